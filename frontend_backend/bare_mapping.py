"""Shared mappings by mmap(2) itself, which hold no descriptor: for who has thousands of rings.

`mmap.mmap` keeps a duplicate of the descriptor it was made from (until Python 3.13's `trackfd`), so that every ring
would cost two of the 20,000 descriptors a process often has. This asks libc itself, by ctypes; an instance, which has
one ring, uses `mmap` and is spared the import.
"""

import ctypes
import functools
import mmap
import os
from typing import Final

from frontend_backend.tpmif import PAGE_SIZE

_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE
_FAILED: Final = ctypes.c_void_p(-1).value  # MAP_FAILED, mmap(2)

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
def _memory(size: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    """Return the type of a mapping: unmapped with its last view, so that no view of it can ever dangle."""

    def unmap(mapped: ctypes.Array[ctypes.c_ubyte]) -> None:
        _libc.munmap(ctypes.addressof(mapped), size)

    return type(f"Memory{size}", (ctypes.c_ubyte * size,), {"__del__": unmap})


def map_memory(size: int, flags: int, descriptor: int, offset: int = 0, *, address: int | None = None) -> int:
    """Return the address of `size` bytes mapped readable and writable; `address` with MAP_FIXED only.

    Raises:
        OSError: what mmap(2) says.

    """
    mapped = _libc.mmap(address, size, _READ_WRITE, flags, descriptor, offset)
    if mapped is None or mapped == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(mapped)


def view_of(address: int, size: int) -> memoryview:
    """Return the bytes of a mapping, which ends with the last view of them."""
    return memoryview(_memory(size).from_address(address)).cast("B")


def map_without_descriptor(memfd: int, size: int = PAGE_SIZE) -> memoryview:
    """Map a ring's page, shared and writable; the descriptor stays the caller's and may be closed.

    Raises:
        OSError: what mmap(2) says.

    """
    return view_of(map_memory(size, mmap.MAP_SHARED, memfd), size)
