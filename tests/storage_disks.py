"""Disks for the storage tests: real files whose calls can fail or come short, and a file in memory."""

import os
from pathlib import Path
from typing import Self

from storage.disk import Bytes, FdDisk


class FileDisk(FdDisk):
    """A real file, closed by the test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        super().__init__(self.fd)

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FaultyDisk(FileDisk):
    """Fails the `fail_at`-th mutating call (from 0) with `error`; a failing write leaves its first `partial` bytes."""

    def __init__(self, path: Path, fail_at: int, error: int, *, partial: int = 0, only: str = "") -> None:
        super().__init__(path)
        self.fail_at, self.error, self.partial, self.only = fail_at, error, partial, only
        self.calls = 0
        self.failed = False

    def _step(self, kind: str) -> None:
        if self.only and kind != self.only:
            return
        self.calls += 1
        if self.calls - 1 == self.fail_at:
            self.failed = True
            raise OSError(self.error, os.strerror(self.error))

    def pwrite(self, data: Bytes, offset: int) -> int:
        try:
            self._step("pwrite")
        except OSError:
            super().pwrite(bytes(data)[: self.partial], offset)
            raise
        return super().pwrite(data, offset)

    def fdatasync(self) -> None:
        self._step("fdatasync")

    def fallocate(self, offset: int, length: int) -> None:
        try:
            self._step("fallocate")
        except OSError:
            # what Linux may do: keep the part that could be allocated
            os.ftruncate(self.fd, max(self.size(), (self.size() + offset + length) // 2))
            raise
        super().fallocate(offset, length)


class ShortDisk(FileDisk):
    """Transfers at most `limit` bytes a call."""

    def __init__(self, path: Path, limit: int) -> None:
        super().__init__(path)
        self.limit = limit

    def pread(self, length: int, offset: int) -> bytes:
        return super().pread(min(length, self.limit), offset)

    def pwrite(self, data: Bytes, offset: int) -> int:
        return super().pwrite(bytes(data)[: self.limit], offset)

    def fdatasync(self) -> None:
        """Not what is tested here; saves the time."""


class MemoryDisk:
    """A file in memory, for thousands of histories."""

    def __init__(self, content: bytes = b"", *, growable: bool = True) -> None:
        self.content = bytearray(content)
        self._growable = growable

    def pread(self, length: int, offset: int) -> bytes:
        return bytes(self.content[offset : offset + length])

    def pwrite(self, data: Bytes, offset: int) -> int:
        end = offset + len(data)
        if end > len(self.content):
            self.content.extend(bytes(end - len(self.content)))
        self.content[offset:end] = data
        return len(data)

    def fdatasync(self) -> None:
        """Memory is as durable as it gets."""

    def forget_cache(self) -> None:
        """There is no other copy."""

    def fallocate(self, offset: int, length: int) -> None:
        if offset + length > len(self.content):
            self.content.extend(bytes(offset + length - len(self.content)))

    def truncate(self, size: int) -> None:
        del self.content[size:]

    def copy(self) -> "MemoryDisk":
        return MemoryDisk(bytes(self.content))

    def size(self) -> int:
        return len(self.content)

    def growable(self) -> bool:
        return self._growable
