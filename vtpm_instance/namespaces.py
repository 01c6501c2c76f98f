"""What the spawner enters once, for all it forks: an empty network, an empty file system, no shared memory of others.

Order matters: everything that is read from files (modules, libraries, OpenSSL's configuration) must be loaded before.
Source: namespaces(7), user_namespaces(7), pivot_root(2).
"""

import os
from collections.abc import Callable
from typing import Final

from vtpm_instance import syscalls
from vtpm_instance._libtpms import ffi

_NEWNS: Final = 0x00020000  # linux/sched.h
_NEWIPC: Final = 0x08000000
_NEWUSER: Final = 0x10000000
_NEWNET: Final = 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8  # linux/mount.h
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 32, 4096, 16384, 1 << 18
_MNT_DETACH: Final = 2
_ALL_IDS: Final = "0 0 4294967295"
_STEPPING_STONE: Final = "/proc"  # a directory that every system has; the empty file system is mounted over it


def enter() -> dict[str, str | None]:
    """Enter what the kernel grants; returns for "network", "mounts" and "ipc" None, or why it is not to be had."""
    why_not_user = None
    try:
        syscalls.unshare(_NEWNET)
    except OSError:
        why_not_user = _tried(_enter_user_namespace)
        network = why_not_user or _tried(lambda: syscalls.unshare(_NEWNET))
    else:
        network = None
    return {
        "network": network,
        "ipc": why_not_user or _tried(lambda: syscalls.unshare(_NEWIPC)),
        "mounts": why_not_user or _tried(_empty_root),
    }


def _tried(step: Callable[[], None]) -> str | None:
    try:
        step()
    except OSError as error:
        return str(error)
    return None


def _enter_user_namespace() -> None:
    """Enter a user namespace in which users have the numbers they have outside: without it only root may do the rest.

    A process with CAP_SETUID outside gives all numbers; another one only its own.
    """
    uid, gid, outer = os.geteuid(), os.getegid(), os.getpid()
    told, tell = os.pipe2(os.O_CLOEXEC)
    helper = os.fork()
    if helper == 0:
        status = 1
        try:
            os.close(tell)
            if os.read(told, 1):
                _write_maps(outer, _ALL_IDS, _ALL_IDS)
                status = 0
        finally:
            os._exit(status)
    os.close(told)
    try:
        syscalls.unshare(_NEWUSER)
        os.write(tell, b"\0")
    finally:
        os.close(tell)
        _, status = os.waitpid(helper, 0)
    if status:
        _write_text("/proc/self/setgroups", "deny")
        _write_maps("self", f"{uid} {uid} 1", f"{gid} {gid} 1")


def _write_maps(process: int | str, users: str, groups: str) -> None:
    _write_text(f"/proc/{process}/gid_map", groups)
    _write_text(f"/proc/{process}/uid_map", users)


def _write_text(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode("ascii"))
    finally:
        os.close(descriptor)


def _empty_root() -> None:
    """Make an empty, read-only file system the root, and let go of every other one."""
    syscalls.unshare(_NEWNS)
    syscalls.mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    plain = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    syscalls.mount("vtpm-nothing", _STEPPING_STONE, "tmpfs", plain, "size=4k,nr_inodes=1,mode=0555")
    os.chdir(_STEPPING_STONE)
    dot = ffi.new("char[]", b".")
    here = syscalls.address_of(dot)
    # The old root is then mounted over the new one (pivot_root(2), "pivot_root(".", ".")") and can be let go of.
    syscalls.call("pivot_root", syscalls.number_of("pivot_root"), here, here)
    syscalls.unmount(".", _MNT_DETACH)
    os.chdir("/")
    syscalls.mount("none", "/", "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | plain)
