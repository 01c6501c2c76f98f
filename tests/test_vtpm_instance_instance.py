"""One instance end to end: a real keeper, a real instance, real libtpms, a real ring."""

import fcntl
import hashlib
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from vtpm_instance_rig import (
    GET_TEST_RESULT,
    SHUTDOWN_CLEAR,
    Bench,
    KeeperProcess,
    command12,
    extended,
    get_random,
    nv_content,
    nv_define,
    nv_read,
    nv_write,
    page_state,
    pcr_extend,
    pcr_read,
    rc,
    receive_response,
    running_keeper,
    transact,
    until,
)

from frontend_backend.messages_instance import InstanceState, Orders, RefusalCode
from frontend_backend.tpmif import RingState

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


def test_a_fresh_vtpm_serves_and_its_first_state_is_committed_before_it_is_ready(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    assert bench.record.states == [InstanceState.READY]
    assert (bench.record.generation, bench.record.fresh) == (1, False)
    with bench.data() as sock:
        assert rc(transact(sock, get_random(16))) == 0
        assert rc(transact(sock, pcr_extend(16))) == 0
        assert transact(sock, pcr_read(16))[-32:] == extended(b"\x11" * 32)


def test_each_nv_write_is_one_commit_and_a_read_is_none(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    before = bench.record.commits
    with bench.data() as sock:
        assert rc(transact(sock, nv_define(INDEX, 8))) == 0
        assert rc(transact(sock, nv_write(INDEX, b"acknowle"))) == 0
        assert bench.record.commits == before + 2
        assert nv_content(transact(sock, nv_read(INDEX, 8))) == b"acknowle"
    assert bench.record.commits == before + 2


def test_a_clean_stop_then_startup_state_keeps_nv_and_pcrs(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    with bench.data() as sock:
        transact(sock, nv_define(INDEX, 4))
        transact(sock, nv_write(INDEX, b"kept"))
        transact(sock, pcr_extend(7))
    assert bench.kill(signal.SIGTERM) == 0
    assert bench.record.resumable
    assert bench.record.states[-1] is InstanceState.STOPPED
    bench.record.lease += 1
    bench.spawn("state")
    assert bench.record.states == [InstanceState.READY]
    assert bench.run(pcr_read(7))[-32:] == extended(b"\x11" * 32)
    assert nv_content(bench.run(nv_read(INDEX, 4))) == b"kept"


def test_an_order_to_stop_is_a_clean_stop(make_bench: MakeBench) -> None:
    bench = make_bench()
    manager = bench.spawn()
    before = bench.record.commits
    manager.give(Orders.STOP)
    assert bench.wait_for_end() == 0
    assert (bench.record.resumable, bench.record.commits) == (True, before + 1)


def test_startup_state_refused_is_failure_until_reset_and_never_a_silent_clear(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    assert rc(bench.run(SHUTDOWN_CLEAR)) == 0
    assert bench.kill(signal.SIGTERM) == 0
    bench.spawn("state")
    assert bench.record.states == [InstanceState.NEEDS_RESET]
    assert bench.record.reports[0].reason == "startup-refused"
    assert rc(bench.run(get_random())) == 0x101
    assert bench.reset_platform() == 0
    assert rc(bench.run(get_random())) == 0


def test_without_startup_the_tpm_waits_for_the_guests_own(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn("none")
    assert rc(bench.run(get_random())) == 0x100
    assert bench.kill(signal.SIGTERM) == 0


@pytest.mark.parametrize("after", [0.0, 0.002, 0.005, 0.01])
def test_every_acknowledged_write_survives_kill_9_and_pcrs_cannot_be_forged(
    make_bench: MakeBench, after: float
) -> None:
    bench = make_bench()
    bench.spawn()
    assert rc(bench.run(nv_define(INDEX, 8))) == 0
    assert rc(bench.run(pcr_extend(7))) == 0
    for _ in range(5):
        acknowledged = written = 0
        started = time.monotonic()
        with bench.data() as sock:
            while time.monotonic() < started + after or written == 0:
                written += 1
                sock.sendall(nv_write(INDEX, written.to_bytes(8)))
                if time.monotonic() < started + after and rc(receive_response(sock)) == 0:
                    acknowledged = written
            signal.pidfd_send_signal(bench.pidfd, signal.SIGKILL)
        assert bench.wait_for_end() == -signal.SIGKILL
        bench.record.lease += 1
        bench.spawn("failed")
        assert bench.record.reports[0].state is InstanceState.NEEDS_RESET
        assert bench.record.reports[0].reason == "crashed-before"
        assert [rc(bench.run(packet)) for packet in (pcr_read(7), nv_read(INDEX, 8), GET_TEST_RESULT)] == [0x101] * 3
        assert bench.reset_platform() == 0
        if acknowledged:
            assert acknowledged <= int.from_bytes(nv_content(bench.run(nv_read(INDEX, 8)))) <= written
        assert bench.run(pcr_read(7))[-32:] == bytes(32)


def test_a_silent_manager_leaves_the_command_pending_then_failure_then_a_reset_brings_the_right_state(
    make_bench: MakeBench,
) -> None:
    bench = make_bench()
    bench.record.commit_timeout = 0.3
    manager = bench.spawn()
    with bench.data() as sock:
        transact(sock, nv_define(INDEX, 4))
        transact(sock, nv_write(INDEX, b"old!"))
        manager.set_silent(True)
        assert rc(transact(sock, nv_write(INDEX, b"new!"))) == 0x101
        assert rc(transact(sock, get_random())) == 0x101
        assert bench.reset_platform() == 9
        manager.set_silent(False)
        assert bench.reset_platform() == 0
        assert nv_content(transact(sock, nv_read(INDEX, 4))) == b"old!"
        assert rc(transact(sock, nv_write(INDEX, b"more"))) == 0
    until(lambda: bench.record.states[1:][-1:] == [InstanceState.READY], "the report after the reset")


def test_no_command_of_a_guest_gets_into_the_log_when_it_fails(make_bench: MakeBench) -> None:
    bench = make_bench()
    manager = bench.spawn()
    with bench.data() as sock:
        transact(sock, nv_define(INDEX, 6))
        manager.refuse = RefusalCode.STORE_FAILED
        assert rc(transact(sock, nv_write(INDEX, b"secret"))) == 0x101
    log = bench.keeper.log.read_text()
    assert f"vtpm {bench.record.vtpm}: failed" in log  # the log is the right one
    assert "Entered failure mode" not in log  # what libtpms says before it writes the command out
    assert b"secret".hex(" ") not in log


def test_a_commit_that_was_recorded_but_not_acknowledged_counts_after_the_reset(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.record.commit_timeout = 0.3
    manager = bench.spawn()
    with bench.data() as sock:
        transact(sock, nv_define(INDEX, 4))
        transact(sock, nv_write(INDEX, b"old!"))
        manager.set_mute(mute=True)
        assert rc(transact(sock, nv_write(INDEX, b"new!"))) == 0x101
        manager.set_mute(mute=False)
        assert bench.reset_platform() == 0
        assert nv_content(transact(sock, nv_read(INDEX, 4))) == b"new!"


def test_a_manager_replaced_while_a_commit_is_pending_is_a_pause_and_no_error(
    make_bench: MakeBench, keeper: KeeperProcess
) -> None:
    bench = make_bench()
    manager = bench.spawn()
    with bench.data() as sock:
        transact(sock, nv_define(INDEX, 4))
        manager.set_silent(True)
        sock.sendall(nv_write(INDEX, b"save"))
        until(lambda: page_state(manager.ring) == RingState.SUBMIT, "the commit is on the page")
        manager.close()
        keeper.reconnect()
        bench.fetch()
        assert rc(receive_response(sock)) == 0
        assert nv_content(transact(sock, nv_read(INDEX, 4))) == b"save"


def test_a_refused_commit_is_failure_until_a_reset(make_bench: MakeBench) -> None:
    bench = make_bench()
    manager = bench.spawn()
    manager.refuse = RefusalCode.STORE_FAILED
    assert rc(bench.run(nv_define(INDEX, 4))) == 0x101
    manager.refuse = None
    until(lambda: bench.record.states[-1] is InstanceState.NEEDS_RESET, "the report")
    manager.give(Orders.RESET)
    until(lambda: bench.record.states[-1] is InstanceState.READY, "the reset")
    assert rc(bench.run(nv_read(INDEX, 4))) == 0x18B  # TPM_RC_HANDLE: the index was never acknowledged


def test_an_unavailable_manager_is_asked_again(make_bench: MakeBench) -> None:
    bench = make_bench()
    manager = bench.spawn()
    manager.refuse = RefusalCode.UNAVAILABLE
    with bench.data() as sock:
        sock.sendall(nv_define(INDEX, 4))
        until(lambda: manager.refused >= 2, "a second attempt")
        manager.refuse = None
        assert rc(receive_response(sock)) == 0


def test_a_stop_while_the_manager_is_away_does_not_take_the_whole_deadline_away_from_the_guest(
    make_bench: MakeBench,
) -> None:
    bench = make_bench()
    bench.record.commit_timeout = 0.3
    manager = bench.spawn()
    generation = bench.record.generation
    manager.set_silent(True)
    assert bench.kill(signal.SIGTERM) == 1
    assert (bench.record.generation, bench.record.resumable) == (generation, False)


def test_a_damaged_slot_is_reported_and_every_byte_is_kept(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    assert bench.kill(signal.SIGTERM) == 0
    damaged = bytearray(bench.image.read_bytes())
    for slot in (0, 1):
        damaged[4096 + slot * 16384 + 600] ^= 1
    bench.image.write_bytes(damaged)
    bench.spawn("state")
    assert bench.wait_for_end() == 6
    assert bench.record.states == [InstanceState.FAILED]
    assert bench.record.reports[0].reason == "no-matching-slot"
    assert bench.image.read_bytes() == damaged


def test_a_key_that_does_not_fit_is_reported(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    assert bench.kill(signal.SIGTERM) == 0
    bench.record.key = bytes(32)
    bench.spawn("state")
    assert bench.wait_for_end() == 6
    assert bench.record.reports[0].reason == "key-mismatch"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [("lease", 77, "wrong-lease"), ("family", "1.2", "wrong-family"), ("vtpm", UUID(int=5), "wrong-vtpm")],
)
def test_a_record_that_is_not_this_instances_is_refused(
    make_bench: MakeBench, field: str, value: object, reason: str
) -> None:
    bench = make_bench()
    kept = bench.record.vtpm, bench.record.lease
    bench.spawn(record_says={field: value})
    bench.record.vtpm, bench.record.lease = kept
    assert bench.wait_for_end() == 6
    assert bench.record.reports[0].reason == reason


def test_an_image_locked_by_another_open_file_is_refused(make_bench: MakeBench) -> None:
    bench = make_bench()
    with bench.image.open("rb") as other:
        bench.spawn(before=lambda: fcntl.flock(other, fcntl.LOCK_EX), lock=False)
        assert bench.wait_for_end() == 6
    assert bench.record.reports[0].reason == "image-busy"


def test_the_lock_on_the_image_dies_with_the_instance(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    with bench.image.open("rb") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        bench.kill()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_no_room_is_nv_unavailable_then_works_when_there_is_room_and_nothing_is_lost(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    size = bench.image.stat().st_size
    resource.prlimit(bench.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    with bench.data() as sock:
        written = 0
        while (code := rc(transact(sock, nv_define(INDEX + written, 1024)))) == 0:
            content = bytes([written]) * 1024
            if (code := rc(transact(sock, nv_write(INDEX + written, content)))) != 0:
                break
            written += 1
        assert (code, written > 0) == (0x923, True)
        assert rc(transact(sock, get_random())) == 0
        assert rc(transact(sock, nv_write(INDEX, b"no"))) == 0x923
        resource.prlimit(bench.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert rc(transact(sock, nv_define(INDEX + 100, 2048))) == 0
        for number in range(written):
            assert nv_content(transact(sock, nv_read(INDEX + number, 1024))) == bytes([number]) * 1024
    assert bench.image.stat().st_size > size
    assert bench.record.states == [InstanceState.READY]


def test_siblings_draw_different_random_numbers(make_bench: MakeBench) -> None:
    drawn = set()
    twin = make_bench()
    twin.spawn()
    assert twin.kill(signal.SIGTERM) == 0
    stored = twin.image.read_bytes()
    for _ in range(3):
        bench = make_bench()
        bench.spawn()
        drawn.add(bench.run(get_random()))
    for _ in range(3):
        # the very same state, key and generation each time
        twin.image.write_bytes(stored)
        copy = replace(twin.record)
        twin.spawn("state")
        drawn.add(twin.run(get_random()))
        twin.kill()
        twin.record = copy
    assert len(drawn) == 6


def test_a_platform_reset_clears_pcrs_and_keeps_nv(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    with bench.data() as sock:
        transact(sock, nv_define(INDEX, 4))
        transact(sock, nv_write(INDEX, b"kept"))
        transact(sock, pcr_extend(7))
        assert bench.reset_platform() == 0
        assert transact(sock, pcr_read(7))[-32:] == bytes(32)
        assert nv_content(transact(sock, nv_read(INDEX, 4))) == b"kept"


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
    assert bench.control(struct.pack(">I", 1), 8) == struct.pack(">II", 0, 0x29)
    assert bench.control(struct.pack(">IB", 5, 0)) == bytes(4)
    assert bench.control(struct.pack(">IB", 5, 3)) == struct.pack(">I", 0x3D)
    assert bench.control(struct.pack(">I", 9)) == bytes(4)
    assert bench.control(struct.pack(">I", 3)) == struct.pack(">I", 0xA)
    assert bench.control(struct.pack(">IIII", 0xD, 0, 1, 4) + b"abcd") == struct.pack(">I", 0xA)


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


def test_an_instance_has_no_stray_descriptors_its_own_user_and_no_rights(make_bench: MakeBench) -> None:
    neighbour = make_bench()
    neighbour.spawn()
    bench = make_bench()
    bench.uid = 4321
    bench.spawn()
    proc = Path(f"/proc/{bench.pid}")
    with bench.data() as sock:
        assert rc(transact(sock, get_random())) == 0
        targets = [os.readlink(entry) for entry in (proc / "fd").iterdir()]
    kinds = sorted(target.split(":")[0] if ":" in target else target for target in targets)
    # one connection, three listeners, the doorbell; the mapping of the ring's page keeps a descriptor of its own
    expected = [*["pipe"] * 2, *["socket"] * 5, "/memfd", str(bench.image), "/dev/null", str(bench.keeper.log)]
    standard_output = os.readlink(proc / "fd/1").split(":")[0]
    assert kinds == sorted([*expected, standard_output])
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    assert status["Name"] == "vtpm-instance"
    assert status["Uid"].split() == ["4321"] * 4
    assert status["Gid"].split() == ["4321"] * 4
    assert status["Groups"].split() == []
    assert (status["NoNewPrivs"], int(status["CapEff"], 16), status["Threads"]) == ("1", 0, "1")
    assert os.getsid(bench.pid) == bench.pid
    limits = (proc / "limits").read_text()
    assert "Max core file size        0                    0 " in limits


def test_a_tpm_12_starts_up_extends_and_keeps_pcrs_over_a_clean_stop(make_bench: MakeBench) -> None:
    bench = make_bench(family="1.2")
    bench.spawn()
    value = hashlib.sha1(bytes(20) + b"\x01" * 20).digest()
    with bench.data() as sock:
        assert rc(transact(sock, command12(0x14, struct.pack(">I", 10) + b"\x01" * 20))) == 0
        assert transact(sock, command12(0x15, struct.pack(">I", 10)))[10:] == value
    assert bench.kill(signal.SIGTERM) == 0
    bench.spawn("state")
    assert bench.record.states == [InstanceState.READY]
    assert bench.run(command12(0x15, struct.pack(">I", 10)))[10:] == value
    bench.kill()
    bench.spawn("failed")
    assert rc(bench.run(command12(0x15, struct.pack(">I", 10)))) == 9
    assert bench.reset_platform() == 0
    assert bench.run(command12(0x15, struct.pack(">I", 10)))[10:] == bytes(20)


def test_tpm2_tools_and_swtpm_ioctl_work_as_with_swtpm(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    environment = {**os.environ, "TPM2TOOLS_TCTI": f"swtpm:path={bench.data_path}"}

    def run(*arguments: str) -> str:
        done = subprocess.run(arguments, env=environment, capture_output=True, check=True, text=True)
        return done.stdout.strip()

    run("tpm2_pcrextend", f"7:sha256={'11' * 32}")
    assert extended(b"\x11" * 32).hex() in run("tpm2_pcrread", "sha256:7").lower()
    assert run("swtpm_ioctl", "--unix", str(bench.control_path), "-c") == "ptm capability is 0x29"
    run("swtpm_ioctl", "--unix", str(bench.control_path), "-i")
    assert "00" * 32 in run("tpm2_pcrread", "sha256:7")
