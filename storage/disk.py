"""The only way to the disk: a narrow interface, so that tests can cut the power at every call.

`Disk` is what the operating system offers, partial transfers included. `Device` is what the formats
use: whole transfers, every OSError wrapped with the operation that met it.
"""

import errno
import os
import stat
from typing import Protocol

from storage.errors import DeviceError, StorageFull

# EFBIG: RLIMIT_FSIZE or the file system's own limit; for the caller it is the same as a full disk.
FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

Bytes = bytes | bytearray | memoryview


class Disk(Protocol):
    """A file or block device; all sizes and offsets in bytes. Methods raise OSError."""

    def pread(self, length: int, offset: int) -> bytes:
        """Read at most `length` bytes; fewer mean a short read or the end."""

    def pwrite(self, data: Bytes, offset: int) -> int:
        """Write at most all of `data`, return how many bytes were taken."""

    def fdatasync(self) -> None:
        """Return once all earlier writes, and the size, survive a power cut."""

    def forget_cache(self) -> None:
        """Drop what memory caches of the file, so that later reads see what the device holds; best effort."""

    def fallocate(self, offset: int, length: int) -> None:
        """Make sure that writes to this range cannot meet a full disk; extends the file."""

    def truncate(self, size: int) -> None:
        """Cut the file back to `size` bytes."""

    def size(self) -> int:
        """Bytes in the file or device."""

    def growable(self) -> bool:
        """Tell whether `fallocate` past the end can work: a regular file, not a block device."""


class FdDisk:
    """A `Disk` on an open descriptor, which stays the caller's to close."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def pread(self, length: int, offset: int) -> bytes:
        """See Disk."""
        return os.pread(self._fd, length, offset)

    def pwrite(self, data: Bytes, offset: int) -> int:
        """See Disk."""
        return os.pwrite(self._fd, data, offset)

    def fdatasync(self) -> None:
        """See Disk."""
        os.fdatasync(self._fd)

    def forget_cache(self) -> None:
        """See Disk."""
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def fallocate(self, offset: int, length: int) -> None:
        """See Disk."""
        os.posix_fallocate(self._fd, offset, length)

    def truncate(self, size: int) -> None:
        """See Disk."""
        os.ftruncate(self._fd, size)

    def size(self) -> int:
        """See Disk."""
        if self.growable():
            return os.fstat(self._fd).st_size
        return os.lseek(self._fd, 0, os.SEEK_END)  # fstat says 0 for a block device

    def growable(self) -> bool:
        """See Disk."""
        return stat.S_ISREG(os.fstat(self._fd).st_mode)


def _wrapped(operation: str, error: OSError) -> DeviceError:
    if error.errno in FULL_ERRNOS:
        return StorageFull(operation, error)
    return DeviceError(operation, error)


class Device:
    """Whole reads and writes on a `Disk`. Every method raises DeviceError, or StorageFull for a full disk."""

    __slots__ = ("_disk", "broken")

    def __init__(self, disk: Disk | int) -> None:
        self._disk = FdDisk(disk) if isinstance(disk, int) else disk
        self.broken = False  # a write or flush failed: what the device holds is not known any more

    def read(self, length: int, offset: int) -> bytes:
        """Read `length` bytes, or as many as there are before the end."""
        parts: list[bytes] = []
        missing = length
        try:
            while missing:
                part = self._disk.pread(missing, offset + length - missing)
                if not part:
                    break
                parts.append(part)
                missing -= len(part)
        except OSError as error:
            raise _wrapped(f"read {length} bytes at {offset}", error) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, data: Bytes, offset: int) -> None:
        """Write all of `data`; on an error any part of the range may hold old or new bytes."""
        length, done = len(data), 0
        try:
            while done < length:
                taken = self._disk.pwrite(memoryview(data)[done:] if done else data, offset + done)
                if taken <= 0:
                    raise OSError(errno.EIO, "the device takes no more bytes")
                done += taken
        except OSError as error:
            self.broken = True
            raise _wrapped(f"write {length - done} bytes at {offset + done}", error) from error

    def flush(self) -> None:
        """Make all earlier writes durable; after an error nothing is known about them."""
        try:
            self._disk.fdatasync()
        except OSError as error:
            self.broken = True
            raise _wrapped("flush", error) from error

    def settle(self) -> None:
        """Make what a predecessor wrote durable, or find out that it is not there.

        After a killed process its writes may be in memory only, and after a failed flush memory may hold
        what the device does not: neither must be taken for durable.
        """
        self.flush()
        try:
            self._disk.forget_cache()
        except OSError as error:
            raise _wrapped("drop the cache", error) from error

    def size(self) -> int:
        """Bytes in the file or device."""
        try:
            return self._disk.size()
        except OSError as error:
            raise _wrapped("ask for the size", error) from error

    def growable(self) -> bool:
        """Tell whether the size can change: a regular file, not a block device."""
        try:
            return self._disk.growable()
        except OSError as error:
            raise _wrapped("ask what it is", error) from error

    def shrink(self, size: int) -> None:
        """Cut a regular file to `size` bytes; durable after the next `flush`."""
        try:
            self._disk.truncate(size)
        except OSError as error:
            self.broken = True
            raise _wrapped(f"cut to {size} bytes", error) from error

    def reserve(self, size: int) -> None:
        """Make the first `size` bytes writable without meeting a full disk, or change nothing.

        A block device has the size it has: StorageFull when that is too small. The new size is
        durable after the next `flush`.
        """
        before = self.size()
        operation = f"reserve {size} bytes"
        try:
            if not self._disk.growable():
                if before < size:
                    raise OSError(errno.ENOSPC, f"the device has only {before} bytes")
                return
            try:
                self._disk.fallocate(0, size)
            except OSError:
                # Linux may keep the part it could allocate; the size must stay what it was.
                if self._disk.size() > before:
                    self._disk.truncate(before)
                raise
        except OSError as error:
            raise _wrapped(operation, error) from error
