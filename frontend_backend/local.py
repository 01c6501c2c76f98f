"""The local transport of the ring: a sealed memfd page and a doorbell.

The page cannot be shrunk under a reader, grown, or re-sealed: whoever receives the descriptors checks the seals
before mapping it. How the ends wake each other is `doorbell`'s business.
"""

import fcntl
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Self

from frontend_backend.doorbell import Doorbell, PipeDoorbell, SocketDoorbell
from frontend_backend.errors import NotARingError
from frontend_backend.tpmif import PAGE_SIZE

SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # fcntl(2): size fixed for good
DESCRIPTORS: Final = 3  # at most, of one end: the page, and one or two of the doorbell
MakeDoorbells = Callable[[], tuple[Doorbell, Doorbell]]
Mapper = Callable[[int], memoryview]


def map_page(memfd: int) -> memoryview:
    """Map a ring's page, shared and writable, until its last view is gone. Holds a descriptor of its own meanwhile."""
    return memoryview(mmap.mmap(memfd, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))


class LocalRing:
    """One end of a local ring: `page` is shared with the peer, the doorbell belongs to this end alone."""

    def __init__(self, memfd: int, page: memoryview, doorbell: Doorbell) -> None:
        """Take over a checked page, its mapping and a doorbell; use `pair` or `adopt` to make one."""
        self._memfd: int | None = memfd
        self.page, self.doorbell = page, doorbell
        # The bell's own methods: a ring costs a system call, and should cost little more.
        self.ring, self.drain, self.wait, self.fileno = doorbell.ring, doorbell.drain, doorbell.wait, doorbell.fileno

    @classmethod
    def pair(cls, mapper: Mapper = map_page, doorbells: MakeDoorbells = SocketDoorbell.pair) -> tuple[Self, Self]:
        """Make a fresh ring and return its (front, back) ends. `mapper`: see also `bare_mapping`.

        Raises:
            OSError: out of descriptors or memory; nothing is left open.

        """
        pages = [os.memfd_create("vtpm-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)]
        try:
            os.ftruncate(pages[0], PAGE_SIZE)
            fcntl.fcntl(pages[0], fcntl.F_ADD_SEALS, SEALS)
            pages.append(os.dup(pages[0]))
            front_view, back_view = mapper(pages[0]), mapper(pages[1])
            front, back = doorbells()
        except OSError:
            for page in pages:
                os.close(page)
            raise
        return cls(pages[0], front_view, front), cls(pages[1], back_view, back)

    @classmethod
    def adopt(cls, memfd: int, *doorbell: int, mapper: Mapper = map_page, patient: bool = True) -> Self:
        """Take over the descriptors of a page and a doorbell that a peer handed us; closes them if they are no ring.

        One descriptor is a socket, two are the ends of pipes; `patient`: see PipeDoorbell.

        Raises:
            NotARingError: no memfd, wrong size, missing seals, or no doorbell.

        """
        page = None
        try:
            cls._check_page(memfd)
            page = mapper(memfd)
            return cls(
                memfd, page, cls._adopt_doorbell(doorbell, patient)
            )  # last: what fails must not own a descriptor yet
        except (OSError, NotARingError) as error:
            if page is not None:
                page.release()
            for descriptor in (memfd, *doorbell):
                with suppress(OSError):
                    os.close(descriptor)
            if isinstance(error, NotARingError):
                raise
            raise NotARingError(f"not a ring: {error}") from error

    @staticmethod
    def _check_page(memfd: int) -> None:
        if fcntl.fcntl(memfd, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise NotARingError("the page is not sealed against shrinking, growing and further seals")
        if os.fstat(memfd).st_size != PAGE_SIZE:
            raise NotARingError(f"the page has {os.fstat(memfd).st_size} bytes, not {PAGE_SIZE}")

    @staticmethod
    def _adopt_doorbell(descriptors: tuple[int, ...], patient: bool) -> Doorbell:
        match descriptors:
            case (both,):
                return SocketDoorbell.adopt(both)
            case (heard, rung):
                return PipeDoorbell.adopt(heard, rung, patient=patient)
        raise NotARingError(f"a doorbell has one descriptor or two, not {len(descriptors)}")

    def descriptors(self) -> tuple[int, ...]:
        """Return the page and the doorbell's one or two to hand this end over; they stay ours.

        Raises:
            NotARingError: `forget_page_descriptor` was called before.

        """
        if self._memfd is None:
            raise NotARingError("this end gave its page descriptor up")
        return self._memfd, *self.doorbell.descriptors()

    def forget_page_descriptor(self) -> None:
        """Close the page's descriptor; the mapping stays. With `map_page` it keeps one of its own."""
        if self._memfd is not None:
            os.close(self._memfd)
            self._memfd = None

    def close(self) -> None:
        """Close all descriptors; the page is unmapped with its last view."""
        self.doorbell.close()
        self.forget_page_descriptor()
        self.page.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
