"""What every transport of the ring must do: call `check_ring` with a function that makes a connected pair.

The transport gives each side a page and a doorbell (RingEnd). The checks use nothing else, so that the same suite
holds for the local transport and for grant tables with event channels.
"""

import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from frontend_backend.ring import Answered, BackRing, FrontRing, Request
from frontend_backend.tpmif import MAX_PACKET, PAGE_SIZE, RingState, SharedPage

DEADLINE: Final = 10.0  # seconds until a doorbell that nobody hears counts as lost
REFUSAL: Final = b"\x80\x01\0\0\0\x0a\0\0\x01\x42"
SIZES: Final = (1, 2, 9, 10, 11, 63, 64, 65, 1023, 2048, 4087, MAX_PACKET)


class RingEnd(Protocol):
    """One side of a transport."""

    page: memoryview

    def ring(self) -> None:
        """Wake the peer; never block, never raise because the peer is gone."""

    def drain(self) -> bool:
        """Swallow what was rung; False once the peer is gone."""

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when the peer rings or goes away."""

    def close(self) -> None:
        """Give the end up."""


MakePair = Callable[[], tuple[RingEnd, RingEnd]]


def check_ring(make_pair: MakePair) -> None:
    """Run every check on fresh pairs of (front, back) ends."""
    for check in (
        _check_page_is_shared_and_blank,
        _check_doorbells_wake_and_fall_silent,
        _check_doorbell_never_blocks,
        _check_sizes,
        _check_cancel,
        _check_malformed_requests,
        _check_replaced_back_end,
        _check_departure_of_the_front_end,
        _check_departure_of_the_back_end,
    ):
        with _pair(make_pair) as (front, back):
            check(front, back)


def refuse(reason: str) -> bytes:
    """Answer malformed requests as the suite expects it."""
    assert reason
    return REFUSAL


def heard(end: RingEnd, seconds: float = DEADLINE) -> bool:
    """Whether the doorbell of `end` becomes readable in time."""
    poll = select.poll()
    poll.register(end.fileno(), select.POLLIN)
    return bool(poll.poll(seconds * 1000))


@contextmanager
def _pair(make_pair: MakePair) -> Iterator[tuple[RingEnd, RingEnd]]:
    front, back = make_pair()
    try:
        yield front, back
    finally:
        front.close()
        back.close()


def _check_page_is_shared_and_blank(front: RingEnd, back: RingEnd) -> None:
    assert len(front.page) == len(back.page) == PAGE_SIZE
    assert bytes(front.page) == bytes(PAGE_SIZE), "a fresh page holds nothing, state IDLE included"
    front.page[PAGE_SIZE - 1] = 0x5A
    assert back.page[PAGE_SIZE - 1] == 0x5A
    back.page[0] = 0xA5
    assert front.page[0] == 0xA5


def _check_doorbells_wake_and_fall_silent(front: RingEnd, back: RingEnd) -> None:
    for here, there in ((front, back), (back, front)):
        assert not heard(there, 0)
        here.ring()
        assert heard(there)
        assert there.drain()
        assert not heard(there, 0)
        assert not heard(here, 0), "a side does not hear itself"


def _check_doorbell_never_blocks(front: RingEnd, back: RingEnd) -> None:
    for _ in range(5000):
        front.ring()
    deadline = time.monotonic() + DEADLINE
    while heard(back, 0):
        assert back.drain()
        assert time.monotonic() < deadline
    front.ring()
    assert heard(back), "a doorbell that was full rings again"


def _check_sizes(front: RingEnd, back: RingEnd) -> None:
    asking, answering = FrontRing(front.page), BackRing(back.page, refuse)
    for size in SIZES:
        question, answer = bytes([size % 251]) * size, bytes([size % 241 + 1]) * (MAX_PACKET + 1 - size)
        asking.submit(question, locality=size % 5)
        front.ring()
        assert heard(back)
        assert back.drain()
        assert answering.take() == Request(question, size % 5)
        assert asking.poll() is None
        assert answering.finish(answer)
        back.ring()
        assert heard(front)
        assert front.drain()
        assert asking.poll() == answer
        assert bytes(front.page[SharedPage.SIZE :]) == bytes(MAX_PACKET), "the answer is wiped once it is read"


def _check_cancel(front: RingEnd, back: RingEnd) -> None:
    asking, answering = FrontRing(front.page), BackRing(back.page, refuse)
    asking.submit(b"not taken yet")
    asking.cancel()
    assert isinstance(answering.take(), Answered)
    assert front.page[SharedPage.STATE_OFFSET] == RingState.IDLE
    asking.submit(b"taken already")
    assert answering.take() == Request(b"taken already", 0)
    asking.cancel()
    assert answering.finish(b"done all the same")
    assert asking.poll() == b"done all the same"


def _check_malformed_requests(front: RingEnd, back: RingEnd) -> None:
    answering = BackRing(back.page, refuse)
    asking = FrontRing(front.page)
    for head in (
        SharedPage(MAX_PACKET + 1, RingState.SUBMIT, 0, 0),
        SharedPage(2**32 - 1, RingState.SUBMIT, 0, 0),
        SharedPage(10, RingState.SUBMIT, 0, 1),
        SharedPage(10, RingState.SUBMIT, 0, 255),
    ):
        front.page[: SharedPage.SIZE] = head.pack()
        assert isinstance(answering.take(), Answered), head
        assert asking.poll() == REFUSAL
    front.page[: SharedPage.SIZE] = SharedPage(0, RingState.SUBMIT, 0, 0).pack()
    assert isinstance(answering.take(), Answered)
    assert back.page[SharedPage.STATE_OFFSET] == RingState.IDLE


def _check_replaced_back_end(front: RingEnd, back: RingEnd) -> None:
    asking = FrontRing(front.page)
    asking.submit(b"survives", locality=3)
    assert BackRing(back.page, refuse).take() == Request(b"survives", 3)
    second = BackRing(back.page, refuse)
    assert second.take() == Request(b"survives", 3)
    assert second.finish(b"answered by the second")
    assert asking.poll() == b"answered by the second"


def _check_departure_of_the_front_end(front: RingEnd, back: RingEnd) -> None:
    front.close()
    _check_alone(back)


def _check_departure_of_the_back_end(front: RingEnd, back: RingEnd) -> None:
    back.close()
    _check_alone(front)


def _check_alone(left: RingEnd) -> None:
    assert heard(left)
    assert not left.drain()
    left.ring()
    assert not left.drain()
