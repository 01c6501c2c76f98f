"""Several keepers: who gets an instance, who is started and ended, and what dies with one of them."""

import os
import resource
import select
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import vtpm_instance_rig as tpm
from e2e_rig import Guest
from manager_rig import ModelTpm, RunningDaemon, installation, running_daemon

from frontend_backend.release import RELEASE
from manager import keeper_client
from manager.errors import BusyError, KeeperRefusedError
from manager.keeper_sockets import describe_all, numbers_found
from manager.keepers import Keepers

INDEX = 0x1500016
LOOKS = 20  # at which sockets a keeper has, for two that are the same


@pytest.fixture
def model() -> ModelTpm:
    return ModelTpm()


@pytest.fixture
def place(model: ModelTpm) -> Iterator[Any]:
    with installation(model) as made:
        yield made


def with_instances(place: Any, **settings: Any) -> Any:
    base, layout, config = place
    return base, layout, replace(config, instance=replace(config.instance, **settings))


def keepers_of(running: RunningDaemon) -> Keepers:
    return running.daemon._keepers


def loads(running: RunningDaemon) -> list[int]:
    return [keepers_of(running).load_of(keeper) for keeper in keepers_of(running).all]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - other processes
            await trio.sleep(0.01)


async def attach(running: RunningDaemon, *names: str) -> list[dict[str, Any]]:
    shown = []
    for name in names:
        await running.ask("add", name=name)
        shown += await running.ask("attach", vtpm=name, guest="g")
    return shown


async def in_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    return await trio.to_thread.run_sync(call, *arguments)


async def test_the_next_keeper_is_started_when_all_are_full_and_ended_when_nobody_needs_it(
    model: ModelTpm, place: Any
) -> None:
    async with running_daemon(model, with_instances(place, per_keeper=2)) as running:
        shown = await attach(running, "a", "b", "c", "d", "e")
        assert loads(running) == [2, 2, 1]
        assert numbers_found(running.layout) == [0, 1, 2]
        assert Counter(parent_of(one["pid"]) for one in shown) == Counter(
            {keeper.pid: load for keeper, load in zip(keepers_of(running).all, loads(running), strict=True)}
        )
        (status,) = await running.ask("status")
        assert status["keepers"] == 3
        assert "keeper-2.sock: process " in status["keepers_hold"]
        assert status["keepers_hold"].endswith("1 of 2 vTPMs")
        for name in ("a", "b", "c", "d"):
            await running.ask("detach", vtpm=name)
        await until(lambda: len(keepers_of(running).all) < 3)
        assert sum(loads(running)) == 1
        guest = Guest(shown[4]["endpoint"])
        await in_thread(guest.good, tpm.get_random(8))
        guest.close()
    await until(lambda: not numbers_found(place[1]))  # a clean stop ends every keeper


async def test_a_new_instance_goes_where_the_fewest_are(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, with_instances(place, per_keeper=3)) as running:
        await attach(running, "a", "b", "c", "d", "e", "f")
        assert loads(running) == [3, 3]
        for name in ("a", "b"):  # the first two, which the first keeper has
            await running.ask("detach", vtpm=name)
        assert loads(running) == [1, 3]
        await attach(running, "g")
        assert loads(running) == [2, 3]


async def test_a_killed_keeper_takes_its_own_instances_with_it_and_no_other(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, with_instances(place, per_keeper=2)) as running:
        shown = await attach(running, "a", "b", "c", "d")
        guests = [Guest(one["endpoint"]) for one in shown]
        for number, guest in enumerate(guests):
            await in_thread(guest.define, INDEX, 1)
            await in_thread(guest.write, INDEX, bytes((number,)))
        first, second = keepers_of(running).all
        victim = second.pid
        os.kill(victim, signal.SIGKILL)
        assert await in_thread(guests[0].read, INDEX, 1) == b"\0", "a connection of the other keeper's goes on"
        rows = [running.registry.find(name).uuid for name in ("c", "d")]

        def back() -> bool:
            found = [running.attachments.running(row) for row in rows]
            return all(one is not None and one.stage.value == "running" for one in found) and not any(
                one.pid in (shown[2]["pid"], shown[3]["pid"]) for one in found if one is not None
            )

        await until(back)
        assert [(await running.ask("show", vtpm=name))[0]["pid"] for name in ("a", "b")] == [
            one["pid"] for one in shown[:2]
        ]
        for number, guest in enumerate(guests):
            guest.close()
            assert await in_thread(guest.read, INDEX, 1) == bytes((number,)), "they stopped cleanly, and are back"
            guest.close()
        assert first.pid != victim
        assert sorted(loads(running)) == [2, 2]
        assert str(victim) not in os.listdir("/proc"), "no zombie"


async def test_the_next_manager_finds_every_keeper_and_what_it_has(model: ModelTpm, place: Any) -> None:
    small = with_instances(place, per_keeper=2)
    async with running_daemon(model, small, stop=False) as running:
        shown = await attach(running, "a", "b", "c")
        pids = [keeper.pid for keeper in keepers_of(running).all]
        said = await in_thread(describe_all, running.layout)
        assert ["serves the manager" in words for _, words in said] == [True, True]
    said = await in_thread(describe_all, place[1])
    assert [(path.name, words.split(";")[1]) for path, words in said] == [
        ("keeper.sock", " no manager is connected"),
        ("keeper-1.sock", " no manager is connected"),
    ]
    assert f"release {RELEASE}, 2 vTPMs" in said[0][1]
    async with running_daemon(model, small) as running:
        assert [keeper.pid for keeper in keepers_of(running).all] == pids
        assert loads(running) == [2, 1]
        assert [(await running.ask("show", vtpm=one["name"]))[0]["pid"] for one in shown] == [
            one["pid"] for one in shown
        ]
        await attach(running, "d", "e")
        assert loads(running) == [2, 2, 1]


async def test_a_socket_that_a_dead_keeper_left_is_cleared_away_at_the_next_start(model: ModelTpm, place: Any) -> None:
    small = with_instances(place, per_keeper=1)
    async with running_daemon(model, small, stop=False) as running:
        shown = await attach(running, "a", "b")
        dead = keepers_of(running).all[1].pid
    os.kill(dead, signal.SIGKILL)
    await until(lambda: not os.path.exists(f"/proc/{shown[1]['pid']}"))
    async with running_daemon(model, small) as running:
        row = running.registry.find("b").uuid

        def runs() -> bool:
            found = running.attachments.running(row)
            return found is not None and found.stage.value == "needs-reset"  # nobody took its last state

        await until(runs)
        assert loads(running) == [1, 1]
        assert dead not in [keeper.pid for keeper in keepers_of(running).all]


@pytest.mark.slow
async def test_few_descriptors_make_more_keepers_and_lose_nothing(model: ModelTpm, place: Any) -> None:
    """The limit is what a keeper has when the manager meets it: 84 descriptors are enough for four vTPMs."""
    async with running_daemon(model, place, stop=False) as running:
        await attach(running, "v0")
        first = keepers_of(running).first.pid
    _, hard = resource.prlimit(first, resource.RLIMIT_NOFILE)
    resource.prlimit(first, resource.RLIMIT_NOFILE, (84, hard))
    async with running_daemon(model, place) as running:
        await attach(running, *(f"v{number}" for number in range(1, 6)))
        assert loads(running) == [3, 3] or loads(running) == [4, 2]
        assert keepers_of(running).room_of(keepers_of(running).first) == 4


async def test_a_keeper_that_has_no_descriptors_left_says_so_and_another_takes_the_instance(
    model: ModelTpm, place: Any
) -> None:
    async with running_daemon(model, place) as running:
        await attach(running, "a")
        first = keepers_of(running).first
        _, hard = resource.prlimit(first.pid, resource.RLIMIT_NOFILE)
        used = {int(name) for name in os.listdir(f"/proc/{first.pid}/fd")}
        resource.prlimit(first.pid, resource.RLIMIT_NOFILE, (min(set(range(1000)) - used) + 2, hard))
        await attach(running, "b")
        assert loads(running) == [1, 1]
        assert keepers_of(running).room_of(first) == 1


async def test_a_fresh_keeper_that_takes_nothing_is_an_error_and_not_the_first_of_many(
    model: ModelTpm, place: Any
) -> None:
    async with running_daemon(model, place) as running:
        first = keepers_of(running).first
        _, hard = resource.prlimit(first.pid, resource.RLIMIT_NOFILE)
        used = {int(name) for name in os.listdir(f"/proc/{first.pid}/fd")}
        resource.prlimit(first.pid, resource.RLIMIT_NOFILE, (min(set(range(1000)) - used) + 2, hard))
        await running.ask("add", name="a")
        with pytest.raises(Exception, match="an empty keeper has no room"):
            await running.ask("attach", vtpm="a", guest="g")
        assert len(keepers_of(running).all) == 1
        resource.prlimit(first.pid, resource.RLIMIT_NOFILE, (hard, hard))
        await running.ask("attach", vtpm="a", guest="g")


async def test_every_keeper_is_of_this_release(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        (shown,) = await attach(running, "a")
        assert (shown["release"], shown["outdated"]) == (RELEASE, False)
        await running.ask("detach", vtpm="a")
        (shown,) = await running.ask("show", vtpm="a")
        assert (shown["release"], shown["outdated"]) == (None, False)


async def test_each_keeper_is_listened_to_once_also_one_that_came_while_the_manager_started(
    model: ModelTpm, place: Any
) -> None:
    """Two listeners would take each other's place for ever."""
    small = with_instances(place, per_keeper=1)
    async with running_daemon(model, small, stop=False) as running:
        shown = await attach(running, "a", "b", "c")
        pids = [keeper.pid for keeper in keepers_of(running).all]
    for pid in pids[1:]:
        os.kill(pid, signal.SIGKILL)
    await until(lambda: not any(os.path.exists(f"/proc/{one['pid']}") for one in shown[1:]))
    async with running_daemon(model, small) as running:
        await until(lambda: loads(running) == [1, 1, 1] and all(runs(running, name) for name in ("a", "b", "c")))
        for _ in range(LOOKS):  # the last keeper may still be getting ready
            watched = {keeper.pid: watching(keeper.pid) for keeper in keepers_of(running).all}
            await trio.sleep(0.3)
            if {pid: watching(pid) for pid in watched} == watched:
                break
        else:
            pytest.fail("somebody takes a listener's place, again and again")


def runs(running: RunningDaemon, name: str) -> bool:
    return running.attachments.running(running.registry.find(name).uuid) is not None


def watching(pid: int) -> set[str]:
    """A process's sockets, by their inodes."""
    targets = {os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}
    return {target for target in targets if target.startswith("socket:")}


@pytest.mark.slow
async def test_a_keeper_that_hangs_holds_up_its_own_and_what_is_new_goes_elsewhere(
    model: ModelTpm, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_client, "_ANSWER_SECONDS", 2.0)
    async with running_daemon(model, with_instances(place, per_keeper=3)) as running:
        await attach(running, "a", "b", "c", "d")
        await running.ask("detach", vtpm="a")
        assert loads(running) == [2, 1]
        hung = keepers_of(running).all[1]
        os.kill(hung.pid, signal.SIGSTOP)
        try:
            await running.ask("add", name="e")
            with pytest.raises(Exception, match=rf"process {hung.pid}\) gave no answer within 2 s"):
                await running.ask("attach", vtpm="e", guest="g")  # it has the fewest
            (shown,) = await attach(running, "f")
            assert parent_of(shown["pid"]) == keepers_of(running).first.pid
        finally:
            os.kill(hung.pid, signal.SIGCONT)
        await running.ask("detach", vtpm="d")
        (shown,) = await attach(running, "g")
        assert parent_of(shown["pid"]) == hung.pid, "it answers again"


async def turned_away_late(path: Path) -> None:
    """Greet a keeper that has turned us away before it was asked."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(str(path))
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    assert await in_thread(poll.poll, 30_000)
    sock.setblocking(False)
    keeper = keeper_client.Keeper(path, sock)
    try:
        await keeper._greet()
    finally:
        keeper.close()


async def test_whoever_is_turned_away_hears_why_however_soon_the_keeper_closes(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        (keeper,) = keepers_of(running).all
        with pytest.raises(KeeperRefusedError, match="another manager is connected"):
            await turned_away_late(keeper.path)
        os.kill(keeper.pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(let_go_on, keeper.pid)
            with pytest.raises(BusyError, match="another manager is connected"):
                await keeper_client.Keeper.connect(keeper.path)  # its question lies there unread


async def let_go_on(pid: int) -> None:
    await trio.sleep(0.3)
    os.kill(pid, signal.SIGCONT)
