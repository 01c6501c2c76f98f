"""A recorded disk, and what a power cut can leave of it.

The model: a flush makes durable what was written before it. Of everything else each 512-byte sector is there or
not, by itself, in any of the versions that were written since; a new size of the file is there or not.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from storage_disks import MemoryDisk

from storage.disk import Bytes

SECTOR = 512  # what a power cut leaves whole
BLOCK = 4096  # what the store calls a sector
SHARES = (0.0, 0.3, 0.5, 0.9, 1.0)  # how much of the un-flushed sectors a random subset keeps, on average


@dataclass(frozen=True)
class Write:
    offset: int
    data: bytes

    def pieces(self, size: int = SECTOR) -> "list[Write]":
        """Cut it at the borders of the device's sectors."""
        end = self.offset + len(self.data)
        borders = [self.offset, *range((self.offset // size + 1) * size, end, size), end]
        return [
            Write(one, self.data[one - self.offset : two - self.offset]) for one, two in itertools.pairwise(borders)
        ]


Step = Write | int | None  # a write, a new size, a flush


@dataclass(frozen=True)
class Cut:
    """A power cut when `steps` had been issued; `whole`: nothing of them is missing on the disk.

    `image` puts together what is there then: before the next cut is asked for, or never.
    """

    steps: int
    whole: bool
    image: Callable[[], bytes]


@dataclass
class RecordingDisk(MemoryDisk):
    """Keeps every write, resize and flush in order; `cuts` replays what a power cut could leave."""

    start: bytes = b""
    growable_disk: bool = True
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.start, growable=self.growable_disk)

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

    def all_cuts(self, rng: random.Random, subsets: int = 4, window: int = 4) -> Iterator[Cut]:
        """Yield power cuts after every step, none twice.

        For each prefix of the steps: all of it; the last write torn at each of its sectors; every subset of the
        last `window` un-flushed 4096-byte blocks, once with all before them, once with a random part; and `subsets`
        random sets of un-flushed sectors. Just before each flush, also: each block missing alone, and torn.
        """
        pending = _Pending(bytearray(self.start), rng, subsets, window)
        yield Cut(0, True, lambda: self.start)
        for count, step in enumerate(self.steps, 1):
            if isinstance(step, Write):
                pending.write(step, count - 1)
                yield from pending.cuts(count, before_flush=not isinstance(self._after(count), Write))
            elif isinstance(step, int):
                yield from (Cut(count, True, pending.everything) for _ in pending.resize(step))
            else:
                pending.flush()
                yield Cut(count, True, pending.everything)

    def cuts(self, rng: random.Random, subsets: int = 4, window: int = 3) -> Iterator[tuple[int, bytes]]:
        """Yield (steps that were issued, image) of all cuts."""
        return ((cut.steps, cut.image()) for cut in self.all_cuts(rng, subsets, window))

    def _after(self, count: int) -> Step:
        return self.steps[count] if count < len(self.steps) else None


@dataclass
class _Pending:
    """What is durable, and the sectors that are not, oldest first, each with the step that wrote it."""

    durable: bytearray
    rng: random.Random
    subsets: int
    window: int
    pieces: list[tuple[int, Write]] = field(default_factory=list)
    size: int = 0

    def __post_init__(self) -> None:
        self.size = len(self.durable)

    def write(self, step: Write, number: int) -> None:
        self.pieces += [(number, piece) for piece in step.pieces()]
        self.size = max(self.size, step.offset + len(step.data))

    def resize(self, size: int) -> Iterator[int]:
        """Take the old size, then the new one."""
        for possible in dict.fromkeys((self.size, size)):
            self.size = possible
            yield possible

    def flush(self) -> None:
        for _, piece in self.pieces:
            apply(self.durable, piece)
        self.pieces.clear()
        resize(self.durable, self.size)

    def everything(self) -> bytes:
        return self.image(range(len(self.pieces)))

    def image(self, kept: Iterable[int], size: int | None = None) -> bytes:
        image = bytearray(self.durable)
        for index in kept:
            apply(image, self.pieces[index][1])
        resize(image, self.size if size is None else size)
        return bytes(image)

    def cuts(self, count: int, *, before_flush: bool) -> Iterator[Cut]:
        seen: set[frozenset[int]] = set()
        for kept in self._choices(before_flush=before_flush):
            key = frozenset(kept)
            if key not in seen:
                seen.add(key)
                yield Cut(count, len(key) == len(self.pieces), partial(self.image, sorted(key)))

        before = len(self.durable)
        if self.size != before:  # the new size is not durable either, and with it what lies behind the old one
            yield Cut(count, False, partial(self.image, range(len(self.pieces)), before))

    def _choices(self, *, before_flush: bool) -> Iterator[list[int]]:
        everything = list(range(len(self.pieces)))
        yield everything
        last = [index for index in everything if self.pieces[index][0] == self.pieces[-1][0]]
        for torn in _some(self.rng, range(len(last)), 24):
            yield everything[: len(everything) - torn]
        blocks = self._blocks()
        recent = blocks[-self.window :] if self.window else []
        older = [index for block in blocks[: len(blocks) - len(recent)] for index in block]
        for chosen in itertools.product((True, False), repeat=len(recent)):
            kept = [index for block, keep in zip(recent, chosen, strict=True) if keep for index in block]
            yield older + kept
            yield self._part(older) + kept
        if before_flush:
            for block in blocks:
                yield [index for index in everything if index not in block]
                yield [index for index in everything if index not in block or self.rng.random() < 0.5]
        for _ in range(self.subsets):
            yield self._part(everything)

    def _part(self, indexes: list[int]) -> list[int]:
        share = self.rng.choice(SHARES)
        return [index for index in indexes if self.rng.random() < share]

    def _blocks(self) -> list[list[int]]:
        """Group the sectors by write and by 4096-byte block."""
        blocks: dict[tuple[int, int], list[int]] = {}
        for index, (number, piece) in enumerate(self.pieces):
            blocks.setdefault((number, piece.offset // BLOCK), []).append(index)
        return list(blocks.values())


def _some(rng: random.Random, choices: range, most: int) -> list[int]:
    return list(choices) if len(choices) <= most else sorted(rng.sample(choices, most))


def resize(image: bytearray, size: int) -> None:
    if size > len(image):
        image.extend(bytes(size - len(image)))
    else:
        del image[size:]


def apply(image: bytearray, write: Write) -> None:
    end = write.offset + len(write.data)
    if end > len(image):
        image.extend(bytes(end - len(image)))
    image[write.offset : end] = write.data
