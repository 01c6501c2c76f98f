"""The store alone: size, opening, single updates and groups of them, beside one flush of this disk and raw SQLite."""

import gc
import os
import random
import sqlite3
import statistics
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

from document import Section, Table, Target
from options import Options, progress
from subjects import scratch
from timing import MICROSECONDS, MILLISECONDS, Call, Ratio, Sample, in_turns

from storage.secrets import GroupKey, StateKey, StoreKey
from storage.store import Change, GroupRecord, PutGroup, PutVtpm, Store, VtpmRecord

VTPMS: Final = 20_000
GROUPS: Final = 3
IMAGE_LIMIT: Final = 2 * 1024 * 1024
LARGE: Final = 4 * IMAGE_LIMIT  # room to rewrite every leaf at once
OPEN_LIMIT_MS: Final = 50.0
UPDATE_LIMIT: Final = 1.2
GAIN: Final = 25
MEMORY_LIMIT: Final = 1024  # bytes for each vTPM
BLOCK: Final = 512
SIZES: Final = (10, 100, 1000)
FLOOR, SMALL, BIG, SQLITE = "one flush", "store, 2 MiB", "store, 8 MiB", "SQLite WAL"
_FILLING: Final = 900
_FLOOR_BYTES: Final = 96 * 1024  # as large as the log, which goes round in the same way
_ROUNDS, _EACH, _GROUP_EACH, _OPENINGS = 5, 768, 12, 9  # of 768 updates and of 4 groups, 8 MiB has a checkpoint
_SQL: Final = "UPDATE vtpm SET key = ?, digest = ?, generation = ? WHERE uuid = ?"

Updates = list[tuple[UUID, UUID, int]]  # vTPM, its group, its next generation


class _Load:
    """Which vTPMs are updated next: by chance, or always the same ones."""

    def __init__(self, groups: list[UUID]) -> None:
        self.vtpms = [(uuid4(), groups[number % GROUPS]) for number in range(VTPMS)]
        self._rng = random.Random(1)
        self._generation = 0

    def all(self) -> Updates:
        """Return the first version of everything."""
        return [(vtpm, group, 0) for vtpm, group in self.vtpms]

    def some(self, count: int) -> Updates:
        """Return newer versions of `count` vTPMs chosen by chance."""
        self._generation += 1
        return [(vtpm, group, self._generation) for vtpm, group in self._rng.sample(self.vtpms, count)]


def _changes(updates: Updates) -> list[Change]:
    return [
        PutVtpm(VtpmRecord(vtpm, group, StateKey.new(), os.urandom(32), generation))
        for vtpm, group, generation in updates
    ]


def _rows(updates: Updates) -> list[tuple[bytes, bytes, int, bytes]]:
    return [(os.urandom(32), os.urandom(32), generation, vtpm.bytes) for vtpm, _, generation in updates]


class _Ready:
    """A call that takes work which was made outside the clock; `prepare` makes the next one."""

    def __init__(self, make: Callable[[], Call]) -> None:
        self._make = make
        self._next = make()

    def __call__(self) -> None:
        """Do the work."""
        self._next()

    def prepare(self) -> None:
        """Make the next work."""
        self._next = self._make()


class _Subject:
    """A store of `size` bytes with all vTPMs in it."""

    def __init__(self, path: Path, size: int, load: _Load, groups: list[UUID]) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.key = StoreKey.new()
        self.groups = {group: GroupKey.new() for group in groups}
        self.store = Store.create(self.descriptor, uuid4(), self.key, b"", size)
        self.store.commit([PutGroup(GroupRecord(group), key) for group, key in self.groups.items()])
        everything = load.all()
        for start in range(0, VTPMS, _FILLING):
            self.store.commit(_changes(everything[start : start + _FILLING]))
        self.store.checkpoint()

    def open(self) -> Store:
        """Open, verify and index everything."""
        store = Store.open(self.descriptor, self.key)
        for group, key in self.groups.items():
            store.unlock_group(group, key)
        return store

    def close(self) -> None:
        """Close store and descriptor."""
        self.store.close()
        os.close(self.descriptor)


class _Bed:
    """All parties on one disk."""

    def __init__(self, disk: Path, stack: ExitStack) -> None:
        groups = [uuid4() for _ in range(GROUPS)]
        self.load = _Load(groups)
        self.small, self.big = (
            stack.enter_context(closing(_Subject(disk / f"store-{size}", size, self.load, groups)))
            for size in (IMAGE_LIMIT, LARGE)
        )
        self.floor = stack.enter_context(_one_flush(disk / "floor"))
        self.sqlite = stack.enter_context(_sqlite(disk / "peer.sqlite", self.load))

    def calls(self, count: int, *, same: bool = False) -> dict[str, Call]:
        """Return a call for each party that durably updates `count` vTPMs; with `same`, always the same ones."""
        chosen = [(vtpm, group) for vtpm, group, _ in self.load.some(count)]

        def updates() -> Updates:
            fresh = self.load.some(count)
            return [(*mine, its[2]) for mine, its in zip(chosen, fresh, strict=True)] if same else fresh

        def store(subject: _Subject) -> _Ready:
            return _Ready(lambda: partial(subject.store.commit, _changes(updates())))

        return {
            SMALL: store(self.small),
            BIG: store(self.big),
            SQLITE: _Ready(lambda: partial(self._update, _rows(updates()))),
        }

    def _update(self, rows: list[tuple[bytes, bytes, int, bytes]]) -> None:
        with self.sqlite:
            self.sqlite.executemany(_SQL, rows)


@contextmanager
def _one_flush(path: Path) -> Iterator[Call]:
    """Yield a call that writes 512 bytes to a written file and flushes: what nothing durable is quicker than."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.pwrite(descriptor, b"\xff" * _FLOOR_BYTES, 0)
    os.fsync(descriptor)
    place, content = 0, os.urandom(BLOCK)

    def write() -> None:
        nonlocal place
        os.pwrite(descriptor, content, place)
        os.fdatasync(descriptor)
        place = (place + BLOCK) % _FLOOR_BYTES

    try:
        yield write
    finally:
        os.close(descriptor)


@contextmanager
def _sqlite(path: Path, load: _Load) -> Iterator[sqlite3.Connection]:
    """Yield SQLite with the same records, as durable: every commit flushes the WAL. Nothing is encrypted."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(
            "CREATE TABLE vtpm (uuid BLOB PRIMARY KEY, key BLOB, digest BLOB, generation INTEGER) WITHOUT ROWID"
        )
        with connection:
            connection.executemany(
                "INSERT INTO vtpm (key, digest, generation, uuid) VALUES (?, ?, ?, ?)", _rows(load.all())
            )
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        yield connection


def run(options: Options) -> Section:
    """Measure and return the section."""
    rounds = options.rounds(_ROUNDS)
    with scratch() as disk, ExitStack() as stack:
        progress(f"store: {VTPMS} vTPMs in {GROUPS} groups, three times")
        bed = _Bed(disk, stack)
        openings = _openings(bed.small, options.rounds(_OPENINGS))
        memory = _memory(bed.small)
        progress("store: single updates")
        before = _singles(bed, rounds, options)
        groups: dict[tuple[int, bool], dict[str, Sample]] = {}
        for size, same in [*((size, False) for size in SIZES), (SIZES[-1], True)]:
            progress(f"store: groups of {size}, {'the same' if same else 'by chance'}")
            groups[size, same] = _time(bed.calls(size, same=same), rounds, options.each(_GROUP_EACH))
        progress("store: single updates again")
        after = _singles(bed, rounds, options)  # groups were between, so that a quick or slow while meets both
        singles = {name: Sample(before[name].rounds + after[name].rounds) for name in before}
        image_bytes = os.fstat(bed.small.descriptor).st_size
    return _section(image_bytes, openings, memory, singles, groups)


def _singles(bed: _Bed, rounds: int, options: Options) -> dict[str, Sample]:
    return _time({FLOOR: bed.floor} | bed.calls(1), rounds, options.each(_EACH))


def _time(calls: dict[str, Call], rounds: int, each: int) -> dict[str, Sample]:
    undo = {name: call.prepare for name, call in calls.items() if isinstance(call, _Ready)}
    return in_turns(calls, rounds, each, undo=undo)


def _openings(subject: _Subject, rounds: int) -> Sample:
    opened: list[Store] = []

    def close() -> None:
        opened.pop().close()

    calls: dict[str, Call] = {"open": lambda: opened.append(subject.open())}
    return in_turns(calls, rounds, 1, undo={"open": close})["open"]


def _memory(subject: _Subject) -> float:
    """Return what an open store takes, in bytes for each vTPM."""
    gc.collect()
    tracemalloc.start()
    try:
        with subject.open() as store:
            gc.collect()
            return tracemalloc.get_traced_memory()[0] / len(store)
    finally:
        tracemalloc.stop()


def _mean(sample: Sample) -> float:
    """Return the median of the rounds' means, in nanoseconds.

    A median of calls would leave out the checkpoints, which belong to them; a mean of all would let one disturbed
    round of single updates make groups look better than they are.
    """
    return statistics.median(sum(times) / len(times) for times in sample.rounds)


def _section(
    image_bytes: int,
    openings: Sample,
    memory: float,
    singles: dict[str, Sample],
    groups: dict[tuple[int, bool], dict[str, Sample]],
) -> Section:
    section = Section(
        "The store alone",
        f"{VTPMS} vTPMs in {GROUPS} groups, once in an image of 2 MiB, which they fill, once in one of 8 MiB. Updates "
        f"replace records chosen by chance. *One flush* is (write {BLOCK} bytes to a written file, fdatasync). "
        "SQLite updates the same rows in WAL mode with synchronous=FULL, one flush a commit, without encryption, "
        "authentication or groups. Records are made outside the clock; everything else, checkpoints too, is inside.",
    )
    section.tables += [_single_table(singles), _group_table(singles, groups)]
    facts = Table(("", "measured"))
    facts.add("image", f"{image_bytes} bytes, {image_bytes / VTPMS:.1f} for each vTPM")
    facts.add(
        "open, verify, index", f"{openings.median / MILLISECONDS:.1f} ms (best {openings.best / MILLISECONDS:.1f})"
    )
    facts.add("memory of an open store", f"{memory:.0f} bytes for each vTPM")
    section.tables.append(facts)
    update = Ratio.of(singles[SMALL], singles[FLOOR])
    section.targets += [
        Target("store image, bytes", image_bytes, IMAGE_LIMIT, "Xen's 2 MiB"),
        Target("open, verify and index 20,000, ms", openings.median / MILLISECONDS, OPEN_LIMIT_MS, "-"),
        Target("one durable update", update.median, UPDATE_LIMIT, "one write and flush", update.spread),
        Target("memory for each vTPM, bytes", round(memory), MEMORY_LIMIT, "-"),
    ]
    share = _mean(groups[SIZES[-1], False][SMALL]) / SIZES[-1] / _mean(singles[SMALL])
    section.targets.append(
        Target(f"time of a record in groups of {SIZES[-1]}, by chance", share, 1 / GAIN, "a single update")
    )
    section.meaning.append(_meaning())
    return section


def _single_table(singles: dict[str, Sample]) -> Table:
    table = Table(("", "median", "mean", "p99", "to one flush", "calls"), note="One durable update, microseconds:")
    for name, sample in singles.items():
        times = (f"{value / MICROSECONDS:.0f}" for value in (sample.median, _mean(sample), sample.p99))
        table.add(name, *times, str(Ratio.of(sample, singles[FLOOR])), str(sample.calls))
    return table


def _group_table(singles: dict[str, Sample], groups: dict[tuple[int, bool], dict[str, Sample]]) -> Table:
    table = Table(
        (
            "records in a group",
            *(head for name in (SMALL, BIG, SQLITE) for head in (f"{name}, updates/s", "to single")),
        ),
        note="Groups; *to single* is the rate as a multiple of single updates; medians of the rounds' means:",
    )
    for (size, same), samples in groups.items():
        cells = []
        for name in (SMALL, BIG, SQLITE):
            per_record = _mean(samples[name]) / size
            cells += [f"{1e9 / per_record:,.0f}", f"{_mean(singles[name]) / per_record:.1f}"]
        table.add(f"{size}, {'always the same' if same else 'by chance'}", *cells)
    return table


def _meaning() -> str:
    return (
        "A thousand records chosen by chance are in about 405 of the 455 leaves, and nearly fill the log of a 2 MiB "
        "image, so each group waits for the checkpoint of the one before. About 16 spare sectors make that some 25 "
        "rounds with a flush each; in 8 MiB it is one round for four groups, which shows what the full image costs. "
        "ADR 0003 has the parts of a single update."
    )
