"""Packets that run on in extra pages: where they lie, and how they are read and written.

tpmif.h: `nr_extra_pages` grant references of 4 bytes stand between the head and the packet, which runs on in those
pages as if each was mapped right after the one before. On a ring of ours all pages lie in one memory and the
references say nothing; Xen's back end maps by reference what each request names.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from frontend_backend.tpmif import GRANT_REFERENCE_SIZE, PAGE_SIZE, SharedPage

MAX_EXTRA_PAGES: Final = 3  # of any ring of ours: 16 KiB, four times what libtpms takes today
_ZEROS: Final = memoryview(bytes(PAGE_SIZE * (1 + MAX_EXTRA_PAGES)))


class ExtraPages(Protocol):
    """The extra pages of one request, in one memory."""

    @property
    def page(self) -> memoryview:
        """Return the memory: 4096 bytes a page, writable."""
        ...

    def unmap(self) -> None:
        """Let them go; also after that `unmap` may be called."""
        ...


MapExtraPages = Callable[[tuple[int, ...]], ExtraPages]
"""Maps the pages with these references; raises PageError for those that cannot be mapped."""


def offset_of(extra_pages: int) -> int:
    """Return where on the first page the packet begins, in bytes."""
    return SharedPage.SIZE + GRANT_REFERENCE_SIZE * extra_pages


def room_of(extra_pages: int) -> int:
    """Return how long a packet may be, in bytes."""
    return PAGE_SIZE * (1 + extra_pages) - offset_of(extra_pages)


def read_references(page: memoryview, extra_pages: int) -> tuple[int, ...]:
    """Copy the references off the page, once."""
    return struct.unpack(f"<{extra_pages}I", bytes(page[SharedPage.SIZE : offset_of(extra_pages)]))


def write_references(page: memoryview, references: tuple[int, ...]) -> None:
    """Put the references on the page."""
    page[SharedPage.SIZE : offset_of(len(references))] = struct.pack(f"<{len(references)}I", *references)


@dataclass(slots=True)
class Extent:
    """The memory of one packet. `extra` is None where `page` itself holds the extra pages too."""

    page: memoryview
    extra: ExtraPages | None
    extra_pages: int

    @property
    def room(self) -> int:
        """How long a packet may be, in bytes."""
        return room_of(self.extra_pages)

    @property
    def used_of_page(self) -> int:
        """How many bytes of `page` behind the head a packet that fills the room covers."""
        return len(self.page) - SharedPage.SIZE if self.extra else room_of(self.extra_pages) + self._references

    @property
    def _references(self) -> int:
        return GRANT_REFERENCE_SIZE * self.extra_pages

    def read(self, size: int) -> bytes:
        """Copy a packet of `size` bytes, at most `room`."""
        first = self._share(size)
        offset = offset_of(self.extra_pages)
        packet = bytes(self.page[offset : offset + first])
        return packet + bytes(self.extra.page[: size - first]) if self.extra and size > first else packet

    def write(self, packet: bytes, used: int) -> None:
        """Replace a packet of `used` bytes by this one; what is left of the old one becomes zeros."""
        size, offset = max(len(packet), used), offset_of(self.extra_pages)
        padded = packet + bytes(_ZEROS[: size - len(packet)])
        first = self._share(size)
        self.page[offset : offset + first] = padded[:first]
        if self.extra and size > first:
            self.extra.page[: size - first] = padded[first:]

    def release(self) -> None:
        """Let the extra pages go."""
        if self.extra:
            self.extra.unmap()

    def _share(self, size: int) -> int:
        """Return how many bytes of a packet lie in `page`."""
        return min(size, len(self.page) - offset_of(self.extra_pages))
