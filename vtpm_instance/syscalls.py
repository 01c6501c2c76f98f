"""System calls that Python does not offer, each raising OSError. Linux numbers come from libseccomp, by name.

What lives here: the calls. What must not: which of them are made, and in which order; that is `confine`,
`namespaces`, `landlock`, `seccomp` and `spawn`.
"""

import os
from typing import Any, Final

from vtpm_instance._libtpms import ffi

_libc: Final[Any] = ffi.dlopen(None)
_libseccomp: Final[Any] = ffi.dlopen("libseccomp.so.2")

_NONE: Final = (0,) * 6  # for arguments that a call does not have

Pointer = Any  # a cffi pointer; it must stay referenced during the call


def number_of(name: str) -> int:
    """Return the number of a system call on this machine, negative when it has none."""
    number: int = _libseccomp.seccomp_syscall_resolve_name(name.encode("ascii"))
    return number


def address_of(pointer: Pointer) -> int:
    """Return a pointer as a number."""
    return int(ffi.cast("uintptr_t", pointer))


def call(what: str, number: int, *arguments: int) -> int:
    """Make a system call of at most five arguments; `what` names it in the error."""
    padded = arguments + (0,) * (5 - len(arguments))
    result: int = _libc.syscall(number, *padded)
    if result < 0:
        raise OSError(ffi.errno, f"{what}: {os.strerror(ffi.errno)}")
    return result


def make(calls: tuple[tuple[int, ...], ...]) -> None:
    """Make prepared system calls, one after the other, each given as number and arguments.

    Raises:
        OSError: one failed; those after it were not made.

    """
    for words in calls:
        if _libc.syscall(*words, *_NONE[len(words) :]) < 0:
            raise OSError(ffi.errno, f"system call {words[0]}: {os.strerror(ffi.errno)}")


def advise(calls: tuple[tuple[int, ...], ...]) -> None:
    """Make prepared system calls whose refusal changes nothing (madvise(2))."""
    for words in calls:
        _libc.syscall(*words, *_NONE[len(words) :])


def prctl(option: int, argument: int) -> None:
    """Change something of this process that takes one argument (prctl(2))."""
    words = [ffi.cast("unsigned long", word) for word in (argument, 0, 0, 0)]
    if _libc.prctl(option, *words) < 0:
        raise OSError(ffi.errno, f"prctl({option}): {os.strerror(ffi.errno)}")


def unshare(flags: int) -> None:
    """Leave namespaces for new ones (unshare(2))."""
    if _libc.unshare(flags):
        raise OSError(ffi.errno, f"unshare({flags:#x}): {os.strerror(ffi.errno)}")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Mount a file system (mount(2))."""
    if _libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()):
        raise OSError(ffi.errno, f"mount of {target}: {os.strerror(ffi.errno)}")


def unmount(target: str, flags: int) -> None:
    """Unmount a file system (umount2(2))."""
    if _libc.umount2(target.encode(), flags):
        raise OSError(ffi.errno, f"unmounting {target}: {os.strerror(ffi.errno)}")


def protect(address: int, length: int, protection: int) -> None:
    """Change what memory may be used for (mprotect(2))."""
    if _libc.mprotect(ffi.cast("void *", address), length, protection):
        raise OSError(ffi.errno, f"mprotect: {os.strerror(ffi.errno)}")
