"""TPM commands as bytes, and what their answers say: no TSS needed."""

import hashlib
import os
import struct

from frontend_backend.tpmhdr import command

_EMPTY_AUTH = struct.pack(">IHBH", 0x40000009, 0, 0, 0)  # TPM_RS_PW, no nonce, no attributes, empty password
_OWNER = 0x40000001


def authorised(code: int, handles: bytes, parameters: bytes = b"") -> bytes:
    body = handles + struct.pack(">I", len(_EMPTY_AUTH)) + _EMPTY_AUTH + parameters
    return command(code, body, 0x8002)


def sized(content: bytes) -> bytes:
    return struct.pack(">H", len(content)) + content


STARTUP_CLEAR = command(0x144, b"\0\0")
STARTUP_STATE = command(0x144, b"\0\1")
SHUTDOWN_CLEAR = command(0x145, b"\0\0")
SHUTDOWN_STATE = command(0x145, b"\0\1")
GET_TEST_RESULT = command(0x17C)


def get_random(count: int = 32) -> bytes:
    return command(0x17B, struct.pack(">H", count))


def pcr_extend(index: int, digest: bytes = b"\x11" * 32) -> bytes:
    return authorised(0x182, struct.pack(">I", index), struct.pack(">IH", 1, 0xB) + digest)


def pcr_read(index: int) -> bytes:
    selection = (1 << index).to_bytes(3, "little")
    return command(0x17E, struct.pack(">IHB", 1, 0xB, 3) + selection)


def extended(*digests: bytes) -> bytes:
    value = bytes(32)
    for digest in digests:
        value = hashlib.sha256(value + digest).digest()
    return value


def nv_define(index: int, size: int) -> bytes:
    attributes = 0x00040004 | 0x00020002 | 0x02000000  # read and write by owner and by its own password, no lockout
    public = struct.pack(">IHIHH", index, 0xB, attributes, 0, size)
    return authorised(0x12A, struct.pack(">I", _OWNER), sized(b"") + sized(public))


def nv_write(index: int, content: bytes) -> bytes:
    return authorised(0x137, struct.pack(">II", index, index), sized(content) + b"\0\0")


def nv_read(index: int, size: int) -> bytes:
    return authorised(0x14E, struct.pack(">II", index, index), struct.pack(">HH", size, 0))


def nv_content(response: bytes) -> bytes:
    size = int.from_bytes(response[14:16])
    return response[16 : 16 + size]


def create_primary_rsa(bits: int = 3072) -> bytes:
    """CreatePrimary of an RSA signing key, another one each time: libtpms needs some hundred milliseconds.

    It looks at the flag for cancels on the way. TPM2_Create takes longer and does not: OpenSSL makes its keys.
    """
    public = struct.pack(">HHIH", 1, 0xB, 0x00040472, 0) + struct.pack(">HHHI", 0x10, 0x10, bits, 0)
    template = sized(public + sized(os.urandom(bits // 8)))
    return authorised(0x131, struct.pack(">I", _OWNER), sized(bytes(4)) + template + bytes(6))


def flush(handle: bytes) -> bytes:
    return command(0x165, handle)


def command12(code: int, body: bytes = b"") -> bytes:
    return command(code, body, 0xC1)


def rc(response: bytes) -> int:
    assert int.from_bytes(response[2:6]) == len(response)
    return int.from_bytes(response[6:10])
