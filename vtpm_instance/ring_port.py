"""The front end `ring`: programs connect, get a ring of their own, and submit TPM commands on it.

A page is shared with a program that may be hostile; `BackRing` copies each request out once. Several rings may be
open; commands are still executed one at a time, by the one loop.
"""

import functools
import os
import select
import socket
from collections.abc import Callable
from typing import Final

from frontend_backend.descriptors import send_message
from frontend_backend.doorbell import PipeDoorbell
from frontend_backend.local import LocalRing
from frontend_backend.ring import BackRing
from frontend_backend.tpmhdr import HEADER_SIZE, MAX_COMMAND, TpmFamily, error_response
from frontend_backend.tpmif import MAX_PACKET
from vtpm_instance.framing import announced
from vtpm_instance.vtpm import Vtpm, wrong_size_response

MAX_RINGS: Final = 8  # more wait in the listener's backlog
_UNREAD: Final = 64  # rings left in the pipe of a ring; it holds thousands, and a full one would not wake us
_GREETING: Final = b"ring"  # the datagram that carries the descriptors; its content says nothing
# TPM_RC_LOCALITY (TPM 2.0 Part 2, 6.6.3) and TPM_BAD_LOCALITY (TPM 1.2 Part 2, 16)
_BAD_LOCALITY: Final = {TpmFamily.TPM_2_0: 0x107, TpmFamily.TPM_1_2: 0x3D}
# An answer of up to 4096 bytes that does not fit a page (TPM_NV_ReadValue can ask for one): TPM_RC_SIZE and TPM_SIZE.
TOO_LONG: Final = {TpmFamily.TPM_2_0: 0x95, TpmFamily.TPM_1_2: 0x17}


@functools.cache
def rings_anew() -> bool:
    """Tell whether a byte written to a pipe that is not empty wakes an edge-triggered epoll, as since Linux 5.14.

    Then the ring of each command need not be read, which is a twentieth of a cheap command's time.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        with select.epoll() as epoll:
            epoll.register(reader, select.EPOLLIN | select.EPOLLET)
            woken = []
            for _ in range(2):
                os.write(writer, b"\0")
                woken.append(bool(epoll.poll(0)))
            return all(woken)
    finally:
        os.close(reader)
        os.close(writer)


class ServedRing:
    """The back end of one ring."""

    def __init__(self, ring: LocalRing, vtpm: Vtpm, gone: Callable[["ServedRing"], None]) -> None:
        """Answer what comes over `ring`, which becomes ours; `gone` is told once when the peer has left."""
        self._ring, self._vtpm = ring, vtpm
        self._back = BackRing(ring.page, lambda _why: wrong_size_response(vtpm.family), most=MAX_COMMAND)
        self._commands, self._execute = vtpm.commands, vtpm.execute_placed
        self._take, self._finish, self._wake = self._back.take, self._back.finish, ring.ring
        self._gone = gone
        self._drain_at = _UNREAD if rings_anew() else 1
        self._heard = 0

    def fileno(self) -> int:
        """Return the doorbell's descriptor."""
        return self._ring.fileno()

    def on_doorbell(self, events: int) -> None:
        """Answer what has been submitted; `events` is what epoll says."""
        self._heard += 1
        if self._heard >= self._drain_at:
            self._heard = 0
            self._ring.drain()
        taken = self._take(self._commands)
        if taken is not None:
            if isinstance(taken, int):
                commands = self._commands
                if taken >= HEADER_SIZE and announced(commands)[0] == taken and not self._back.locality:
                    answer = self._execute(taken, 0, self._back)
                    if len(answer) > MAX_PACKET:
                        answer = error_response(self._vtpm.family, TOO_LONG[self._vtpm.family])
                else:
                    answer = self._refusal(taken)
                self._finish(answer)
            self._wake()
        if events & select.EPOLLHUP:
            self._gone(self)

    def quiet(self) -> bool:
        """Tell whether it is between two commands; a ring that comes after this is heard by whoever looks next."""
        self._ring.drain()
        return not self._back.awaited

    def descriptors(self) -> tuple[int, ...]:
        """Return the page and the pipes' ends, to hand them over; they stay ours."""
        return self._ring.descriptors()

    def _refusal(self, size: int) -> bytes:
        if size >= HEADER_SIZE and announced(self._commands)[0] == size:
            return error_response(self._vtpm.family, _BAD_LOCALITY[self._vtpm.family])
        return wrong_size_response(self._vtpm.family)

    def close(self) -> None:
        """Close the ring."""
        self._back.release()
        self._ring.close()


Serve = Callable[[LocalRing, Callable[[ServedRing], None]], ServedRing]


class RingPort:
    """A SEQPACKET listener that hands a new ring to each program that connects."""

    def __init__(self, listener: socket.socket, serve: Serve, pages: int = 1) -> None:
        """Take `listener` over; `serve` makes the back end of a ring of `pages` pages."""
        self._listener, self._serve_ring, self._pages = listener, serve, pages
        self._listener.setblocking(False)
        self.rings: dict[int, ServedRing] = {}

    def fileno(self) -> int:
        """Return the listener's descriptor."""
        return self._listener.fileno()

    @property
    def full(self) -> bool:
        """Whether no more rings are made for now."""
        return len(self.rings) >= MAX_RINGS

    def accept(self, gone: Callable[[ServedRing], None]) -> ServedRing | None:
        """Make a ring for one waiting program, None when there is none any more; `gone`: see ServedRing.

        Raises:
            OSError: out of descriptors or memory; the program still waits.

        """
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        with sock:
            sock.setblocking(False)
            try:
                front, back = LocalRing.pair(doorbells=PipeDoorbell.pair, pages=self._pages)
            except OSError:
                return None  # out of descriptors or memory: the program sees its connection end, and may ask again
            with front:
                try:
                    send_message(sock, _GREETING, front.descriptors())
                except OSError:
                    # Who asked for a ring is gone. No line in the log: a guest could fill it that way.
                    back.close()
                    return None
        return self._serve(back, gone)

    def adopt(self, descriptors: tuple[int, ...], gone: Callable[[ServedRing], None]) -> ServedRing:
        """Serve a ring that an earlier instance made, and whose guest has been waiting since perhaps.

        Raises:
            NotARingError: it is none; its descriptors are closed.

        """
        page, heard, rung = descriptors
        return self._serve(LocalRing.adopt(page, heard, rung, patient=False, most_pages=self._pages), gone)

    def _serve(self, ring: LocalRing, gone: Callable[[ServedRing], None]) -> ServedRing:
        served = self._serve_ring(ring, gone)
        self.rings[served.fileno()] = served
        return served

    def close(self) -> None:
        """Close everything."""
        for ring in self.rings.values():
            ring.close()
        self.rings.clear()
        self._listener.close()
