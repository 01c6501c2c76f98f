"""A pump between two rings: requests that arrive at a back end's ring are submitted on a front end's. No I/O, no clock.

At most one request is in flight. It stays on the submitting peer's page until it is answered there, so that whoever
replaces a dead bridge finds it; what must not be executed twice is marked by the hooks before it leaves. What gets no
answer (the answering peer is gone, or gave it back) is given back: state IDLE, which a driver reports as cancelled.
"""

from collections.abc import Callable
from enum import IntFlag
from typing import Final, Protocol

from frontend_backend.errors import IllegalTransitionError, PageError, RingCancelledError
from frontend_backend.ring import Answered, BackRing, FrontRing, Request

WISH_INTERVAL: Final = 0.25
"""Seconds between two rings for a wish over a channel that coalesces: it may have been taken for an answer's."""


class Rewrite(Protocol):
    """Another request to send in place of one, and what its answer becomes."""

    @property
    def request(self) -> bytes:
        """What is sent."""
        ...

    @property
    def answer(self) -> Callable[[bytes], bytes]:
        """Makes the answer from the answer."""
        ...


Inspect = Callable[[bytes, int], bytes | Rewrite | None]


class Wake(IntFlag):
    """Whose peer is to be rung."""

    NONE = 0
    BACK = 1  # the peer of our back end's ring: who submits
    FRONT = 2  # the peer of our front end's ring: who answers


def _nothing() -> None:
    pass


def _as_it_is(answer: bytes) -> bytes:
    return answer


class Bridge:
    """One request at a time, from `back`'s peer to `front`'s."""

    def __init__(
        self,
        back: BackRing,
        front: FrontRing | None,
        *,
        inspect: Inspect | None = None,
        before_submit: Callable[[], None] = _nothing,
        after_answer: Callable[[], None] = _nothing,
        wishes: bool = False,
    ) -> None:
        """`inspect(packet, locality)` may answer by itself. `wishes`: a ring without an answer is passed on.

        `before_submit` is called before a request leaves, `after_answer` once its answer (or its being given back) is
        on the page: the ledger.
        """
        self.back, self.front = back, front
        self._inspect = inspect
        self._before_submit, self._after_answer = before_submit, after_answer
        self._wishes = wishes
        self._finish_answer: Callable[[bytes], bytes] = _as_it_is
        self._in_flight = False
        self._cancelled = False  # and the answering peer knows
        self._abandoned = False  # something of ours is on the front ring that nobody waits for
        self.wishing = False
        """Whether a wish stands: call `tick` each WISH_INTERVAL if the channel to the submitting peer coalesces."""

    @property
    def in_flight(self) -> bool:
        """Whether a request is with the answering peer."""
        return self._in_flight

    def start(self, *, in_hand: bool = False) -> Wake:
        """Look at what is on the page; with `in_hand` a request found there was handed on before: give it back."""
        if in_hand:
            wake = Wake.NONE
            if self.back.awaited:
                self.back.abort()
                wake = Wake.BACK
            self._after_answer()
            return wake
        return self.on_back()

    def on_back(self) -> Wake:
        """Deal with a ring of the submitting peer."""
        if self._in_flight:
            return self._pass_cancel_on()
        if self.front is None or self._abandoned:
            return self._look_for_cancel()
        taken = self.back.take()
        if taken is None:
            return Wake.NONE
        self.wishing = False  # whoever submits is awake
        if isinstance(taken, Answered):
            return Wake.BACK
        return self._hand_on(self.front, taken)

    def _look_for_cancel(self) -> Wake:
        """Leave a request where it is until somebody can answer it; a cancelled one goes at once."""
        if not self.back.cancelled or self.back.take() is None:
            return Wake.NONE
        self.back.abort()  # also what was made a request of between the two looks
        return Wake.BACK

    def _hand_on(self, front: FrontRing, taken: Request) -> Wake:
        packet = taken.packet
        self._finish_answer = _as_it_is
        made = self._inspect(packet, taken.locality) if self._inspect else None
        if isinstance(made, bytes):
            self._answer(made)
            return Wake.BACK
        if made is not None:
            packet, self._finish_answer = made.request, made.answer
        self._before_submit()
        try:
            front.submit_long(packet, taken.locality, min(taken.extra_pages, front.extra_pages))
        except (IllegalTransitionError, PageError, ValueError):
            # the answering peer scribbled, or it has no extra pages: it never saw this request
            self._give_back()
            return Wake.BACK
        self._in_flight, self._cancelled = True, False
        return Wake.FRONT

    def _pass_cancel_on(self) -> Wake:
        if self._cancelled or self.front is None or not self.back.cancelled:
            return Wake.NONE
        self._cancelled = True
        return self._cancel(self.front)

    def _cancel(self, front: FrontRing) -> Wake:
        try:
            if not front.in_flight:
                return Wake.NONE  # it has been answered: `on_front` comes
            front.cancel()
        except PageError:
            return Wake.NONE  # `on_front` meets it, too
        return Wake.FRONT

    def on_front(self, rings: int = 1) -> Wake:
        """Deal with `rings` rings of the answering peer (1 where they coalesce).

        Raises:
            PageError: it broke the page's contract. Call `lose_front`, which gives back what is in flight.

        """
        if self.front is None:
            return Wake.NONE
        if self._abandoned:
            return self._clear_away(self.front)
        if not self._in_flight:
            return self._wish(rings)
        try:
            answer = self.front.poll()
        except RingCancelledError:
            self._give_back()
            return Wake.BACK | self._wish(rings - 1)
        if answer is None:
            return self._wish(rings)
        self._in_flight = False
        self._answer(self._finish_answer(answer))
        self._after_answer()
        return Wake.BACK | self._wish(rings - 1)

    def _clear_away(self, front: FrontRing) -> Wake:
        if front.in_flight:
            return Wake.NONE
        front.discard()
        self._abandoned = False
        return self.on_back()

    def _wish(self, rings: int) -> Wake:
        if not self._wishes or rings <= 0:
            return Wake.NONE
        self.wishing = True
        return Wake.BACK

    def tick(self) -> Wake:
        """Say a standing wish again."""
        return Wake.BACK if self.wishing else Wake.NONE

    def lose_front(self) -> Wake:
        """Go on without an answering peer: what is in flight is given back, what comes stays on the page."""
        self.front, self._abandoned = None, False
        if not self._in_flight:
            return Wake.NONE
        self._give_back()
        return Wake.BACK

    def replace_front(self, front: FrontRing) -> Wake:
        """Go on with another answering peer, whose ring is blank or holds something for nobody.

        Raises:
            PageError: what is on its ring cannot be. Call `lose_front`.

        """
        wake = self.lose_front()
        self.front = front
        self._abandoned = front.in_flight
        return wake if self._abandoned else wake | self.on_back()

    def close(self) -> Wake:
        """Give back what is in flight, ask the answering peer to give it up. The rings are the caller's to release."""
        wake = Wake.NONE
        if self._in_flight:
            if self.front is not None:
                wake |= self._cancel(self.front)
            self._give_back()
            wake |= Wake.BACK
        elif self.back.awaited:
            self.back.abort()
            wake |= Wake.BACK
        self.front = None
        return wake

    def _answer(self, answer: bytes) -> None:
        if len(answer) > self.back.answer_room:
            self.back.abort()  # no transport of ours lets that through; a driver takes it for cancelled
        else:
            self.back.finish(answer)

    def _give_back(self) -> None:
        self._in_flight = False
        self.back.abort()
        self._after_answer()
