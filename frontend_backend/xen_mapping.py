"""A mapping of one of Xen's devices that can be taken away at any time, whoever still holds a view of it.

`mmap.mmap` cannot be closed while a slice of it lives, and keeps a duplicate of the descriptor. A page of another
domain must go when the domain says so, not when the last slice goes. So `detach` puts private memory in the mapping's
place, at the same address and in one step (mmap(2), MAP_FIXED): the device sees its mapping end at once, and a view
that somebody forgot reads zeros (a ring at rest) and writes to nobody.
"""

import mmap
from typing import Final

from frontend_backend.bare_mapping import map_memory, view_of

_MAP_FIXED: Final = 0x10  # asm-generic/mman-common.h; the mmap module does not have it


class Mapping:
    """`length` bytes of a device, shared and writable. The descriptor stays the caller's and may be closed."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        """Map them.

        Raises:
            OSError: what mmap(2) says; for Xen's devices EINVAL mostly means that Xen refused a page.

        """
        self.address = map_memory(length, mmap.MAP_SHARED, descriptor, offset)
        self.page = view_of(self.address, length)
        self._attached = True

    def detach(self) -> None:
        """End the device's mapping. Views stay readable and mean nothing. May be called twice.

        Raises:
            OSError: no memory; the mapping stays.

        """
        if self._attached:
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
            map_memory(len(self.page), private, -1, address=self.address)
            self._attached = False
