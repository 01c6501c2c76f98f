"""A front end for programs: submit a TPM command on any local ring and get the answer."""

import select
import socket
import time
from typing import Self

from frontend_backend.descriptors import close_all, receive_message
from frontend_backend.errors import NotARingError, RingClosedError, RingTimeoutError
from frontend_backend.local import DESCRIPTORS, LocalRing
from frontend_backend.ring_extent import MAX_EXTRA_PAGES
from frontend_backend.ring_front import FrontRing

_CANCEL_GRACE = 1.0  # seconds a cancelled command may take to be given back before the ring counts as lost


class RingFrontEnd:
    """The submitting end of a ring, with waiting. One command at a time; not for use by several threads."""

    def __init__(self, ring: LocalRing) -> None:
        """Use `ring` as its front end; closing this closes the ring."""
        self.ring = ring
        self._front = FrontRing(ring.page)
        self._poll = select.poll()
        self._poll.register(ring.fileno(), select.POLLIN)

    @classmethod
    def connect(cls, path: str) -> Self:
        """Get a ring from a vTPM attached with `--frontend ring`, whose endpoint is `path`; it may have extra pages.

        Raises:
            OSError: nobody listens there.
            ChannelClosedError: the vTPM's side closed without handing a ring over.
            MessageTruncatedError, NotARingError: what came is not a ring; its descriptors are closed.

        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(path)
            _, descriptors = receive_message(sock, 64, DESCRIPTORS)
        if len(descriptors) < DESCRIPTORS - 1:
            close_all(descriptors)
            raise NotARingError(f"{len(descriptors)} descriptors came, a ring has {DESCRIPTORS - 1} or {DESCRIPTORS}")
        return cls(LocalRing.adopt(*descriptors, most_pages=1 + MAX_EXTRA_PAGES))

    def begin(self, packet: bytes, locality: int = 0, extra_pages: int = 0) -> None:
        """Submit and ring, without waiting. Raises what FrontRing.submit raises.

        With `extra_pages` there is room for a longer answer, too.
        """
        if extra_pages:
            self._front.submit_long(packet, locality, extra_pages)
        else:
            self._front.submit(packet, locality)
        self.ring.ring()

    def finish(self) -> bytes | None:
        """Return the answer if it is there, else None. Raises what FrontRing.poll raises."""
        return self._front.poll()

    def cancel(self) -> None:
        """Ask the back end to give the command in flight up."""
        self._front.cancel()
        self.ring.ring()

    @property
    def in_flight(self) -> bool:
        """Whether a command still awaits its answer."""
        return self._front.in_flight

    def wait(self, timeout: float | None = None) -> bytes:
        """Wait for the answer to what was begun, at most `timeout` seconds.

        Raises:
            RingTimeoutError: nothing came; the request has been cancelled on the page.
            RingClosedError: the peer's end is gone and no answer is on the page.
            RingCancelledError, PageError: see FrontRing.poll.

        """
        if timeout is not None:
            return self._wait_until(time.monotonic() + timeout, timeout)
        poll, sleep = self._front.poll, self.ring.wait
        alive = True
        while True:
            answer = poll()
            if answer is not None:
                return answer
            if not alive:
                raise RingClosedError
            alive = sleep()

    def _wait_until(self, limit: float, timeout: float) -> bytes:
        alive = True
        while True:
            answer = self.finish()
            if answer is not None:
                return answer
            if not alive:
                raise RingClosedError
            left = limit - time.monotonic()
            if left <= 0:
                self._give_up()
                raise RingTimeoutError(timeout)
            self._poll.poll(left * 1000)
            alive = self.ring.drain()

    def transact(self, packet: bytes, *, locality: int = 0, timeout: float | None = None) -> bytes:
        """Submit `packet` (1 to 4088 bytes) and wait for its answer; raises what `begin` and `wait` raise."""
        self._front.submit(packet, locality)
        self.ring.ring()
        if timeout is None and self.ring.wait():  # nothing can be there yet, and each answer is followed by a ring
            answer = self._front.poll()
            if answer is not None:
                return answer
        return self.wait(timeout)

    def _give_up(self) -> None:
        """Cancel, and give a living back end a moment to take it off the page, or to answer for nobody."""
        self.cancel()
        limit = time.monotonic() + _CANCEL_GRACE
        alive = True
        while alive and self.in_flight and (left := limit - time.monotonic()) > 0:
            self._poll.poll(left * 1000)
            alive = self.ring.drain()
        self._front.discard()

    def close(self) -> None:
        """Close the ring."""
        self._front.release()
        self.ring.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
