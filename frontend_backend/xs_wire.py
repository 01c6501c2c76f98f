"""Xenstore's wire protocol without I/O: requests and replies as bytes, a splitter for streams, and the rules of paths.

One message is a header and a payload of at most 4096 bytes. Replies carry the request's id and come in any order
between requests of different transactions; watch events come between them whenever they like. Strings end in NUL
inside payloads, except a node's value, which is bytes.

Source: xen/include/public/io/xs_wire.h and docs/misc/xenstore.txt of Xen 4.17.
"""

import errno
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from frontend_backend.xen_kernel import XenError

HEADER: Final = struct.Struct("<IIII")  # struct xsd_sockmsg: type, req_id, tx_id, len
assert HEADER.size == 16

MAX_PAYLOAD: Final = 4096  # XENSTORE_PAYLOAD_MAX, bytes
MAX_ABSOLUTE_PATH: Final = 3072  # XENSTORE_ABS_PATH_MAX, bytes without NUL
MAX_RELATIVE_PATH: Final = 2048  # XENSTORE_REL_PATH_MAX, bytes without NUL
NO_TRANSACTION: Final = 0
MAX_ID: Final = (1 << 32) - 1

_PATH_CHARACTERS: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-/_@")
_NUL: Final = b"\0"


class Operation(IntEnum):
    """`enum xsd_sockmsg_type`."""

    CONTROL = 0
    DIRECTORY = 1
    READ = 2
    GET_PERMS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    INTRODUCE = 8
    RELEASE = 9
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MKDIR = 12
    RM = 13
    SET_PERMS = 14
    WATCH_EVENT = 15
    ERROR = 16
    IS_DOMAIN_INTRODUCED = 17
    RESUME = 18
    SET_TARGET = 19
    RESET_WATCHES = 21
    DIRECTORY_PART = 22


ERROR_NAMES: Final = (
    "EINVAL",
    "EACCES",
    "EEXIST",
    "EISDIR",
    "ENOENT",
    "ENOMEM",
    "ENOSPC",
    "EIO",
    "ENOTEMPTY",
    "ENOSYS",
    "EROFS",
    "EBUSY",
    "EAGAIN",
    "EISCONN",
    "E2BIG",
    "EPERM",
)
"""The errors xenstored knows by name (xsd_errors). A name outside of this list is kept as it came."""

_REASONS: Final = {
    "EACCES": "this domain may not; the node belongs to another one",
    "EAGAIN": "another change came between",
    "E2BIG": "too long for a message of 4096 bytes",
    "EINVAL": "not a valid path or value",
    "ENOENT": "no such node",
    "ENOSPC": "this domain's quota in xenstore is used up",
}


_MAX_SHOWN: Final = 200  # characters of a path in a message


class XenstoreError(XenError):
    """Xenstore refused an operation: `name` is its word (EACCES, ENOENT, EAGAIN, ...)."""

    def __init__(self, name: str, operation: str, path: str) -> None:
        reason = f" ({_REASONS[name]})" if name in _REASONS else ""
        shown = path if len(path) <= _MAX_SHOWN else f"{path[:_MAX_SHOWN]}..."
        super().__init__(f"xenstore refused to {operation} {shown}: {name}{reason}")
        self.name, self.operation, self.path = name, operation, path

    @property
    def errno(self) -> int:
        """The number of `name` on this system, EIO where it is unknown."""
        return int(getattr(errno, self.name)) if self.name in ERROR_NAMES else errno.EIO


class XenstoreGoneError(XenError):
    """The connection to xenstore ended: xenstored or the kernel closed it, or what came broke the protocol."""


class XenstoreProtocolError(XenstoreGoneError):
    """What came is not xenstore's protocol. Nothing after it can be understood: the connection is lost."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of either direction. `operation` is a plain number: a peer may send one we do not know."""

    operation: int
    request: int
    transaction: int
    payload: bytes

    def encode(self) -> bytes:
        """Return the message's bytes.

        Raises:
            ValueError: the payload is longer than MAX_PAYLOAD.

        """
        if len(self.payload) > MAX_PAYLOAD:
            raise ValueError(f"a payload of {len(self.payload)} bytes; at most {MAX_PAYLOAD} are allowed")
        return HEADER.pack(self.operation, self.request, self.transaction, len(self.payload)) + self.payload


class Splitter:
    """Cuts a stream into messages, whatever the pieces it comes in. Holds at most one message that is not whole."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Take the next bytes of the stream; return the messages that are whole now.

        Raises:
            XenstoreProtocolError: a length above MAX_PAYLOAD. The splitter must not be used any more.

        """
        self._buffer += data
        messages, at = [], 0
        while len(self._buffer) - at >= HEADER.size:
            operation, request, transaction, length = HEADER.unpack_from(self._buffer, at)
            if length > MAX_PAYLOAD:
                raise XenstoreProtocolError(f"xenstore announced {length} bytes; at most {MAX_PAYLOAD} are allowed")
            end = at + HEADER.size + length
            if len(self._buffer) < end:
                break
            messages.append(Message(operation, request, transaction, bytes(self._buffer[at + HEADER.size : end])))
            at = end
        del self._buffer[:at]
        return messages

    @property
    def inside(self) -> bool:
        """Whether the stream stands inside a message: its end here would cut one."""
        return bool(self._buffer)


def encode_path(path: str) -> bytes:
    """Return the path's bytes with NUL, checked by the rules of xenstored, so that no part of it can end it early.

    A path is absolute, relative to the caller's own `/local/domain/<n>`, or, for watches, special (`@releaseDomain`).

    Raises:
        XenstoreError: EINVAL, the path breaks the rules.

    """
    raw = path.encode("utf-8", "surrogateescape")
    longest = MAX_ABSOLUTE_PATH if raw.startswith(b"/") else MAX_RELATIVE_PATH
    allowed = raw and len(raw) <= longest and _PATH_CHARACTERS.issuperset(raw) and b"//" not in raw
    if not allowed or (raw.endswith(b"/") and raw != b"/"):
        raise XenstoreError("EINVAL", "take", repr(path))
    return raw + _NUL


def encode_strings(*strings: str) -> bytes:
    """Return strings as payloads carry them.

    Raises:
        ValueError: a string holds NUL.

    """
    for string in strings:
        if "\0" in string:
            raise ValueError(f"NUL inside of {string!r}")
    return b"".join(string.encode() + _NUL for string in strings)


def decode_strings(payload: bytes) -> list[str]:
    """Return the strings of a payload. Bytes that are no UTF-8 come as lone surrogates and go back as they came.

    Raises:
        XenstoreProtocolError: the last one does not end.

    """
    if not payload:
        return []
    if not payload.endswith(_NUL):
        raise XenstoreProtocolError("a string of xenstore's does not end in NUL")
    return [part.decode("utf-8", "surrogateescape") for part in payload[:-1].split(_NUL)]


def decode_error(message: Message, operation: str, path: str) -> XenstoreError | None:
    """Return the error a reply carries, or None where it carries none."""
    if message.operation != Operation.ERROR:
        return None
    return XenstoreError(message.payload.rstrip(_NUL).decode("ascii", "backslashreplace"), operation, path)
