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
from frontend_backend.ring_extent import MAX_EXTRA_PAGES
from frontend_backend.tpmif import PAGE_SIZE

SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # fcntl(2): size fixed for good
DESCRIPTORS: Final = 3  # at most, of one end: the page, and one or two of the doorbell
MakeDoorbells = Callable[[], tuple[Doorbell, Doorbell]]
Mapper = Callable[[int, int], memoryview]  # of a descriptor, and the bytes to map


def map_page(memfd: int, size: int = PAGE_SIZE) -> memoryview:
    """Map a ring's page, shared and writable, until its last view is gone. Holds a descriptor of its own meanwhile."""
    return memoryview(mmap.mmap(memfd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))


class LocalRing:
    """One end of a local ring: `page` is shared with the peer, the doorbell belongs to this end alone."""

    def __init__(self, memfd: int, page: memoryview, doorbell: Doorbell) -> None:
        """Take over a checked page, its mapping and a doorbell; use `pair` or `adopt` to make one."""
        self._memfd: int | None = memfd
        self.page, self.doorbell = page, doorbell
        # The bell's own methods: a ring costs a system call, and should cost little more.
        self.ring, self.drain, self.wait, self.fileno = doorbell.ring, doorbell.drain, doorbell.wait, doorbell.fileno

    @classmethod
    def pair(
        cls, mapper: Mapper = map_page, doorbells: MakeDoorbells = SocketDoorbell.pair, *, pages: int = 1
    ) -> tuple[Self, Self]:
        """Make a fresh ring and return its (front, back) ends. `mapper`: see also `bare_mapping`.

        `pages`: with more than one, packets may run on in pages that follow the first (`ring_extent`).

        Raises:
            OSError: out of descriptors or memory; nothing is left open.

        """
        assert 1 <= pages <= 1 + MAX_EXTRA_PAGES, pages
        size = pages * PAGE_SIZE
        memfds = [os.memfd_create("vtpm-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)]
        try:
            os.ftruncate(memfds[0], size)
            fcntl.fcntl(memfds[0], fcntl.F_ADD_SEALS, SEALS)
            memfds.append(os.dup(memfds[0]))
            front_view, back_view = mapper(memfds[0], size), mapper(memfds[1], size)
            front, back = doorbells()
        except OSError:
            for memfd in memfds:
                os.close(memfd)
            raise
        return cls(memfds[0], front_view, front), cls(memfds[1], back_view, back)

    @classmethod
    def adopt(
        cls,
        memfd: int,
        *doorbell: int,
        mapper: Mapper = map_page,
        patient: bool = True,
        wary: bool = False,
        most_pages: int = 1,
    ) -> Self:
        """Take over the descriptors of a page and a doorbell that a peer handed us; closes them if they are no ring.

        One descriptor is a socket, two are the ends of pipes; `patient`, `wary`: see PipeDoorbell. The ring
        may have `most_pages` pages.

        Raises:
            NotARingError: no memfd, wrong size, missing seals, or no doorbell.

        """
        page = None
        try:
            page = mapper(memfd, cls._check_page(memfd, most_pages))
            return cls(
                memfd, page, cls._adopt_doorbell(doorbell, patient, wary)
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
    def _check_page(memfd: int, most_pages: int) -> int:
        """Return the size of a ring's pages, in bytes."""
        if fcntl.fcntl(memfd, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise NotARingError("the page is not sealed against shrinking, growing and further seals")
        size = os.fstat(memfd).st_size
        if size % PAGE_SIZE or not PAGE_SIZE <= size <= most_pages * PAGE_SIZE:
            raise NotARingError(f"the page has {size} bytes, not {PAGE_SIZE}")
        return size

    @staticmethod
    def _adopt_doorbell(descriptors: tuple[int, ...], patient: bool, wary: bool) -> Doorbell:
        match descriptors:
            case (both,):
                return SocketDoorbell.adopt(both)
            case (heard, rung):
                return PipeDoorbell.adopt(heard, rung, patient=patient, wary=wary)
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
