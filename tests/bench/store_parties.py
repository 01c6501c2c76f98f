"""The store and what it is measured beside: SQLite and LMDB with the same records, as durable, and one flush.

What lives here: parties, and the work they are given. What must not: numbers of rounds, tables, targets.
"""

import gc
import math
import os
import random
import sqlite3
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Final, Protocol, Self
from uuid import UUID, uuid4

import lmdb
from timing import Call, Sample, in_turns

from storage.secrets import GroupKey, StateKey, StoreKey
from storage.store import Change, GroupRecord, PutGroup, PutVtpm, Store, VtpmRecord

GROUPS: Final = 3
BLOCK: Final = 512  # bytes of one write of the floor: one unit of the store's log
_FILLING: Final = 900  # records in one commit: a frame must fit the log of the smallest image
_FLOOR_BYTES: Final = 96 * 1024  # as large as the log of 2 MiB, which goes round in the same way
_LMDB_ROOM: Final = 1 << 31  # address space, no disk
_SQL: Final = "UPDATE vtpm SET key = ?, digest = ?, generation = ? WHERE uuid = ?"
_VALUE: Final = 72  # bytes of key, digest and generation

Updates = Sequence[tuple[UUID, UUID, int]]  # vTPM, its group, its next generation


class Load:
    """`count` vTPMs in three groups, and which of them are updated next."""

    def __init__(self, count: int) -> None:
        self.groups = [uuid4() for _ in range(GROUPS)]
        self.vtpms = [(uuid4(), self.groups[number % GROUPS]) for number in range(count)]
        self._rng = random.Random(1)
        self._generation = 0

    def __len__(self) -> int:
        return len(self.vtpms)

    def everything(self, at_once: int = _FILLING) -> Iterator[Updates]:
        """Yield the first version of all, in pieces."""
        for start in range(0, len(self.vtpms), at_once):
            yield [(vtpm, group, 0) for vtpm, group in self.vtpms[start : start + at_once]]

    def some(self, count: int) -> Updates:
        """Return newer versions of `count` vTPMs chosen by chance."""
        self._generation += 1
        return [(vtpm, group, self._generation) for vtpm, group in self._rng.sample(self.vtpms, count)]


class Ready:
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


class Party(Protocol):
    """Something that keeps records durably."""

    def update(self, updates: Updates) -> Call:
        """Return a call that makes all of `updates` durable together."""

    def read_everything(self) -> int:
        """Open what is on the disk anew, bring every record into memory, and close; returns how many."""

    @property
    def bytes(self) -> int:
        """Bytes on the disk."""

    def close(self) -> None:
        """Close it."""


class StoreParty:
    """A store of at least `size` bytes with all vTPMs in it."""

    def __init__(self, path: Path, load: Load, size: int) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.key = StoreKey.new()
        self.groups = {group: GroupKey.new() for group in load.groups}
        self.store = Store.create(self.descriptor, uuid4(), self.key, b"", size)
        self.store.commit([PutGroup(GroupRecord(group), key) for group, key in self.groups.items()])
        for updates in load.everything():
            self.store.commit(_changes(updates))
        self.store.checkpoint()

    def update(self, updates: Updates) -> Call:
        """Return a call that makes all of `updates` durable together."""
        return partial(self.store.commit, _changes(updates))

    def open(self) -> Store:
        """Open, verify and index everything."""
        store = Store.open(self.descriptor, self.key)
        for group, key in self.groups.items():
            store.unlock_group(group, key)
        return store

    def read_everything(self) -> int:
        """Open, verify and index everything, and close."""
        with self.open() as store:
            return len(store)

    def openings(self, rounds: int) -> Sample:
        """Time how long it takes to open, verify and index everything."""
        opened: list[Store] = []

        def close() -> None:
            opened.pop().close()

        calls: dict[str, Call] = {"open": lambda: opened.append(self.open())}
        return in_turns(calls, rounds, 1, undo={"open": close})["open"]

    def memory(self) -> float:
        """Return what an open store takes, in bytes for each vTPM."""
        gc.collect()
        tracemalloc.start()
        try:
            with self.open() as store:
                gc.collect()
                return tracemalloc.get_traced_memory()[0] / len(store)
        finally:
            tracemalloc.stop()

    @property
    def bytes(self) -> int:
        """Bytes of the image."""
        return os.fstat(self.descriptor).st_size

    def close(self) -> None:
        """Close store and descriptor."""
        self.store.close()
        os.close(self.descriptor)


class SqliteParty:
    """SQLite with the same records, as durable: every commit flushes the WAL. Nothing is encrypted."""

    def __init__(self, path: Path, load: Load) -> None:
        self._path = path
        self._connection = self._connect()
        self._connection.execute(
            "CREATE TABLE vtpm (uuid BLOB PRIMARY KEY, key BLOB, digest BLOB, generation INTEGER) WITHOUT ROWID"
        )
        with self._connection:
            for updates in load.everything():
                self._connection.executemany(
                    "INSERT INTO vtpm (key, digest, generation, uuid) VALUES (?, ?, ?, ?)", _rows(updates)
                )
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def update(self, updates: Updates) -> Call:
        """Return a call that makes all of `updates` durable together."""
        return partial(self._update, _rows(updates))

    def _update(self, rows: list[tuple[bytes, bytes, int, bytes]]) -> None:
        with self._connection:
            self._connection.executemany(_SQL, rows)

    def read_everything(self) -> int:
        """Open the file, read all rows into a dict, close."""
        with closing(self._connect()) as connection:
            rows = connection.execute("SELECT uuid, key, digest, generation FROM vtpm")
            return len({row[0]: row for row in rows})

    @property
    def bytes(self) -> int:
        """Bytes of database and WAL."""
        files = (self._path, Path(f"{self._path}-wal"))
        return sum(path.stat().st_size for path in files if path.exists())

    def close(self) -> None:
        """Close the database."""
        self._connection.close()


class LmdbParty:
    """LMDB with the same records, as durable: each commit flushes data, then its meta page. Nothing is encrypted."""

    def __init__(self, path: Path, load: Load) -> None:
        self._path = path
        self._environment = lmdb.open(str(path), map_size=_LMDB_ROOM, subdir=False, sync=True, metasync=True)
        with self._environment.begin(write=True) as transaction:
            for updates in load.everything():
                transaction.cursor().putmulti(_items(updates))

    def update(self, updates: Updates) -> Call:
        """Return a call that makes all of `updates` durable together."""
        return partial(self._update, _items(updates))

    def _update(self, items: list[tuple[bytes, bytes]]) -> None:
        with self._environment.begin(write=True) as transaction:
            transaction.cursor().putmulti(items)

    def read_everything(self) -> int:
        """Read all records of the mapped file into a dict. The file stays open: a process may map it only once."""
        with self._environment.begin() as transaction:
            return len(dict(iter(transaction.cursor())))

    @property
    def bytes(self) -> int:
        """Bytes of the data file."""
        return self._path.stat().st_size

    def close(self) -> None:
        """Close the file."""
        self._environment.close()


class Floor:
    """Writes 512 bytes to a written file and flushes: what nothing durable is quicker than."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.pwrite(self._descriptor, b"\xff" * _FLOOR_BYTES, 0)
        os.fsync(self._descriptor)
        self._place, self._content = 0, os.urandom(BLOCK)

    def __call__(self) -> None:
        """Write and flush once."""
        os.pwrite(self._descriptor, self._content, self._place)
        os.fdatasync(self._descriptor)
        self._place = (self._place + BLOCK) % _FLOOR_BYTES

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def updating(party: Party, load: Load, count: int, *, same: bool = False) -> Ready:
    """Return a call with which `party` durably updates `count` vTPMs; with `same`, always the same ones."""
    chosen = [(vtpm, group) for vtpm, group, _ in load.some(count)] if same else []

    def updates() -> Updates:
        fresh = load.some(count)
        return [(*mine, its[2]) for mine, its in zip(chosen, fresh, strict=True)] if same else fresh

    return Ready(lambda: party.update(updates()))


def time_all(
    calls: dict[str, Call], rounds: int, each: int, block: int = 1, budget: float = math.inf
) -> dict[str, Sample]:
    """Time calls in turns; what is `Ready` makes its next work outside the clock.

    No round begins after `budget` seconds: a slow or busy disk makes the numbers coarser, not the run endless.
    """
    undo = {name: call.prepare for name, call in calls.items() if isinstance(call, Ready)}
    taken: dict[str, tuple[tuple[int, ...], ...]] = dict.fromkeys(calls, ())
    started = time.monotonic()
    for number in range(rounds):
        if number and time.monotonic() - started > budget:
            break
        one = in_turns(calls, 1, each, block, undo=undo)
        taken = {name: rounds_before + one[name].rounds for name, rounds_before in taken.items()}
    return {name: Sample(times) for name, times in taken.items()}


@contextmanager
def parties(disk: Path, load: Load, size: int) -> Iterator[tuple[StoreParty, SqliteParty, LmdbParty]]:
    """Make all three with the same vTPMs in them, below `disk`; `size` is what the store's image begins with."""
    name = f"{len(load)}-{size}"
    with (
        closing(StoreParty(disk / f"store-{name}", load, size)) as ours,
        closing(SqliteParty(disk / f"sqlite-{name}", load)) as sqlite,
        closing(LmdbParty(disk / f"lmdb-{name}", load)) as its,
    ):
        yield ours, sqlite, its


def _changes(updates: Updates) -> list[Change]:
    return [
        PutVtpm(VtpmRecord(vtpm, group, StateKey.new(), os.urandom(32), generation))
        for vtpm, group, generation in updates
    ]


def _rows(updates: Updates) -> list[tuple[bytes, bytes, int, bytes]]:
    return [(os.urandom(32), os.urandom(32), generation, vtpm.bytes) for vtpm, _, generation in updates]


def _items(updates: Updates) -> list[tuple[bytes, bytes]]:
    return [(vtpm.bytes, os.urandom(_VALUE - 8) + generation.to_bytes(8)) for vtpm, _, generation in updates]
