"""The front/back ring: one table of transitions and two sans-IO ends over a page of memory.

Theory of operation. One command is in flight at a time. The front end writes packet, length and locality,
then the state SUBMIT, and rings. The back end copies head and packet out *once*, checks the copy, works, writes
packet and length, then FINISH, and rings. The front end may write CANCEL at any time; the back end then either
finishes or sets IDLE. The page is shared with a peer that may be hostile: nothing on it is read twice.

Rule 1: everything about states lives in `ring_table`. Rule 2: nobody here knows what a doorbell is. Rule 3: `submit`,
`poll`, `take` and `finish` are walked for each command of a guest; they read the head as one number, look the state
up in tables of 256, and leave everything unusual to methods of their own.
Source: xen/include/public/io/tpmif.h version 2; reference implementation notes in docs/architecture.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, overload

from frontend_backend.errors import PageError, RingCancelledError
from frontend_backend.ring_table import MAY_FINISH, MAY_SUBMIT, RingEvent, advance
from frontend_backend.tpmif import (
    BYTE_MASK,
    EXTRA_PAGES_SHIFT,
    LENGTH_MASK,
    LOCALITY_SHIFT,
    MAX_PACKET,
    PAGE_SIZE,
    STATE_SHIFT,
    RingState,
    SharedPage,
)

_HEAD: Final = SharedPage.SIZE
_NOTHING: Final = memoryview(bytes(MAX_PACKET))
_NO_LENGTH: Final = bytes(SharedPage.STATE_OFFSET)
_MAX_LOCALITY: Final = 255  # a byte (tpmif.h); what a locality may do is the back end's business
_SUBMIT: Final = int(RingState.SUBMIT)  # plain numbers: a comparison with an IntEnum's member costs three times as much
_FINISH: Final = int(RingState.FINISH)
_SUBMITTED: Final = _SUBMIT << STATE_SHIFT
_FINISHED: Final = _FINISH << STATE_SHIFT


@dataclass(slots=True)
class Request:
    """One command the back end copied out: `packet` is private to it, `locality` is what the front end claims.

    Not frozen: that would make it twice as dear, and one is made for each command.
    """

    packet: bytes
    locality: int


@dataclass(frozen=True, slots=True)
class Answered:
    """The back end dealt with the page by itself (a malformed request, or a cancel); the caller only rings."""

    reason: str


def _as_head(word: int) -> SharedPage:
    return SharedPage.unpack(word.to_bytes(_HEAD, "little"))


class _Page:
    """A writable page of exactly PAGE_SIZE bytes and the few ways both ends touch it.

    `_used` counts the bytes behind the head that may hold something of this conversation, to be wiped: all of them
    on a page that was found. What a hostile peer writes beyond the packets that were announced is its own affair.
    """

    def __init__(self, page: memoryview) -> None:
        if len(page) != PAGE_SIZE or page.readonly:
            raise PageError(f"a ring needs a writable page of {PAGE_SIZE} bytes, not {len(page)}")
        self._page = page
        self._words = page.cast("Q")  # the first is the head, in one load or store
        self._used = MAX_PACKET

    def head(self) -> SharedPage:
        """Copy the head out once and check the copy."""
        return _as_head(self._words[0])

    def release(self) -> None:
        """Give the view of the page up, after which the end is of no use: a page is unmapped with its last view."""
        self._words.release()

    def _set_state(self, state: RingState) -> None:
        self._page[SharedPage.STATE_OFFSET] = state

    def _wipe(self) -> None:
        self._page[_HEAD:] = _NOTHING
        self._used = 0


def _check_span(head: SharedPage) -> None:
    """Check the packet that a head announces against the room left on the page."""
    if head.nr_extra_pages:
        raise PageError(f"{head.nr_extra_pages} extra pages announced; this transport has none")
    room = PAGE_SIZE - head.packet_offset
    if head.length > room:
        raise PageError(f"a packet of {head.length} bytes announced, the page has room for {room}")


class FrontRing(_Page):
    """The submitting end."""

    def __init__(self, page: memoryview) -> None:
        super().__init__(page)
        self._asked = 0  # bytes of the request in flight, which the answer need not have covered

    def submit(self, packet: bytes, locality: int = 0) -> None:
        """Put one command on the page (at most MAX_PACKET bytes); the caller then rings.

        The packet replaces all that was on the page. Then comes the head, which is what the peer looks at, in one
        aligned store of 8 bytes: whoever dies here leaves length and state that belong together.

        Raises:
            IllegalTransitionError: a command is still in flight.
            PageError: the back end left a state that does not exist.
            ValueError: the packet does not fit a page, or the locality is not 0..255.

        """
        size = len(packet)
        if not 0 < size <= MAX_PACKET:
            raise ValueError(f"a packet has 1 to {MAX_PACKET} bytes, not {size}")
        if not 0 <= locality <= _MAX_LOCALITY:
            raise ValueError(f"a locality is 0 to {_MAX_LOCALITY}, not {locality}")
        words, page, used = self._words, self._page, self._used
        if not MAY_SUBMIT[words[0] >> STATE_SHIFT & BYTE_MASK]:
            self._advance(RingEvent.FRONT_SUBMITS)
        end = _HEAD + size
        page[_HEAD:end] = packet
        if used > size:
            page[end : _HEAD + used] = _NOTHING[size:used]
        self._asked = size
        self._used = MAX_PACKET  # until the answer is read it is not known how much of the page that takes
        words[0] = size | _SUBMITTED | locality << LOCALITY_SHIFT

    def _advance(self, event: RingEvent) -> RingState:
        return advance(self.head().state, event)

    def poll(self) -> bytes | None:
        """Return the answer and wipe it from the page, or None while the back end still works.

        Raises:
            RingCancelledError: the back end set IDLE.
            PageError: the back end's head is malformed.

        """
        word = self._words[0]
        state = word >> STATE_SHIFT & BYTE_MASK
        if state == _SUBMIT:
            return None
        if state != _FINISH:
            if _as_head(word).state is RingState.IDLE:
                raise RingCancelledError
            return None
        size = word & LENGTH_MASK
        if size > MAX_PACKET or word >> EXTRA_PAGES_SHIFT:
            _check_span(_as_head(word))
        page = self._page
        answer = page[_HEAD : _HEAD + size].tobytes()
        used = max(size, self._asked)
        page[_HEAD : _HEAD + used] = _NOTHING[:used]
        self._used = self._asked = 0
        return answer

    def cancel(self) -> None:
        """Ask the back end to give the command up; the caller then rings and keeps polling."""
        self._set_state(self._advance(RingEvent.FRONT_CANCELS))

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
        self.locality = 0  # what the front end claims for the request that was taken last

    @overload
    def take(self) -> Request | Answered | None: ...

    @overload
    def take(self, room: Any) -> int | Answered | None: ...

    def take(self, room: Any = None) -> Request | int | Answered | None:
        """Copy the pending request out, if there is one.

        With `room`, writable memory of at least MAX_PACKET bytes that takes slices (memoryview, cffi's buffer), the
        packet is copied there: its size is returned, and `locality` tells the rest.

        The request's bytes stay on the page until it is answered, so that a back end that replaces a dead one
        finds it again. Returns Answered when the page held a malformed request (now answered with an error), or
        a cancelled or half overwritten one (now IDLE): the caller rings and goes on. Returns None while the request
        taken last awaits `finish` or `abort`, whatever rings: no command is executed twice, and a cancel that comes
        that late gets the answer. Never raises for anything a peer writes.
        """
        if self._in_hand:
            return None
        word = self._words[0]
        if word >> STATE_SHIFT & BYTE_MASK != _SUBMIT:
            return self._look_at_unsubmitted(word)
        size = word & LENGTH_MASK
        if not 0 < size <= MAX_PACKET or word >> EXTRA_PAGES_SHIFT:
            return self._look_at_malformed(word)
        self._used = max(size, self._used)
        self.locality = word >> LOCALITY_SHIFT & BYTE_MASK
        self._in_hand = True
        packet = self._page[_HEAD : _HEAD + size]
        if room is None:
            return Request(packet.tobytes(), self.locality)
        room[0:size] = packet
        return size

    def _look_at_unsubmitted(self, word: int) -> Answered | None:
        try:
            state = _as_head(word).state
        except PageError as error:
            return self._give_back(str(error))
        return self._give_back("cancelled by the front end") if state is RingState.CANCEL else None

    def _look_at_malformed(self, word: int) -> Answered:
        head = _as_head(word)
        if not head.length:
            # FrontRing never submits this: a back end died while it answered, and the request is lost
            return self._give_back("a request without a packet")
        try:
            _check_span(head)
        except PageError as error:
            self._used = MAX_PACKET  # whatever was there
            self.finish(self._refuse(str(error)))
            return Answered(str(error))
        raise AssertionError(f"nothing is wrong with {head}")

    def _give_back(self, reason: str) -> Answered:
        self.abort()
        return Answered(reason)

    @property
    def answered(self) -> bool:
        """Whether the last request on the page was answered, by us or by a back end before us."""
        return self._page[SharedPage.STATE_OFFSET] == RingState.FINISH

    @property
    def awaited(self) -> bool:
        """Whether a request is on the page, or one in hand is not answered yet."""
        return self._in_hand or self._page[SharedPage.STATE_OFFSET] in (RingState.SUBMIT, RingState.CANCEL)

    @property
    def cancelled(self) -> bool:
        """Whether the front end asks to give the command in hand up; its answer is still owed."""
        return self._page[SharedPage.STATE_OFFSET] == RingState.CANCEL

    def finish(self, packet: bytes) -> bool:
        """Answer the request in flight and wipe what is left of it; the caller then rings.

        Returns False, and answers nothing, when the page no longer holds a request (the front end scribbled).

        Raises:
            ValueError: the answer does not fit a page; the page is untouched.

        """
        size = len(packet)
        if size > MAX_PACKET:
            raise ValueError(f"an answer has at most {MAX_PACKET} bytes, not {size}")
        self._in_hand = False
        words, page, used = self._words, self._page, self._used
        if not MAY_FINISH[words[0] >> STATE_SHIFT & BYTE_MASK]:
            self.abort()
            return False
        # from here the request's bytes go: without a length nobody who finds the page takes the rest for a request
        page[: SharedPage.STATE_OFFSET] = _NO_LENGTH
        end = _HEAD + size
        page[_HEAD:end] = packet
        if used > size:
            page[end : _HEAD + used] = _NOTHING[size:used]
        self._used = size
        words[0] = size | _FINISHED
        return True

    def abort(self) -> None:
        """Give the request in flight back without an answer (the front end sees it as cancelled)."""
        self._in_hand = False
        self._wipe()
        self._set_state(RingState.IDLE)
