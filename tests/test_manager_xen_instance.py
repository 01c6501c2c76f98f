"""An instance domain's program, with a real keeper, instance, xenstored and a manager behind a Xen ring."""

import gc
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import cast
from uuid import uuid4

import pytest
import trio
import trio.testing
from vtpm_instance_commands import extended, get_random, nv_define, nv_read, nv_write, pcr_extend, pcr_read, rc
from vtpm_instance_manager import page_state
from vtpm_instance_rig import short_directory
from xen_instance_rig import GUEST, INSTANCE, OLDER_GUEST, World, world
from xenstored_rig import running_xenstored

from frontend_backend import xen_connection_trio
from frontend_backend.local import LocalRing
from frontend_backend.messages_instance import InstanceState, LoadReply, Report, decode_reply, encode_reply
from frontend_backend.orders import Orders
from frontend_backend.tpmhdr import command
from frontend_backend.tpmif import RingState
from frontend_backend.xen_front_node_trio import device_path
from frontend_backend.xen_front_trio import XenFront
from manager.config import InstanceConfig
from manager.errors import ConflictError, IntegrityError, KeeperError
from manager.keeper_client import Keeper
from manager.xen_instance_guest import GuestBinder
from manager.xen_instance_image import open_image
from manager.xen_instance_life import Life, LifeSettings
from manager.xen_instance_relay import Relay
from manager.xen_instance_uplink import Uplink
from vtpm_instance.errors import ManagerSilentError
from vtpm_instance.instance import EXIT_BUSY, EXIT_INTEGRITY, reason_of

OK, FAILURE, RC_SIZE, TOO_LONG = 0, 0x101, 0x095, 0x142
INDEX = 0x01500007
NOTHING = bytes(32)
PATIENCE = 90.0  # seconds for a whole scenario on a busy machine
Scenario = Callable[[World], Awaitable[None]]


@pytest.fixture(scope="module")
def store() -> Iterator[Path]:
    with running_xenstored() as running:
        yield running.socket


def play(store: Path, scenario: Scenario) -> None:
    """Play a scenario in a world of its own; nothing stays mapped, offered or bound after it."""

    async def play_it() -> None:
        with trio.fail_after(PATIENCE), short_directory() as directory:
            async with world(store, directory) as made:
                await scenario(made)
            assert (made.xen.mapped, made.xen.offered, made.xen.ports) == (0, 0, {})

    trio.run(play_it)


async def run(guest: XenFront, packet: bytes) -> int:
    return rc(await guest.transact(packet))


def padded(size: int) -> bytes:
    """Return TPM2_GetRandom with bytes behind it, which libtpms itself refuses."""
    return command(0x17B, bytes(size - 10))


async def stop(here: World) -> None:
    here.stop.set()
    assert await here.until_ended() is None


async def until(what: Callable[[], bool]) -> None:
    while not what():  # noqa: ASYNC110 - threads and processes make it true
        await trio.sleep(0.01)


def instance_of(here: World) -> int:
    """Return the process of the running instance, 0 when there is none."""
    mark, found = str(here.directory / "run" / "keeper.sock"), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode().split("\0")
                name = (entry / "comm").read_text().strip()  # spawner and instances have one command line
                if mark in words and name == "vtpm-instance":
                    found.append(int(entry.name))
    return max(found, default=0)


async def refused(guest: XenFront, seconds: float = 0.5) -> bool:
    """Tell whether a guest has no TPM, after that time."""
    with trio.move_on_after(seconds):
        await guest.transact(get_random())
        return False
    return True


def in_memory(key: bytes) -> list[LoadReply]:
    """Return the answers to Load that hold this key; other tests of the same process hold other ones."""
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, LoadReply) and one.key == key]


def test_a_vtpm_keeps_its_state_across_restarts_of_its_domain(store: Path) -> None:
    async def scenario(here: World) -> None:
        async with here.managers_domain():
            here.nursery.start_soon(here.run_instance)
            async with here.guest() as guest:
                assert await run(guest, nv_define(INDEX, 8)) == OK
                assert await run(guest, nv_write(INDEX, b"a secret")) == OK
                assert await run(guest, pcr_extend(7)) == OK
            await stop(here)
            assert here.record.states[-1] is InstanceState.STOPPED
            assert here.record.resumable
            here.record.startup = "state"
            kept = here.image.rename(here.directory / "away")
            here.image.write_bytes(b"\1" * kept.stat().st_size)
            here.nursery.start_soon(here.run_instance)
            error = await here.until_ended()
            assert isinstance(error, IntegrityError)
            assert "kept" in str(error)
            assert here.image.read_bytes() == b"\1" * kept.stat().st_size
            kept.rename(here.image)
            here.nursery.start_soon(here.run_instance)
            async with here.guest() as guest:  # a file says that it is the same guest as before
                assert b"a secret" in await guest.transact(nv_read(INDEX, 8))
                await until(lambda: not in_memory(here.record.key))  # what a task has in hand goes soon
                assert (await guest.transact(pcr_read(7)))[-32:] == extended(b"\x11" * 32)
            await stop(here)
            # the domain was booted anew: nothing says whether a guest older than it is the one whose PCRs these are
            (here.directory / "run" / "guest").write_text(f"{OLDER_GUEST} of-another-boot", encoding="ascii")
            here.nursery.start_soon(here.run_instance)
            async with here.guest(OLDER_GUEST) as guest:
                assert await run(guest, pcr_read(7)) == FAILURE
            async with here.guest(GUEST + 1) as guest:
                assert (await guest.transact(pcr_read(7)))[-32:] == NOTHING
            await stop(here)

    play(store, scenario)


def test_the_managers_domain_goes_and_comes_back_under_a_running_guest(store: Path) -> None:
    async def scenario(here: World) -> None:
        async with here.managers_domain():
            here.nursery.start_soon(here.run_instance)
            ready = trio.Event()
            answers: list[int] = []
            gone, back = trio.Event(), trio.Event()

            async def be_a_guest() -> None:
                async with here.guest() as guest:
                    answers.append(await run(guest, nv_define(INDEX, 8)))
                    ready.set()
                    await gone.wait()
                    answers.append(await run(guest, get_random()))  # needs no save, and no manager
                    answers.append(await run(guest, pcr_extend(7)))
                    here.nursery.start_soon(bring_it_back)
                    answers.append(await run(guest, nv_write(INDEX, b"durable!")))  # waits
                    assert back.is_set()
                    assert (await guest.transact(pcr_read(7)))[-32:] == extended(b"\x11" * 32)
                done.set()

            async def bring_it_back() -> None:
                await trio.sleep(0.3)
                back.set()

            done = trio.Event()
            here.nursery.start_soon(be_a_guest)
            await ready.wait()
            before = here.record.commits
        gone.set()
        await back.wait()
        async with here.managers_domain():
            await done.wait()
            assert answers == [OK] * 4
            assert here.record.commits > before
            await stop(here)

    play(store, scenario)


def test_a_manager_that_comes_back_at_a_device_of_another_number_is_found(store: Path) -> None:
    async def scenario(here: World) -> None:
        async with here.managers_domain(crashes=True):
            here.nursery.start_soon(here.run_instance)
            await until(lambda: InstanceState.READY in here.record.states)
        async with here.managers_domain(device=1), here.guest() as guest:
            assert await run(guest, nv_define(INDEX, 8)) == OK
            await stop(here)
            here.record.startup = "state"
            here.nursery.start_soon(here.run_instance)  # also from the start, where device 0 is a dead one
            assert await run(guest, nv_write(INDEX, b"durable!")) == OK
            await stop(here)
        await here.toolstack.xs.remove(device_path(INSTANCE, 0))

    play(store, scenario)


def test_a_save_that_was_under_way_when_the_manager_went_is_made_with_the_next_one(store: Path) -> None:
    async def scenario(here: World) -> None:
        answers: list[int] = []
        written, let_go = trio.Event(), trio.Event()

        async def be_a_guest() -> None:
            async with here.guest() as guest:
                assert await run(guest, get_random()) == OK
                written.set()
                answers.append(await run(guest, nv_define(INDEX, 8)))
                let_go.set()

        async with here.managers_domain() as manager:
            here.nursery.start_soon(here.run_instance)
            await until(lambda: InstanceState.READY in here.record.states)
            assert manager.manager is not None
            manager.manager.silent = True
            here.nursery.start_soon(be_a_guest)
            await written.wait()
            page = manager.manager.ring
            await until(lambda: page_state(page) == RingState.SUBMIT)
            before = here.record.generation
        assert not answers
        async with here.managers_domain():
            await let_go.wait()
            assert (answers, here.record.generation) == ([OK], before + 1)
            await stop(here)

    play(store, scenario)


def test_a_guests_reboot_is_a_power_cycle_and_a_hot_plug_is_none(store: Path) -> None:
    async def scenario(here: World) -> None:
        async with here.managers_domain():
            here.nursery.start_soon(here.run_instance)
            async with here.guest() as guest:
                assert await run(guest, pcr_extend(7)) == OK
            async with here.guest() as guest:  # xl vtpm-detach, xl vtpm-attach: the guest has not stopped
                assert (await guest.transact(pcr_read(7)))[-32:] == extended(b"\x11" * 32)
            async with here.guest(GUEST + 2) as guest:  # another domain: a power cycle
                assert (await guest.transact(pcr_read(7)))[-32:] == NOTHING
                assert await run(guest, nv_define(INDEX, 8)) == OK
                assert await run(guest, nv_write(INDEX, b"survives")) == OK
                os.kill(instance_of(here), signal.SIGKILL)
                await until(lambda: here.record.states[-1] is InstanceState.NEEDS_RESET)
                assert await run(guest, pcr_read(7)) == FAILURE, "its PCRs are gone, and nobody may fill them anew"
                assert await run(guest, pcr_extend(7)) == FAILURE
            async with here.guest(GUEST + 3) as guest:
                assert (await guest.transact(pcr_read(7)))[-32:] == NOTHING
                assert b"survives" in await guest.transact(nv_read(INDEX, 8))
            await stop(here)

    play(store, scenario)


def test_an_instance_that_dies_while_it_is_reset_for_the_next_guest(store: Path) -> None:
    async def scenario(here: World) -> None:
        async with here.managers_domain():
            here.nursery.start_soon(here.run_instance)
            async with here.guest() as guest:
                assert await run(guest, pcr_extend(7)) == OK
            process = instance_of(here)
            os.kill(process, signal.SIGSTOP)
            async with here.guest(GUEST + 1) as guest:
                assert await refused(guest, 0.3), "it is not reset yet"
                os.kill(process, signal.SIGKILL)
                assert (await guest.transact(pcr_read(7)))[-32:] == NOTHING
            await stop(here)

    play(store, scenario)


async def test_nobody_waits_for_an_instance_that_died_before_its_first_word() -> None:
    front, back = LocalRing.pair()
    relay = Relay(back, cast(Uplink, None), "clear")
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay.run)
            nursery.start_soon(relay.until_up)
            await trio.testing.wait_all_tasks_blocked()
            front.close()
        assert relay.ended


def test_an_instance_that_nobody_told_its_state_is_no_damage(tmp_path: Path) -> None:
    """Its manager's domain went between the program's Load and the instance's, which gives up after 30 s."""
    life = Life(LifeSettings(tmp_path / "vtpm.img", tmp_path), cast(Uplink, None), cast(Keeper, None), InstanceConfig())
    front, back = LocalRing.pair()
    with front, back:
        relay = Relay(back, Uplink(cast(XenFront, None)), "state")
        relay.report = Report(InstanceState.FAILED, reason_of(ManagerSilentError("Load", 30.0)), "no answer")
        assert not life._ended_well(relay, EXIT_BUSY)
        assert relay.untold == "state", "the next one is told what this one never was"
        later = LoadReply(bytes(16), "1.2", 1, False, bytes(32), bytes(32), 5, "deactivated", 90.0)
        told, _ = decode_reply(relay._ours(encode_reply(later)))
        assert told == replace(later, startup="state", after_reset="deactivated")
        assert relay.untold is None
        relay.report = Report(InstanceState.FAILED, "no-matching-slot", "another disk")
        with pytest.raises(IntegrityError, match="kept"):
            life._ended_well(relay, EXIT_INTEGRITY)


def test_two_devices_of_one_guest_are_two_that_want_it(store: Path) -> None:
    async def scenario(here: World) -> None:
        async with here.managers_domain():
            here.nursery.start_soon(here.run_instance)
            async with here.guest() as guest:
                assert await run(guest, pcr_extend(7)) == OK
                async with here.guest(device=1) as other:
                    assert await refused(other), "two devices share one vTPM"
                async with here.guest(GUEST + 1) as other:
                    assert await refused(other), "the first device still has it"
                    assert (await guest.transact(pcr_read(7)))[-32:] == extended(b"\x11" * 32)
            await stop(here)

    play(store, scenario)


def test_a_managers_program_that_is_away_for_long_is_waited_for(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xen_connection_trio, "RING_PATIENCE", 0.2)

    async def scenario(here: World) -> None:
        answers: list[int] = []
        async with here.managers_domain() as manager:
            here.nursery.start_soon(here.run_instance)
            async with here.guest() as guest, trio.open_nursery() as nursery:
                assert await run(guest, pcr_extend(7)) == OK
                manager.leave()  # the back end of its domain stays, as vtpm-xen does under a restart of vtpm-managerd

                async def save() -> None:
                    answers.append(await run(guest, nv_define(INDEX, 8)))

                nursery.start_soon(save)
                await trio.sleep(1.0)
                assert not answers
                manager.come_back()
                await until(lambda: answers == [OK])
                assert (await guest.transact(pcr_read(7)))[-32:] == extended(b"\x11" * 32)
            await stop(here)

    play(store, scenario)


def test_a_guest_that_this_domain_is_not_for_is_refused(store: Path) -> None:
    async def scenario(here: World) -> None:
        here.guest_rule = "webshop"
        async with here.managers_domain():
            here.nursery.start_soon(here.run_instance)
            await until(lambda: InstanceState.READY in here.record.states)
            async with here.guest() as guest:
                assert await refused(guest), "its name cannot be read"
            await here.toolstack.xs.write(f"/local/domain/{GUEST}/name", "mail")
            async with here.guest() as guest:
                assert await refused(guest), "another name"
            await here.toolstack.xs.write(f"/local/domain/{GUEST}/name", "webshop")
            mine, here.record.vtpm = here.record.vtpm, uuid4()
            async with here.guest() as guest:
                assert await refused(guest), "a device for another vTPM"
            here.record.vtpm = mine
            async with here.guest() as guest:
                assert await run(guest, get_random()) == OK
            await stop(here)
            await here.toolstack.xs.remove(f"/local/domain/{GUEST}/name")

    play(store, scenario)


def test_one_guest_at_a_time_has_the_vtpm(store: Path) -> None:
    async def scenario(here: World) -> None:
        async with here.managers_domain():
            here.nursery.start_soon(here.run_instance)
            async with here.guest() as guest:
                assert await run(guest, pcr_extend(7)) == OK
                async with here.guest(GUEST + 1) as other:
                    assert await refused(other), "two guests share one vTPM"
                    assert (await guest.transact(pcr_read(7)))[-32:] == extended(b"\x11" * 32)
            await stop(here)

    play(store, scenario)


def test_what_the_manager_orders_reaches_the_instance(store: Path) -> None:
    async def scenario(here: World) -> None:
        async with here.managers_domain() as manager:
            here.nursery.start_soon(here.run_instance)
            async with here.guest(extra_pages=1) as guest:
                # an extra page carries what libtpms takes, and not a byte more
                assert [await run(guest, padded(size)) for size in (4088, 4096, 4097)] == [RC_SIZE, RC_SIZE, TOO_LONG]
                assert await run(guest, pcr_extend(7)) == OK
                assert manager.manager is not None
                reports = len(here.record.reports)
                manager.manager.orders = Orders.RESET
                manager.manager.ring.ring()
                await until(lambda: len(here.record.reports) > reports + 1)
                assert (await guest.transact(pcr_read(7)))[-32:] == NOTHING
                assert await run(guest, pcr_extend(7)) == OK
                manager.manager.orders = Orders.RESET  # which the program's own Load after a crash is told
                reports = len(here.record.reports)
                os.kill(instance_of(here), signal.SIGKILL)
                await until(lambda: InstanceState.READY in here.record.states[reports:])
                assert (await guest.transact(pcr_read(7)))[-32:] == NOTHING
                manager.manager.orders = Orders.STOP
                manager.manager.ring.ring()
                await until(lambda: here.record.states[-1] is InstanceState.STOPPED)
                # attached again: the domain loads it anew
                await until(lambda: here.record.states[-1] is InstanceState.READY)
                assert await run(guest, get_random()) == OK
            await stop(here)

    play(store, scenario)


def test_a_missing_or_foreign_image_is_never_a_new_vtpm(tmp_path: Path) -> None:
    path, vtpm = tmp_path / "vtpm.img", uuid4()
    known = LoadReply(vtpm.bytes, "2.0", 1, False, bytes(32), bytes(32), 5, "clear", 90.0)
    with pytest.raises(IntegrityError, match="is missing"):
        open_image(path, known)
    assert not path.exists()
    fresh = replace(known, fresh=True, store=uuid4().bytes)
    path.write_bytes(b"\1" * 40_000)
    with pytest.raises(ConflictError, match="Nothing was changed"):
        open_image(path, fresh)
    assert path.read_bytes() == b"\1" * 40_000
    path.unlink()
    first = open_image(path, fresh)
    try:
        with pytest.raises(ConflictError, match="in use by another process"):
            open_image(path, known)
    finally:
        os.close(first)
    os.close(open_image(path, fresh))  # one that never came to its first commit
    with pytest.raises(ConflictError):
        open_image(path, replace(fresh, vtpm=uuid4().bytes))


def test_an_instance_goes_on_when_its_program_fails_and_the_next_one_takes_it_over(store: Path) -> None:
    async def scenario(here: World) -> None:
        async with here.managers_domain():
            async with trio.open_nursery() as doomed:
                doomed.start_soon(here.run_instance)
                async with here.guest() as guest:
                    assert await run(guest, pcr_extend(7)) == OK
                    process = instance_of(here)
                    doomed.cancel_scope.cancel()
            here.nursery.start_soon(here.run_instance)
            async with here.guest() as guest:
                assert (await guest.transact(pcr_read(7)))[-32:] == extended(b"\x11" * 32)
                assert instance_of(here) == process
                assert await run(guest, nv_define(INDEX, 8)) == OK
            await stop(here)

    play(store, scenario)


def test_an_instance_that_crashes_again_and_again_is_left_down(store: Path) -> None:
    async def scenario(here: World) -> None:
        async with here.managers_domain():
            here.nursery.start_soon(here.run_instance)
            await until(lambda: InstanceState.READY in here.record.states)
            killed: set[int] = {0}
            while not here.outcome:
                if (process := instance_of(here)) not in killed:
                    os.kill(process, signal.SIGKILL)
                    killed.add(process)
                await trio.sleep(0.05)
            error = await here.until_ended()
            assert isinstance(error, KeeperError)
            assert "left down" in str(error)

    play(store, scenario)


def test_the_guest_that_had_it_keeps_it_though_the_next_program_meets_another_first(store: Path) -> None:
    async def scenario(here: World) -> None:
        async with here.managers_domain(), here.guest(GUEST + 2) as guest, trio.open_nursery() as second:
            async with trio.open_nursery() as doomed:
                doomed.start_soon(here.run_instance)
                assert await run(guest, pcr_extend(7)) == OK
                other = await second.start(also, here)
                assert await refused(other)
                doomed.cancel_scope.cancel()
            here.nursery.start_soon(here.run_instance)
            assert (await guest.transact(pcr_read(7)))[-32:] == extended(b"\x11" * 32)
            assert await refused(other)
            second.cancel_scope.cancel()
            await stop(here)

    async def also(here: World, task_status: trio.TaskStatus[XenFront]) -> None:
        async with here.guest(GUEST) as other:
            task_status.started(other)
            await trio.sleep_forever()

    play(store, scenario)


def test_who_waits_from_the_beginning_does_not_get_it_when_the_binding_of_the_one_that_has_it_ends(store: Path) -> None:
    """As where its device met an error, and is tried again: it lives, and its PCRs are its own."""

    async def scenario(here: World) -> None:
        async with here.managers_domain(), here.guest(GUEST) as one, here.guest(GUEST + 2) as two:
            here.nursery.start_soon(here.run_instance)
            await until(lambda: any(each._holder and each._turn.locked() for each in binders(here)))
            (binder,) = binders(here)
            assert binder._holder is not None
            guest, other = (one, two) if binder._holder.place.domain == GUEST else (two, one)
            assert await run(guest, pcr_extend(7)) == OK
            binder._holder.close()
            assert (await guest.transact(pcr_read(7)))[-32:] == extended(b"\x11" * 32)
            assert await refused(other)
            await stop(here)

    def binders(here: World) -> list[GuestBinder]:
        found = [each for each in gc.get_objects() if isinstance(each, GuestBinder)]
        return [each for each in found if each._kept.is_relative_to(here.directory)]

    play(store, scenario)
