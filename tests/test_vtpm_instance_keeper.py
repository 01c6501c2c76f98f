"""The keeper as a process: who it serves, what it keeps, what dies with it."""

import os
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from vtpm_instance_commands import get_random, rc
from vtpm_instance_manager import DEADLINE, until
from vtpm_instance_rig import Bench, KeeperClient, KeeperProcess, connect, running_keeper, short_directory

from frontend_backend.descriptors import close_all, receive_message, send_message
from frontend_backend.errors import ChannelClosedError
from frontend_backend.messages_instance import InstanceState
from frontend_backend.messages_keeper import (
    Describe,
    Description,
    Fetch,
    Forget,
    Forgotten,
    Hello,
    HelloReply,
    KeeperFull,
    KeeperRefusal,
    List,
    ListReply,
    Spawn,
    Stop,
    Stopping,
    decode_keeper,
)
from frontend_backend.release import RELEASE
from vtpm_instance.confine import STANDBY_NAME
from vtpm_instance.keeper import EXIT_BUSY, main


@pytest.fixture(scope="module")
def keeper() -> Iterator[KeeperProcess]:
    with running_keeper() as process:
        yield process


def open_descriptors(pid: int) -> int:
    """How many a keeper has, once it has the channel and the pidfd of an instance that stands by."""
    until(lambda: any(_is_standby(pid, number) for number in os.listdir(f"/proc/{pid}/fd")), "an instance to stand by")
    return len(os.listdir(f"/proc/{pid}/fd"))


def _is_standby(keeper: int, descriptor: str) -> bool:
    """Tell whether a descriptor of a keeper's is the pidfd of an instance that stands by."""
    try:
        told = Path(f"/proc/{keeper}/fdinfo/{descriptor}").read_text()
        (pid,) = [line.split()[1] for line in told.splitlines() if line.startswith("Pid:")]
        return Path(f"/proc/{pid}/comm").read_text().strip() == STANDBY_NAME
    except (OSError, ValueError):
        return False


def test_its_socket_is_for_its_user_only(keeper: KeeperProcess) -> None:
    assert stat.S_IMODE(keeper.path.stat().st_mode) == 0o600


def test_a_second_manager_is_turned_away_while_the_first_is_there(keeper: KeeperProcess) -> None:
    with connect(keeper.path, socket.SOCK_SEQPACKET) as second:
        data, _ = receive_message(second)
        assert isinstance(decode_keeper(data), KeeperRefusal)
        with pytest.raises(ChannelClosedError):
            receive_message(second)
    assert isinstance(keeper.client.call(List())[0], ListReply)


def test_a_manager_that_comes_right_after_the_death_of_another_is_served(keeper: KeeperProcess) -> None:
    for _ in range(20):
        keeper.reconnect()
    assert keeper.client.call(List())[0] == ListReply((), 0)


def test_another_users_connection_is_turned_away(keeper: KeeperProcess) -> None:
    keeper.client.close()
    keeper.path.chmod(0o666)
    script = (
        "import os, socket, sys; os.setresuid(4321, 4321, 4321);"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1]);"
        "sys.stdout.buffer.write(s.recv(4096))"
    )
    run = subprocess.run([sys.executable, "-I", "-c", script, str(keeper.path)], capture_output=True, check=True)
    keeper.path.chmod(0o600)
    assert decode_keeper(run.stdout) == KeeperRefusal("user 4321 is not the keeper's")
    keeper.client = KeeperClient(keeper.path)


def test_it_tells_its_release_its_limit_and_how_many_it_has(keeper: KeeperProcess) -> None:
    most = resource.prlimit(keeper.process.pid, resource.RLIMIT_NOFILE)[0]
    assert keeper.client.call(Describe())[0] == Description(RELEASE, most, 0)
    bench = Bench(keeper)
    bench.spawn()
    assert keeper.client.call(Describe())[0] == Description(RELEASE, most, 1)
    bench.close()


def test_another_version_is_refused(keeper: KeeperProcess) -> None:
    assert isinstance(keeper.client.call(Hello(2))[0], KeeperRefusal)
    assert isinstance(keeper.client.call(Hello(1))[0], HelloReply)


@pytest.mark.parametrize("data", [b"x", b"\x93\x01\xa5Bogus\x80", bytes(1000)])
def test_bytes_that_are_no_message_are_refused_and_their_descriptors_closed(keeper: KeeperProcess, data: bytes) -> None:
    before = open_descriptors(keeper.process.pid)
    send_message(keeper.client.sock, data, [0, 0, 0])
    reply, _ = receive_message(keeper.client.sock)
    assert isinstance(decode_keeper(reply), KeeperRefusal)
    assert open_descriptors(keeper.process.pid) == before


def spawn_request(**changes: object) -> Spawn:
    fields: dict[str, object] = {
        "vtpm": uuid4().bytes,
        "lease": 1,
        "family": "2.0",
        "uid": 0,
        "gid": 0,
        "frontend": "socket",
        "owner_uid": 0,
        "manager_uid": 0,
        "listeners": ("data", "control"),
    }
    return Spawn(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "descriptors"),
    [
        (spawn_request(), 5),
        (spawn_request(), 7),
        (spawn_request(listeners=("data", "data")), 6),
        (spawn_request(listeners=("data", "wrong")), 6),
        (spawn_request(family="3.0"), 6),
        (spawn_request(frontend="telnet"), 6),
        (spawn_request(vtpm=b"short"), 6),
        (spawn_request(uid=-1), 6),
        (spawn_request(uid=(1 << 32) - 1), 6),
        (spawn_request(gid=-1), 6),
        (List(), 1),
        (List(-1), 0),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_and_leaves_nothing_behind(
    keeper: KeeperProcess, request_: Spawn | List, descriptors: int
) -> None:
    before = open_descriptors(keeper.process.pid)
    reply, _ = keeper.client.call(request_, [0] * descriptors)
    assert isinstance(reply, KeeperRefusal)
    assert open_descriptors(keeper.process.pid) == before
    assert keeper.client.call(List())[0] == ListReply((), 0)


def test_descriptors_that_are_no_ring_end_the_instance_only(keeper: KeeperProcess) -> None:
    before = open_descriptors(keeper.process.pid)
    request = spawn_request()
    reply, received = keeper.client.call(request, [0] * 6)
    close_all(received)

    def ended() -> bool:
        listed, _ = keeper.client.call(List())
        assert isinstance(listed, ListReply)
        return not listed.instances[0].alive

    until(ended, "the end of the instance")
    forgotten, _ = keeper.client.call(Forget(request.vtpm, 1))
    assert isinstance(forgotten, Forgotten), reply
    assert os.waitstatus_to_exitcode(forgotten.status or 0) == 70
    assert "NotARingError" in keeper.log.read_text()
    assert open_descriptors(keeper.process.pid) == before


def test_what_it_keeps_is_listed_fetched_and_forgotten(keeper: KeeperProcess) -> None:
    bench = Bench(keeper)
    bench.spawn()
    name = (bench.record.vtpm.bytes, bench.record.lease)
    listed, _ = keeper.client.call(List())
    assert isinstance(listed, ListReply)
    (kept,) = listed.instances
    assert (kept.vtpm, kept.lease, kept.pid, kept.alive, kept.status) == (*name, bench.pid, True, None)
    assert (kept.frontend, kept.listeners) == ("socket", ("data", "control", "ring"))
    assert keeper.client.call(List(1))[0] == ListReply((), 1)
    _, fetched = keeper.client.call(Fetch(*name))
    assert len(fetched) == 6
    close_all(fetched)
    assert isinstance(keeper.client.call(Forget(*name))[0], KeeperRefusal)
    assert isinstance(keeper.client.call(Fetch(name[0], 9))[0], KeeperRefusal)
    assert bench.kill(signal.SIGTERM) == 0
    assert isinstance(keeper.client.call(Fetch(*name))[0], KeeperRefusal)


def test_a_second_instance_of_a_vtpm_is_refused_while_one_is_kept(keeper: KeeperProcess) -> None:
    bench = Bench(keeper)
    bench.spawn()
    for lease in (bench.record.lease, bench.record.lease + 1):
        request = spawn_request(vtpm=bench.record.vtpm.bytes, lease=lease)
        assert isinstance(keeper.client.call(request, [0] * 6)[0], KeeperRefusal)
    bench.close()


def test_no_descriptor_is_left_after_many_instances(keeper: KeeperProcess) -> None:
    counts = set()
    for _ in range(4):
        bench = Bench(keeper)
        bench.spawn()
        assert bench.kill() == -signal.SIGKILL
        counts.add(open_descriptors(keeper.process.pid))
    assert len(counts) == 1


def test_clients_that_connect_between_two_instances_wait_and_are_served(keeper: KeeperProcess) -> None:
    bench = Bench(keeper)
    bench.spawn()
    signal.pidfd_send_signal(bench.pidfd, signal.SIGTERM)
    poll = select.poll()
    poll.register(bench.pidfd, select.POLLIN)
    assert poll.poll(DEADLINE * 1000)
    # the keeper still holds the listening sockets, so this does not fail
    with bench.data() as sock:
        sock.sendall(get_random())
    assert bench.wait_for_end() == 0


def test_instances_live_on_without_a_manager(keeper: KeeperProcess) -> None:
    bench = Bench(keeper)
    manager = bench.spawn()
    manager.close()
    keeper.client.close()
    assert rc(bench.run(get_random())) == 0
    keeper.client = KeeperClient(keeper.path)
    bench.fetch()
    assert bench.kill(signal.SIGTERM) == 0
    assert bench.record.states[-1] is InstanceState.STOPPED


def test_sigterm_to_the_keeper_is_a_clean_stop_of_every_instance() -> None:
    with running_keeper() as keeper:
        benches = [Bench(keeper) for _ in range(3)]
        for bench in benches:
            bench.spawn()
        keeper.process.send_signal(signal.SIGTERM)
        assert keeper.process.wait(DEADLINE) == 0
        assert not keeper.path.exists()
        for bench in benches:
            assert bench.record.resumable
            os.close(bench.pidfd)
            assert bench.manager is not None
            bench.manager.close()


def test_a_stop_request_is_a_clean_stop_and_nothing_is_started_any_more() -> None:
    with running_keeper() as keeper:
        bench = Bench(keeper)
        bench.spawn()
        assert isinstance(keeper.client.call(Stop())[0], Stopping)
        assert keeper.process.wait(DEADLINE) == 0
        assert bench.record.resumable
        os.close(bench.pidfd)
        assert bench.manager is not None
        bench.manager.close()


def test_when_the_keeper_is_killed_its_instances_stop_cleanly() -> None:
    with running_keeper() as keeper:
        bench = Bench(keeper)
        bench.spawn()
        keeper.process.kill()
        poll = select.poll()
        poll.register(bench.pidfd, select.POLLIN)
        assert poll.poll(DEADLINE * 1000)
        assert bench.record.resumable
        os.close(bench.pidfd)
        assert bench.manager is not None
        bench.manager.close()
        keeper.process.wait()


def test_a_keeper_that_nobody_needs_ends_by_itself() -> None:
    with running_keeper(linger=1.0) as keeper:
        bench = Bench(keeper)
        bench.spawn()
        assert bench.kill(signal.SIGTERM) == 0
        keeper.client.close()
        assert keeper.process.wait(DEADLINE) == 0


def test_without_free_descriptors_it_refuses_and_recovers(keeper: KeeperProcess) -> None:
    bench = Bench(keeper)
    bench.spawn()
    used = open_descriptors(keeper.process.pid)
    soft, hard = resource.prlimit(keeper.process.pid, resource.RLIMIT_NOFILE)
    numbers = {int(name) for name in os.listdir(f"/proc/{keeper.process.pid}/fd")}
    lowest_free = min(set(range(1000)) - numbers)
    resource.prlimit(keeper.process.pid, resource.RLIMIT_NOFILE, (lowest_free, hard))
    with connect(keeper.path, socket.SOCK_SEQPACKET) as second:
        assert second.recv(1) == b""
    assert isinstance(keeper.client.call(spawn_request(), [0] * 6)[0], KeeperFull)
    assert rc(bench.run(get_random())) == 0
    resource.prlimit(keeper.process.pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert open_descriptors(keeper.process.pid) == used
    another = Bench(keeper)
    another.spawn()
    another.close()
    assert bench.kill(signal.SIGTERM) == 0


def test_a_path_that_is_served_already_is_left_alone(keeper: KeeperProcess, capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "vtpm_instance.keeper", "--socket", str(keeper.path)]
    run = subprocess.run(command, capture_output=True, check=False, cwd=Path(__file__).parent.parent, text=True)
    assert run.returncode == EXIT_BUSY
    assert "already serves" in run.stderr
    assert isinstance(keeper.client.call(List())[0], ListReply)


def test_a_socket_that_a_dead_keeper_left_is_replaced() -> None:
    with short_directory() as directory:
        first = KeeperProcess(directory)
        first.process.kill()
        first.process.wait()
        first.client.close()
        assert first.path.exists()
        KeeperProcess(directory).close()


def test_a_keeper_whose_socket_is_gone_already_ends_as_any_other() -> None:
    with running_keeper() as keeper:
        keeper.path.unlink()
        keeper.process.send_signal(signal.SIGTERM)
        assert keeper.process.wait(DEADLINE) == 0, keeper.log.read_text()


def test_a_keeper_that_ends_leaves_the_socket_of_the_one_that_came_in_its_place() -> None:
    """Who finds that nobody listens removes the socket and starts another keeper, which would be lost without it."""
    with running_keeper() as keeper:
        keeper.path.unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as next_one:
            next_one.bind(str(keeper.path))
            keeper.process.send_signal(signal.SIGTERM)
            assert keeper.process.wait(DEADLINE) == 0, keeper.log.read_text()
            assert keeper.path.exists()


def test_without_a_socket_path_it_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "--socket" in capsys.readouterr().err
