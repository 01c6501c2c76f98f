"""What dies with what, in real processes (the table in docs/architecture.md), and that instances are made afresh."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vtpm_instance_commands import get_random, rc
from vtpm_instance_manager import DEADLINE, until
from vtpm_instance_rig import Bench, KeeperProcess, running_keeper

from frontend_backend.messages_keeper import Confinement, ConfinementReply, KeeperRefusal, Spawn
from vtpm_instance.spawner_link import Spawner, SpawnSettings


@pytest.fixture(params=["fork", "exec"])
def keeper(request: pytest.FixtureRequest) -> Iterator[KeeperProcess]:
    with running_keeper(options=("--spawn", request.param)) as process:
        yield process


def children(pid: int) -> dict[int, str]:
    """The children of a process, by their names."""
    words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(word): Path(f"/proc/{word}/comm").read_text().strip() for word in words}


def spawner_of(keeper: KeeperProcess) -> int:
    """The child that is not an instance, once it is ready."""
    assert isinstance(keeper.client.call(Confinement())[0], ConfinementReply)
    (found,) = [pid for pid, name in children(keeper.process.pid).items() if name != "vtpm-instance"]
    return found


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


def test_a_spawner_that_dies_over_a_request_refuses_that_one_only(keeper: KeeperProcess) -> None:
    spawner = spawner_of(keeper)
    os.kill(spawner, signal.SIGSTOP)
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
    bench = Bench(keeper)
    bench.spawn()
    assert rc(bench.run(get_random())) == 0
    assert bench.kill(signal.SIGTERM) == 0


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
    pids = [os.pidfd_open(pid) for pid in children(keeper.process.pid)]
    assert len(pids) == 2
    keeper.process.send_signal(signal.SIGTERM)
    assert keeper.process.wait(DEADLINE) == 0
    assert all(has_ended(pidfd) for pidfd in pids)
    for pidfd in (*pids, bench.pidfd):
        os.close(pidfd)
    assert bench.manager is not None
    bench.manager.close()


def test_fifty_siblings_and_fifty_restarts_draw_different_random_numbers(keeper: KeeperProcess) -> None:
    starts = 3 if "exec" in Path(f"/proc/{keeper.process.pid}/cmdline").read_text().split("\0") else 50
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
Keeping().end_strays(spawner)
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
