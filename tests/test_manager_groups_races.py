"""Groups of a running manager while it stops, while others change them, and while something fails halfway."""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
import trio
from manager_rig import ModelTpm, RunningDaemon, installation, lost_answer, running_daemon

from frontend_backend.messages_admin import ExitCode
from manager.client import RemoteError, request
from manager.config import Config, Layout
from manager.errors import ConflictError, ManagerError, NotFoundError
from manager.group_terms import Wanted
from manager.keys import GroupSeal
from manager.recovery_pair import RecoveryPrivate
from manager.restore import restore
from storage.store_records import GroupFlags, PutGroup, RemoveVtpm

Place = tuple[Path, Layout, Config]


@pytest.fixture
def model() -> ModelTpm:
    return ModelTpm()


@pytest.fixture
def place(model: ModelTpm) -> Iterator[Place]:
    with installation(model, "sha256:7", RecoveryPrivate.new()) as made:
        yield made


async def refused(running: RunningDaemon, verb: str, **arguments: object) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        await running.ask(verb, **arguments)
    return caught.value


async def asked(running: RunningDaemon, verb: str, arguments: dict[str, object]) -> None:
    with suppress(RemoteError, ManagerError, OSError):  # it was done, or the manager stopped before
        await running.ask(verb, **arguments)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("group-add", {"name": "new"}),
        ("group-rotate", {"group": "tenant"}),
        ("group-update", {"group": "tenant", "pcrs": "none"}),
    ],
)
async def test_a_manager_that_stops_while_a_group_is_being_changed_comes_to_its_end(
    model: ModelTpm, place: Place, verb: str, arguments: dict[str, object]
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def sealing() -> None:
        begun.set()
        go_on.wait(20)

    async with running_daemon(model, place) as running, trio.open_nursery() as nursery:
        await running.ask("group-add", name="tenant")
        await running.ask("add", count=5, group="tenant", name="v{}")
        model.before_call["seal"] = sealing
        nursery.start_soon(asked, running, verb, arguments)
        await trio.to_thread.run_sync(begun.wait)
        running.stop()
        with trio.fail_after(20):
            while not running.daemon._committer.lock.locked():  # noqa: ASYNC110 - the final anchor waits for the TPM
                await trio.sleep(0.01)
        go_on.set()
    async with running_daemon(model, place) as running:
        assert running.daemon._opened.standing.value == "clean"
        assert not running.opened.closed
        assert {finding["verdict"] for finding in await running.ask("verify", all=True)} == {"ok"}


async def test_what_an_older_manager_left_to_be_adopted_does_not_undo_a_rotation(model: ModelTpm, place: Place) -> None:
    async with running_daemon(model, place) as running:
        (made,) = await running.ask("group-add", name="tenant")
        await running.ask("add", name="v", group="tenant")
        committer, group = running.daemon._committer, UUID(made["uuid"])
        record = committer.store.group(group)
        await committer.commit(PutGroup(replace(record, flags=GroupFlags(0))))  # as an older manager has it
        async with trio.open_nursery() as nursery, committer.lock:
            nursery.start_soon(running.daemon._groups.rotate, running.daemon._groups.find("tenant"))
            await trio.sleep(0.2)
            nursery.start_soon(running.daemon._start_group, group)
            await trio.sleep(0.2)
        assert committer.store.group(group).flags & GroupFlags.EPOCHS
        key = model.sealed[GroupSeal.unpack(committer.store.group(group).blob).sealed.private][0]
        with committer.store.group_key(group) as current:
            assert key == current.reveal(), "what is sealed is the key in force"
    async with running_daemon(model, place) as running:
        assert not running.opened.closed


async def test_names_of_groups_that_somebody_swapped_in_the_catalogue_are_those_of_the_store_again(
    model: ModelTpm, place: Place
) -> None:
    async with running_daemon(model, place) as running:
        made = {name: (await running.ask("group-add", name=name))[0]["uuid"] for name in ("tenant", "acme", "third")}
    with sqlite3.connect(place[1].catalogue) as connection:
        for old, new in (("tenant", "t"), ("acme", "tenant"), ("third", "acme"), ("t", "third")):
            connection.execute("UPDATE groups SET name = ? WHERE name = ?", (new, old))
    async with running_daemon(model, place) as running:
        found = {group["name"]: group["uuid"] for group in await running.ask("group-list")}
        assert {name: found.get(name) for name in made} == made
        await running.ask("add", name="v", group="tenant")
        assert running.opened.store.count(UUID(made["tenant"])) == 1
        assert {finding["verdict"] for finding in await running.ask("verify", all=True)} == {"ok"}


@pytest.mark.parametrize("verb", ["group-add", "group-update"])
async def test_a_name_that_the_store_has_is_taken_though_the_catalogue_did_not_take_it(
    model: ModelTpm, place: Place, verb: str
) -> None:
    arguments: dict[str, object] = {"name": "new"} if verb == "group-add" else {"group": "old", "name": "new"}
    async with running_daemon(model, place) as running:
        for name in ("old", "other"):
            await running.ask("group-add", name=name)
        with sqlite3.connect(place[1].catalogue) as connection:  # it refuses to be written, for now
            connection.execute("CREATE TRIGGER full BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'no room'); END")
        with pytest.raises(RemoteError):
            await running.ask(verb, **arguments)
        with sqlite3.connect(place[1].catalogue) as connection:
            connection.execute("DROP TRIGGER full")
        error = await refused(running, "group-add", name="new")
        assert error.exit_code is ExitCode.CONFLICT
        assert (await refused(running, "group-update", group="other", name="new")).exit_code is ExitCode.CONFLICT
    async with running_daemon(model, place) as running:
        names = [GroupSeal.unpack(record.blob).name for record in running.opened.store.groups().values()]
        assert sorted(names) == sorted(group["name"] for group in await running.ask("group-list"))
        assert names.count("new") == 1


async def test_a_group_whose_start_was_cut_short_by_the_tpm_is_started_by_opening_it_again(
    model: ModelTpm, place: Place
) -> None:
    async with running_daemon(model, place) as running:
        await running.ask("group-add", name="bound", pcrs="sha256:1")
        await running.ask("add", name="v", group="bound")
        await running.ask("attach", vtpm="v", guest="g")
    model.pcrs[1] = b"\x11" * 32
    async with running_daemon(model, place) as running:
        model.pcrs[1] = bytes(32)
        running.daemon._approvals.raise_used = failing  # type: ignore[assignment,method-assign]
        assert (await refused(running, "group-open", group="bound")).exit_code is ExitCode.TPM_UNAVAILABLE
        del running.daemon._approvals.raise_used
        (opened,) = await running.ask("group-open", group="bound")
        assert opened["state"] == "open"
        assert (await running.ask("show", vtpm="v"))[0]["state"] == "running"


async def failing(*_: object) -> None:
    raise lost_answer()


async def test_a_group_is_kept_while_the_catalogue_names_vtpms_in_it(model: ModelTpm, place: Place) -> None:
    async with running_daemon(model, place) as running:
        (made,) = await running.ask("group-add", name="tenant")
        await running.ask("add", name="v", group="tenant")
        committer, row = running.daemon._committer, running.registry.find("v")
        await committer.commit(RemoveVtpm(row.uuid))  # a removal that was cut short, and whose tombstone is gone
        error = await refused(running, "group-remove", group="tenant", yes=True)
        assert error.exit_code is ExitCode.CONFLICT
        assert "vtpm-remove" in str(error)
        assert UUID(made["uuid"]) in committer.store.groups()
        await running.ask("remove", vtpm="v", yes=True)
        await running.ask("group-remove", group="tenant", yes=True)


@pytest.mark.parametrize(
    ("verb", "wanted"), [("update", [Wanted(pcrs="none")]), ("rotate", []), ("remove", []), ("open", [])]
)
async def test_a_group_that_another_administrator_removed_meanwhile_is_not_found(
    model: ModelTpm, place: Place, verb: str, wanted: list[Wanted]
) -> None:
    async with running_daemon(model, place) as running:
        await running.ask("group-add", name="tenant")
        row = running.daemon._groups.find("tenant")
        await running.ask("group-remove", group="tenant", yes=True)
        with pytest.raises(NotFoundError):
            await getattr(running.daemon._groups, verb)(row, *wanted)


async def test_a_name_given_up_and_taken_by_another_group_meanwhile_is_not_taken_back(
    model: ModelTpm, place: Place
) -> None:
    async with running_daemon(model, place) as running:
        await running.ask("group-add", name="tenant")
        row = running.daemon._groups.find("tenant")
        await running.ask("group-update", group="tenant", name="renamed")
        await running.ask("group-add", name="tenant")
        with pytest.raises(ConflictError):
            await running.daemon._groups.update(row, Wanted(name="tenant"))


async def test_a_restore_says_where_the_state_images_of_closed_groups_belong(model: ModelTpm, place: Place) -> None:
    image = place[0] / "named.img"
    image.touch(mode=0o600)
    target = place[0] / "all.vtpm"
    async with running_daemon(model, place) as running:
        await running.ask("group-add", name="bound", pcrs="sha256:1")
        registry = running.registry
        row = await registry.add("v", None, "bound", "2.0", str(image))
        await running.ask("attach", vtpm="v", guest="g")
    model.pcrs[1] = b"\x11" * 32
    async with running_daemon(model, place) as running:
        target.touch()
        descriptor = os.open(target, os.O_RDWR)
        try:
            await trio.to_thread.run_sync(
                lambda: request(str(place[1].admin_socket), "backup", {"file": str(target)}, (descriptor,))
            )
        finally:
            os.close(descriptor)
    restored = restore(target, place[0] / "again")
    assert restored.named == {str(row.uuid): str(image)}


async def test_tombstones_of_a_group_that_is_opened_later_go_by_themselves(model: ModelTpm, place: Place) -> None:
    async with running_daemon(model, place) as running:
        await running.ask("group-add", name="bound", pcrs="sha256:1")
        await running.ask("add", name="v", group="bound")
        await running.ask("remove", vtpm="v", yes=True)
    model.pcrs[1] = b"\x11" * 32
    async with running_daemon(model, place) as running:
        running.daemon._tombstones._seconds = 0
        model.pcrs[1] = bytes(32)
        await running.ask("group-open", group="bound")
        with trio.fail_after(30):
            while (await running.ask("group-show", group="bound"))[0]["tombstones"]:  # noqa: ASYNC110 - what it waits for is the store's
                await trio.sleep(0.1)
        await running.ask("group-remove", group="bound", yes=True)
