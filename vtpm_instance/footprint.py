"""Which pages of the spawner's memory an instance writes to: they are copied while it stands by, not while it starts.

A forked process shares each page with its parent until one of them writes to it; the copy is then made in a page
fault, about a thousand times until the first answer. Starts of throw-away instances, in children of the spawner's,
tell which pages those are; `Confinement.hints` has the kernel copy at once what all of them wrote to. More would cost
each instance memory for good: where new objects come to lie differs from start to start.
Source: proc(5), pagemap; Documentation/admin-guide/mm/pagemap.rst; madvise(2).
"""

import os
import struct
from collections.abc import Callable, Iterator
from typing import Final

from vtpm_instance.journal import note
from vtpm_instance.syscalls import number_of

LookAt = Callable[[int], None]

_ENTRY: Final = struct.Struct("=Q")  # of /proc/PID/pagemap, one for each page; also how addresses are told
_PRESENT, _EXCLUSIVE = 1 << 63, 1 << 56  # bits of an entry: in memory, mapped by nobody else
_WRITABLE: Final = "rw-p"
_POPULATE_WRITE: Final = 23  # MADV_POPULATE_WRITE, since Linux 5.14
_PAGE: Final = os.sysconf("SC_PAGESIZE")


def written_in(life: Callable[[LookAt], object]) -> set[int]:
    """Return the addresses of this process's pages that `life` writes to in a child; none where that cannot be seen.

    `life` is given what looks at a process, and has it called in another one, forked before what is to be seen.
    """
    told, tell = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(told)
            mapped = list(_mappings())

            def look_at(pid: int) -> None:
                os.write(tell, b"".join(map(_ENTRY.pack, _private(pid, mapped))))

            life(look_at)
            status = 0
        finally:
            os._exit(status)
    os.close(tell)
    with open(told, "rb") as file:
        found = {address for (address,) in _ENTRY.iter_unpack(file.read())}
    if os.waitpid(child, 0)[1]:
        note("which memory an instance writes to is not known: it is copied when it is written to")
        return set()
    return found


def _mappings() -> Iterator[tuple[int, int]]:
    """Yield first address and length of this process's private writable memory."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        for line in file:
            place, rights, *_ = line.split(maxsplit=2)
            if rights == _WRITABLE:
                start, end = (int(word, 16) for word in place.split("-"))
                yield start, end - start


def _private(pid: int, mapped: list[tuple[int, int]]) -> Iterator[int]:
    """Yield the addresses of those pages that are a process's alone by now."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        for start, length in mapped:
            file.seek(start // _PAGE * _ENTRY.size)
            for number, (entry,) in enumerate(_ENTRY.iter_unpack(file.read(length // _PAGE * _ENTRY.size))):
                if entry & _PRESENT and entry & _EXCLUSIVE:
                    yield start + number * _PAGE


def calls_to_copy(pages: set[int]) -> tuple[tuple[int, ...], ...]:
    """Return the system calls that have the kernel copy these pages for the process that makes them."""
    madvise, ordered = number_of("madvise"), sorted(pages)
    starts = [page for page in ordered if page - _PAGE not in pages]
    ends = [page + _PAGE for page in ordered if page + _PAGE not in pages]
    return tuple((madvise, start, end - start, _POPULATE_WRITE) for start, end in zip(starts, ends, strict=True))
