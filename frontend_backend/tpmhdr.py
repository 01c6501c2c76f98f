"""The 10-byte header of TPM commands and responses, both families.

Source: TPM 2.0 Part 1, 18.2; TPM 1.2 Part 2, 6. Big-endian: tag u16, size u32, code u32.
"""

import struct
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import ClassVar, Final, Self

from frontend_backend.errors import HeaderError

HEADER_SIZE: Final = 10
MAX_COMMAND: Final = 4096  # bytes; TPM2_BUFFER_MAX of libtpms 0.9 (its TPM 1.2 has the same)


class TpmFamily(Enum):
    """The TCG family a vTPM implements; the value is what users write."""

    TPM_2_0 = "2.0"
    TPM_1_2 = "1.2"


class Tag(IntEnum):
    """Tags that open a packet."""

    TPM2_NO_SESSIONS = 0x8001
    TPM2_SESSIONS = 0x8002
    TPM12_REQUEST = 0x00C1
    TPM12_REQUEST_AUTH1 = 0x00C2
    TPM12_REQUEST_AUTH2 = 0x00C3
    TPM12_RESPONSE = 0x00C4


class ResponseCode(IntEnum):
    """Response codes the back end itself gives; the TPM gives its own."""

    SUCCESS = 0
    TPM12_FAIL = 0x009  # TPM 1.2 Part 2, 16: TPM_FAIL
    TPM12_BAD_ORDINAL = 0x00A
    TPM12_NOSPACE = 0x011
    TPM12_BAD_PARAM_SIZE = 0x019
    TPM12_BAD_LOCALITY = 0x03D
    TPM12_RETRY = 0x800
    FAILURE = 0x101  # TPM 2.0 Part 2, 6.6.3: TPM_RC_FAILURE
    COMMAND_SIZE = 0x142
    NV_SPACE = 0x14B
    LOCALITY = 0x907
    NV_UNAVAILABLE = 0x923


@dataclass(frozen=True, slots=True)
class CommandHeader:
    """Head of a command or response: `size` counts the whole packet, `code` is the command or response code."""

    tag: int
    size: int
    code: int

    CODEC: ClassVar[struct.Struct] = struct.Struct(">HII")

    @classmethod
    def unpack(cls, untrusted: bytes) -> Self:
        """Read the first 10 bytes.

        Raises:
            HeaderError: fewer than 10 bytes, or a size below 10.

        """
        if len(untrusted) < HEADER_SIZE:
            raise HeaderError(f"a TPM header has {HEADER_SIZE} bytes, not {len(untrusted)}")
        header = cls(*cls.CODEC.unpack_from(untrusted))
        if header.size < HEADER_SIZE:
            raise HeaderError(f"a TPM packet has at least {HEADER_SIZE} bytes, its header says {header.size}")
        return header

    def pack(self) -> bytes:
        """Return the 10 bytes."""
        return self.CODEC.pack(self.tag, self.size, self.code)


assert CommandHeader.CODEC.size == HEADER_SIZE, "TPM 2.0 Part 1, 18.2: tag, size and code are 10 bytes"


def error_response(family: TpmFamily, code: int) -> bytes:
    """Return a 10-byte response that carries nothing but `code`."""
    tag = Tag.TPM2_NO_SESSIONS if family is TpmFamily.TPM_2_0 else Tag.TPM12_RESPONSE
    return CommandHeader(tag, HEADER_SIZE, code).pack()


def command(code: int, body: bytes = b"", tag: int = Tag.TPM2_NO_SESSIONS) -> bytes:
    """Return a command packet: header and `body`."""
    return CommandHeader(tag, HEADER_SIZE + len(body), code).pack() + body


def response_code(packet: bytes) -> int:
    """Return the response code of a packet.

    Raises:
        HeaderError: not a response.

    """
    return CommandHeader.unpack(packet).code
