"""The system calls an instance may make, as a filter: built once by the spawner, loaded by each instance.

What is not listed ends the process (SIGSYS), or by configuration fails with EPERM, or is logged and allowed, to find
out what is missing. The list is what instances were seen to make (strace over the tests) and what the C library and
Python need beside it in rare moments. Source: seccomp(2), libseccomp's seccomp.h.
"""

import os
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from vtpm_instance._libtpms import ffi
from vtpm_instance.syscalls import address_of, number_of

_SECCOMP_SET_MODE_FILTER: Final = 1
_ALLOW: Final = 0x7FFF0000
_FAIL: Final = 0x00050000  # with an errno in the low half
_EPERM, _ENOSYS = 1, 38
_OPTIMIZE: Final = 8  # SCMP_FLTATR_CTL_OPTIMIZE: 2 is a binary tree, quicker than a list of 60
_INSTRUCTION_BYTES: Final = 8  # struct sock_filter
_EQUAL, _MASKED_EQUAL = 4, 7  # SCMP_CMP_EQ, SCMP_CMP_MASKED_EQ
_PROT_EXEC: Final = 4
_THREAD: Final = 0x3D0F00  # what pthread_create of glibc passes to clone(2): a thread of this process, nothing else


class OnViolation(StrEnum):
    """What a system call that is not listed does; `instance.seccomp` in the configuration."""

    KILL = "kill"
    ERRNO = "errno"
    LOG = "log"


_ACTIONS: Final = {
    OnViolation.KILL: 0x80000000,  # SCMP_ACT_KILL_PROCESS
    OnViolation.ERRNO: _FAIL | _EPERM,
    OnViolation.LOG: 0x7FFC0000,
}


@dataclass(frozen=True, slots=True)
class Compare:
    """One condition on an argument: `argument & mask == value`; without a mask all bits count."""

    argument: int
    value: int
    mask: int | None = None


ALLOWED: Final = (
    # what it was handed: ring, state image, connections; no recvmsg, by which an accomplice could hand it more
    *("read", "write", "pread64", "pwrite64", "fdatasync", "fsync", "ftruncate", "fallocate"),
    *("fstat", "newfstatat", "lseek", "close", "close_range", "flock", "dup"),
    *("accept4", "recvfrom", "sendto", "sendmsg", "shutdown", "getsockname", "getpeername"),
    # waiting
    *("epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "poll", "ppoll", "futex", "restart_syscall"),
    *("clock_nanosleep", "nanosleep", "sched_yield", "clock_gettime", "clock_getres", "gettimeofday"),
    # new rings
    *("memfd_create", "pipe2"),
    # memory, never executable
    *("munmap", "brk", "madvise", "mremap"),
    # the C library and Python
    *("getrandom", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "rseq", "set_robust_list"),
    *("getpid", "gettid", "getuid", "geteuid", "getgid", "getegid", "getrusage", "sched_getaffinity", "exit"),
    "exit_group",
)
CONDITIONAL: Final[dict[str, tuple[tuple[Compare, ...], ...]]] = {
    "mmap": ((Compare(2, 0, _PROT_EXEC),),),
    "mprotect": ((Compare(2, 0, _PROT_EXEC),),),
    "socketpair": ((Compare(0, 1),),),  # AF_UNIX: the doorbell of a new ring
    "getsockopt": ((Compare(1, 1),),),  # SOL_SOCKET: who is at the other end
    "setsockopt": ((Compare(1, 1),),),
    # F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_ADD_SEALS, F_GET_SEALS: never F_SETOWN, which sends signals
    "fcntl": tuple((Compare(1, command),) for command in (1030, 1, 2, 3, 4, 1033, 1034)),
    # FIONBIO and FIOCLEX: Python's setblocking and set_inheritable; TCGETS: "is this a terminal?", asked by libtpms
    "ioctl": tuple((Compare(1, request),) for request in (0x5421, 0x5451, 0x5401)),
    "clone": ((Compare(0, _THREAD),),),
}
# QEMU passes its end of the data channel over the control channel (SET_DATAFD)
DESCRIPTOR_TAKING: Final = ("recvmsg",)
# The swtpm command keeps its state in files that it opens anew for each save, and waits for their POSIX record lock.
FILE_KEEPING: Final = (
    *("openat", "rename", "renameat", "renameat2", "unlink", "unlinkat", "linkat", "fchmod", "getdents64"),
    *("stat", "lstat", "statx"),
)
FILE_LOCKING: Final = tuple((Compare(1, command),) for command in (6, 7))  # fcntl: F_SETLK, F_SETLKW
REFUSED: Final = {
    "clone3": _ENOSYS,  # the flags lie in memory, where a filter cannot look; glibc then takes clone
    "openat": _EPERM,  # the C library looks for files when it is out of memory or writes a message: no reason to die
    "open": _EPERM,
}


def build(on_violation: OnViolation, *, takes_descriptors: bool = False, keeps_files: bool = False) -> Any:
    """Return the filter's program (struct sock_fprog), for `call_to_load`.

    `takes_descriptors`: it is for a front end that passes a descriptor to its instance; `keeps_files`: for a process
    that opens its state files itself.

    Raises:
        OSError: libseccomp does not make it.

    """
    library: Any = ffi.dlopen("libseccomp.so.2")
    context = library.seccomp_init(_ACTIONS[on_violation])
    if context == ffi.NULL:
        raise OSError("libseccomp makes no filter here")
    try:
        _check(library.seccomp_attr_set(context, _OPTIMIZE, 2), "attributes")
        more = (DESCRIPTOR_TAKING if takes_descriptors else ()) + (FILE_KEEPING if keeps_files else ())
        for name in (*ALLOWED, *more):
            _add(library, context, _ALLOW, name, ())
        conditional = CONDITIONAL | {"fcntl": CONDITIONAL["fcntl"] + (FILE_LOCKING if keeps_files else ())}
        for name, ways in conditional.items():
            for conditions in ways:
                _add(library, context, _ALLOW, name, conditions)
        for name, errno in REFUSED.items():
            if name not in more:
                _add(library, context, _FAIL | errno, name, ())
        return _exported(library, context)
    finally:
        library.seccomp_release(context)


def _check(code: int, what: str) -> None:
    if code < 0:
        raise OSError(-code, f"libseccomp: {what}: {os.strerror(-code)}")


def _add(library: Any, context: Any, action: int, name: str, conditions: tuple[Compare, ...]) -> None:
    number = number_of(name)
    if number < 0:
        return  # not on this architecture, so it need not be allowed
    array = ffi.new("struct scmp_arg_cmp[]", max(len(conditions), 1))
    for entry, condition in zip(array, conditions, strict=False):
        entry.arg = condition.argument
        if condition.mask is None:
            entry.op, entry.datum_a = _EQUAL, condition.value
        else:
            entry.op, entry.datum_a, entry.datum_b = _MASKED_EQUAL, condition.mask, condition.value
    _check(library.seccomp_rule_add_array(context, action, number, len(conditions), array), name)


def _exported(library: Any, context: Any) -> Any:
    descriptor = os.memfd_create("vtpm-filter", os.MFD_CLOEXEC)
    try:
        _check(library.seccomp_export_bpf(context, descriptor), "export")
        code = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    finally:
        os.close(descriptor)
    program = ffi.new("struct sock_fprog *")
    instructions = ffi.new("char[]", code)
    program.len, program.filter = len(code) // _INSTRUCTION_BYTES, instructions
    _kept.append(instructions)
    return program


_kept: list[Any] = []  # what programs point to


def call_to_load(program: Any) -> tuple[int, ...]:
    """Return the system call that puts a process under the filter, for good, and threads it starts later.

    It needs no new privileges set.
    """
    return (number_of("seccomp"), _SECCOMP_SET_MODE_FILTER, 0, address_of(program))
