"""The instance's end of the ring to the manager: ask and wait, or report without waiting.

The manager may be away, may be replaced while a request is on the page (the keeper holds its end of the ring, and
the next manager finds the request there), and may give a request back. All requests are idempotent, so one that was
given back is sent again until its deadline. Orders that travel with any answer are kept until they are taken.
"""

import os
import select
import time
from collections.abc import Callable, Sequence
from typing import Final

from frontend_backend.doorbell import SocketDoorbell
from frontend_backend.errors import MessageError, PageError, RingCancelledError, RingError
from frontend_backend.front import RingFrontEnd
from frontend_backend.local import LocalRing
from frontend_backend.messages_instance import (
    Refusal,
    RefusalCode,
    Reply,
    Report,
    Request,
    decode_reply,
    encode_request,
)
from frontend_backend.orders import Orders
from vtpm_instance.errors import ManagerConfusedError, ManagerGoneError, ManagerRefusedError, ManagerSilentError

RETRY_PAUSE: Final = 0.25  # seconds before a request is sent again that the manager gave back or could not serve yet
LOOK_AGAIN: Final = 1.0  # seconds between looks at the page: a manager may die between its answer and its ring
STOP_GRACE: Final = 10.0  # seconds a request may still wait once this process was told to stop


class ManagerLink:
    """One conversation over one ring; takes the ring over. Not for use by several threads."""

    def __init__(self, ring: LocalRing) -> None:
        """Use `ring` as its front end."""
        self._front = RingFrontEnd(ring)
        self._orders = Orders.NONE
        self.news = False  # whether take_orders or take_asked may return something; plain, for a hot loop
        self._outstanding = False  # something of ours may still be on the page
        self._surplus = 0  # rings less answers
        self._queued: Report | None = None
        self._wakeup: int | None = None
        self._told_to_stop = False
        self._poll = select.poll()
        self._poll.register(ring.fileno(), select.POLLIN)

    def fileno(self) -> int:
        """Return the descriptor that is readable when the manager has rung."""
        return self._front.ring.fileno()

    def watch_for_stop(self, wakeup: int) -> None:
        """Shorten every wait to STOP_GRACE once the descriptor `wakeup` is readable (it is not read)."""
        self._wakeup = wakeup
        self._poll.register(wakeup, select.POLLIN)

    def sleep(self, seconds: float) -> bool:
        """Wait for a ring, at most `seconds`; returns False once the peer is gone. Counts one ring."""
        for descriptor, _ in self._poll.poll(seconds * 1000):
            if descriptor == self._wakeup:
                self._poll.unregister(descriptor)  # it stays readable
                self._told_to_stop = True
            else:
                return self._count_ring() is not False
        return True

    @property
    def told_to_stop(self) -> bool:
        """Whether SIGTERM was seen while something was waited for."""
        return self._told_to_stop

    def take_orders(self) -> Orders:
        """Return the manager's orders since the last call."""
        orders, self._orders, self.news = self._orders, Orders.NONE, self._surplus > 0
        return orders

    def ask(self, request: Request, seconds: float, meanwhile: Callable[[], None] | None = None) -> Reply:
        """Send `request` and wait at most `seconds` for its answer, which is no Refusal.

        `meanwhile` is called once, while the manager works. What it raises is raised here; the answer is dropped then.

        Raises:
            ManagerSilentError: no answer in time; whether the manager acted is not known.
            ManagerRefusedError: the manager refused, for another reason than being unavailable just now.
            ManagerGoneError: nobody holds the other end.
            ManagerConfusedError: the answer is unreadable.

        """
        verb = type(request).__name__
        wait = _Wait(self, verb, seconds)
        packet = encode_request(request)
        while True:
            self._settle(wait)
            self._begin(verb, packet)
            if meanwhile is not None:
                do, meanwhile = meanwhile, None
                do()
            try:
                answer = self._collect(wait)
            except ManagerSilentError:
                self._front.cancel()
                raise
            if answer is None:
                wait.pause(RETRY_PAUSE)
                continue
            reply = self._decode(verb, answer)
            if not isinstance(reply, Refusal):
                return reply
            if reply.code is not RefusalCode.UNAVAILABLE:
                raise ManagerRefusedError(verb, reply.code.value, reply.text)
            wait.pause(RETRY_PAUSE)

    def report(self, report: Report) -> None:
        """Send a report without waiting; while another request is on the page the newest report is kept for later."""
        self._queued = report
        self._send_queued()

    def hand_over(self, data: bytes, descriptors: Sequence[int]) -> None:
        """Leave connections with whoever holds the other end of the ring when this process has ended: the keeper.

        Raises:
            OSError: what sendmsg(2) says.

        """
        doorbell = self._front.ring.doorbell
        assert isinstance(doorbell, SocketDoorbell), "the manager's rings have sockets"
        doorbell.hand_over(data, descriptors)

    def take_asked(self) -> bool:
        """Return whether the manager has rung without giving an answer since the last call: it wants a report."""
        asked = self._surplus > 0
        if asked:
            self._surplus = 0
        self.news = self._orders is not Orders.NONE
        return asked

    def on_doorbell(self) -> None:
        """Deal with a ring of the manager's.

        Raises:
            ManagerGoneError: nobody holds the other end.
            ManagerConfusedError: the answer is unreadable.

        """
        alive = self.count_rings()
        self._poll_outstanding()
        self._send_queued()
        if not alive:
            raise ManagerGoneError

    def count_rings(self) -> bool:
        """Swallow what has been rung, counting it; returns False once the peer is gone.

        An answer is one ring. Those beyond that are the manager's wish to be asked, which must not get lost when
        it rings right after an answer, so this counts where LocalRing.drain only swallows.
        """
        while heard := self._count_ring():
            pass
        return heard is None

    def _count_ring(self) -> bool | None:
        """Swallow one ring. Returns None when there was none, False when the peer is gone."""
        try:
            if not os.read(self.fileno(), 1):
                return False
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return False
        self._surplus += 1
        self.news = True
        return True

    def close(self) -> None:
        """Close the ring."""
        self._front.close()

    def _send_queued(self) -> None:
        if self._queued is not None and not self._outstanding:
            report, self._queued = self._queued, None
            self._begin("Report", encode_request(report))

    def _begin(self, verb: str, packet: bytes) -> None:
        try:
            self._front.begin(packet)
        except RingError as error:
            raise ManagerConfusedError(verb, str(error)) from error
        self._outstanding = True
        self._surplus = max(self._surplus, 0)  # a ring that never came (its manager died) is not waited for

    def _poll_outstanding(self) -> None:
        """Collect the answer to a report or to an abandoned request, if it is there."""
        if not self._outstanding:
            return
        _, answer = self._look("a request")
        if answer is not None:
            self._decode("a request", answer)

    def _look(self, verb: str) -> tuple[bool, bytes | None]:
        """Return (whether the request was given back, its answer if it is there)."""
        try:
            answer = self._front.finish()
        except RingCancelledError:
            answer, given_back = None, True
        except PageError as error:
            raise ManagerConfusedError(verb, str(error)) from error
        else:
            given_back = False
        if given_back or answer is not None:
            self._outstanding = False
            self._surplus -= 1
        return given_back, answer

    def _settle(self, wait: "_Wait") -> None:
        """Wait until the page is free for a new request."""
        self._poll_outstanding()
        while self._outstanding:
            wait.for_doorbell()
            self._poll_outstanding()

    def _collect(self, wait: "_Wait") -> bytes | None:
        """Wait for the answer to what was begun; None when it was given back.

        Looks at the page only after a doorbell: the manager rings after each answer, and an answer that is taken
        before its ring makes the count of rings wrong for a while.
        """
        while True:
            wait.for_doorbell()
            given_back, answer = self._look(wait.verb)
            if given_back or answer is not None:
                return answer
            wait.check()

    def _decode(self, verb: str, answer: bytes) -> Reply:
        try:
            reply, orders = decode_reply(answer)
        except MessageError as error:
            raise ManagerConfusedError(verb, str(error)) from error
        if orders is not Orders.NONE:
            self._orders |= orders
            self.news = True
        return reply


class _Wait:
    """One bounded wait for the manager."""

    def __init__(self, link: ManagerLink, verb: str, seconds: float) -> None:
        self.verb = verb
        self._link, self._seconds = link, seconds
        self._limit = time.monotonic() + seconds
        self._hurried = self._gone = False

    def for_doorbell(self) -> None:
        """Return after the next doorbell, at the latest after LOOK_AGAIN; the caller then looks at the page.

        Raises:
            ManagerSilentError: the time was over when the caller looked last.
            ManagerGoneError: the peer had gone when the caller looked last.

        """
        self._gone = not self._link.sleep(min(self._left(), LOOK_AGAIN))
        if self._link.told_to_stop and not self._hurried:
            self._hurried = True
            self._limit = min(self._limit, time.monotonic() + STOP_GRACE)

    def check(self) -> None:
        """Raise what `for_doorbell` raises, without waiting."""
        self._left()

    def _left(self) -> float:
        """Return how many seconds there are, more than none; raises what `for_doorbell` raises."""
        if self._gone:
            raise ManagerGoneError
        left = self._limit - time.monotonic()
        if left <= 0:
            raise ManagerSilentError(self.verb, self._seconds)
        return left

    def pause(self, seconds: float) -> None:
        """Let `seconds` pass, or less when the manager rings.

        Raises:
            ManagerSilentError: the time is over.
            ManagerGoneError: the peer is gone.

        """
        left = self._left()
        doorbell = select.poll()
        doorbell.register(self._link.fileno(), select.POLLIN)
        if doorbell.poll(max(min(left, seconds), 0.0) * 1000):
            self._gone = not self._link.count_rings()
        self.check()
