"""What dies with what, in real processes (the table in docs/architecture.md), and that instances are made afresh."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from vtpm_instance_commands import get_random, rc
from vtpm_instance_manager import DEADLINE, until
from vtpm_instance_rig import Bench, KeeperProcess, running_keeper

from frontend_backend.messages_keeper import Confinement, ConfinementReply, KeeperRefusal, Spawn
from vtpm_instance.confine import NICE, STANDBY_NAME
from vtpm_instance.spawner_link import Spawner, SpawnSettings
from vtpm_instance.standby import UNTAKEN, Untaken


@pytest.fixture(params=["fork", "exec"])
def keeper(request: pytest.FixtureRequest) -> Iterator[KeeperProcess]:
    with running_keeper(options=("--spawn", request.param)) as process:
        yield process


@pytest.fixture
def forking() -> Iterator[KeeperProcess]:
    with running_keeper() as process:
        yield process


def children(pid: int) -> dict[int, str]:
    """The children of a process, by their names; not those that end meanwhile."""
    names = {}
    for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):
            names[int(word)] = Path(f"/proc/{word}/comm").read_text().strip()
    return names


def spawner_of(keeper: KeeperProcess) -> int:
    """The child that is not an instance, once it is ready."""
    assert isinstance(keeper.client.call(Confinement())[0], ConfinementReply)

    def found() -> list[int]:
        others = {pid: name for pid, name in children(keeper.process.pid).items() if name != "vtpm-instance"}
        # in mode "exec" it is the one that stands by
        return [pid for pid, name in others.items() if name != STANDBY_NAME] or list(others)

    return the_one(found, "one just forked to take its name")


def standby_of(keeper: KeeperProcess) -> int:
    """The child that waits for its order, once there is one."""

    def found() -> list[int]:
        return [pid for pid, name in children(keeper.process.pid).items() if name == STANDBY_NAME]

    return the_one(found, "an instance to stand by")


def the_one(found: Callable[[], list[int]], what: str) -> int:
    """Wait until there is one, and return it."""
    seen: list[int] = []

    def is_one() -> bool:
        seen[:] = found()
        return len(seen) == 1

    until(is_one, what)
    return seen[0]


def is_forking(keeper: KeeperProcess) -> bool:
    return "exec" not in Path(f"/proc/{keeper.process.pid}/cmdline").read_text().split("\0")


def has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def wait_until_replaced(keeper: KeeperProcess, spawner: int) -> None:
    until(lambda: spawner not in children(keeper.process.pid), "the end of the spawner")
    assert spawner_of(keeper) != spawner


def test_when_the_spawner_dies_another_is_started_and_instances_live_on(keeper: KeeperProcess) -> None:
    bench = Bench(keeper)
    bench.spawn()
    for _ in range(2):
        spawner = spawner_of(keeper)
        os.kill(spawner, signal.SIGKILL)
        wait_until_replaced(keeper, spawner)
        assert rc(bench.run(get_random())) == 0
    another = Bench(keeper)
    another.spawn()
    assert rc(another.run(get_random())) == 0
    # both are the keeper's own: it knows how they ended
    assert bench.kill(signal.SIGTERM) == 0
    assert another.kill() == -signal.SIGKILL


def test_a_spawner_that_dies_over_a_request_refuses_that_one_only(forking: KeeperProcess) -> None:
    keeper = forking  # in mode exec a spawner is the instance that it makes
    spawner = spawner_of(keeper)
    standby_of(keeper)
    os.kill(spawner, signal.SIGSTOP)
    bench = Bench(keeper)
    bench.spawn()  # by the one that stood by
    request = Spawn(bytes(16), 1, "2.0", 0, 0, "socket", 0, 0, ("data", "control"))

    def kill_soon() -> None:
        time.sleep(0.2)
        os.kill(spawner, signal.SIGKILL)

    thread = threading.Thread(target=kill_soon)
    thread.start()
    reply, _ = keeper.client.call(request, [0] * 6)
    thread.join()
    assert isinstance(reply, KeeperRefusal)
    assert "running instances are not affected" in reply.text
    another = Bench(keeper)
    another.spawn()
    for each in (bench, another):
        assert rc(each.run(get_random())) == 0
        assert each.kill(signal.SIGTERM) == 0


def test_one_that_dies_while_it_stands_by_costs_nobody_anything(keeper: KeeperProcess) -> None:
    standby = standby_of(keeper)
    pidfd = os.pidfd_open(standby)
    os.kill(standby, signal.SIGKILL)
    until(lambda: has_ended(pidfd), "its end")  # one that is about to end may still be handed an order
    os.close(pidfd)
    bench = Bench(keeper)
    bench.spawn()
    assert rc(bench.run(get_random())) == 0
    until(lambda: standby not in children(keeper.process.pid), "it to be collected")
    assert standby_of(keeper) not in (standby, bench.pid)
    assert bench.kill(signal.SIGTERM) == 0


def test_one_that_stands_by_is_shut_in_holds_nothing_and_ends_with_the_keeper(forking: KeeperProcess) -> None:
    keeper = forking
    standby = standby_of(keeper)
    pidfd = os.pidfd_open(standby)
    until(lambda: len(beyond_the_standard_three(standby)) == 1, "it to have closed the rest")
    assert beyond_the_standard_three(standby)[0].startswith("socket:")
    assert os.getsid(standby) == standby
    status = Path(f"/proc/{standby}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    assert "CapBnd:\t0000000000000000" in status, "as instances: it has left what it could get back"
    assert os.getpriority(os.PRIO_PROCESS, standby) == NICE
    os.kill(spawner_of(keeper), signal.SIGSTOP)  # nobody tells it: the kernel does
    keeper.process.kill()
    until(lambda: has_ended(pidfd), "its end")
    os.close(pidfd)


def beyond_the_standard_three(pid: int) -> list[str]:
    """What else a process has open."""
    return [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd") if int(name) > 2]


def test_each_that_stood_by_serves_one_vtpm(forking: KeeperProcess) -> None:
    keeper = forking
    served = []
    benches = [Bench(keeper) for _ in range(8)]
    for bench in benches:  # quicker than it is replaced, so that some are made on demand
        bench.spawn()
        served.append(bench.pid)
    assert len(set(served)) == len(benches)
    assert standby_of(keeper) not in served
    for bench in benches:
        assert rc(bench.run(get_random())) == 0
        assert bench.kill(signal.SIGTERM) == 0


def test_descriptors_on_their_way_to_others_keep_nobody_from_being_started(forking: KeeperProcess) -> None:
    """The kernel counts them by user, and the spawner has a small RLIMIT_NOFILE (ETOOMANYREFS)."""
    keeper = forking
    spawner = spawner_of(keeper)
    standby_of(keeper)
    sender, receiver = socket.socketpair()
    with sender, receiver:
        socket.send_fds(sender, [b"x"], [0] * 200)
        for bench in [Bench(keeper) for _ in range(3)]:
            bench.spawn()
            assert rc(bench.run(get_random())) == 0
            assert bench.kill(signal.SIGTERM) == 0
    assert spawner_of(keeper) == spawner


def test_few_orders_are_on_their_way_at_once_and_one_that_is_not_taken_is_not_waited_for_long() -> None:
    untaken, others = Untaken(), []
    for _ in range(UNTAKEN):
        untaken.make_room()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        untaken.add(ours)
        others.append(theirs)
    waiter = threading.Thread(target=untaken.make_room)
    waiter.start()
    waiter.join(0.2)
    assert waiter.is_alive(), "there is room though none was taken"
    others[0].close()
    waiter.join(DEADLINE)
    assert not waiter.is_alive()
    untaken.close()
    assert all(not theirs.recv(1) for theirs in others[1:])
    for theirs in others[1:]:
        theirs.close()


def test_a_spawner_that_dies_over_what_nobody_waits_for_is_not_asked_for_that_again_and_again() -> None:
    spawner = Spawner(SpawnSettings(), lambda _old, _new: None)
    try:
        spawner.wait_ready()
        assert not spawner.seconds_left(), "the first is made at once"
        first = spawner.pid
        os.kill(first, signal.SIGSTOP)
        spawner.have_one_stand_by()
        os.kill(first, signal.SIGKILL)
        until(spawner.on_event, "its end to be seen")
        spawner.wait_ready()
        assert spawner.pid != first
        assert spawner.seconds_left() == float("inf")
    finally:
        spawner.close()


def test_when_an_instance_dies_nothing_else_does(keeper: KeeperProcess) -> None:
    benches = [Bench(keeper) for _ in range(2)]
    for bench in benches:
        bench.spawn()
    spawner = spawner_of(keeper)
    assert benches[0].kill() == -signal.SIGKILL
    assert rc(benches[1].run(get_random())) == 0
    assert spawner_of(keeper) == spawner
    assert keeper.process.poll() is None
    assert benches[1].kill(signal.SIGTERM) == 0


def test_when_the_keeper_is_killed_its_spawner_and_instances_end_and_instances_do_so_cleanly(
    keeper: KeeperProcess,
) -> None:
    bench = Bench(keeper)
    bench.spawn()
    spawner = os.pidfd_open(spawner_of(keeper))
    keeper.process.kill()
    until(lambda: has_ended(spawner), "the end of the spawner")
    until(lambda: has_ended(bench.pidfd), "the end of the instance")
    assert bench.record.resumable
    os.close(spawner)
    os.close(bench.pidfd)
    assert bench.manager is not None
    bench.manager.close()


def test_when_the_manager_goes_nothing_else_does(keeper: KeeperProcess) -> None:
    bench = Bench(keeper)
    manager = bench.spawn()
    spawner = spawner_of(keeper)
    manager.close()
    keeper.client.close()
    assert rc(bench.run(get_random())) == 0
    keeper.reconnect()
    assert spawner_of(keeper) == spawner
    bench.fetch()
    assert bench.kill(signal.SIGTERM) == 0


def test_nothing_is_left_when_the_keeper_stops(keeper: KeeperProcess) -> None:
    bench = Bench(keeper)
    bench.spawn()
    standby_of(keeper)
    pids = [os.pidfd_open(pid) for pid in children(keeper.process.pid)]
    assert len(pids) == (3 if is_forking(keeper) else 2)
    keeper.process.send_signal(signal.SIGTERM)
    assert keeper.process.wait(DEADLINE) == 0
    assert all(has_ended(pidfd) for pidfd in pids)
    for pidfd in (*pids, bench.pidfd):
        os.close(pidfd)
    assert bench.manager is not None
    bench.manager.close()


def test_fifty_siblings_and_fifty_restarts_draw_different_random_numbers(keeper: KeeperProcess) -> None:
    starts = 50 if is_forking(keeper) else 3
    drawn: list[bytes] = []
    for _ in range(starts):  # siblings: manufactured alike, at the same point
        bench = Bench(keeper)
        bench.spawn()
        drawn.append(bench.run(get_random(32)))
        assert bench.kill() == -signal.SIGKILL
    bench = Bench(keeper)
    bench.spawn()
    assert bench.kill(signal.SIGTERM) == 0
    record = (bench.record.key, bench.record.digest, bench.record.generation)
    saved = bench.image.read_bytes()
    for _ in range(starts):  # restarts: of the very same state each time, as after restoring a backup
        bench.image.write_bytes(saved)
        bench.record.key, bench.record.digest, bench.record.generation = record
        bench.spawn("state")
        drawn.append(bench.run(get_random(32)))
        assert bench.kill() == -signal.SIGKILL
    assert len(set(drawn)) == 2 * starts


_STRAYS = """
import os, signal
from vtpm_instance.kept import Keeping

def sleeper():
    pid = os.fork()
    if pid == 0:
        signal.pause()
    return pid

spawner, stray = sleeper(), sleeper()
Keeping().end_strays({spawner})
print(os.waitpid(spawner, os.WNOHANG) == (0, 0), os.path.exists(f"/proc/{stray}"))
os.kill(spawner, signal.SIGKILL)
"""


def test_what_a_lost_spawner_made_without_telling_is_ended() -> None:
    run = subprocess.run([sys.executable, "-c", _STRAYS], capture_output=True, text=True, check=True)
    assert run.stdout == "True False\n", run.stderr


def test_an_event_that_was_dealt_with_already_costs_no_spawner() -> None:
    """The keeper polls, then serves what was readable one after the other: a spawn may take the greeting first."""
    spawner = Spawner(SpawnSettings(), lambda _old, _new: None)
    try:
        spawner.wait_ready()
        pid = spawner.pid
        spawner.on_event()
        assert spawner.pid == pid
        assert Path(f"/proc/{pid}/comm").exists()
        os.kill(pid, signal.SIGKILL)
        until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z", "its end")
        spawner.on_event()
        assert spawner.wait_ready()
        assert spawner.pid != pid
    finally:
        spawner.close()
