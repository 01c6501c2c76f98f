"""A kernel for Xen's domain builders, without the zeros that Debian's has at the end of its segments.

Its last segment is 25 MB, 23 of them its empty memory (.bss, and a scratch area behind it, which makes a linker write
out both). Whatever loads an ELF file fills a segment with zeros behind what the file has of it, and under emulation
each byte that xl reads and copies costs.
"""

import struct
from typing import Final

_HEADER: Final = struct.Struct("<32xQ14xHH6x")  # e_phoff, e_phentsize, e_phnum
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")  # p_type, p_flags, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
_LOAD: Final = 1
assert (_HEADER.size, _SEGMENT.size) == (64, 56)  # System V ABI, ELF-64


def without_zeros(elf: bytes) -> bytes:
    """Return the same program: each loaded segment ends with its last byte that is not 0, sections are left out."""
    made = bytearray(elf)
    table, size, count = _HEADER.unpack_from(elf)
    end = table + size * count
    for at in range(table, end, size):
        kind, flags, offset, virtual, physical, stored, memory, align = _SEGMENT.unpack_from(elf, at)
        if kind == _LOAD:
            stored = len(elf[offset : offset + stored].rstrip(b"\0"))
            _SEGMENT.pack_into(made, at, kind, flags, offset, virtual, physical, stored, memory, align)
            end = max(end, offset + stored)
    struct.pack_into("<Q", made, 40, 0)  # e_shoff
    struct.pack_into("<HHH", made, 58, 0, 0, 0)  # e_shentsize, e_shnum, e_shstrndx
    return bytes(made[:end])
