"""Evidence of a vTPM's PCRs, made by the real libtpms, and what its guest could notice of it."""

import hashlib
import struct
from collections.abc import Iterator

import pytest
from vtpm_instance_commands import authorised, extended, pcr_extend, rc, sized

from frontend_backend.deep_quote import Evidence
from frontend_backend.tpmhdr import TpmFamily, command
from manager.attest_wire import RH_NULL, VTPM_KEY_ATTRIBUTES, KeyPublic, QuoteAttest, pcr_digest, qualified_name, verify
from vtpm_instance import tpm_commands
from vtpm_instance.errors import QuoteRefusedError
from vtpm_instance.evidence import gather
from vtpm_instance.libtpms import Tpm, the_tpm

ALL = (1 << 24) - 1
_OWNER, _NULL, _ENDORSEMENT, _PLATFORM = 0x40000001, 0x40000007, 0x4000000B, 0x4000000C
_ECC = struct.pack(">HHIHHHHHH", 0x23, 0xB, 0x00050472, 0, 0x10, 0x18, 0xB, 3, 0x10) + sized(b"") + sized(b"")


@pytest.fixture
def tpm() -> Iterator[Tpm]:
    """A running TPM 2.0 in this process."""
    emulator = the_tpm()
    stored: list[str] = []
    emulator.start(TpmFamily.TPM_2_0, {}, lambda name, _content: stored.append(name), fresh=True)
    emulator.process(tpm_commands.startup(TpmFamily.TPM_2_0, tpm_commands.Startup.CLEAR))
    stored.clear()
    emulator.stored = stored  # type: ignore[attr-defined]
    try:
        yield emulator
    finally:
        emulator.terminate()


def evidence(tpm: Tpm, selection: int = ALL, nonce: bytes = b"nonce") -> Evidence:
    return gather(tpm.process, TpmFamily.TPM_2_0, nonce, selection, "libtpms")


def good(tpm: Tpm, packet: bytes) -> bytes:
    answer = tpm.process(packet)
    assert rc(answer) == 0, hex(rc(answer))
    return answer


def primary(tpm: Tpm, hierarchy: int = _OWNER) -> bytes:
    """Make a key; its handle."""
    return good(tpm, authorised(0x131, struct.pack(">I", hierarchy), sized(bytes(4)) + sized(_ECC) + bytes(6)))[10:14]


def handles(tpm: Tpm, first: int) -> bytes:
    return good(tpm, command(0x17A, struct.pack(">III", 1, first, 20)))[19:]


def check(made: Evidence, nonce: bytes = b"nonce") -> KeyPublic:
    key, quote = KeyPublic.unpack(made.public), QuoteAttest.unpack(made.attest)
    verify(made.signature, made.attest, key.point)
    assert key.attributes == VTPM_KEY_ATTRIBUTES
    assert (quote.extra, quote.selection, quote.signer) == (nonce, made.selection, qualified_name(RH_NULL, key.name))
    assert quote.pcr_digest == pcr_digest(made.values)
    return key


@pytest.mark.parametrize("selection", [1, 1 << 23, 0b1010101, 0x1FF, ALL])
def test_the_evidence_is_the_tpms_own_quote_over_the_values(tpm: Tpm, selection: int) -> None:
    good(tpm, pcr_extend(4, b"\x44" * 32))
    made = evidence(tpm, selection, b"n" * 64)
    check(made, b"n" * 64)
    assert len(made.values) == selection.bit_count()
    if selection >> 4 & 1:
        assert made.values[(selection & 0xF).bit_count()] == extended(b"\x44" * 32)
    assert Evidence.unpack(made.pack()) == made


def test_the_key_is_the_same_until_the_tpm_is_reset(tpm: Tpm) -> None:
    first = check(evidence(tpm))
    assert check(evidence(tpm)).area == first.area
    blobs = dict(tpm.blobs)
    tpm.terminate()
    tpm.start(TpmFamily.TPM_2_0, blobs)
    good(tpm, tpm_commands.startup(TpmFamily.TPM_2_0, tpm_commands.Startup.CLEAR))
    assert check(evidence(tpm)).area != first.area


def test_a_guest_notices_nothing_and_nothing_is_stored(tpm: Tpm) -> None:
    good(tpm, pcr_extend(4))
    key = primary(tpm)
    session = good(tpm, command(0x176, struct.pack(">II", _NULL, _NULL) + sized(bytes(16)) + b"\0\0\0\0\x10\0\x0b"))[
        10:14
    ]
    before = [handles(tpm, first) for first in (0x80000000, 0x02000000, 0x03000000, 0x81000000)]
    counter = good(tpm, command(0x17E, bytes.fromhex("00000001000b03ffffff")))[10:14]
    tpm.stored.clear()  # type: ignore[attr-defined]
    evidence(tpm)
    assert not tpm.stored  # type: ignore[attr-defined]
    assert [handles(tpm, first) for first in (0x80000000, 0x02000000, 0x03000000, 0x81000000)] == before
    assert good(tpm, command(0x17E, bytes.fromhex("00000001000b03ffffff")))[10:14] == counter
    good(tpm, command(0x173, key))
    good(tpm, command(0x165, session))


def test_objects_in_every_slot_come_back_under_their_handles(tpm: Tpm) -> None:
    first, second = primary(tpm), primary(tpm, _NULL)
    sequence = good(tpm, command(0x186, sized(b"") + b"\0\x0b"))[10:14]  # HashSequenceStart
    good(tpm, authorised(0x15C, sequence, sized(b"abc")))
    public = [good(tpm, command(0x173, handle)) for handle in (first, second)]
    assert rc(tpm.process(command(0x186, sized(b"") + b"\0\x0b"))) == 0x902  # no room left
    check(evidence(tpm))
    assert handles(tpm, 0x80000000) == first + second + sequence
    assert [good(tpm, command(0x173, handle)) for handle in (first, second)] == public
    done = good(tpm, authorised(0x13E, sequence, sized(b"def") + struct.pack(">I", _NULL)))
    assert done[16:48] == hashlib.sha256(b"abcdef").digest()
    third = primary(tpm)  # the slot is as free as it was
    check(evidence(tpm))
    assert handles(tpm, 0x80000000) == first + second + third


def test_passwords_and_switched_off_hierarchies_do_not_keep_it_from_being_made(tpm: Tpm) -> None:
    for hierarchy in (_OWNER, _ENDORSEMENT):
        good(tpm, authorised(0x129, struct.pack(">I", hierarchy), sized(b"secret")))
    for hierarchy in (_OWNER, _ENDORSEMENT):
        good(tpm, authorised(0x121, struct.pack(">I", _PLATFORM), struct.pack(">IB", hierarchy, 0)))
    check(evidence(tpm))


def test_a_bank_that_is_switched_off_is_told(tpm: Tpm) -> None:
    allocation = struct.pack(">IHB", 2, 0xB, 3) + bytes(3) + struct.pack(">HB", 4, 3) + b"\xff" * 3
    good(tpm, authorised(0x12B, struct.pack(">I", _PLATFORM), allocation))
    blobs = dict(tpm.blobs)
    tpm.terminate()
    tpm.start(TpmFamily.TPM_2_0, blobs)
    good(tpm, tpm_commands.startup(TpmFamily.TPM_2_0, tpm_commands.Startup.CLEAR))
    with pytest.raises(QuoteRefusedError, match="SHA-256 bank is not active"):
        evidence(tpm)


def test_a_tpm_that_was_not_started_up_gives_its_own_code(tpm: Tpm) -> None:
    blobs = dict(tpm.blobs)
    tpm.terminate()
    tpm.start(TpmFamily.TPM_2_0, blobs)
    with pytest.raises(QuoteRefusedError) as refused:
        evidence(tpm)
    assert refused.value.code == 0x100


def test_a_tpm_1_2_gives_its_values() -> None:
    emulator = the_tpm()
    emulator.start(TpmFamily.TPM_1_2, {}, fresh=True)
    try:
        emulator.process(tpm_commands.startup(TpmFamily.TPM_1_2, tpm_commands.Startup.CLEAR))
        good(emulator, command(0x14, (7).to_bytes(4) + b"\x07" * 20, 0xC1))
        made = gather(emulator.process, TpmFamily.TPM_1_2, b"n", 0x81, "libtpms")
    finally:
        emulator.terminate()
    assert made.values == (bytes(20), hashlib.sha1(bytes(20) + b"\x07" * 20).digest())
    assert not made.attest
