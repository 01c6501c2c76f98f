"""What a granted binding is to `vtpm-xen`: the connection to the manager on which it stands, and its rings."""

import logging
import socket
from pathlib import Path
from typing import Final

import trio

from frontend_backend.channel_trio import receive_message_trio
from frontend_backend.errors import ChannelClosedError, NotARingError, RingError
from frontend_backend.local import DESCRIPTORS, LocalRing
from frontend_backend.messages_xen import XEN_DATAGRAM
from frontend_backend.ring_extent import MAX_EXTRA_PAGES
from frontend_backend.xen_terms import BindingEndedError, Terms

_log = logging.getLogger("vtpm.xen")

RING_SECONDS: Final = 10.0
"""Seconds for an instance to hand a ring out: it wakes in milliseconds, and is back from a crash within a second."""
FIRST_PAUSE: Final = 0.25
"""Seconds before the second question to a manager that is away or not ready; doubled up to LAST_PAUSE."""
LAST_PAUSE: Final = 3.0
"""And at most so long: libxl waits 10 s for some things, guests' drivers 120 s."""
_RING_DATAGRAM: Final = 64  # bytes; what comes with a ring says nothing (vtpm_instance.ring_port)


class Standing:
    """What both kinds of binding have: the connection on which it was granted."""

    def __init__(self, sock: socket.socket, terms: Terms) -> None:
        self._sock = sock
        self.terms = terms
        self._over = trio.Event()

    async def ended(self) -> None:
        """See Granted."""
        while not self._over.is_set():
            try:
                await receive_message_trio(self._sock, XEN_DATAGRAM)
            except (OSError, ChannelClosedError, trio.ClosedResourceError):
                self._over.set()
            except RingError as error:
                _log.error("the manager said what it should not on a granted connection: %s", error)
                self._over.set()

    def close(self) -> None:
        """See Granted."""
        self._over.set()
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()


class BoundVtpm(Standing):
    """A guest's vTPM in this domain: a ring from its instance's listener."""

    def __init__(self, sock: socket.socket, endpoint: str, terms: Terms) -> None:
        """Take the granted connection over."""
        super().__init__(sock, terms)
        self._endpoint = Path(endpoint)

    async def ring(self) -> LocalRing:
        """See Granted."""
        pause, said = FIRST_PAUSE, False
        while not self._over.is_set():
            try:
                with trio.fail_after(RING_SECONDS):
                    return await take_ring(self._endpoint)
            except (OSError, RingError, trio.TooSlowError) as error:
                if not said:
                    _log.warning("no ring at %s: %s", self._endpoint, reason(error))
                said = True
            with trio.move_on_after(pause):
                await self._over.wait()
            pause = min(pause * 2, LAST_PAUSE)
        raise BindingEndedError("the manager ended the binding")


class JoinedInstance(Standing):
    """An instance domain's end of a ring that the manager serves: one, and with its end all is to be done anew."""

    def __init__(self, sock: socket.socket, ring: LocalRing) -> None:
        """Take the granted connection and the ring over."""
        super().__init__(sock, Terms(wishes=True))
        self._ring: LocalRing | None = ring

    async def ring(self) -> LocalRing:
        """See Granted."""
        await trio.lowlevel.checkpoint()
        ring, self._ring = self._ring, None
        if ring is None:
            self._over.set()
            self.close()
            raise BindingEndedError("the ring to the manager ended")
        return ring

    def close(self) -> None:
        """See Granted."""
        super().close()
        if self._ring is not None:
            self._ring.close()
            self._ring = None


def reason(error: Exception) -> str:
    """Return why nobody answered, in words for the log."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or "no answer in time"


async def connect(path: Path) -> socket.socket:
    """Connect to a SEQPACKET listener.

    Raises:
        OSError: nobody listens there, or the backlog is full for longer than ANSWER_SECONDS.

    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        while True:
            try:
                sock.connect(str(path))
            except BlockingIOError:
                await trio.sleep(FIRST_PAUSE)  # AF_UNIX does not tell when there is room again
            else:
                return sock
    except BaseException:
        sock.close()
        raise


async def take_ring(path: Path) -> LocalRing:
    """Return a ring from an instance's listener, the submitting end.

    Raises:
        OSError, RingError: nobody listens, or what came is no ring.

    """
    with await connect(path) as sock:
        _, descriptors = await receive_message_trio(sock, _RING_DATAGRAM, DESCRIPTORS)
    if not descriptors:
        raise NotARingError("nothing came with the answer")
    return LocalRing.adopt(*descriptors, patient=False, wary=True, most_pages=1 + MAX_EXTRA_PAGES)
