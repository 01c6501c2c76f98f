"""Open connections on their way from an instance that goes to sleep to the one that wakes: how they are written down.

The instance sends one datagram with all of them over its ring's doorbell, whose other end its keeper has, too; the
keeper keeps them, looks whether something can be read (it never reads), and hands them to the next instance. An
instance may be hostile, so what it sends is checked here before anybody polls or maps it. No protocol with others:
keeper and instance are always of one release.
"""

import fcntl
import os
import select
import socket
import stat
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Final

from frontend_backend.local import SEALS
from frontend_backend.ring_extent import MAX_EXTRA_PAGES
from frontend_backend.tpmif import PAGE_SIZE
from vtpm_instance.errors import BadRequestError

# descriptors of all connections together: what a running vTPM costs its keeper beside its listeners (page, doorbell,
# pidfd), and a hibernated one does not. So hibernation never takes descriptors that were not counted.
MAX_HANDED: Final = 3
_MAGIC: Final = b"HNDO"
_COUNT: Final = struct.Struct("=4sB")


class Kind(IntEnum):
    """What a connection is of."""

    DATA = 0
    CONTROL = 1
    RING = 2


_RING_SIZES: Final = range(PAGE_SIZE, (1 + MAX_EXTRA_PAGES) * PAGE_SIZE + 1, PAGE_SIZE)
_FAMILIES: Final = frozenset({socket.AF_UNIX, socket.AF_INET, socket.AF_INET6})
_DESCRIPTORS: Final = {Kind.DATA: 1, Kind.CONTROL: 1, Kind.RING: 3}
_MOST: Final = MAX_HANDED // min(_DESCRIPTORS.values())


@dataclass(slots=True)
class Handed:
    """One connection: a socket, or a ring's page with the ends of its pipes (the one to read first).

    `note` is the session's own (0 to 255): see `ControlSession.note`.
    """

    kind: Kind
    descriptors: tuple[int, ...]
    note: int = 0

    CODEC: ClassVar[struct.Struct] = struct.Struct("=BB")  # kind, note

    @property
    def watched(self) -> int:
        """The descriptor that is readable when its guest wants something."""
        return self.descriptors[1] if self.kind is Kind.RING else self.descriptors[0]


def count(connections: Iterable[Handed]) -> int:
    """Return how many descriptors these have."""
    return sum(len(each.descriptors) for each in connections)


def pack(connections: Sequence[Handed]) -> tuple[bytes, list[int]]:
    """Return the bytes and descriptors of a datagram that `unpack` reads."""
    parts = [_COUNT.pack(_MAGIC, len(connections))]
    parts += [Handed.CODEC.pack(each.kind, each.note) for each in connections]
    return b"".join(parts), [descriptor for each in connections for descriptor in each.descriptors]


def size_of(number: int) -> int:
    """Return the bytes of a datagram with so many connections."""
    return _COUNT.size + number * Handed.CODEC.size


MAX_BYTES: Final = size_of(_MOST)


def unpack(data: bytes, descriptors: Sequence[int]) -> list[Handed]:
    """Return the connections in a datagram; the descriptors are the caller's, whatever happens.

    Raises:
        BadRequestError: it holds none, or the descriptors do not fit it.

    """
    if len(data) < _COUNT.size:
        raise BadRequestError("no connections are in this")
    magic, number = _COUNT.unpack_from(data)
    if magic != _MAGIC or len(data) != size_of(number):
        raise BadRequestError("no connections are in this")
    found, rest = [], list(descriptors)
    for index in range(number):
        code, note = Handed.CODEC.unpack_from(data, size_of(index))
        try:
            kind = Kind(code)
        except ValueError as error:
            raise BadRequestError(f"connection of an unknown kind: {error}") from None
        own, rest = rest[: _DESCRIPTORS[kind]], rest[_DESCRIPTORS[kind] :]
        if len(own) != _DESCRIPTORS[kind]:
            raise BadRequestError("fewer descriptors than the connections have")
        found.append(Handed(kind, tuple(own), note))
    if rest:
        raise BadRequestError("more descriptors than the connections have")
    return found


def check(handed: Handed) -> None:
    """Check that the descriptors are what they should be, so that whoever polls or maps them comes to no harm.

    Raises:
        BadRequestError: they are not.

    """
    try:
        good = _is_ring(*handed.descriptors) if handed.kind is Kind.RING else _is_connection(handed.descriptors[0])
    except OSError as error:
        raise BadRequestError(f"a connection that was handed over cannot be used: {error}") from error
    if not good:
        raise BadRequestError(f"what was handed over is no connection of kind {handed.kind.name.lower()}")


def _is_connection(descriptor: int) -> bool:
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return False
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        sock.getpeername()
        return sock.family in _FAMILIES and sock.type == socket.SOCK_STREAM


def _is_ring(page: int, heard: int, rung: int) -> bool:
    """Tell whether it is a sealed page or a few, the reading end of a pipe and the writing end of one."""
    if fcntl.fcntl(page, fcntl.F_GET_SEALS) & SEALS != SEALS or os.fstat(page).st_size not in _RING_SIZES:
        return False
    return all(
        stat.S_ISFIFO(os.fstat(descriptor).st_mode) and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == access
        for descriptor, access in ((heard, os.O_RDONLY), (rung, os.O_WRONLY))
    )


def readable(descriptors: Iterable[int]) -> bool:
    """Tell whether one of these can be read now, or its peer is gone."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
