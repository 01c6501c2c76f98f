"""The front end `xen`: what an instance does for whoever passes a Xen guest's commands on."""

import hashlib
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from test_vtpm_instance_emulator import send_to_sleep, wake
from vtpm_instance_commands import authorised, command12, get_random, pcr_extend, pcr_read, rc
from vtpm_instance_rig import Bench, running_keeper

from frontend_backend.front import RingFrontEnd
from frontend_backend.tpmhdr import command
from frontend_backend.tpmif import PAGE_SIZE

OK = 0
RC_LOCALITY, BAD_LOCALITY, RC_SIZE = 0x907, 0x3D, 0x95
BAD_ORDINAL, DEACTIVATED = 0x0A, 0x06
Make = Callable[..., Bench]
ALL, ZERO_AND_TWO = 0b11111, 0b101
EXIT_INTEGRITY = 6


@contextmanager
def guest_of(family: str = "2.0", **terms: Any) -> Iterator[tuple[Bench, RingFrontEnd]]:
    with running_keeper() as keeper:
        startup = terms.pop("startup", "clear")
        bench = Bench(keeper, family=family, frontend="xen", terms=terms)
        bench.spawn(startup)
        with RingFrontEnd.connect(str(bench.ring_path)) as ring:
            yield bench, ring
        bench.close()


def extend12(pcr: int) -> bytes:
    return command12(0x14, struct.pack(">I", pcr) + b"\x11" * 20)


def reset12(pcr: int) -> bytes:
    return command12(0xC8, struct.pack(">H", 3) + (1 << pcr).to_bytes(3, "little"))


def reset20(pcr: int) -> bytes:
    return authorised(0x13D, struct.pack(">I", pcr))


def test_a_guest_has_locality_0_and_no_other_unless_its_attachment_says_so() -> None:
    with guest_of() as (_, ring):
        assert rc(ring.transact(get_random(), timeout=10)) == OK
        for locality in (1, 2, 3, 4, 5, 31, 32, 255):
            assert rc(ring.transact(get_random(), locality=locality, timeout=10)) == RC_LOCALITY
        assert rc(ring.transact(pcr_extend(17), timeout=10)) == RC_LOCALITY, "libtpms' own answer to locality 0"


# PC Client Platform TPM Profile, 4.6.2: who may extend and reset which PCR, here as libtpms has it
EXTENDS_20 = {17: (2, 3, 4), 18: (2, 3, 4), 19: (2, 3), 20: (1, 2, 3), 21: (2,), 22: (2,)}
RESETS_20 = {17: (), 18: (), 19: (), 20: (2,), 21: (2,), 22: (2,)}
EXTENDS_12 = {17: (2, 3, 4), 18: (2, 3, 4), 19: (2, 3), 20: (1, 2, 3), 21: (2,), 22: (2,)}
RESETS_12 = {17: (4,), 18: (4,), 19: (4,), 20: (2, 4), 21: (2,), 22: (2,)}


@pytest.mark.parametrize(
    ("family", "extend", "reset", "extends", "resets", "refused"),
    [
        ("2.0", pcr_extend, reset20, EXTENDS_20, RESETS_20, {RC_LOCALITY}),
        ("1.2", extend12, reset12, EXTENDS_12, RESETS_12, {BAD_LOCALITY, 0x33}),
    ],
)
def test_localities_that_are_allowed_reach_the_tpm(
    family: str,
    extend: Callable[[int], bytes],
    reset: Callable[[int], bytes],
    extends: dict[int, tuple[int, ...]],
    resets: dict[int, tuple[int, ...]],
    refused: set[int],
) -> None:
    with guest_of(family, localities=ALL) as (_, ring):
        for locality in range(5):
            for pcr in range(17, 23):
                for make, table in ((extend, extends), (reset, resets)):
                    code = rc(ring.transact(make(pcr), locality=locality, timeout=10))
                    assert code == OK if locality in table[pcr] else code in refused, (make, pcr, locality, hex(code))


def test_a_map_of_localities_is_kept_to_bit_by_bit() -> None:
    with guest_of(localities=ZERO_AND_TWO) as (_, ring):
        codes = [rc(ring.transact(get_random(), locality=locality, timeout=10)) for locality in range(6)]
        assert codes == [OK, RC_LOCALITY, OK, RC_LOCALITY, RC_LOCALITY, RC_LOCALITY]
        assert rc(ring.transact(pcr_extend(20), locality=2, timeout=10)) == OK
        assert ring.transact(pcr_read(20), timeout=10)[-32:] == hashlib.sha256(b"\xff" * 32 + b"\x11" * 32).digest()


def test_commands_and_answers_of_libtpms_whole_buffer_cross_a_ring_of_two_pages() -> None:
    with guest_of("1.2") as (bench, ring):
        assert len(ring.ring.page) == 2 * PAGE_SIZE
        # TPM_NV_DATA_PUBLIC (TPM 1.2 Part 2, 19.3) of an index that everybody may read and write
        pcrs = struct.pack(">H3sB20s", 3, bytes(3), 0x1F, bytes(20))
        public = struct.pack(">HI", 0x18, 0x1234) + pcrs * 2 + struct.pack(">HI3sI", 0x17, 2, bytes(3), 4080)
        assert rc(ring.transact(command12(0xCC, public + bytes(20)), timeout=10)) == OK
        content = bytes(index % 251 for index in range(4074))
        write = command12(0xCD, struct.pack(">III", 0x1234, 0, len(content)) + content)
        assert len(write) == 4096
        assert rc(ring.transact(write, timeout=10)) == OK
        # the page says for each command how long its answer may be: with extra pages up to libtpms' 4096 bytes
        read = command12(0xCF, struct.pack(">III", 0x1234, 0, 4080))
        ring.begin(read, extra_pages=1)
        answer = ring.wait(10)
        assert len(answer) == 4094
        assert answer[14:-6] == content
        assert rc(ring.transact(read, timeout=10)) == 0x17, "no room for the answer: an error, and the vTPM goes on"
        assert rc(bench.run(command12(0x50))) == OK


@pytest.mark.parametrize("size", [4097, 8180])
def test_what_libtpms_cannot_take_is_refused_before_it_is_copied(size: int) -> None:
    with guest_of() as (_, ring):
        assert rc(ring.transact(command(0x17B, bytes(size - 10)), timeout=10)) == 0x142
        assert rc(ring.transact(get_random(), timeout=10)) == OK


@pytest.mark.parametrize("allowed", [False, True])
def test_tpm_12_has_no_maintenance_commands_and_hears_of_none(allowed: bool) -> None:
    with guest_of("1.2", maintenance=allowed, trace=True) as (bench, ring):
        for ordinal in range(0x2C, 0x31):
            assert rc(ring.transact(command12(ordinal, bytes(20)), timeout=10)) == BAD_ORDINAL
        assert rc(ring.transact(command12(0x50), timeout=10)) == OK
        assert "command 0x0000002c, 30 bytes, locality 0: answered 0xa, 10 bytes" in bench.keeper.log.read_text()


def test_tracing_names_commands_and_never_what_is_in_them() -> None:
    with guest_of(trace=True) as (bench, ring):
        secret = b"do not log this password, please"
        assert rc(ring.transact(command(0x146, struct.pack(">H", len(secret)) + secret), timeout=10)) == OK
        answer = ring.transact(get_random(16), timeout=10)
        ring.transact(get_random(16), locality=3, timeout=10)
        log = bench.keeper.log.read_bytes()
        assert b"command 0x00000146, 44 bytes, locality 0: answered 0x0, 10 bytes" in log
        assert b"command 0x0000017b, 12 bytes, locality 3: answered 0x907, 10 bytes" in log
        assert secret not in log
        assert secret.hex().encode() not in log
        assert answer[12:].hex().encode() not in log


def test_a_tpm_12_that_starts_up_deactivated_is_so_again_after_a_reset() -> None:
    with guest_of("1.2", startup="deactivated") as (bench, ring):
        for _ in range(2):
            assert rc(ring.transact(command12(0x15, struct.pack(">I", 1)), timeout=10)) == DEACTIVATED
            flags = ring.transact(command12(0x65, struct.pack(">III", 4, 4, 0x109)), timeout=10)
            assert flags[16] == 1, "TPM_STCLEAR_FLAGS.deactivated"
            bench.record.startup = "clear"  # what a manager says from the second Load on
            assert bench.reset_platform() == OK


@pytest.mark.parametrize(("end", "startup"), [(signal.SIGKILL, "failed"), (signal.SIGTERM, "state")])
def test_it_is_deactivated_after_a_reset_too_where_it_came_up_otherwise(end: int, startup: str) -> None:
    with guest_of("1.2", startup="deactivated") as (bench, _):
        bench.record.after_reset = "deactivated"
        bench.kill(end)
        bench.spawn(startup)
        assert bench.reset_platform() == OK
        with RingFrontEnd.connect(str(bench.ring_path)) as ring:
            assert rc(ring.transact(command12(0x15, struct.pack(">I", 1)), timeout=10)) == DEACTIVATED


def test_a_ring_of_two_pages_survives_hibernation() -> None:
    with guest_of(localities=ZERO_AND_TWO) as (bench, ring):
        assert rc(ring.transact(pcr_extend(20), locality=2, timeout=10)) == OK
        assert send_to_sleep(bench) == 1, "the ring is kept for the one that wakes"
        ring.begin(command(0x17B, bytes(4086)))
        wake(bench)
        assert rc(ring.wait(10)) == RC_SIZE, "a command of 4096 bytes that was submitted while it slept"
        assert rc(ring.transact(pcr_extend(20), locality=2, timeout=10)) == OK
        assert rc(ring.transact(get_random(), locality=1, timeout=10)) == RC_LOCALITY


def test_a_tpm_20_is_never_deactivated_and_says_why() -> None:
    with running_keeper() as keeper:
        bench = Bench(keeper, family="2.0", frontend="xen")
        bench.spawn("deactivated")
        assert bench.wait_for_end() == EXIT_INTEGRITY
        assert "only a TPM 1.2" in bench.record.reports[-1].text
