"""The save path end to end: crashes, a manager that is away or replaced, a full disk."""

import resource
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from vtpm_instance_commands import (
    GET_TEST_RESULT,
    extended,
    get_random,
    nv_content,
    nv_define,
    nv_read,
    nv_write,
    pcr_extend,
    pcr_read,
    rc,
)
from vtpm_instance_manager import page_state, until
from vtpm_instance_rig import Bench, KeeperProcess, receive_response, running_keeper, transact

from frontend_backend.messages_instance import InstanceState, RefusalCode
from frontend_backend.orders import Orders
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


def test_no_room_is_nv_unavailable_for_what_grows_and_nothing_else_is_lost(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.spawn()
    size = bench.image.stat().st_size
    hard = resource.prlimit(bench.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(bench.pid, resource.RLIMIT_FSIZE, (size, hard))
    with bench.data() as sock:
        defined = 0
        while (code := rc(transact(sock, nv_define(INDEX + defined, 1024)))) == 0:
            defined += 1
        assert (code, defined > 0) == (0x923, True)
        for number in range(defined):
            assert rc(transact(sock, nv_write(INDEX + number, bytes([number]) * 1024))) == 0
        assert rc(transact(sock, pcr_extend(7))) == 0
        assert rc(transact(sock, nv_define(INDEX + defined, 8))) == 0x923
    assert bench.kill(signal.SIGTERM) == 0
    assert bench.image.stat().st_size == size
    bench.spawn("state")
    with bench.data() as sock:
        assert transact(sock, pcr_read(7))[-32:] == extended(b"\x11" * 32)
        for number in range(defined):
            assert nv_content(transact(sock, nv_read(INDEX + number, 1024))) == bytes([number]) * 1024
        assert rc(transact(sock, nv_define(INDEX + defined, 1024))) == 0
    assert bench.image.stat().st_size > size
    assert bench.record.states == [InstanceState.READY]
