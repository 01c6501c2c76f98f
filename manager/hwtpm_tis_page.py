"""One locality's page of registers, mapped from /dev/mem or a file like it: every access has the width it is asked for.

ctypes reads and writes a c_uint8 or c_uint32 with one load or store; slices of an mmap are memcpy, whose width is
anybody's guess, and a FIFO gives or takes a byte at each access.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from manager import hwtpm_tis_probe
from manager.hwtpm_tis_errors import DriverBound, MemoryDenied, PageRefused, PathMissing
from manager.hwtpm_tis_place import LOCALITIES, PAGE_BYTES, Place

assert mmap.PAGESIZE == PAGE_BYTES, "PTP's page per locality is the smallest that can be mapped"
PROBE_SECONDS: Final = 30.0  # one Python, also on a machine that boots
# struct flock of fcntl(2) on 64-bit Linux: type, whence, start, length, pid
_FLOCK: Final = struct.Struct("hhqqi4x")
assert _FLOCK.size == 32, "struct flock"
CLASS_DIR: Final = Path("/sys/class/tpm")
# Drivers of Linux that drive a TPM's registers themselves; virtual TPMs have others, or none.
REGISTER_DRIVERS: Final = frozenset({"tpm_tis", "tpm_crb", "tpm_infineon", "tpm_nsc", "tpm_atmel"})


@dataclass(frozen=True, slots=True)
class BoundDriver:
    """A driver of the kernel that has a TPM's registers: its name, and the device that it is bound to."""

    driver: str
    device: str


def bound_drivers(class_dir: Path = CLASS_DIR) -> list[BoundDriver]:
    """Return the kernel's drivers that are bound to TPMs with registers."""
    found = []
    for device in sorted(class_dir.glob("*/device")):
        driver = device / "driver"
        if driver.exists() and driver.resolve().name in REGISTER_DRIVERS:
            found.append(BoundDriver(driver.resolve().name, device.resolve().name))
    return found


class RegisterPage:
    """Registers by memory accesses. Only this one page is mapped: no other locality can be touched, by no mistake."""

    def __init__(self, path: str, place: Place) -> None:
        """Map the page.

        Raises:
            PathMissing, MemoryDenied, PageRefused, DriverBound: see their messages; each names what to do.
            BlockingIOError: another process of ours has this TPM.

        """
        self._descriptor = _open(path, place)
        try:
            _lock(self._descriptor, place)
            self._map = _map(self._descriptor, path, place)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._bytes: ctypes.Array[ctypes.c_uint8] | None = (ctypes.c_uint8 * PAGE_BYTES).from_buffer(self._map)
        self._words: ctypes.Array[ctypes.c_uint32] | None = (ctypes.c_uint32 * (PAGE_BYTES // 4)).from_buffer(self._map)

    def close(self) -> None:
        """Unmap the page; idempotent."""
        if self._bytes is not None:
            self._bytes = self._words = None
            self._map.close()
            os.close(self._descriptor)

    def read8(self, offset: int) -> int:
        """See Registers."""
        assert self._bytes is not None, "closed"
        return self._bytes[offset]

    def write8(self, offset: int, value: int) -> None:
        """See Registers."""
        assert self._bytes is not None, "closed"
        self._bytes[offset] = value

    def read32(self, offset: int) -> int:
        """See Registers."""
        assert self._words is not None, "closed"
        assert not offset % 4, "unaligned"
        return self._words[offset // 4]

    def write32(self, offset: int, value: int) -> None:
        """See Registers."""
        assert self._words is not None, "closed"
        assert not offset % 4, "unaligned"
        self._words[offset // 4] = value

    def read_fifo(self, offset: int, count: int) -> bytes:
        """See Registers."""
        registers = self._bytes
        assert registers is not None, "closed"
        return bytes([registers[offset] for _ in range(count)])

    def write_fifo(self, offset: int, content: bytes) -> None:
        """See Registers."""
        registers = self._bytes
        assert registers is not None, "closed"
        for value in content:
            registers[offset] = value

    def read_bytes(self, offset: int, count: int) -> bytes:
        """See Registers."""
        registers = self._bytes
        assert registers is not None, "closed"
        return bytes([registers[offset + index] for index in range(count)])

    def write_bytes(self, offset: int, content: bytes) -> None:
        """See Registers."""
        registers = self._bytes
        assert registers is not None, "closed"
        for index, value in enumerate(content):
            registers[offset + index] = value


def _open(path: str, place: Place) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_SYNC | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise PathMissing(path) from error
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EPERM}:
            raise MemoryDenied(path, os.strerror(error.errno), root=os.geteuid() == 0) from error
        if error.errno in {errno.ENXIO, errno.ENODEV}:
            raise PathMissing(path) from error
        raise _refused(path, place, error) from error


def _lock(descriptor: int, place: Place) -> None:
    """Keep other processes of ours from this TPM: its registers cannot tell two users of one locality apart.

    The lock is on the addresses of all localities, and ends with the descriptor. Raises BlockingIOError.
    """
    lock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, place.base, len(LOCALITIES) * PAGE_BYTES, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)
    except (BlockingIOError, PermissionError) as error:  # fcntl(2): EAGAIN or EACCES
        raise BlockingIOError(errno.EAGAIN, "another vtpm-manager uses this TPM") from error


def _map(descriptor: int, path: str, place: Place) -> mmap.mmap:
    try:
        _try_out(descriptor, path, place)
        return mmap.mmap(descriptor, PAGE_BYTES, mmap.MAP_SHARED, offset=place.address)
    except (OSError, ValueError) as error:
        raise _refused(path, place, error) from error


def _try_out(descriptor: int, path: str, place: Place) -> None:
    """Have another process touch the page first: Xen lets it be mapped and ends who touches it. Raises OSError too."""
    command = [sys.executable, "-I", "-S", hwtpm_tis_probe.__file__, str(descriptor), str(place.address)]
    try:
        done = subprocess.run(
            command,
            pass_fds=(descriptor,),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        why = f"touching it does not end in {PROBE_SECONDS:g} s"
        raise PageRefused(place, path, why, "Check `base=`, `locality=` and `path=`.") from error
    if done.returncode == -signal.SIGBUS:
        raise PageRefused(
            place,
            path,
            "whoever touches it is ended with SIGBUS",
            f'Under Xen the domain must be given this page: iomem=["{place.address >> 12:x},1"]. '
            "With a file as `path=` it is too short, or its disk is full.",
        )
    if done.returncode > 0 and not done.stderr:
        raise OSError(done.returncode, os.strerror(done.returncode))
    if done.returncode:
        raise PageRefused(
            place,
            path,
            f"trying it out failed ({done.returncode}): {done.stderr.decode(errors='replace')[-200:]}",
            "Check `base=`, `locality=` and `path=`.",
        )


def _refused(path: str, place: Place, error: OSError | ValueError) -> PageRefused:
    if isinstance(error, OSError) and error.errno == errno.EPERM:
        for bound in bound_drivers():
            return DriverBound(place, path, bound.driver, bound.device)
        return PageRefused(
            place,
            path,
            "the kernel refuses it (CONFIG_STRICT_DEVMEM, or a driver that has the region: /proc/iomem tells)",
            "Unbind that driver, or boot with `iomem=relaxed`.",
        )
    why = error.strerror if isinstance(error, OSError) else str(error)
    return PageRefused(place, path, why or str(error), "Check `base=`, `locality=` and `path=`.")
