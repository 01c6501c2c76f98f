"""A shared mapping that holds no descriptor: for who has thousands of rings.

`mmap.mmap` keeps a duplicate of the descriptor it was made from (until Python 3.13's `trackfd`), so that every ring
would cost two of the 20,000 descriptors a process often has. This asks libc itself, by ctypes, and is the only module
that does; an instance, which has one ring, uses `mmap` and is spared the import.
"""

import ctypes
import mmap
import os
from typing import Final

from frontend_backend.tpmif import PAGE_SIZE

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


class _Page(ctypes.Array[ctypes.c_ubyte]):
    """Unmapped with its last view, so that no view of it can ever dangle."""

    _type_ = ctypes.c_ubyte
    _length_ = PAGE_SIZE

    def __del__(self) -> None:
        _libc.munmap(ctypes.addressof(self), PAGE_SIZE)


def map_without_descriptor(memfd: int) -> memoryview:
    """Map a ring's page, shared and writable; the descriptor stays the caller's and may be closed.

    Raises:
        OSError: what mmap(2) says.

    """
    address = _libc.mmap(None, PAGE_SIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, memfd, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return memoryview(_Page.from_address(address)).cast("B")
