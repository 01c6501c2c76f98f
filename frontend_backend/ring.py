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
from typing import Any, Final, overload

from frontend_backend.errors import PageError
from frontend_backend.ring_extent import MAX_EXTRA_PAGES, Extent, MapExtraPages, read_references
from frontend_backend.ring_front import FrontRing
from frontend_backend.ring_page import FINISHED, HEAD, NOTHING, SUBMIT, Answered, Request, RingPage, as_head, check_span
from frontend_backend.ring_table import MAY_FINISH
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

__all__ = ["Answered", "BackRing", "FrontRing", "Request"]

_NO_LENGTH: Final = bytes(SharedPage.STATE_OFFSET)


class BackRing(RingPage):
    """The answering end. `refuse` makes the answer to a malformed request from its reason.

    `map_extra` maps the extra pages of a request by their references, at most `extra_pages` of them, where they do not
    follow the page in memory. `most`: bytes of the longest packet with extra pages that is taken, others are refused.
    """

    def __init__(
        self,
        page: memoryview,
        refuse: Callable[[str], bytes],
        *,
        map_extra: MapExtraPages | None = None,
        extra_pages: int = 0,
        most: int | None = None,
    ) -> None:
        super().__init__(page)
        self._refuse = refuse
        self._map_extra, self._most = map_extra, most
        if map_extra:
            self.extra_pages = min(extra_pages, MAX_EXTRA_PAGES)
        self._extent: Extent | None = None  # of a request in hand with extra pages
        self._room = MAX_PACKET  # for an answer on one page; none while the request in hand has extra pages
        self._in_hand = False
        self.locality = 0  # what the front end claims for the request that was taken last

    @overload
    def take(self) -> Request | Answered | None: ...

    @overload
    def take(self, room: Any) -> int | Answered | None: ...

    def take(self, room: Any = None) -> Request | int | Answered | None:
        """Copy the pending request out, if there is one.

        With `room`, writable memory of at least MAX_PACKET bytes (`most`, if there are extra pages) that takes slices
        (memoryview, cffi's buffer), the packet is copied there: its size is returned, and `locality` tells the rest.

        The request's bytes stay on the page until it is answered, so that a back end that replaces a dead one
        finds it again. Returns Answered when the page held a malformed request (now answered with an error), or
        a cancelled or half overwritten one (now IDLE): the caller rings and goes on. Returns None while the request
        taken last awaits `finish` or `abort`, whatever rings: no command is executed twice, and a cancel that comes
        that late gets the answer. Never raises for anything a peer writes.
        """
        if self._in_hand:
            return None
        word = self._words[0]
        if word >> STATE_SHIFT & BYTE_MASK != SUBMIT:
            return self._look_at_unsubmitted(word)
        size = word & LENGTH_MASK
        if not 0 < size <= MAX_PACKET or word >> EXTRA_PAGES_SHIFT:
            return self._look_at_long(as_head(word), room)
        self._used = max(size, self._used)
        self.locality = word >> LOCALITY_SHIFT & BYTE_MASK
        self._in_hand = True
        packet = self._page[HEAD : HEAD + size]
        if room is None:
            return Request(packet.tobytes(), self.locality)
        room[0:size] = packet
        return size

    def _look_at_unsubmitted(self, word: int) -> Answered | None:
        try:
            state = as_head(word).state
        except PageError as error:
            return self._give_back(str(error))
        return self._give_back("cancelled by the front end") if state is RingState.CANCEL else None

    def _look_at_long(self, head: SharedPage, room: Any) -> Request | int | Answered:
        """Take a request with extra pages, or refuse a malformed one."""
        if not head.length:
            # FrontRing never submits this: a back end died while it answered, and the request is lost
            return self._give_back("a request without a packet")
        try:
            packet = self._take_long(head)
        except PageError as error:
            self._used = len(self._page) - HEAD  # whatever was there
            self.finish(self._refuse(str(error)))
            return Answered(str(error))
        self.locality = head.locality
        self._in_hand = True
        if room is None:
            return Request(packet, head.locality, head.nr_extra_pages)
        room[0 : head.length] = packet
        return head.length

    def _take_long(self, head: SharedPage) -> bytes:
        check_span(head, self.extra_pages)
        assert head.nr_extra_pages, f"nothing is long about {head}"
        if self._most is not None and head.length > self._most:
            raise PageError(f"a packet of {head.length} bytes announced, at most {self._most} are taken")
        extra = self._map_extra(read_references(self._page, head.nr_extra_pages)) if self._map_extra else None
        extent = Extent(self._page, extra, head.nr_extra_pages)
        self._extent, self._room = extent, -1
        self._used = max(extent.used_of_page, self._used)
        return extent.read(head.length)

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
        if size > self._room:
            return self._finish_long(packet)
        self._in_hand = False
        words, page, used = self._words, self._page, self._used
        if not MAY_FINISH[words[0] >> STATE_SHIFT & BYTE_MASK]:
            self.abort()
            return False
        # from here the request's bytes go: without a length nobody who finds the page takes the rest for a request
        page[: SharedPage.STATE_OFFSET] = _NO_LENGTH
        end = HEAD + size
        page[HEAD:end] = packet
        if used > size:
            page[end : HEAD + used] = NOTHING[size:used]
        self._used = size
        words[0] = size | FINISHED
        return True

    @property
    def answer_room(self) -> int:
        """The most bytes that `finish` takes now."""
        return self._extent.room if self._extent else MAX_PACKET

    def _finish_long(self, packet: bytes) -> bool:
        size, extent = len(packet), self._extent
        if size > self.answer_room or extent is None:
            raise ValueError(f"an answer has at most {self.answer_room} bytes, not {size}")
        self._in_hand = False
        if not MAY_FINISH[self._words[0] >> STATE_SHIFT & BYTE_MASK]:
            self.abort()
            return False
        self._page[: SharedPage.STATE_OFFSET] = _NO_LENGTH
        extent.write(packet, extent.room)
        self._let_extent_go()
        self._words[0] = size | FINISHED | extent.extra_pages << EXTRA_PAGES_SHIFT
        return True

    def _let_extent_go(self) -> None:
        if self._extent:
            self._extent.release()
        self._extent, self._room = None, MAX_PACKET

    def release(self) -> None:
        """Give the views up, of extra pages too."""
        self._let_extent_go()
        super().release()

    def abort(self) -> None:
        """Give the request in flight back without an answer (the front end sees it as cancelled)."""
        self._in_hand = False
        if self._extent:
            self._extent.write(b"", self._extent.room)
            self._let_extent_go()
        self._wipe()
        self._set_state(RingState.IDLE)
