"""The promises of docs/threat-model.md that need a whole manager: no secret where it does not belong, one owner each.

Every search for a secret has a control that shows it would have been found.
"""

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import vtpm_instance_rig as tpm
from e2e_rig import Guest
from manager_rig import ModelTpm, RunningDaemon, installation, running_daemon

from frontend_backend import messages_instance as m
from manager.client import RemoteError
from manager.keys import GroupSeal, catalogue_key
from storage.secrets import GroupKey, StateKey
from storage.store import RecordFlags

INDEX = 0x1500016


@pytest.fixture
def model() -> ModelTpm:
    return ModelTpm()


@pytest.fixture
def place(model: ModelTpm) -> Iterator[Any]:
    with installation(model) as made:
        yield made


def secrets_of(running: RunningDaemon, vtpm: str) -> dict[str, bytes]:
    """Every secret of this installation, taken from the process that holds them."""
    from uuid import UUID

    secret = running.opened.secret
    (record,) = running.opened.store.groups().values()
    group = running.model.sealed[GroupSeal.unpack(record.blob).sealed.private][0]
    return {
        "store key": secret.store_key.reveal(),
        "anchor auth": secret.anchor_auth,
        "group key": group,
        "state key": running.opened.store.get(UUID(vtpm)).key.reveal(),
        "catalogue key": catalogue_key(secret.store_key, running.opened.store.uuid),
        "guest's secret": b"the guest's very own secret....",
    }


def forms(secret: bytes) -> Iterator[bytes]:
    """How a secret could stand in a text."""
    import base64

    yield secret
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    yield base64.b64encode(secret)[:40]
    yield repr(secret)[2:-1].encode()


def found(text: bytes, secrets: dict[str, bytes]) -> set[str]:
    return {name for name, secret in secrets.items() if any(form in text for form in forms(secret))}


def files_of(base: Path) -> bytes:
    return b"".join(path.read_bytes() for path in base.rglob("*") if path.is_file())


async def guest_writes(endpoint: str) -> None:
    def work() -> None:
        guest = Guest(endpoint)
        guest.define(INDEX, 31)
        guest.write(INDEX, b"the guest's very own secret....")
        guest.close()

    await trio.to_thread.run_sync(work)


async def test_no_secret_is_in_a_log_a_file_or_a_repr(
    model: ModelTpm, place: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    base, _, _ = place
    async with running_daemon(model, place) as running:
        (added,) = await running.ask("add", name="web")
        (attached,) = await running.ask("attach", vtpm="web", guest="g")
        await guest_writes(attached["endpoint"])
        for verb in ("show", "reset-platform"):
            await running.ask(verb, vtpm="web")
        secrets = secrets_of(running, added["uuid"])
        assert len(set(secrets.values())) == 6
        assert all(len(set(secret)) > 8 for secret in secrets.values()), "real ones"
        (status,) = await running.ask("status")
        assert not found(repr(status).encode(), secrets)
        assert not found(files_of(base), secrets)
        shown = [running.opened, running.opened.secret, running.attachments.running, running.registry.record]
        shown += [running.opened.store.get(record.uuid) for record in running.opened.store.vtpms()]
        shown += list(running.attachments._instances.running.values())
        assert not found("".join(map(repr, shown)).encode(), secrets)
        await running.ask("detach", vtpm="web")
        secrets |= {"last " + name: secret for name, secret in secrets_of(running, added["uuid"]).items()}
    assert not found(files_of(base), secrets)
    assert not found(caplog.text.encode(), secrets)
    assert "attach" in caplog.text, "the log was looked at"
    # controls: the same search finds a secret that does stand there
    (base / "state" / "leak").write_text(secrets["state key"].hex())
    assert found(files_of(base), secrets) == {"state key"} | (
        {"last state key"} if secrets["last state key"] == secrets["state key"] else set()
    )
    logging.getLogger("vtpm.test").debug("key %r", secrets["store key"])
    assert "store key" in found(caplog.text.encode(), secrets)


def test_messages_that_carry_keys_do_not_print_them() -> None:
    key = os.urandom(32)
    reply = m.LoadReply(
        bytes(16), "2.0", 1, fresh=False, key=key, digest=b"", generation=1, startup="clear", commit_timeout=1.0
    )
    secrets = {"key": key}
    assert not found(
        repr([reply, m.Commit(1, key, b"", 1), m.RandomReply(key), StateKey(key), GroupKey(key)]).encode(), secrets
    )
    assert found(m.encode_reply(reply), secrets), "it is in the message"


async def test_a_stopped_manager_has_wiped_its_keys(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        secret, group = running.opened.secret, next(iter(running.opened.store._state.groups.values()))
        key = group.key
        assert key is not None
        assert any(secret.view)
    assert (repr(secret), repr(key)) == ("<PlatformSecret wiped>", "<GroupKey wiped>")
    gc.collect()


async def test_a_clean_stop_is_one_and_the_guest_finds_its_secret_again(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        await running.ask("add", name="web")
        (attached,) = await running.ask("attach", vtpm="web", guest="g")
        await guest_writes(attached["endpoint"])
    async with running_daemon(model, place) as running:
        assert running.opened.standing.value == "clean"

        def read() -> bytes:
            guest = Guest(attached["endpoint"])
            try:
                return guest.read(INDEX, 31)
            finally:
                guest.close()

        assert await trio.to_thread.run_sync(read) == b"the guest's very own secret...."


async def test_the_same_image_cannot_be_opened_twice_with_saves_in_between(model: ModelTpm, place: Any) -> None:
    _, layout, _ = place
    async with running_daemon(model, place):
        pass
    stopped = layout.store.read_bytes()
    async with running_daemon(model, place, stop=False) as running:
        await running.ask("add", name="first")
    crashed = layout.store.read_bytes()
    layout.store.write_bytes(stopped)
    from manager.errors import RolledBackError

    with pytest.raises(RolledBackError):
        async with running_daemon(model, place):
            pass
    layout.store.write_bytes(crashed)
    async with running_daemon(model, place) as running:
        assert [row["name"] for row in await running.ask("list")] == ["first"]


async def refused(running: RunningDaemon, code: int, verb: str, **arguments: Any) -> str:
    with pytest.raises(RemoteError) as caught:
        await running.ask(verb, **arguments)
    assert caught.value.exit_code == code, caught.value
    return str(caught.value)


async def test_verbs_on_one_vtpm_wait_for_each_other(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        for round_ in range(3):
            name = f"race-{round_}"
            await running.ask("add", name=name)
            outcomes: list[str] = []
            codes: list[int] = []

            async def attempt(
                verb: str, name: str = name, outcomes: list[str] = outcomes, codes: list[int] = codes, **more: Any
            ) -> None:
                try:
                    await running.ask(verb, vtpm=name, **more)
                    outcomes.append(verb)
                except RemoteError as error:
                    codes.append(int(error.exit_code))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: attempt("attach", guest="g"))
                nursery.start_soon(lambda: attempt("reset", yes=True))
                nursery.start_soon(lambda: attempt("remove", yes=True))
            assert set(codes) <= {3, 4}
            rows = {row["name"]: row for row in await running.ask("list")}
            if "attach" in outcomes:
                assert "remove" not in outcomes
                assert rows[name]["state"] == "running"
                assert running.registry.image_path(running.registry.find(name)).exists(), "it keeps its image"
            else:
                assert name not in rows


async def test_two_adds_of_one_name_make_one_vtpm(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        codes: list[int] = []

        async def add() -> None:
            try:
                await running.ask("add", name="one")
                codes.append(0)
            except RemoteError as error:
                codes.append(int(error.exit_code))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(add)
        assert sorted(codes) == [0, 4, 4, 4]
        assert len(running.opened.store) == 1
        await refused(running, 2, "add", uuid="00000000-0000-0000-0000-000000000000")
        await refused(running, 2, "add", name="x", state_image="relative")
        await refused(running, 2, "add", name="x", state_image="/no\0where")


async def test_what_a_cut_add_or_remove_left_can_be_done_again(
    model: ModelTpm, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from storage.catalogue import Catalogue
    from storage.errors import CatalogueDamaged

    def cut(*_: Any) -> None:
        raise CatalogueDamaged("the power went")

    uuid = "11111111-2222-4333-8444-555555555555"
    async with running_daemon(model, place) as running:
        with monkeypatch.context() as patched:
            patched.setattr(Catalogue, "add_vtpm", cut)
            await refused(running, 1, "add", name="web", uuid=uuid)
        await running.ask("add", name="web", uuid=uuid)
        await running.ask("attach", vtpm="web", guest="g")
        await running.ask("detach", vtpm="web")
        with monkeypatch.context() as patched:
            patched.setattr(Catalogue, "remove_vtpm", cut)
            await refused(running, 1, "remove", vtpm="web", yes=True)
        wrong = [found["text"] for found in await running.ask("verify", all=True) if found["code"]]
        assert any("run 'vtpm-remove' again" in text for text in wrong)
        await running.ask("remove", vtpm="web", yes=True)
        assert await running.ask("list") == []
        assert "was removed" in await refused(running, 4, "add", name="web", uuid=uuid)
        await running.ask("add", name="web")
        (shown,) = await running.ask("attach", vtpm="web", guest="g")
        assert shown["state"] == "running"


async def test_a_used_uuid_that_the_catalogue_lost_is_not_given_again(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        (added,) = await running.ask("add", name="web")
        await running.ask("attach", vtpm="web", guest="g")
        await running.ask("detach", vtpm="web")
        row = running.registry.find("web")
        running.registry.catalogue.remove_vtpm(row.uuid)
        assert "already" in await refused(running, 4, "add", name="other", uuid=added["uuid"])


async def test_a_quarantine_ends_while_the_guest_saves(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        await running.ask("add", name="web")
        await running.ask("attach", vtpm="web", guest="g")
        await running.ask("detach", vtpm="web")
        row = running.registry.find("web")
        await running.registry.flag(row.uuid, add=RecordFlags.QUARANTINED)
        (shown,) = await running.ask("show", vtpm="web")
        assert shown["state"] == "quarantined"
        (attached,) = await running.ask("attach", vtpm="web", guest="g")
        await guest_writes(attached["endpoint"])
        assert not running.registry.record(row.uuid).flags & RecordFlags.QUARANTINED


async def test_a_stop_waits_for_what_is_being_started_and_starts_nothing_more(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        for name in ("one", "two"):
            await running.ask("add", name=name)
        codes: list[int] = []

        async def attach(name: str) -> None:
            try:
                await running.ask("attach", vtpm=name, guest="g")
                codes.append(0)
            except RemoteError as error:
                codes.append(int(error.exit_code))
            except Exception:  # noqa: BLE001 - the manager may be gone by now
                codes.append(-1)

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(attach, "one")
                await trio.sleep(0.01)
                running.stop()
                nursery.start_soon(attach, "two")
    assert len(codes) == 2
    async with running_daemon(model, place) as running:
        assert running.opened.standing.value == "clean"


async def test_a_resumed_state_is_resumed_once(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        await running.ask("add", name="web")
        (attached,) = await running.ask("attach", vtpm="web", guest="g")

        def extend() -> None:
            guest = Guest(attached["endpoint"])
            guest.extend(10, b"\x11" * 32)
            guest.close()

        await trio.to_thread.run_sync(extend)
        await running.ask("detach", vtpm="web")
        await running.ask("attach", vtpm="web", guest="g", startup="state")
        instance = running.attachments.running(running.registry.find("web").uuid)
        assert instance is not None
        assert instance.stage == "running"
        with trio.fail_after(10):
            await running.attachments._instances.kill(instance)
        await running.ask("detach", vtpm="web")
        (again,) = await running.ask("attach", vtpm="web", guest="g", startup="state")
        assert again["state"] == "needs-reset", "its PCRs could be forged by a crash"
        await running.ask("reset-platform", vtpm="web")
        (shown,) = await running.ask("show", vtpm="web")
        assert shown["state"] == "running"

        def pcr() -> bytes:
            guest = Guest(attached["endpoint"])
            try:
                return guest.pcr(10)
            finally:
                guest.close()

        assert await trio.to_thread.run_sync(pcr) == bytes(32) != tpm.extended(b"\x11" * 32)


async def test_an_instance_that_closed_its_doorbell_does_not_stop_the_next_manager(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place, stop=False) as running:
        for name in ("good", "bad"):
            await running.ask("add", name=name)
            await running.ask("attach", vtpm=name, guest="g")
        instance = running.attachments.running(running.registry.find("bad").uuid)
        assert instance is not None
        import socket

        with socket.socket(fileno=os.dup(instance.ring.fileno())) as doorbell:
            doorbell.shutdown(socket.SHUT_RDWR)  # both ends, as an instance could
        running.daemon._keep_instances = True
        running.stop()
    async with running_daemon(model, place) as running:
        rows = {row["name"]: row["state"] for row in await running.ask("list")}
        assert rows["good"] == "running"


async def test_a_runtime_directory_of_somebody_else_is_refused(model: ModelTpm, place: Any) -> None:
    from manager.daemon import make_runtime_directory
    from manager.errors import ConfigurationError

    if os.geteuid() != 0:
        pytest.skip("needs root to give a directory away")
    _, layout, _ = place
    layout.runtime_dir.mkdir()
    os.chown(layout.runtime_dir, 54321, 54321)
    with pytest.raises(ConfigurationError, match="belongs to user 54321"):
        make_runtime_directory(layout)
