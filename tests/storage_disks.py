"""Disks for the storage tests: real files whose calls can fail, come short, or be recorded for a power cut."""

import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from storage.disk import Bytes, FdDisk

SECTOR = 512  # what a power cut leaves whole


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

    def size(self) -> int:
        return len(self.content)

    def growable(self) -> bool:
        return self._growable


@dataclass(frozen=True)
class Write:
    offset: int
    data: bytes


@dataclass
class RecordingDisk(MemoryDisk):
    """Keeps every write, resize and flush in order; `cuts` replays what a power cut could leave."""

    start: bytes = b""
    steps: list[Write | int | None] = field(default_factory=list)  # write, new size, flush

    def __post_init__(self) -> None:
        super().__init__(self.start)

    def pwrite(self, data: Bytes, offset: int) -> int:
        self.steps.append(Write(offset, bytes(data)))
        return super().pwrite(data, offset)

    def fdatasync(self) -> None:
        self.steps.append(None)

    def fallocate(self, offset: int, length: int) -> None:
        super().fallocate(offset, length)
        self.steps.append(len(self.content))

    def truncate(self, size: int) -> None:
        super().truncate(size)
        self.steps.append(size)

    def flushes(self) -> int:
        return self.steps.count(None)

    def cuts(self, rng: random.Random, subsets: int = 4) -> Iterator[tuple[int, bytes]]:
        """Yield (steps that were issued, image) for power cuts after every step.

        For each prefix: all writes so far; the last one torn at a random sector; and random subsets of the
        sectors written since the last flush, in which each sector holds any of its un-flushed versions.
        """
        durable = bytearray(self.start)
        window: list[Write] = []
        size = len(durable)
        yield 0, bytes(durable)
        for count, step in enumerate(self.steps, 1):
            if step is None:
                for write in window:
                    apply(durable, write)
                _resize(durable, size)
                window.clear()
                yield count, bytes(durable)
                continue
            if isinstance(step, int):
                size = step
                yield from ((count, _image(durable, window, chosen)) for chosen in (size, len(durable)))
                continue
            window.append(step)
            size = max(size, step.offset + len(step.data))
            yield count, _image(durable, window, size)
            for _ in range(subsets):
                yield count, _image(durable, _some_sectors(window, rng), size)


def _resize(image: bytearray, size: int) -> None:
    if size > len(image):
        image.extend(bytes(size - len(image)))
    else:
        del image[size:]


def apply(image: bytearray, write: Write) -> None:
    end = write.offset + len(write.data)
    if end > len(image):
        image.extend(bytes(end - len(image)))
    image[write.offset : end] = write.data


def _image(durable: bytearray, window: list[Write], size: int) -> bytes:
    image = bytearray(durable)
    for write in window:
        apply(image, write)
    _resize(image, size)
    return bytes(image)


def _some_sectors(window: list[Write], rng: random.Random) -> list[Write]:
    """Each un-flushed write loses a random set of its sectors (none, some or all of them)."""
    kept: list[Write] = []
    for write in window:
        share = rng.choice((0.0, 0.3, 0.5, 0.9, 1.0))
        ends = itertools.pairwise([write.offset, *_borders(write), write.offset + len(write.data)])
        for start, end in ends:
            if end > start and rng.random() < share:
                kept.append(Write(start, write.data[start - write.offset : end - write.offset]))
    return kept


def _borders(write: Write) -> range:
    first = (write.offset // SECTOR + 1) * SECTOR
    return range(first, write.offset + len(write.data), SECTOR)
