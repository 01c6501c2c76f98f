"""Compatibility mode: a TPM 2.0 vTPM behind Linux' xen-tpmfront, which takes every TPM for a 1.2 (reference 6.1).

The driver's few TPM 1.2 commands are answered here, or rewritten to TPM 2.0 commands and their answers back; TPM 2.0
commands (tags 0x8001, 0x8002) pass through, and no answer to one is ever changed. What else a TPM 1.2 could is refused
with TPM_DISABLED, which Linux does not log ("A TPM error"): nobody may take this for a TPM 1.2 that works.
What lives here: packets in, packets out. What must not: rings, the driver's timing, TPM 2.0 answers.
Source: Linux 6.1 drivers/char/tpm/tpm1-cmd.c, tpm-sysfs.c, tpm-interface.c, xen-tpmfront.c; TPM 1.2 Part 2, 21
(capabilities) and Part 3; TPM 2.0 Part 3, 16.1, 22.2, 22.4. docs/xen-guests.md has the table.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from frontend_backend.tpmhdr import HEADER_SIZE, CommandHeader, ResponseCode, Tag, command

_REQUESTS: Final = frozenset({Tag.TPM12_REQUEST, Tag.TPM12_REQUEST_AUTH1, Tag.TPM12_REQUEST_AUTH2})


class Ordinal(IntEnum):
    """TPM 1.2 commands that are known here (TPM 1.2 Part 2, 17)."""

    EXTEND = 0x14
    PCR_READ = 0x15
    GET_RANDOM = 0x46
    SELF_TEST_FULL = 0x50
    CONTINUE_SELF_TEST = 0x53
    GET_CAPABILITY = 0x65
    SAVE_STATE = 0x98
    STARTUP = 0x99


class Capability(IntEnum):
    """Capability areas of TPM_GetCapability, and properties of the area PROPERTY (TPM 1.2 Part 2, 21.1, 21.2)."""

    FLAG = 4
    PROPERTY = 5
    VERSION = 6
    VERSION_INFO = 0x1A
    PCR_COUNT = 0x101
    MANUFACTURER = 0x103
    PERMANENT_FLAGS = 0x108
    VOLATILE_FLAGS = 0x109
    OWNER = 0x111
    TIS_TIMEOUTS = 0x115
    TIS_DURATIONS = 0x120


DISABLED: Final = 0x07  # TPM_DISABLED: the one refusal that Linux keeps to itself (tpm_transmit_cmd)
_BAD_PARAMETER: Final = 0x03
_RC_RETRY, _RC_TESTING, _RC_NV_RATE = 0x922, 0x90A, 0x920
_LATER: Final = frozenset({_RC_RETRY, _RC_TESTING, _RC_NV_RATE})  # what a TPM 2.0 says when asking again helps

PCRS: Final = 24
# Microseconds. A, B, C and D of the PC Client TIS 1.2; C is how long the driver waits for an idle page.
TIMEOUTS: Final = (750_000, 2_000_000, 750_000, 750_000)
# Short, medium, long, of TPM 1.2 commands only: Linux has two minutes for every TPM 2.0 command code
DURATIONS: Final = (20_000_000, 120_000_000, 120_000_000)
MAX_RANDOM: Final = 64  # bytes of one TPM2_GetRandom: the longest digest of a vTPM; the driver asks again for the rest

_SHA1: Final = 0x0004  # TPM_ALG_ID; and the other banks that a vTPM has, with their digests' sizes
_DIGESTS: Final = {_SHA1: 20, 0x000B: 32, 0x000C: 48, 0x000D: 64}
_PASSWORD: Final = struct.pack(">IIHBH", 9, 0x4000_0009, 0, 0, 0)  # size, TPM_RS_PW, no nonce, flags, no password
_GET_RANDOM, _PCR_READ, _PCR_EXTEND = 0x17B, 0x17E, 0x182  # TPM 2.0 Part 2, 6.5.2
_PERMANENT: Final = struct.pack(">H20x", 0x001F)  # TPM_PERMANENT_FLAGS as Linux reads it: neither disabled nor owned
_VOLATILE: Final = struct.pack(">H5x", 0x0020)  # TPM_STCLEAR_FLAGS: not deactivated
_CAPABILITIES: Final[dict[tuple[int, int | None], bytes]] = {
    (Capability.PROPERTY, Capability.TIS_TIMEOUTS): struct.pack(">4I", *TIMEOUTS),
    (Capability.PROPERTY, Capability.TIS_DURATIONS): struct.pack(">3I", *DURATIONS),
    (Capability.PROPERTY, Capability.PCR_COUNT): struct.pack(">I", PCRS),
    (Capability.PROPERTY, Capability.MANUFACTURER): b"IBM\0",  # as libtpms says as a TPM 2.0
    (Capability.PROPERTY, Capability.OWNER): b"\0",
    (Capability.FLAG, Capability.PERMANENT_FLAGS): _PERMANENT,
    (Capability.FLAG, Capability.VOLATILE_FLAGS): _VOLATILE,
    (Capability.VERSION, None): bytes([1, 1, 0, 0]),
    # tag, version 1.2 revision 0.0, specification level 2, errata 3, vendor, nothing of the vendor's own
    (Capability.VERSION_INFO, None): struct.pack(">H4BHB4sH", 0x0030, 1, 2, 0, 0, 2, 3, b"IBM\0", 0),
}


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A command to send instead; `answer` makes of what the vTPM says the answer that is waited for."""

    request: bytes
    answer: Callable[[bytes], bytes]


def inspect(packet: bytes, _locality: int) -> bytes | Rewritten | None:
    """Return what becomes of a guest's command: an answer made here, another command, or None: send it as it is.

    Whatever is not a well-formed TPM 1.2 command is the vTPM's to judge.
    """
    if len(packet) < HEADER_SIZE:
        return None
    tag, size, code = CommandHeader.CODEC.unpack_from(packet)
    if tag not in _REQUESTS or size != len(packet):
        return None
    known = _COMMANDS.get(code) if tag == Tag.TPM12_REQUEST else None
    return _refusal(DISABLED) if known is None else known(packet[HEADER_SIZE:])


def _refusal(code: int) -> bytes:
    return command(code, b"", Tag.TPM12_RESPONSE)


def _success(body: bytes = b"") -> bytes:
    return command(0, body, Tag.TPM12_RESPONSE)


def _done(_body: bytes) -> bytes:
    """Answer what needs no doing: the host has started the vTPM up, which tests and saves itself."""
    return _success()


def _capability(body: bytes) -> bytes:
    """Answer TPM_GetCapability: area u32, then the size u32 and the bytes of what is asked for in it."""
    if len(body) < 8:
        return _refusal(ResponseCode.TPM12_BAD_PARAM_SIZE)
    area, size = struct.unpack_from(">II", body)
    wanted = body[8:]
    if len(wanted) != size:
        return _refusal(ResponseCode.TPM12_BAD_PARAM_SIZE)
    property_ = int.from_bytes(wanted) if size == 4 else None
    if area in (Capability.VERSION, Capability.VERSION_INFO):
        property_ = None
    found = _CAPABILITIES.get((area, property_))
    return _refusal(DISABLED) if found is None else _success(struct.pack(">I", len(found)) + found)


def _random(body: bytes) -> bytes | Rewritten:
    """Have the vTPM's TPM2_GetRandom answer TPM_GetRandom; with fewer bytes than asked for, as both may."""
    if len(body) != 4:
        return _refusal(ResponseCode.TPM12_BAD_PARAM_SIZE)
    wanted = min(int.from_bytes(body), MAX_RANDOM)

    def answer(response: bytes) -> bytes:
        """TPM2B_DIGEST (u16 size) to TPM 1.2's u32 size."""
        refused = _refused(response, HEADER_SIZE + 2)
        if refused is not None:
            return refused
        count = int.from_bytes(response[HEADER_SIZE : HEADER_SIZE + 2])
        data = response[HEADER_SIZE + 2 :]
        if len(data) != count or count > wanted:
            return _refusal(ResponseCode.TPM12_FAIL)
        return _success(struct.pack(">I", count) + data)

    return Rewritten(command(_GET_RANDOM, struct.pack(">H", wanted)), answer)


def _pcr_read(body: bytes) -> bytes | Rewritten:
    """Have TPM2_PCR_Read of the SHA-1 bank answer TPM_PcrRead."""
    if len(body) != 4:
        return _refusal(ResponseCode.TPM12_BAD_PARAM_SIZE)
    pcr = int.from_bytes(body)
    if pcr >= PCRS:
        return _refusal(_BAD_PARAMETER)
    selection = struct.pack(">IHB3s", 1, _SHA1, 3, (1 << pcr).to_bytes(3, "little"))
    # Part 3, 22.4: update counter u32, the selection that was read, u32 count of digests, each with its u16 size
    found = struct.pack(">IHB3sIH", 1, _SHA1, 3, (1 << pcr).to_bytes(3, "little"), 1, _DIGESTS[_SHA1])

    def answer(response: bytes) -> bytes:
        refused = _refused(response, HEADER_SIZE)
        if refused is not None:
            return refused
        rest = response[HEADER_SIZE + 4 :]
        if not rest.startswith(found) or len(rest) != len(found) + _DIGESTS[_SHA1]:
            return _refusal(ResponseCode.TPM12_FAIL)  # a vTPM without a SHA-1 bank
        return _success(rest[len(found) :])

    return Rewritten(command(_PCR_READ, selection), answer)


def _extend(body: bytes) -> bytes | Rewritten:
    """Have TPM2_PCR_Extend do TPM_Extend (IMA's), in every bank: with zeros behind the digest, as Linux pads it."""
    if len(body) != 4 + _DIGESTS[_SHA1]:
        return _refusal(ResponseCode.TPM12_BAD_PARAM_SIZE)
    pcr, digest = int.from_bytes(body[:4]), body[4:]
    if pcr >= PCRS:
        return _refusal(_BAD_PARAMETER)
    digests = b"".join(bank.to_bytes(2) + digest.ljust(size, b"\0") for bank, size in _DIGESTS.items())
    packet = command(_PCR_EXTEND, body[:4] + _PASSWORD + len(_DIGESTS).to_bytes(4) + digests, Tag.TPM2_SESSIONS)

    def answer(response: bytes) -> bytes:
        # what TPM_Extend returns, the PCR's new value, Linux does not look at: none is made up for it
        refused = _refused(response, HEADER_SIZE)
        return _success(bytes(_DIGESTS[_SHA1])) if refused is None else refused

    return Rewritten(packet, answer)


def _refused(response: bytes, least: int) -> bytes | None:
    """Return TPM 1.2's way to say what a TPM 2.0's answer says, None where it did what it was asked."""
    code = int.from_bytes(response[6:HEADER_SIZE]) if len(response) >= HEADER_SIZE else int(ResponseCode.FAILURE)
    if code in _LATER:
        return _refusal(ResponseCode.TPM12_RETRY)
    return _refusal(ResponseCode.TPM12_FAIL) if code or len(response) < least else None


_COMMANDS: Final[dict[int, Callable[[bytes], bytes | Rewritten]]] = {
    Ordinal.GET_CAPABILITY: _capability,
    Ordinal.PCR_READ: _pcr_read,
    Ordinal.EXTEND: _extend,
    Ordinal.GET_RANDOM: _random,
    **dict.fromkeys((Ordinal.CONTINUE_SELF_TEST, Ordinal.SELF_TEST_FULL, Ordinal.STARTUP, Ordinal.SAVE_STATE), _done),
}
