"""One instance end to end: a real keeper, a real instance, real libtpms, a real ring."""

import fcntl
import hashlib
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from vtpm_instance_commands import (
    SHUTDOWN_CLEAR,
    command12,
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
from vtpm_instance_manager import until
from vtpm_instance_rig import Bench, KeeperProcess, running_keeper, transact

from frontend_backend.messages_instance import InstanceState, Report
from frontend_backend.orders import Orders

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


def test_a_report_of_idleness_still_says_that_quotes_can_be_ordered(make_bench: MakeBench) -> None:
    bench = make_bench()
    manager = bench.spawn()
    for _ in range(40):
        asked = len(bench.record.reports)
        manager.ring.ring()
        until(lambda before=asked: len(bench.record.reports) > before, "a report")
        if bench.record.reports[-1].reason == "idle":
            break
        time.sleep(0.05)
    assert bench.record.reports[-1] == Report(InstanceState.READY, "idle", quotes=True)


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
    # one connection, three listeners, the doorbell, and epoll; the ring's mapping keeps one of its own
    expected = [
        *["pipe"] * 2,
        *["socket"] * 5,
        "/memfd",
        str(bench.image),
        "/dev/null",
        "anon_inode",
        str(bench.keeper.log),
    ]
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
