"""What a new instance gives up before it starts its TPM: descriptors, rights, core dumps, its parent's session.

Order matters: descriptors first (they keep locks and ends of file alive in the wrong process), then the user, and
after that what a change of user resets: the parent-death signal and the dumpable flag.
Source: prctl(2), setresuid(2), close_range(2), unshare(2).
"""

import os
import resource
import signal
from collections.abc import Iterable
from typing import Any, Final

from vtpm_instance._libtpms import ffi

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15
_PR_SET_NO_NEW_PRIVS: Final = 38
_CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
_MAX_DESCRIPTORS: Final = 64  # an instance has 3 standard ones, 3 of its state, 2 listeners and at most 16 connections
_STANDARD: Final = 3
_ALL_DESCRIPTORS: Final = 1 << 30  # the kernel's own limit where there is no other (fs.nr_open)

_libc: Any = ffi.dlopen(None)


def _prctl(option: int, argument: Any) -> None:
    zero = ffi.cast("unsigned long", 0)
    if _libc.prctl(option, argument, zero, zero, zero):
        raise OSError(ffi.errno, f"prctl({option}) failed: {os.strerror(ffi.errno)}")


def _prctl_number(option: int, number: int) -> None:
    _prctl(option, ffi.cast("unsigned long", number))


def close_all_but(keep: Iterable[int]) -> None:
    """Close every descriptor but the standard three and those in `keep`."""
    low = _STANDARD
    for descriptor in sorted({descriptor for descriptor in keep if descriptor >= _STANDARD}):
        os.closerange(low, descriptor)
        low = descriptor + 1
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    os.closerange(low, _ALL_DESCRIPTORS if limit == resource.RLIM_INFINITY else limit)


def detach_from_parent() -> None:
    """Leave the parent's session, signal handling and standard input; no core dumps, few descriptors.

    Standard input is then the null device, for reading and writing.
    """
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0, inheritable=False)
    os.close(null)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MAX_DESCRIPTORS, _MAX_DESCRIPTORS))


def become(uid: int, gid: int) -> None:
    """Take the user `uid` and group `gid` for good, when this process is root and `uid` is not 0.

    Raises:
        OSError: the kernel refuses.

    """
    if os.geteuid() == 0 and uid != 0:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)


def lock_down(name: str, parent: int) -> bool:
    """Die with the parent, show no memory, gain no rights. Returns False when `parent` is gone already.

    Raises:
        OSError: the kernel refuses.

    """
    _prctl_number(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _prctl_number(_PR_SET_DUMPABLE, 0)
    _prctl_number(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_NAME, ffi.new("char[]", name.encode("ascii")[:15]))
    return os.getppid() == parent


def leave_network() -> str | None:
    """Enter an empty network namespace, for this process and all it forks.

    Returns None when done, otherwise why it could not be: only root can, and containers may forbid it.
    """
    if os.geteuid() != 0:
        return "only root can"
    if _libc.unshare(_CLONE_NEWNET):
        return os.strerror(ffi.errno)
    return None
