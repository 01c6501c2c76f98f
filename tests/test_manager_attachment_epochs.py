"""A genuine row of an earlier attachment that is put back is refused; what a crash leaves is explained."""

import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from typing import Any

import pytest
import trio
import vtpm_instance_rig as tpm
from e2e_rig import Guest, alive, wait_for
from manager_rig import ModelTpm, RunningDaemon, as_tpm, installation, running_daemon

from manager.client import RemoteError
from manager.errors import StaleAttachmentError
from manager.keys import catalogue_key
from manager.opening import locked_store, open_store
from storage.catalogue import Catalogue
from storage.errors import CatalogueUnreachable
from storage.store import Store
from storage.store_records import EPOCHS, GroupFlags, PutGroup, PutVtpm, RecordFlags, next_epoch

ROWS = "select * from attachments"


@pytest.fixture
def model() -> ModelTpm:
    return ModelTpm()


@pytest.fixture
def place(model: ModelTpm) -> Iterator[Any]:
    with installation(model) as made:
        yield made


def rows_of(place: Any) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(place[1].catalogue)) as database:
        return database.execute(ROWS).fetchall()


def put_rows(place: Any, rows: list[tuple[Any, ...]]) -> None:
    """What somebody who can write the file does: put genuine rows back, whole."""
    with closing(sqlite3.connect(place[1].catalogue)) as database, database:
        database.execute("delete from attachments")
        for row in rows:
            database.execute(f"insert into attachments values ({','.join('?' * len(row))})", row)


async def verdicts(running: RunningDaemon, name: str = "web") -> list[str]:
    rows = await running.ask("verify", vtpm=name)
    return [row["text"] for row in rows if row["what"] == "attachment"]


async def refused(running: RunningDaemon, code: int, verb: str, **arguments: Any) -> str:
    with pytest.raises(RemoteError) as caught:
        await running.ask(verb, **arguments)
    assert caught.value.exit_code == code, caught.value
    return str(caught.value)


async def attached(running: RunningDaemon, guest: str) -> Any:
    (document,) = await running.ask("attach", vtpm="web", guest=guest)
    return document


async def starting_fails(model: ModelTpm, place: Any) -> str:
    with pytest.raises(StaleAttachmentError) as caught:
        async with running_daemon(model, place):
            pass
    assert caught.value.code == 6
    return str(caught.value)


async def test_an_old_attachment_row_with_its_right_mac_is_refused(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        await running.ask("add", name="web")
        await attached(running, "first")
        old = rows_of(place)
        await running.ask("detach", vtpm="web")
        await attached(running, "second")
        new = rows_of(place)
    put_rows(place, old)
    said = await starting_fails(model, place)
    assert "first" in said
    assert "rebuild-catalogue" in said
    put_rows(place, new)
    async with running_daemon(model, place) as running:
        (shown,) = await running.ask("show", vtpm="web")
        assert (shown["guest"], shown["state"]) == ("second", "running")
        await running.ask("detach", vtpm="web")
    put_rows(place, new)
    assert "detached" in await starting_fails(model, place), "nor the newest, after its detach"
    assert rows_of(place) == new, "nothing is repaired"


async def test_a_row_that_is_put_back_while_the_manager_runs_starts_nothing(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        await running.ask("add", name="web")
        await attached(running, "first")
        old = rows_of(place)
        await running.ask("detach", vtpm="web")
        put_rows(place, old)
        (shown,) = await running.ask("show", vtpm="web")
        assert shown["state"] == "stale"
        (text,) = await verdicts(running)
        assert "put back" in text
        for verb, more in (("attach", {"guest": "x"}), ("reset-platform", {})):
            assert "put back" in await refused(running, 6, verb, vtpm="web", **more)
        assert running.attachments.running(running.registry.find("web").uuid) is None
        await running.ask("detach", vtpm="web")
        assert await verdicts(running) == []
        assert rows_of(place) == []
        events = await running.ask("events", vtpm="web")
        assert "old attachment" in events[-1]["text"]
        await attached(running, "second")


async def test_a_uuid_that_was_in_use_before_does_not_take_its_old_row(model: ModelTpm, place: Any) -> None:
    uuid = "11111111-2222-4333-8444-555555555555"
    async with running_daemon(model, place) as running:
        epochs = set()
        for _ in range(3):
            await running.ask("add", name="web", uuid=uuid)
            await attached(running, "first")
            epochs.add(running.registry.record(running.registry.find("web").uuid).epoch)
            await running.ask("detach", vtpm="web")
            row = running.registry.find("web")
            from storage.store_records import RemoveVtpm

            await running.registry.committer.commit(RemoveVtpm(row.uuid))
            running.registry.catalogue.remove_vtpm(row.uuid)
            running.registry.image_path(row).unlink()
        assert len(epochs) == 3, "new records begin at a random epoch"


async def test_an_instances_saves_keep_the_epoch(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        await running.ask("add", name="web")
        row = running.registry.find("web")
        before = running.registry.record(row.uuid)
        document = await attached(running, "g")
        record = running.registry.record(row.uuid)
        assert record.flags & RecordFlags.ATTACHED
        assert record.epoch == next_epoch(before.epoch)
        stored = running.registry.catalogue.find_attachment(row.uuid)
        assert stored is not None
        assert stored.epoch == record.epoch

        def save() -> None:
            guest = Guest(document["endpoint"])
            guest.good(tpm.nv_define(0x1500016, 8))
            guest.close()

        await trio.to_thread.run_sync(save)
        saved = running.registry.record(row.uuid)
        assert saved.generation > record.generation
        assert (saved.epoch, bool(saved.flags & RecordFlags.ATTACHED)) == (record.epoch, True)
        await running.ask("detach", vtpm="web")
        after = running.registry.record(row.uuid)
        assert (after.epoch, bool(after.flags & RecordFlags.ATTACHED)) == (record.epoch, False)
        await running.ask("reset", vtpm="web", yes=True)
        assert running.registry.record(row.uuid).epoch == record.epoch


# --- crashes between the two writes -----------------------------------------------------------------


@asynccontextmanager
async def changed_store(model: ModelTpm, place: Any) -> AsyncIterator[Store]:
    """The store, while no manager runs; its anchor is written as a clean stop does."""
    from manager.anchor import clean_stop

    _, layout, config = place
    with locked_store(layout) as descriptor:
        opened = open_store(descriptor, as_tpm(model), config)
        yield opened.store
        as_tpm(model).anchor_write(opened.boot.anchor, opened.secret.anchor_auth, clean_stop(opened.store.digest()))
        model.reset()
        opened.store.close()


async def test_a_marked_record_without_a_row_counts_as_detached_and_is_told_of(model: ModelTpm, place: Any) -> None:
    """What a crash leaves between an attach's mark and its row, a detach's row and its mark, and a deleted row."""
    async with running_daemon(model, place) as running:
        await running.ask("add", name="web")
        await attached(running, "first")
        old = rows_of(place)
    put_rows(place, [])
    async with running_daemon(model, place) as running:
        (shown,) = await running.ask("show", vtpm="web")
        assert (shown["state"], shown["guest"]) == ("detached", None)
        (text,) = await verdicts(running)
        assert "cut short" in text
        assert "vtpm-detach" in text
        await running.ask("detach", vtpm="web")
        assert await verdicts(running) == []
        assert "not attached" in await refused(running, 4, "detach", vtpm="web")
    put_rows(place, old)
    await starting_fails(model, place)
    put_rows(place, [])
    async with running_daemon(model, place) as running:
        await attached(running, "second")
        assert await verdicts(running) == []
    put_rows(place, old)
    await starting_fails(model, place)


@pytest.mark.parametrize("step", ["mark", "row"])
async def test_an_attach_that_fails_half_way_leaves_no_instance_and_no_mark(
    model: ModelTpm, place: Any, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from manager.registry import Registry
    from storage.errors import CatalogueDamaged

    def cut(*_: Any) -> None:
        raise CatalogueDamaged("the power went")

    async with running_daemon(model, place) as running:
        await running.ask("add", name="web")
        with monkeypatch.context() as patched:
            patched.setattr(*((Registry, "mark_attached") if step == "mark" else (Catalogue, "attach")), cut)
            await refused(running, 1, "attach", vtpm="web", guest="g")
        row = running.registry.find("web")
        assert running.attachments.running(row.uuid) is None
        assert not running.registry.record(row.uuid).flags & RecordFlags.ATTACHED
        assert rows_of(place) == []
        assert await verdicts(running) == []
        await attached(running, "g")


@pytest.mark.parametrize("away", [False, True], ids=["answers-again", "stays-away"])
async def test_a_row_whose_commit_was_not_acknowledged_is_no_old_row(
    model: ModelTpm, place: Any, away: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection to PostgreSQL ends between its commit and its answer: the row is there, and the attach fails."""
    real = Catalogue.attach

    def gone(*_: Any) -> Any:
        raise CatalogueUnreachable("postgresql+psycopg://", "the connection ended")

    def unanswered(*arguments: Any) -> Any:
        real(*arguments)
        if away:
            for name in ("find_attachment", "detach"):
                patched.setattr(Catalogue, name, gone)
        gone()

    async with running_daemon(model, place) as running:
        await running.ask("add", name="web")
        with monkeypatch.context() as patched:
            patched.setattr(Catalogue, "attach", unanswered)
            await refused(running, 1, "attach", vtpm="web", guest="g")
        assert running.attachments.running(running.registry.find("web").uuid) is None
        assert len(rows_of(place)) == away
    async with running_daemon(model, place) as running:
        assert await verdicts(running) == []
        if away:
            await running.ask("detach", vtpm="web")
        await attached(running, "other")


async def test_a_manager_that_dies_between_mark_and_row_ends_the_instance(
    model: ModelTpm, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_daemon(model, place, stop=False) as running:
        await running.ask("add", name="web")
        document = await attached(running, "g")
        running.registry.catalogue.detach(running.registry.find("web").uuid)
    async with running_daemon(model, place) as running:
        assert running.attachments.running(running.registry.find("web").uuid) is None
        await trio.to_thread.run_sync(lambda: wait_for(lambda: not alive(document["pid"]), "the instance to end"))
        assert len(await verdicts(running)) == 1


# --- stores and catalogues of the first schema ------------------------------------------------------


async def as_before_epochs(model: ModelTpm, place: Any) -> None:
    """Make of an installation what the first version left: no epochs, no marks, no flag; rows as schema 1 has them."""
    _, layout, _ = place
    async with changed_store(model, place) as store:
        (group,) = store.groups().values()
        records = [PutVtpm(replace(r, flags=r.flags & ~RecordFlags.ATTACHED, epoch=0)) for r in store.vtpms()]
        store.commit([*records, PutGroup(replace(group, flags=0))])
    with locked_store(layout) as descriptor:
        opened = open_store(descriptor, as_tpm(model), place[2])
        key = catalogue_key(opened.secret.store_key, opened.store.uuid)
        opened.store.close()
    with Catalogue.open(layout.catalogue, key) as catalogue:
        for row in catalogue.attachments():
            catalogue.renew(replace(row, epoch=0))
    statements = ["alter table about drop column store", "drop table labels", "drop table alembic_version"]
    statements += [f"alter table groups drop column {name}" for name in ("pcrs", "locality", "created")]
    younger = ["epoch", "tcp_port", "hibernate_after", "commands_per_second", "saves_per_second", "nv_bytes", "hw_pcrs"]
    younger += [
        "domain",
        "xsm_label",
        "instance_domain",
        "localities",
        "compat",
        "maintenance",
        "trace",
        "measure",
        "measured",
    ]
    younger += ["bound_domain", "bound_uuid", "bound_boot", "bound_since", "ran_before"]
    statements += [f"alter table attachments drop column {name}" for name in younger] + ["drop index ix_events_time"]
    with closing(sqlite3.connect(layout.catalogue)) as database, database:
        for statement in [*statements, "update about set schema = 1"]:
            database.execute(statement)


async def test_an_older_installation_is_adopted_once(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        for name in ("web", "idle"):
            await running.ask("add", name=name)
        await attached(running, "first")
    await as_before_epochs(model, place)
    older = place[1].catalogue.read_bytes()
    async with running_daemon(model, place) as running:
        (shown,) = await running.ask("show", vtpm="web")
        assert (shown["state"], shown["guest"]) == ("running", "first")
        record = running.registry.record(running.registry.find("web").uuid)
        assert (record.epoch, bool(record.flags & RecordFlags.ATTACHED)) == (1, True)
        (group,) = running.opened.store.groups().values()
        assert group.flags == GroupFlags.EPOCHS
        assert running.registry.catalogue.groups()[0].pcrs == "none"
        assert {row["verdict"] for row in await running.ask("verify", all=True)} == {"ok"}
        await running.ask("detach", vtpm="web")
    for tail in ("-wal", "-shm"):
        place[1].catalogue.with_name(f"catalogue.sqlite{tail}").unlink(missing_ok=True)
    place[1].catalogue.write_bytes(older)
    assert "epoch 0" in await starting_fails(model, place), "the old catalogue is adopted once, not twice"


@pytest.mark.parametrize("cut", ["records", "rows", "flag"])
async def test_an_adoption_that_was_cut_short_is_taken_up_again(
    model: ModelTpm, place: Any, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_daemon(model, place) as running:
        await running.ask("add", name="web")
        await attached(running, "first")
    await as_before_epochs(model, place)
    layout = place[1]
    async with running_daemon(model, place) as running:
        pass
    async with changed_store(model, place) as store:  # back to where the adoption was cut
        (group,) = store.groups().values()
        (record,) = store.vtpms()
        changes: list[Any] = [PutGroup(replace(group, flags=0))]
        if cut == "records":
            changes.append(PutVtpm(replace(record, flags=record.flags & ~RecordFlags.ATTACHED, epoch=0)))
        store.commit(changes)
    if cut != "flag":
        with locked_store(layout) as descriptor:
            opened = open_store(descriptor, as_tpm(model), place[2])
            key = catalogue_key(opened.secret.store_key, opened.store.uuid)
            opened.store.close()
        with Catalogue.open(layout.catalogue, key, check_rows=False) as catalogue:
            (row,) = catalogue.attachments()
            catalogue.renew(replace(row, epoch=0))
    async with running_daemon(model, place) as running:
        (shown,) = await running.ask("show", vtpm="web")
        assert (shown["state"], shown["guest"]) == ("running", "first")
        assert await verdicts(running) == []
        (group,) = running.opened.store.groups().values()
        assert group.flags == GroupFlags.EPOCHS


def test_epochs_go_round_and_never_to_nought() -> None:
    assert (next_epoch(0), next_epoch(1), next_epoch(EPOCHS - 2), next_epoch(EPOCHS - 1)) == (1, 2, EPOCHS - 1, 1)
