"""What both ends of a ring know of its page. See `ring`, which has the theory of operation."""

from dataclasses import dataclass
from typing import Final

from frontend_backend.errors import PageError
from frontend_backend.ring_extent import MAX_EXTRA_PAGES, room_of
from frontend_backend.tpmif import MAX_PACKET, PAGE_SIZE, STATE_SHIFT, RingState, SharedPage

HEAD: Final = SharedPage.SIZE
NOTHING: Final = memoryview(bytes(MAX_PACKET + MAX_EXTRA_PAGES * PAGE_SIZE))
SUBMIT: Final = int(RingState.SUBMIT)  # plain numbers: a comparison with an IntEnum's member costs three times as much
FINISH: Final = int(RingState.FINISH)
SUBMITTED: Final = SUBMIT << STATE_SHIFT
FINISHED: Final = FINISH << STATE_SHIFT


@dataclass(slots=True)
class Request:
    """One command the back end copied out: `packet` is private to it, `locality` is what the front end claims.

    Not frozen: that would make it twice as dear, and one is made for each command.
    """

    packet: bytes
    locality: int
    extra_pages: int = 0  # announced by the front end; its answer has as much room


@dataclass(frozen=True, slots=True)
class Answered:
    """The back end dealt with the page by itself (a malformed request, or a cancel); the caller only rings."""

    reason: str


def as_head(word: int) -> SharedPage:
    """Return the head that a word of the page is; raises PageError for a state that does not exist."""
    return SharedPage.unpack(word.to_bytes(HEAD, "little"))


class RingPage:
    """A writable page of PAGE_SIZE bytes, perhaps with extra pages right after it, and the few ways to touch it.

    `_used` counts the bytes behind the head that may hold something of this conversation, to be wiped: all of them
    on a page that was found. What a hostile peer writes beyond the packets that were announced is its own affair.
    """

    def __init__(self, page: memoryview) -> None:
        extra, odd = divmod(len(page) - PAGE_SIZE, PAGE_SIZE)
        if odd or not 0 <= extra <= MAX_EXTRA_PAGES or page.readonly:
            raise PageError(f"a ring needs a writable page of {PAGE_SIZE} bytes, not {len(page)}")
        self._page = page
        self._words = page.cast("Q")  # the first is the head, in one load or store
        self._used = len(page) - HEAD
        self.extra_pages = extra  # how many a request may announce

    def head(self) -> SharedPage:
        """Copy the head out once and check the copy."""
        return as_head(self._words[0])

    def release(self) -> None:
        """Give the view of the page up, after which the end is of no use: a page is unmapped with its last view."""
        self._words.release()

    def _set_state(self, state: RingState) -> None:
        self._page[SharedPage.STATE_OFFSET] = state

    def _wipe(self) -> None:
        self._page[HEAD:] = NOTHING[: len(self._page) - HEAD]
        self._used = 0


def check_span(head: SharedPage, extra_pages: int) -> None:
    """Check the packet that a head announces against the room there is."""
    if head.nr_extra_pages > extra_pages:
        raise PageError(f"{head.nr_extra_pages} extra pages announced; this transport has {extra_pages or 'none'}")
    room = room_of(head.nr_extra_pages)
    if head.length > room:
        raise PageError(f"a packet of {head.length} bytes announced, the page has room for {room}")
