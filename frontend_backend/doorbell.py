"""Doorbells of a local ring: how one end wakes the other, and notices that it is gone.

Two kinds, alike to use. A socket is one descriptor, for who holds thousands of rings (the manager). A pair of pipes is
two, and takes a third of the time: a ring and its hearing cost 0.7 us there and 2.4 us on a socket.

Both ends of a ring distrust each other, so nothing here may block because of what a peer does. O_NONBLOCK belongs to
the open file description. Of a pipe, the peer holds another description than we do, unless it made both ends: who
serves others too is wary, and opens each end anew. Of a socket that was handed over, somebody may have kept a copy and
clear the flag: there each call says MSG_DONTWAIT. An eventfd, a little quicker still,
has one description for both sides and no such call: a peer could make our next ring wait for ever.
"""

import fcntl
import os
import socket
import stat
from collections.abc import Sequence
from typing import Final, Protocol, Self

from frontend_backend.descriptors import is_readable, send_message
from frontend_backend.errors import NotARingError

_DING: Final = b"\0"
_HEARD: Final = 64  # rings that `wait` swallows; small, because each time room for them is allocated
_CAPACITY: Final = 64 * 1024  # bytes a pipe holds (pipe(7)), and so rings
_DONT_WAIT: Final = socket.MSG_DONTWAIT
_QUIETLY: Final = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT


class Doorbell(Protocol):
    """One end's doorbell."""

    def ring(self) -> None:
        """Wake the peer. Never blocks; a bell that is full is as good as rung; a peer that is gone stays unnoticed."""

    def drain(self) -> bool:
        """Swallow some of what has been rung, all of it as a rule; returns False once the peer's end is gone.

        What is left makes `fileno` readable again. Never blocks.
        """

    def wait(self) -> bool:
        """Sleep until the peer rings or goes, then do as `drain`."""

    def fileno(self) -> int:
        """Return the descriptor that is readable when something was rung, or the peer is gone."""

    def descriptors(self) -> tuple[int, ...]:
        """Return what makes this end, to hand it over; it stays ours."""

    def close(self) -> None:
        """Close this end. May be repeated."""


class SocketDoorbell:
    """One end of a connected SEQPACKET socket: each datagram is a ring."""

    def __init__(self, sock: socket.socket) -> None:
        """Take a connected socket over."""
        sock.setblocking(False)
        self._sock = sock

    @classmethod
    def pair(cls) -> tuple[Self, Self]:
        """Make two doorbells that ring each other."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(here), cls(there)

    @classmethod
    def adopt(cls, descriptor: int) -> Self:
        """Take a descriptor over.

        Raises:
            NotARingError, OSError: it is no connected SEQPACKET socket; it stays the caller's.

        """
        sock = socket.socket(fileno=descriptor)
        try:
            if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
                raise NotARingError("the doorbell is not a SEQPACKET Unix socket")
            sock.getpeername()  # ENOTCONN here rather than at every ring
        except BaseException:
            sock.detach()
            raise
        return cls(sock)

    def ring(self) -> None:
        """Wake the peer."""
        try:
            self._sock.send(_DING, _QUIETLY)
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            return  # as good as rung; or `drain` tells

    def drain(self) -> bool:
        """Swallow one ring: whoever waits for the descriptor is told of the next, and spared a call that finds none."""
        try:
            return bool(self._sock.recv(len(_DING), _DONT_WAIT))
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False

    def hand_over(self, data: bytes, descriptors: Sequence[int]) -> None:
        """Send a datagram with descriptors, for a peer that looks for more than rings: `ring` and `drain` drop it.

        Raises:
            OSError: what sendmsg(2) says.

        """
        send_message(self._sock, data, descriptors)

    def wait(self) -> bool:
        """Sleep until the peer rings or goes."""
        _until_readable(self._sock.fileno())
        return self.drain()

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def descriptors(self) -> tuple[int, ...]:
        """Return the socket."""
        return (self._sock.fileno(),)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


class PipeDoorbell:
    """The reading end of one pipe and the writing end of another: each byte is a ring.

    Python ignores SIGPIPE from its start; a program that does not any more is ended by ringing for a peer that is gone.
    """

    def __init__(self, heard: int, rung: int, *, patient: bool) -> None:
        """Take the descriptor to read and the one to write over; `patient` for an end that sleeps in `wait`.

        Reading then blocks, which spares `wait` the poll before; `drain` polls instead.
        """
        os.set_blocking(heard, patient)
        os.set_blocking(rung, False)
        self._heard, self._rung, self._patient = heard, rung, patient

    @classmethod
    def pair(cls) -> tuple[Self, Self]:
        """Make two doorbells that ring each other."""
        first = os.pipe2(os.O_CLOEXEC)
        try:
            second = os.pipe2(os.O_CLOEXEC)
        except OSError:
            for descriptor in first:
                os.close(descriptor)
            raise
        return cls(first[0], second[1], patient=False), cls(second[0], first[1], patient=False)

    @classmethod
    def adopt(cls, heard: int, rung: int, *, patient: bool = True, wary: bool = False) -> Self:
        """Take the ends of two pipes over, as the end that waits unless it is not `patient`.

        `wary`: whoever made them may have kept copies of these very ends; needs /proc.

        Raises:
            NotARingError: they are not that; they stay the caller's.

        """
        for descriptor, access in ((heard, os.O_RDONLY), (rung, os.O_WRONLY)):
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            if not stat.S_ISFIFO(os.fstat(descriptor).st_mode) or flags & os.O_ACCMODE != access:
                raise NotARingError("the doorbell is not the reading end of one pipe and the writing end of another")
        if wary:
            heard, rung = _anew((heard, os.O_RDONLY), (rung, os.O_WRONLY))
        return cls(heard, rung, patient=patient)

    def ring(self) -> None:
        """Wake the peer."""
        try:
            os.write(self._rung, _DING)
        except (BlockingIOError, BrokenPipeError):
            return  # as good as rung; or `drain` tells

    def drain(self) -> bool:
        """Swallow all rings."""
        if self._patient and not is_readable(self._heard):
            return True
        try:
            return bool(os.read(self._heard, _CAPACITY))
        except BlockingIOError:
            return True

    def wait(self) -> bool:
        """Sleep until the peer rings or goes."""
        if not self._patient:
            _until_readable(self._heard)
        try:
            return bool(os.read(self._heard, _HEARD))
        except BlockingIOError:
            # Whoever handed the pipe over kept a copy, and made it so, or has read what was there.
            _until_readable(self._heard)
            return self.drain()

    def fileno(self) -> int:
        """Return the descriptor that is read."""
        return self._heard

    def descriptors(self) -> tuple[int, ...]:
        """Return the ends, the one to read first."""
        return self._heard, self._rung

    def close(self) -> None:
        """Close both ends."""
        for descriptor in self.descriptors():
            if descriptor >= 0:
                os.close(descriptor)
        self._heard = self._rung = -1


def _anew(*ends: tuple[int, int]) -> list[int]:
    """Open pipes' ends (descriptor, access mode) again, so that nobody else has their flags; closes what came."""
    mine: list[int] = []
    try:
        for descriptor, access in ends:
            mine.append(os.open(f"/proc/self/fd/{descriptor}", access | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        for descriptor in mine:
            os.close(descriptor)
        raise
    for descriptor, _ in ends:
        os.close(descriptor)
    return mine


def _until_readable(descriptor: int) -> None:
    is_readable(descriptor, None)
