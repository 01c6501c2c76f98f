"""The store alone: size, opening, single updates and groups of them, beside one flush of this disk and raw SQLite."""

import os
import random
import sqlite3
import statistics
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from uuid import UUID, uuid4

from document import Section, Table, Target
from options import Options, progress
from subjects import scratch
from timing import MICROSECONDS, MILLISECONDS, Call, Ratio, Sample, in_turns

from storage.secrets import GroupKey, StateKey, StoreKey
from storage.store import Change, GroupRecord, PutGroup, PutVtpm, Store, VtpmRecord

VTPMS = 20_000
GROUPS = 3
IMAGE_LIMIT = 2 * 1024 * 1024
OPEN_LIMIT_MS = 50.0
UPDATE_LIMIT = 1.2
GROUP_GAIN = 25
MEMORY_LIMIT = 1024  # bytes for each vTPM
BLOCK = 512  # what a single update writes
LARGE = 4 * IMAGE_LIMIT  # an image with room to rewrite every leaf at once
SIZES = (10, 100, 1000)
_FILLING = 900
_FLOOR_BYTES = 96 * 1024  # as large as the log, which goes round in the same way
_ROUNDS, _EACH, _GROUP_EACH, _OPENINGS = 9, 120, 6, 9
_SQL = "UPDATE vtpm SET key = ?, digest = ?, generation = ?, flags = ? WHERE uuid = ?"


@dataclass(slots=True)
class _Subject:
    """A store with its vTPMs, and the updates that are still to be made of them."""

    descriptor: int
    store: Store
    key: StoreKey
    groups: dict[UUID, GroupKey]
    vtpms: list[tuple[UUID, UUID]] = field(default_factory=list)
    generations: Iterator[int] = field(default_factory=lambda: count(1))

    @classmethod
    def new(cls, path: Path, size: int) -> "_Subject":
        """Make a store of `size` bytes with VTPMS vTPMs in GROUPS groups."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        key = StoreKey.new()
        groups = {uuid4(): GroupKey.new() for _ in range(GROUPS)}
        subject = cls(descriptor, Store.create(descriptor, uuid4(), key, b"", size), key, groups)
        subject.store.commit([PutGroup(GroupRecord(uuid), group_key) for uuid, group_key in groups.items()])
        owners = list(groups)
        subject.vtpms = [(uuid4(), owners[number % GROUPS]) for number in range(VTPMS)]
        for start in range(0, VTPMS, _FILLING):
            subject.store.commit(subject.updates(subject.vtpms[start : start + _FILLING]))
        subject.store.checkpoint()
        return subject

    def updates(self, vtpms: Sequence[tuple[UUID, UUID]]) -> list[Change]:
        """Make a newer record for each of `vtpms`."""
        generation = next(self.generations)
        return [
            PutVtpm(VtpmRecord(vtpm, group, StateKey.new(), os.urandom(32), generation, force_flags))
            for vtpm, group in vtpms
            for force_flags in (VtpmRecord.__dataclass_fields__["flags"].default,)
        ]
