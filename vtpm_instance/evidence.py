"""Makes the evidence of a vTPM's PCRs by TPM commands of our own, between two commands of the guest.

A TPM 2.0 signs by a key in its NULL hierarchy: no guest can put a password on that one or switch it off. The key is
made for the quote and flushed after it, from one template, so it is the same until the vTPM is reset. Where the guest
uses all the room for objects, one of its own is saved, flushed, and loaded again under the same handle.
Source: TPM 2.0 Part 3: TPM2_CreatePrimary 24.1, TPM2_Quote 18.4, TPM2_PCR_Read 22.4, contexts 28; Part 1, 30.3.
"""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from frontend_backend.deep_quote import DIGEST_BYTES, SELECT_BYTES, Evidence, bits, sized
from frontend_backend.tpmhdr import HEADER_SIZE, Tag, TpmFamily, command
from vtpm_instance.errors import QuoteRefusedError
from vtpm_instance.journal import note
from vtpm_instance.tpm_commands import code_of

Process = Callable[[bytes], bytes]

_CONTEXT_LOAD, _CONTEXT_SAVE, _FLUSH = 0x161, 0x162, 0x165  # Part 2, 6.5.2
_CREATE_PRIMARY, _QUOTE, _PCR_READ, _GET_CAPABILITY = 0x131, 0x158, 0x17E, 0x17A
_TPM12_PCR_READ: Final = 0x15  # TPM 1.2 Part 3, 16.2
_RH_NULL: Final = (0x4000_0007).to_bytes(4)
_TRANSIENT_FIRST: Final = 0x8000_0000
_RC_OBJECT_MEMORY: Final = 0x902
_EMPTY_PASSWORD: Final = struct.pack(">IIHBH", 9, 0x4000_0009, 0, 0, 0)  # size, TPM_RS_PW, no nonce, flags, password
_READ_AT_ONCE: Final = 8  # TPML_DIGEST, Part 2, 10.9.9
_SHA256: Final = 0x000B
_PARAMETERS: Final = HEADER_SIZE + 4  # where the parameters of an answer with sessions begin

# TPMT_PUBLIC: ECC, SHA-256, fixedTPM|fixedParent|sensitiveDataOrigin|userWithAuth|noDA|restricted|sign, no policy,
# symmetric NULL, ECDSA with SHA-256, P-256, kdf NULL, and a name of ours so that nobody makes it by chance.
_TEMPLATE: Final = (
    struct.pack(">HHIHHHHHH", 0x0023, _SHA256, 0x0005_0472, 0, 0x0010, 0x0018, _SHA256, 0x0003, 0x0010)
    + sized(b"vTPM deep quote, version 1".ljust(32, b"\0"))
    + sized(bytes(32))
)


def gather(process: Process, family: TpmFamily, nonce: bytes, selection: int, emulator: str) -> Evidence:
    """Return the evidence of the PCRs in the bit map `selection`, `nonce` (1 to 64 bytes) in its quote.

    `process` executes one command of the vTPM; no command of the guest may come between.

    Raises:
        QuoteRefusedError: the vTPM refuses, say because it was not started up.

    """
    if family is TpmFamily.TPM_1_2:
        values = tuple(_pcr_12(process, pcr) for pcr in bits(selection))
        return Evidence(family, emulator, selection, values)
    values = tuple(_pcrs_20(process, selection))
    with _room_for_an_object(process) as primary, _flushed(process, primary[HEADER_SIZE : HEADER_SIZE + 4]):
        public = _sized_at(primary, _PARAMETERS + 4)
        parameters = sized(nonce) + (0x0010).to_bytes(2) + _selection(selection)
        answer = _run(process, _authorised(_QUOTE, primary[HEADER_SIZE : HEADER_SIZE + 4], parameters))
    attest = _sized_at(answer, _PARAMETERS)
    end = _PARAMETERS + int.from_bytes(answer[HEADER_SIZE:_PARAMETERS])
    return Evidence(family, emulator, selection, values, public, attest, answer[_PARAMETERS + 2 + len(attest) : end])


def _run(process: Process, packet: bytes) -> bytes:
    answer = process(packet)
    if code := code_of(answer):
        raise QuoteRefusedError(code_of(packet), code)
    return answer


def _authorised(code: int, handle: bytes, parameters: bytes) -> bytes:
    return command(code, handle + _EMPTY_PASSWORD + parameters, Tag.TPM2_SESSIONS)


def _sized_at(answer: bytes, offset: int) -> bytes:
    size = int.from_bytes(answer[offset : offset + 2])
    return answer[offset + 2 : offset + 2 + size]


def _selection(selection: int) -> bytes:
    return struct.pack(">IHB", 1, _SHA256, SELECT_BYTES) + selection.to_bytes(SELECT_BYTES, "little")


def _pcr_12(process: Process, pcr: int) -> bytes:
    return _run(process, command(_TPM12_PCR_READ, pcr.to_bytes(4), Tag.TPM12_REQUEST))[HEADER_SIZE:]


def _pcrs_20(process: Process, selection: int) -> Iterator[bytes]:
    """Read the values, eight to a command: u32 counter, the selection as it was read, u32 number, sized digests."""
    chosen, size = bits(selection), DIGEST_BYTES[TpmFamily.TPM_2_0]
    for start in range(0, len(chosen), _READ_AT_ONCE):
        part = _selection(sum(1 << pcr for pcr in chosen[start : start + _READ_AT_ONCE]))
        answer = _run(process, command(_PCR_READ, part))
        digests = answer[HEADER_SIZE + 4 + len(part) + 4 :]
        wanted = len(chosen[start : start + _READ_AT_ONCE])
        if answer[HEADER_SIZE + 4 :][: len(part)] != part or len(digests) != wanted * (2 + size):
            raise QuoteRefusedError(_PCR_READ, 0, "its SHA-256 bank is not active")
        yield from (digests[at + 2 : at + 2 + size] for at in range(0, len(digests), 2 + size))


def _make_key(process: Process) -> bytes:
    """Return the answer to CreatePrimary, whatever it says."""
    parameters = sized(bytes(4)) + sized(_TEMPLATE) + bytes(2) + bytes(4)
    return process(_authorised(_CREATE_PRIMARY, _RH_NULL, parameters))


@contextmanager
def _room_for_an_object(process: Process) -> Iterator[bytes]:
    """Make the key and yield the answer; where there is no room for it an object of the guest's steps aside."""
    answer = _make_key(process)
    if code_of(answer) == _RC_OBJECT_MEMORY:
        with _stepped_aside(process):
            yield _checked(_make_key(process))
        return
    yield _checked(answer)


def _checked(answer: bytes) -> bytes:
    if code := code_of(answer):
        raise QuoteRefusedError(_CREATE_PRIMARY, code)
    return answer


@contextmanager
def _afterwards(tidy_up: Callable[[], object]) -> Iterator[None]:
    """Tidy up in the TPM, unless a save or libtpms itself failed: then it is powered off, and that error counts."""
    try:
        yield
    except QuoteRefusedError:
        tidy_up()
        raise
    tidy_up()


@contextmanager
def _flushed(process: Process, handle: bytes) -> Iterator[None]:
    with _afterwards(lambda: _run(process, command(_FLUSH, handle))):
        yield


@contextmanager
def _stepped_aside(process: Process) -> Iterator[None]:
    """Save and flush the guest's last object meanwhile. Loading takes the first free slot: the one it was in."""
    asked = command(_GET_CAPABILITY, struct.pack(">III", 1, _TRANSIENT_FIRST, 254))
    handles = _run(process, asked)[HEADER_SIZE + 1 + 4 + 4 :]
    handle = handles[-4:]
    saved = _run(process, command(_CONTEXT_SAVE, handle))[HEADER_SIZE:]
    _run(process, command(_FLUSH, handle))

    def bring_back() -> None:
        loaded = _run(process, command(_CONTEXT_LOAD, saved))[HEADER_SIZE:]
        if loaded != handle:
            note(f"an object of the guest moved from {handle.hex()} to {loaded.hex()} for a quote")

    with _afterwards(bring_back):
        yield
