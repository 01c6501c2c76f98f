"""The sockets of a real instance: data channel, control channel, real clients."""

import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from tcp_bench import TcpBench
from vtpm_instance_commands import extended, get_random, pcr_extend, pcr_read, rc
from vtpm_instance_rig import (
    Bench,
    KeeperProcess,
    connect,
    receive_exactly,
    receive_response,
    running_keeper,
    transact,
)

from frontend_backend.front import RingFrontEnd

INDEX = 0x01500001
MakeBench = Callable[..., Bench]


@pytest.fixture(scope="module")
def keeper() -> Iterator[KeeperProcess]:
    with running_keeper() as process:
        yield process


@pytest.fixture
def make_bench(keeper: KeeperProcess) -> Iterator[MakeBench]:
    made: list[Bench] = []

    def make(**options: str) -> Bench:
        made.append(Bench(keeper, **options))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


def test_only_an_owner_may_reset_the_platform(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.owner_uid = 4242
    bench.spawn()
    bench.run(pcr_extend(7))
    script = (
        "import os, socket, sys; os.setresuid(*[int(sys.argv[2])] * 3); s = socket.socket(socket.AF_UNIX);"
        "s.connect(sys.argv[1]); s.sendall(bytes.fromhex('0000000200000000')); sys.stdout.write(s.recv(9).hex())"
    )

    def ask_as(uid: int) -> str:
        arguments = [sys.executable, "-I", "-c", script, str(bench.control_path), str(uid)]
        return subprocess.run(arguments, capture_output=True, check=True, text=True).stdout

    assert ask_as(4243) == "0000000a"
    assert bench.run(pcr_read(7))[-32:] == extended(b"\x11" * 32)
    assert ask_as(4242) == "00000000"
    assert bench.run(pcr_read(7))[-32:] == bytes(32)


def test_control_commands_over_the_socket(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    assert bench.control(struct.pack(">I", 1), 8) == struct.pack(">II", 0, 0xE82D)
    assert bench.control(struct.pack(">IB", 5, 0)) == bytes(4)
    assert bench.control(struct.pack(">IB", 5, 3)) == struct.pack(">I", 0x3D)
    assert bench.control(struct.pack(">I", 9)) == bytes(4)
    assert bench.control(struct.pack(">I", 3)) == struct.pack(">I", 0xA)
    assert bench.control(struct.pack(">IIII", 0xD, 0, 1, 4) + b"abcd") == struct.pack(">I", 0xA)


def test_over_tcp_both_channels_work_and_nobody_is_its_owner(keeper: KeeperProcess) -> None:
    bench = TcpBench(keeper)
    bench.spawn()
    with bench.connect() as data, bench.connect(1) as control:
        for cut in (1, 7, 12):
            data.sendall(get_random(8)[:cut])
            data.sendall(get_random(8)[cut:])
            assert rc(receive_response(data)) == 0
        assert rc(transact(data, pcr_extend(7))) == 0
        for request, answer in (("00000001", "000000000000e82d"), ("0000000500", "00000000"), ("00000009", "00000000")):
            control.sendall(bytes.fromhex(request))
            assert receive_exactly(control, len(answer) // 2).hex() == answer
        control.sendall(bytes.fromhex("00000002 00000000"))
        assert receive_exactly(control, 4).hex() == "0000000a", "no platform reset by whoever reaches the port"
        assert transact(data, pcr_read(7))[-32:] == extended(b"\x11" * 32)
    bench.close()


def test_split_and_pipelined_commands_work_and_the_last_answers_come_after_the_client_is_done(
    make_bench: MakeBench,
) -> None:
    bench = make_bench()
    bench.spawn()
    packet = get_random(8)
    with bench.data() as sock:
        for piece in (packet[:3], packet[3:11], packet[11:]):
            sock.sendall(piece)
        assert rc(receive_response(sock)) == 0
        sock.sendall(packet * 20)
        sock.shutdown(socket.SHUT_WR)
        assert {rc(receive_response(sock)) for _ in range(20)} == {0}
        assert sock.recv(1) == b""


@pytest.mark.parametrize("size", [0, 9, 4097, 0xFFFFFFFF])
def test_an_impossible_size_is_answered_and_the_connection_closed(make_bench: MakeBench, size: int) -> None:
    bench = make_bench()
    bench.spawn()
    with bench.data() as sock:
        sock.sendall(struct.pack(">HII", 0x8001, size, 0x17B) + b"xx")
        assert rc(receive_response(sock)) == 0x142
        assert sock.recv(1) == b""
    assert rc(bench.run(get_random())) == 0


def test_eight_connections_are_served_and_a_ninth_waits_its_turn(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    socks = [bench.data() for _ in range(9)]
    try:
        assert {rc(transact(sock, get_random(4))) for sock in socks[:8]} == {0}
        socks[8].sendall(get_random(4))
        socks.pop(0).close()
        assert rc(receive_response(socks[-1])) == 0
    finally:
        for sock in socks:
            sock.close()


def test_a_client_that_does_not_read_its_answers_does_not_disturb_another(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    with bench.data() as greedy, bench.data() as other:
        greedy.setblocking(False)
        packets = get_random(32) * 400
        with suppress(BlockingIOError):
            while greedy.send(packets):
                pass
        assert rc(transact(other, get_random())) == 0


def test_who_sends_many_commands_at_once_does_not_keep_the_others_waiting(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    many = 40
    values = [extended(*[b"\x11" * 32] * count) if count else bytes(32) for count in range(many + 1)]
    with bench.data() as greedy, bench.data() as other, RingFrontEnd.connect(str(bench.ring_path)) as ring:
        for sock in (greedy, other):
            assert rc(transact(sock, get_random())) == 0
        signal.pidfd_send_signal(bench.pidfd, signal.SIGSTOP)  # so that all of it is there when it looks
        greedy.sendall(pcr_extend(7) * many)
        other.sendall(pcr_read(7))
        ring.begin(pcr_read(7))
        signal.pidfd_send_signal(bench.pidfd, signal.SIGCONT)
        seen = [receive_response(other)[-32:], ring.wait(10)[-32:]]
        assert {rc(receive_response(greedy)) for _ in range(many)} == {0}
        assert transact(other, pcr_read(7))[-32:] == values[many]
    assert max(map(values.index, seen)) <= 2, "one request of each connection a turn"


def test_tpm2_tools_and_swtpm_ioctl_work_as_with_swtpm(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    environment = {**os.environ, "TPM2TOOLS_TCTI": f"swtpm:path={bench.data_path}"}

    def run(*arguments: str) -> str:
        done = subprocess.run(arguments, env=environment, capture_output=True, check=True, text=True)
        return done.stdout.strip()

    run("tpm2_pcrextend", f"7:sha256={'11' * 32}")
    assert extended(b"\x11" * 32).hex() in run("tpm2_pcrread", "sha256:7").lower()
    assert run("swtpm_ioctl", "--unix", str(bench.control_path), "-c") == "ptm capability is 0xe82d"
    run("swtpm_ioctl", "--unix", str(bench.control_path), "-i")
    assert "00" * 32 in run("tpm2_pcrread", "sha256:7")


def test_without_descriptors_new_connections_wait_and_the_others_go_on(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    with bench.data() as old:
        assert rc(transact(old, get_random())) == 0
        limits = resource.prlimit(bench.pid, resource.RLIMIT_NOFILE, (3, 64))
        with (
            bench.data() as data,
            connect(bench.control_path) as control,
            connect(bench.ring_path, socket.SOCK_SEQPACKET) as ring,
        ):
            assert rc(transact(old, pcr_extend(7))) == 0
            resource.prlimit(bench.pid, resource.RLIMIT_NOFILE, limits)
            assert transact(data, pcr_read(7))[-32:] == extended(b"\x11" * 32)
            control.sendall(struct.pack(">IB", 5, 0))
            assert control.recv(4) == bytes(4)
            assert ring.recv(64) == b"ring"
