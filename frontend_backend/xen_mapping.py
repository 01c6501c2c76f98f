"""A mapping of one of Xen's devices that can be taken away at any time, whoever still holds a view of it.

`mmap.mmap` cannot be closed while a slice of it lives, and keeps a duplicate of the descriptor. A page of another
domain must go when the domain says so, not when the last slice goes. So `detach` puts private memory in the mapping's
place, at the same address and in one step (mmap(2), MAP_FIXED): the device sees its mapping end at once, and a view
that somebody forgot reads zeros (a ring at rest) and writes to nobody.
"""

import ctypes
import functools
import mmap
import os
from typing import Final

_MAP_FIXED: Final = 0x10  # asm-generic/mman-common.h; the mmap module does not have it
_FAILED: Final = ctypes.c_void_p(-1).value  # MAP_FAILED, mmap(2)
_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,  # off_t of a 64-bit libc
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


@functools.cache
def _memory(length: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    """Return the type of `length` bytes that are unmapped with their last view."""

    def unmap(memory: ctypes.Array[ctypes.c_ubyte]) -> None:
        _libc.munmap(ctypes.addressof(memory), length)

    return type("_Memory", (ctypes.c_ubyte * length,), {"__del__": unmap})


def _map(address: int | None, length: int, flags: int, descriptor: int, offset: int) -> int:
    mapped = _libc.mmap(address, length, _READ_WRITE, flags, descriptor, offset)
    if mapped is None or mapped == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(mapped)


class Mapping:
    """`length` bytes of a device, shared and writable. The descriptor stays the caller's and may be closed."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        """Map them.

        Raises:
            OSError: what mmap(2) says; for Xen's devices EINVAL mostly means that Xen refused a page.

        """
        self.address = _map(None, length, mmap.MAP_SHARED, descriptor, offset)
        self.page = memoryview(_memory(length).from_address(self.address)).cast("B")
        self._attached = True

    def detach(self) -> None:
        """End the device's mapping. Views stay readable and mean nothing. May be called twice.

        Raises:
            OSError: no memory; the mapping stays.

        """
        if self._attached:
            _map(self.address, len(self.page), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED, -1, 0)
            self._attached = False
