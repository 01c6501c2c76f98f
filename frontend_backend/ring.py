"""The front/back ring: one table of transitions and two sans-IO ends over a page of memory.

Theory of operation. One command is in flight at a time. The front end writes packet, length and locality,
then the state SUBMIT, and rings. The back end copies head and packet out *once*, checks the copy, works, writes
packet and length, then FINISH, and rings. The front end may write CANCEL at any time; the back end then either
finishes or sets IDLE. The page is shared with a peer that may be hostile: nothing on it is read twice.

Rule 1: everything about states lives in TRANSITIONS. Rule 2: nobody here knows what a doorbell is.
Source: xen/include/public/io/tpmif.h version 2; reference implementation notes in docs/architecture.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from frontend_backend.errors import IllegalTransitionError, PageError, RingCancelledError
from frontend_backend.tpmif import MAX_PACKET, PAGE_SIZE, RingState, SharedPage

_NOTHING: Final = bytes(MAX_PACKET)


class RingEvent(Enum):
    """What either side can do to the ring."""

    FRONT_SUBMITS = auto()
    FRONT_CANCELS = auto()
    BACK_FINISHES = auto()
    BACK_ABORTS = auto()


_MAX_LOCALITY: Final = 255  # a byte (tpmif.h); what a locality may do is the back end's business

_S, _E = RingState, RingEvent
TRANSITIONS: Final[dict[tuple[RingState, RingEvent], RingState]] = {
    (_S.IDLE, _E.FRONT_SUBMITS): _S.SUBMIT,
    (_S.FINISH, _E.FRONT_SUBMITS): _S.SUBMIT,
    # "at any time" (tpmif.h): a cancel races with the back end's answer, and a late one finds IDLE or FINISH
    (_S.SUBMIT, _E.FRONT_CANCELS): _S.CANCEL,
    (_S.CANCEL, _E.FRONT_CANCELS): _S.CANCEL,
    (_S.FINISH, _E.FRONT_CANCELS): _S.CANCEL,
    (_S.IDLE, _E.FRONT_CANCELS): _S.CANCEL,
    (_S.SUBMIT, _E.BACK_FINISHES): _S.FINISH,
    (_S.CANCEL, _E.BACK_FINISHES): _S.FINISH,
    (_S.SUBMIT, _E.BACK_ABORTS): _S.IDLE,
    (_S.CANCEL, _E.BACK_ABORTS): _S.IDLE,
}


def advance(state: RingState, event: RingEvent) -> RingState:
    """Return the state that `event` leads to.

    Raises:
        IllegalTransitionError: the pair is not in TRANSITIONS.

    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransitionError(state.name, event.name) from None


@dataclass(frozen=True, slots=True)
class Request:
    """One command the back end copied out: `packet` is private to it, `locality` is what the front end claims."""

    packet: bytes
    locality: int


@dataclass(frozen=True, slots=True)
class Answered:
    """The back end dealt with the page by itself (a malformed request, or a cancel); the caller only rings."""

    reason: str


class _Page:
    """A writable page of exactly PAGE_SIZE bytes and the few ways both ends touch it."""

    def __init__(self, page: memoryview) -> None:
        if len(page) != PAGE_SIZE or page.readonly:
            raise PageError(f"a ring needs a writable page of {PAGE_SIZE} bytes, not {len(page)}")
        self._page = page

    def head(self) -> SharedPage:
        """Copy the head out once and check the copy."""
        return SharedPage.unpack(bytes(self._page[: SharedPage.SIZE]))

    def _put(self, packet: bytes, locality: int, state: RingState) -> None:
        """Write the packet over all that was on the page, then the head, which is what the peer looks at.

        The head is one aligned store of 8 bytes: whoever dies here leaves length and state that belong together.
        """
        self._page[SharedPage.SIZE :] = packet.ljust(MAX_PACKET, b"\0")
        self._page[: SharedPage.SIZE] = SharedPage(len(packet), state, locality, 0).pack()

    def _set_state(self, state: RingState) -> None:
        self._page[SharedPage.STATE_OFFSET] = state

    def _wipe(self) -> None:
        self._page[SharedPage.SIZE :] = _NOTHING


def _packet_span(head: SharedPage) -> tuple[int, int]:
    """Return (offset, length) of the packet, checked against the room left on the page."""
    if head.nr_extra_pages:
        raise PageError(f"{head.nr_extra_pages} extra pages announced; this transport has none")
    room = PAGE_SIZE - head.packet_offset
    if head.length > room:
        raise PageError(f"a packet of {head.length} bytes announced, the page has room for {room}")
    return head.packet_offset, head.length


class FrontRing(_Page):
    """The submitting end."""

    def submit(self, packet: bytes, locality: int = 0) -> None:
        """Put one command on the page (at most MAX_PACKET bytes); the caller then rings.

        Raises:
            IllegalTransitionError: a command is still in flight.
            PageError: the back end left a state that does not exist.
            ValueError: the packet does not fit a page, or the locality is not 0..255.

        """
        if not 0 < len(packet) <= MAX_PACKET:
            raise ValueError(f"a packet has 1 to {MAX_PACKET} bytes, not {len(packet)}")
        if not 0 <= locality <= _MAX_LOCALITY:
            raise ValueError(f"a locality is 0 to {_MAX_LOCALITY}, not {locality}")
        advance(self.head().state, RingEvent.FRONT_SUBMITS)
        self._put(packet, locality, RingState.SUBMIT)

    def poll(self) -> bytes | None:
        """Return the answer and wipe it from the page, or None while the back end still works.

        Raises:
            RingCancelledError: the back end set IDLE.
            PageError: the back end's head is malformed.

        """
        if self._page[SharedPage.STATE_OFFSET] == RingState.SUBMIT:
            return None  # only an early way out: what counts is the copy below
        head = self.head()
        if head.state is RingState.IDLE:
            raise RingCancelledError
        if head.state is not RingState.FINISH:
            return None
        offset, length = _packet_span(head)
        answer = bytes(self._page[offset : offset + length])
        self._wipe()
        return answer

    def cancel(self) -> None:
        """Ask the back end to give the command up; the caller then rings and keeps polling."""
        self._set_state(advance(self.head().state, RingEvent.FRONT_CANCELS))

    def discard(self) -> None:
        """Wipe an answer that nobody waits for any more; does nothing while a command is in flight."""
        if not self.in_flight:
            self._wipe()

    @property
    def in_flight(self) -> bool:
        """Whether a submitted or cancelled command still awaits the back end."""
        return self.head().state in (RingState.SUBMIT, RingState.CANCEL)


class BackRing(_Page):
    """The answering end. `refuse` makes the answer to a malformed request from its reason."""

    def __init__(self, page: memoryview, refuse: Callable[[str], bytes]) -> None:
        super().__init__(page)
        self._refuse = refuse
        self._in_hand = False

    def take(self) -> Request | Answered | None:
        """Copy the pending request out, if there is one.

        The request's bytes stay on the page until it is answered, so that a back end that replaces a dead one
        finds it again. Returns Answered when the page held a malformed request (now answered with an error), or
        a cancelled or half overwritten one (now IDLE): the caller rings and goes on. Returns None while the request
        taken last awaits `finish` or `abort`, whatever rings: no command is executed twice, and a cancel that comes
        that late gets the answer. Never raises for anything a peer writes.
        """
        if self._in_hand:
            return None
        try:
            head = self.head()
        except PageError as error:
            return self._give_back(str(error))
        if head.state is RingState.CANCEL:
            return self._give_back("cancelled by the front end")
        return self._take_submitted(head) if head.state is RingState.SUBMIT else None

    def _take_submitted(self, head: SharedPage) -> Request | Answered:
        if not head.length:
            # FrontRing never submits this: a back end died while it answered, and the request is lost
            return self._give_back("a request without a packet")
        try:
            offset, length = _packet_span(head)
        except PageError as error:
            self.finish(self._refuse(str(error)))
            return Answered(str(error))
        self._in_hand = True
        return Request(bytes(self._page[offset : offset + length]), head.locality)

    def _give_back(self, reason: str) -> Answered:
        self.abort()
        return Answered(reason)

    def finish(self, packet: bytes) -> bool:
        """Answer the request in flight and wipe what is left of it; the caller then rings.

        Returns False, and answers nothing, when the page no longer holds a request (the front end scribbled).

        Raises:
            ValueError: the answer does not fit a page; the page is untouched.

        """
        if len(packet) > MAX_PACKET:
            raise ValueError(f"an answer has at most {MAX_PACKET} bytes, not {len(packet)}")
        self._in_hand = False
        try:
            advance(self.head().state, RingEvent.BACK_FINISHES)
        except (PageError, IllegalTransitionError):
            self.abort()
            return False
        # from here the request's bytes go: without a length nobody who finds the page takes the rest for a request
        self._page[: SharedPage.STATE_OFFSET] = bytes(SharedPage.STATE_OFFSET)
        self._put(packet, 0, RingState.FINISH)
        return True

    def abort(self) -> None:
        """Give the request in flight back without an answer (the front end sees it as cancelled)."""
        self._in_hand = False
        self._wipe()
        self._set_state(RingState.IDLE)
