"""Compatibility mode between the commands of Linux' xen-tpmfront (as bytes of its source) and a real TPM 2.0."""

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vtpm_instance_commands import STARTUP_CLEAR, command12, get_random, pcr_read, rc

from frontend_backend.tpmhdr import Tag, TpmFamily, command
from frontend_backend.xen_compat import DISABLED, Rewritten, inspect
from vtpm_instance.libtpms import Tpm, the_tpm

RETRY, FAIL = 0x800, 9


@dataclass
class Guest:
    """A guest behind the mode; `passed` is what reached the vTPM."""

    tpm: Tpm
    passed: int = 0

    def send(self, packet: bytes) -> bytes:
        match inspect(packet, 0):
            case bytes() as answer:
                return answer
            case Rewritten(request, answer):
                self.passed += 1
                return answer(self.tpm.process(request))
            case None:
                self.passed += 1
                return self.tpm.process(packet)

    def send_12(self, code: int, body: bytes = b"") -> bytes:
        """The answer's body, of an answer that Linux takes for good."""
        answer = self.send(command12(code, body))
        tag, size, result = struct.unpack_from(">HII", answer)
        assert (tag, size, result) == (0xC4, len(answer), 0), answer.hex()
        return answer[10:]


@pytest.fixture
def guest() -> Iterator[Guest]:
    tpm = the_tpm()
    tpm.start(TpmFamily.TPM_2_0, {}, fresh=True)
    assert rc(tpm.process(STARTUP_CLEAR)) == 0
    yield Guest(tpm)
    tpm.terminate()


def get_capability(guest: Guest, area: int, wanted: int | None = None) -> bytes:
    sub = struct.pack(">II", 4, wanted) if wanted is not None else struct.pack(">I", 0)
    body = guest.send_12(0x65, struct.pack(">I", area) + sub)
    assert int.from_bytes(body[:4]) == len(body) - 4
    return body[4:]


def test_the_drivers_probes_are_answered_without_the_vtpm(guest: Guest) -> None:
    """tpm1_get_timeouts: values it neither has to adjust nor to complain about; in microseconds."""
    timeouts = struct.unpack(">4I", get_capability(guest, 5, 0x115))
    assert min(timeouts) >= 1000
    durations = struct.unpack(">3I", get_capability(guest, 5, 0x120))
    assert min(durations) >= 1_000_000
    for code, body in ((0x53, b""), (0x50, b""), (0x99, b"\0\1"), (0x98, b"")):
        assert guest.send_12(code, body) == b""
    assert guest.passed == 0


def test_sysfs_reads_what_its_structures_need(guest: Guest) -> None:
    """tpm-sysfs.c: the least sizes of its capabilities, or the driver says -EFAULT."""
    for area, wanted, least in ((5, 0x101, 4), (5, 0x103, 4), (5, 0x111, 1), (4, 0x108, 22), (4, 0x109, 7)):
        assert len(get_capability(guest, area, wanted)) >= least
    assert get_capability(guest, 5, 0x101) == (24).to_bytes(4)
    assert get_capability(guest, 0x1A)[2:4] == b"\1\2"
    assert len(get_capability(guest, 6)) == 4
    assert not any(get_capability(guest, 4, 0x108)[2:])  # neither disabled nor deactivated: PCRs and numbers do work


def test_random_numbers_are_the_vtpms(guest: Guest) -> None:
    for wanted, most in ((32, 32), (128, 64), (64, 64), (0, 0), (0xFFFF_FFFF, 64)):
        body = guest.send_12(0x46, wanted.to_bytes(4))
        (count,) = struct.unpack_from(">I", body)
        assert count == len(body) - 4 <= most
        assert count > 0 or most == 0
    assert guest.send_12(0x46, (32).to_bytes(4)) != guest.send_12(0x46, (32).to_bytes(4))
    assert guest.passed == 7


def test_pcrs_are_those_of_the_sha1_bank_and_an_extend_reaches_every_bank(guest: Guest) -> None:
    digest = os.urandom(20)
    assert guest.send_12(0x15, (10).to_bytes(4)) == bytes(20)
    assert len(guest.send_12(0x14, (10).to_bytes(4) + digest)) == 20
    assert guest.send_12(0x15, (10).to_bytes(4)) == hashlib.sha1(bytes(20) + digest).digest()
    padded = digest.ljust(32, b"\0")
    assert guest.tpm.process(pcr_read(10))[-32:] == hashlib.sha256(bytes(32) + padded).digest()
    assert guest.send_12(0x15, (17).to_bytes(4)) == b"\xff" * 20
    # PCR 17 is not for locality 0: said as a TPM 1.2 says it
    assert rc(guest.send(command12(0x14, (17).to_bytes(4) + digest))) == FAIL
    assert rc(guest.send(command12(0x15, (24).to_bytes(4)))) == 3


def test_a_vtpm_that_fails_says_so_in_the_old_words(guest: Guest) -> None:
    rewritten = inspect(command12(0x46, (16).to_bytes(4)), 0)
    assert isinstance(rewritten, Rewritten)
    assert rc(rewritten.answer(command(0x101))) == FAIL
    assert rc(rewritten.answer(command(0x922))) == RETRY
    for odd in (b"", b"\x80\x01", command(0), command(0, b"\0\x20" + bytes(3)), command(0, b"\0\x11" + bytes(17))):
        assert rc(rewritten.answer(odd)) == FAIL
    guest.tpm.terminate()


@pytest.mark.parametrize("code", [0x7C, 0x0A, 0x0B, 0x1F, 0xC8, 0x2C, 0x14C])
def test_everything_else_of_a_tpm_1_2_is_refused_as_linux_keeps_to_itself(code: int) -> None:
    """tpm_transmit_cmd logs no "A TPM error" of TPM_DISABLED: an owner, keys and NV of a TPM 1.2 are not there."""
    answer = inspect(command12(code, bytes(20)), 0)
    assert answer == command(DISABLED, b"", Tag.TPM12_RESPONSE)
    assert inspect(command(code, bytes(65), 0xC2), 0) == answer
    assert inspect(command(0x46, bytes(4), 0xC3), 0) == answer


def test_malformed_ones_are_refused_here_and_what_is_no_tpm_1_2_command_is_not_touched(guest: Guest) -> None:
    for code, body in ((0x65, b""), (0x65, bytes(4)), (0x65, struct.pack(">II", 5, 9) + bytes(4)), (0x46, b""),
                       (0x15, bytes(3)), (0x14, bytes(23))):  # fmt: skip
        assert rc(guest.send(command12(code, body))) == 0x19
    assert guest.passed == 0
    for packet in (get_random(), pcr_read(0), STARTUP_CLEAR, b"", b"\0\xc1", command12(0x46, bytes(4)) + b"x"):
        assert inspect(packet, 0) is None


@given(st.binary(max_size=60), st.sampled_from([0xC1, 0xC2, 0xC3, 0x8001, 0x8002, 0xC4]), st.integers(0, 0xFF))
def test_no_bytes_break_it_and_no_answer_of_a_tpm_2_0_is_changed(body: bytes, tag: int, code: int) -> None:
    found = inspect(command(code, body, tag), 0)
    if tag not in (0xC1, 0xC2, 0xC3):
        assert found is None
    elif isinstance(found, Rewritten):
        assert int.from_bytes(found.request[:2]) in (0x8001, 0x8002)
        answer = found.answer(body)
        assert (answer[:2], int.from_bytes(answer[2:6])) == (b"\0\xc4", len(answer))
    else:
        assert found is not None
        assert (found[:2], int.from_bytes(found[2:6])) == (b"\0\xc4", len(found))
