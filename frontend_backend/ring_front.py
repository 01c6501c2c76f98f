"""The submitting end of a ring. See `ring`, which has the theory of operation."""

from typing import Final

from frontend_backend.errors import RingCancelledError
from frontend_backend.ring_extent import Extent, room_of, write_references
from frontend_backend.ring_page import FINISH, HEAD, NOTHING, SUBMIT, SUBMITTED, RingPage, as_head, check_span
from frontend_backend.ring_table import MAY_SUBMIT, RingEvent, advance
from frontend_backend.tpmif import (
    BYTE_MASK,
    EXTRA_PAGES_SHIFT,
    LENGTH_MASK,
    LOCALITY_SHIFT,
    MAX_PACKET,
    STATE_SHIFT,
    RingState,
    SharedPage,
)

_MAX_LOCALITY: Final = 255  # a byte (tpmif.h); what a locality may do is the back end's business


class FrontRing(RingPage):
    """The submitting end. `references`: of the extra pages, if the peer maps them by those."""

    def __init__(self, page: memoryview, references: tuple[int, ...] = ()) -> None:
        super().__init__(page)
        self._references = references or (0,) * self.extra_pages
        self._asked = 0  # bytes of the request in flight, which the answer need not have covered

    def submit(self, packet: bytes, locality: int = 0) -> None:
        """Put one command on the page (more than MAX_PACKET bytes need extra pages); the caller then rings.

        The packet replaces all that was on the page. Then comes the head, which is what the peer looks at, in one
        aligned store of 8 bytes: whoever dies here leaves length and state that belong together.

        Raises:
            IllegalTransitionError: a command is still in flight.
            PageError: the back end left a state that does not exist.
            ValueError: the packet does not fit a page, or the locality is not 0..255.

        """
        size = len(packet)
        if not 0 < size <= MAX_PACKET:
            return self.submit_long(packet, locality, self.extra_pages)
        if not 0 <= locality <= _MAX_LOCALITY:
            raise ValueError(f"a locality is 0 to {_MAX_LOCALITY}, not {locality}")
        words, page, used = self._words, self._page, self._used
        if not MAY_SUBMIT[words[0] >> STATE_SHIFT & BYTE_MASK]:
            self._advance(RingEvent.FRONT_SUBMITS)
        end = HEAD + size
        page[HEAD:end] = packet
        if used > size:
            page[end : HEAD + used] = NOTHING[size:used]
        self._asked = size
        self._used = MAX_PACKET  # until the answer is read it is not known how much of the page that takes
        words[0] = size | SUBMITTED | locality << LOCALITY_SHIFT
        return None

    def submit_long(self, packet: bytes, locality: int, extra_pages: int) -> None:
        """Put one command on the page, with room for it and for its answer in `extra_pages` more; else as `submit`."""
        room = room_of(extra_pages)
        if not 0 < len(packet) <= room:
            raise ValueError(f"a packet has 1 to {room} bytes, not {len(packet)}")
        if not 0 <= locality <= _MAX_LOCALITY or not 0 <= extra_pages <= self.extra_pages:
            raise ValueError(f"locality {locality} or {extra_pages} extra pages: this ring has {self.extra_pages}")
        if not extra_pages:
            return self.submit(packet, locality)
        self._advance(RingEvent.FRONT_SUBMITS)
        self._wipe()
        write_references(self._page, self._references[:extra_pages])
        extent = Extent(self._page, None, extra_pages)
        extent.write(packet, 0)
        self._asked = self._used = extent.used_of_page
        self._words[0] = len(packet) | SUBMITTED | locality << LOCALITY_SHIFT | extra_pages << EXTRA_PAGES_SHIFT
        return None

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
        if state == SUBMIT:
            return None
        if state != FINISH:
            if as_head(word).state is RingState.IDLE:
                raise RingCancelledError
            return None
        size = word & LENGTH_MASK
        if size > MAX_PACKET or word >> EXTRA_PAGES_SHIFT:
            return self._poll_long(as_head(word))
        page = self._page
        answer = page[HEAD : HEAD + size].tobytes()
        used = max(size, self._asked)
        page[HEAD : HEAD + used] = NOTHING[:used]
        self._used = self._asked = 0
        return answer

    def _poll_long(self, head: SharedPage) -> bytes:
        check_span(head, self.extra_pages)
        answer = Extent(self._page, None, head.nr_extra_pages).read(head.length)
        self._wipe()
        self._asked = 0
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
