"""What an instance that was taken over may try, as a table. Each attempt raises OSError when it is refused.

They run in real, confined instances (evil_instance.py). What it takes is imported before the confinement.
"""

import ctypes
import mmap
import os
import resource
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from vtpm_instance.syscalls import call, number_of


@dataclass(frozen=True)
class Targets:
    """What is there to be attacked: a neighbour instance, the keeper, a file that everybody may read, sockets."""

    neighbour: int
    keeper: int
    readable: str
    unix_path: str
    unix_abstract: bytes
    tcp_port: int
    closure: int
    handed: int  # the one descriptor that attempts are handed


Attempt = Callable[[Targets], object]
_libc = ctypes.CDLL(None, use_errno=True)
_text = ctypes.create_string_buffer(b"/")
_room = ctypes.create_string_buffer(4096)
_array_map = ctypes.create_string_buffer(struct.pack("IIII", 2, 4, 4, 1), 128)  # BPF_MAP_TYPE_ARRAY, a valid one


def _at(buffer: object) -> int:
    return ctypes.addressof(buffer)  # type: ignore[arg-type]


def _call(name: str, *arguments: int) -> int:
    return call(name, number_of(name), *arguments)


def _connect(family: int, address: object) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(2)
        sock.connect(address)  # type: ignore[arg-type]


def _fork() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _read_neighbour(targets: Targets) -> None:
    mine = ctypes.create_string_buffer(struct.pack("QQ", _at(_room), 16))
    theirs = ctypes.create_string_buffer(struct.pack("QQ", targets.closure, 16))
    if _libc.process_vm_readv(targets.neighbour, mine, 1, theirs, 1, 0) < 0:
        raise OSError(ctypes.get_errno(), "process_vm_readv")


def _steal_descriptor(targets: Targets) -> None:
    pidfd = os.pidfd_open(targets.neighbour)
    _call("pidfd_getfd", pidfd, 0, 0)


def _open_every_descriptor(targets: Targets) -> None:
    """Use descriptors that were not handed over; raises when there is none."""
    handed = {0, 1, 2, targets.handed}
    for number in set(range(1024)) - handed:
        try:
            os.fstat(number)
        except OSError:
            continue
        return
    raise OSError("none is open")


def _write_code(targets: Targets) -> None:
    _libc.memset(targets.closure, 0x90, 16)


def _executable(_targets: Targets) -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)


def _make_executable(targets: Targets) -> None:
    page = mmap.mmap(-1, 4096)
    _call("mprotect", _at((ctypes.c_char * 4096).from_buffer(page)) & ~4095, 4096, 5)


# A whole x86-64 program: ELF header, one program header, and exit(0).
_CODE = bytes.fromhex("31ff b83c000000 0f05")
_PROGRAM = (
    struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, 0x400078, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    + struct.pack("<IIQQQQQQ", 1, 5, 0, 0x400000, 0x400000, 120 + len(_CODE), 120 + len(_CODE), 4096)
    + _CODE
)


def _execute_from_memory(_targets: Targets) -> None:
    descriptor = os.memfd_create("evil", 0)
    os.write(descriptor, _PROGRAM)
    os.execve(descriptor, ["evil"], {})


def _flood(_targets: Targets) -> None:
    _call("clone", 0x3D0F00 & ~0x10000, 0, 0)  # as a thread is made, but as a process


def _sigio(targets: Targets) -> None:
    """Have the kernel send a signal to somebody else (F_SETOWN)."""
    ours, _ = socket.socketpair()
    _call("fcntl", ours.fileno(), 8, targets.keeper)


def _take_from_accomplice(targets: Targets) -> None:
    ours, theirs = socket.socketpair()
    socket.send_fds(theirs, [b"here"], [targets.handed])
    socket.recv_fds(ours, 8, 1)


ATTEMPTS: dict[str, dict[str, Attempt]] = {
    "files": {
        "read a file that everybody may read": lambda t: os.open(t.readable, os.O_RDONLY),
        "list the root directory": lambda _: os.listdir("/"),
        "make a file": lambda _: os.open("/evil", os.O_WRONLY | os.O_CREAT),
        "make a directory": lambda _: os.mkdir("/evil"),
        "look at /proc": lambda _: os.open("/proc/self/mem", os.O_RDWR),
        "make a device": lambda _: os.mknod("/evil", 0o20600, os.makedev(1, 1)),
        "change its root": lambda _: os.chroot("."),
        "mount something": lambda _: _call("mount", _at(_text), _at(_text), _at(_text), 0, 0),
    },
    "the TPM": {
        "open /dev/tpm0": lambda _: os.open("/dev/tpm0", os.O_RDWR),
        "open /dev/tpmrm0": lambda _: os.open("/dev/tpmrm0", os.O_RDWR),
    },
    "network and sockets": {
        "connect by TCP": lambda t: _connect(socket.AF_INET, ("127.0.0.1", t.tcp_port)),
        "connect to a Unix socket": lambda t: _connect(socket.AF_UNIX, t.unix_path),
        "connect to an abstract Unix socket": lambda t: _connect(socket.AF_UNIX, t.unix_abstract),
        "make a raw socket": lambda _: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
        "talk to the kernel by netlink": lambda _: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).bind((0, 0)),
        "make a vsock": lambda _: socket.socket(40, socket.SOCK_STREAM),
    },
    "other processes": {
        "kill the neighbour": lambda t: os.kill(t.neighbour, signal.SIGKILL),
        "kill the keeper": lambda t: os.kill(t.keeper, signal.SIGKILL),
        "trace the neighbour": lambda t: _call("ptrace", 16, t.neighbour),
        "read the neighbour's memory": _read_neighbour,
        "take a descriptor of the neighbour's": _steal_descriptor,
        "limit the neighbour": lambda t: resource.prlimit(t.neighbour, resource.RLIMIT_AS, (4096, 4096)),
        "have the kernel signal the keeper": _sigio,
        "use a descriptor of another ring": _open_every_descriptor,
        "take a descriptor that an accomplice sends": _take_from_accomplice,
    },
    "rights": {
        "become root": lambda _: os.setresuid(0, 0, 0),
        "become another user": lambda _: os.setresuid(1, 1, 1),
        "enter a user namespace": lambda _: _call("unshare", 0x10000000),
        "enter a network namespace": lambda _: _call("unshare", 0x40000000),
        "set the clock": lambda _: _call("clock_settime", 0, _at(_room)),
        "raise its limits": lambda _: resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096)),
        "show its memory again": lambda _: _call("prctl", 4, 1),
    },
    "new processes and code": {
        "fork": lambda _: _fork(),
        "fork with the flags of a thread": _flood,
        "execute a program": lambda _: os.execv("/bin/sh", ["sh"]),
        "execute from memory": _execute_from_memory,
        "map memory to write and execute": _executable,
        "make memory executable": _make_executable,
        "write over the callbacks' code": _write_code,
    },
    "the kernel": {
        "bpf": lambda _: _call("bpf", 0, _at(_array_map), 72),
        "keyctl": lambda _: _call("keyctl", 0, -3, 1),
        "userfaultfd": lambda _: _call("userfaultfd", 1),
        "io_uring": lambda _: _call("io_uring_setup", 1, _at(_room)),
        "perf events": lambda _: _call("perf_event_open", _at(_room), 0, -1, -1, 0),
        "shared memory of System V": lambda _: _call("shmget", 0x1234, 4096, 0o1600),
        "message queues": lambda _: _call("mq_open", _at(_text), 0o102, 0o600, 0),
        "personality": lambda _: _call("personality", 0x0040000),
        "load a module": lambda _: _call("init_module", _at(_room), 16, _at(_text)),
    },
}
# Beside the filter, does something else refuse it? Not these: there the filter is the only thing in the way.
FILTER_ALONE = frozenset(
    {
        "fork",
        "fork with the flags of a thread",
        "map memory to write and execute",
        "make memory executable",
        "execute from memory",
        "enter a user namespace",
        "have the kernel signal the keeper",
        "take a descriptor that an accomplice sends",
        "make a vsock",
        "show its memory again",
        "talk to the kernel by netlink",
        "keyctl",
        "userfaultfd",
        "shared memory of System V",
        "personality",
    }
)
