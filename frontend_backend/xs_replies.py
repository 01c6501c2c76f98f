"""What xenstore's replies and events hold, without I/O: numbers, watch events, permissions, directories in parts.

Source: docs/misc/xenstore.txt of Xen 4.17.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from frontend_backend.xen_kernel import FIRST_RESERVED_DOMAIN
from frontend_backend.xs_wire import MAX_ID, XenstoreProtocolError, decode_strings, encode_strings

MAX_LISTING: Final = 1 << 20
"""Bytes of one directory listing read in parts: the 1,000 nodes xenstored allows a guest, each of 1,000 bytes."""

_NUL: Final = b"\0"


def decode_event(payload: bytes) -> tuple[str, str]:
    """Return path and token of a watch event. Servers may add more strings: they are for others.

    Raises:
        XenstoreProtocolError: it has fewer than two strings.

    """
    strings = decode_strings(payload)
    if len(strings) < 2:
        raise XenstoreProtocolError("a watch event without a token")
    return strings[0], strings[1]


def decode_number(payload: bytes) -> int:
    """Return the number a reply consists of (TRANSACTION_START).

    Raises:
        XenstoreProtocolError: it is no 32-bit number.

    """
    strings = decode_strings(payload)
    digits = strings[0] if len(strings) == 1 else ""
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 10 and int(digits) <= MAX_ID):
        raise XenstoreProtocolError(f"xenstore answered {payload[:32]!r} where a number belongs")
    return int(digits)


class Listing:
    """Collects a directory that is larger than one payload from DIRECTORY_PART replies.

    Each part carries the directory's generation; a part of another generation starts it all over.
    """

    def __init__(self) -> None:
        self._generation: str | None = None
        self._names = bytearray()

    @property
    def offset(self) -> int:
        """Where the next part begins, to be asked for."""
        return len(self._names)

    def add(self, payload: bytes) -> list[str] | None:
        """Take the part that begins at `offset`; returns the names once it was the last, else None: ask again.

        Raises:
            XenstoreProtocolError: the payload is no such reply, or the listing is beyond any quota.

        """
        head, nul, part = payload.partition(_NUL)
        generation = head.decode("ascii", "backslashreplace")
        if not nul or not generation or (part and not part.endswith(_NUL)):
            raise XenstoreProtocolError("a part of a directory is not as it should be")
        if self._generation not in (None, generation):
            self._generation = None
            self._names.clear()
            return None
        self._generation = generation
        last = part == _NUL or part.endswith(b"\0\0")
        if not part:
            raise XenstoreProtocolError("a part of a directory holds nothing")
        self._names += part[:-1] if last else part
        if len(self._names) > MAX_LISTING:
            raise XenstoreProtocolError(f"a directory of more than {MAX_LISTING} bytes")
        return decode_strings(bytes(self._names)) if last else None


@dataclass(frozen=True, slots=True)
class Permission:
    """What one domain may do with a node. The first of a node names its owner and what all the others may do."""

    domain: int
    read: bool = False
    write: bool = False

    def encode(self) -> str:
        """Return it as SET_PERMS has it: n, r, w or b, and the domain."""
        return f"{'nrwb'[self.read + 2 * self.write]}{self.domain}"

    @classmethod
    def decode(cls, text: str) -> Self:
        """Read it as GET_PERMS has it.

        Raises:
            XenstoreProtocolError: it is none.

        """
        kind, digits = text[:1], text[1:]
        if kind not in tuple("nrwb") or not (digits.isascii() and digits.isdigit() and len(digits) <= 5):
            raise XenstoreProtocolError(f"xenstore answered {text!r} where a permission belongs")
        number = int(digits)
        if number > FIRST_RESERVED_DOMAIN + 0xF:
            raise XenstoreProtocolError(f"xenstore named a domain {number}, which cannot be")
        return cls(number, read=kind in "rb", write=kind in "wb")


def decode_permissions(payload: bytes) -> tuple[Permission, ...]:
    """Return a node's permissions, the owner's first."""
    return tuple(Permission.decode(text) for text in decode_strings(payload))


def encode_permissions(permissions: Sequence[Permission]) -> bytes:
    """Return permissions as SET_PERMS carries them after the path."""
    return encode_strings(*(permission.encode() for permission in permissions))
