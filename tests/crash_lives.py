"""Lives of a store: what it must hold while things are done to it, every power cut on the way, what must be there then.

What is done comes from plans (`crash_plans`); `tests/test_storage_crash_lives.py` lives thousands of them, `./dev bench
crash` as many as there is time for.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Generic, TypeVar
from uuid import UUID

from crash_rows import Rows, difference, rows_in, rows_of
from storage_cuts import Cut, RecordingDisk
from storage_disks import MemoryDisk
from storage_histories import (
    SECTOR,
    Model,
    content,
    key_of,
    reopen,
    rotated,
)

from manager import anchor
from manager.anchoring import position_of
from manager.errors import ManagerError
from storage import store_format as fmt
from storage.errors import StorageError, StorageFull
from storage.store import Change, Store

AFTER_RESET = anchor.PCR22_AFTER_RESET[0]
T = TypeVar("T")


class CrashError(AssertionError):
    """Something was lost, half, or refused after a power cut; `image` is what was on the disk."""

    def __init__(self, what: str, image: bytes) -> None:
        super().__init__(what)
        self.image = image


@dataclass
class Timeline(Generic[T]):
    """Values that held one after the other, with the steps of the disk that had been issued when each began to."""

    values: list[tuple[int, T]]

    def note(self, steps: int, value: T) -> None:
        self.values.append((steps, value))

    @property
    def last(self) -> T:
        return self.values[-1][1]

    def possible(self, steps: int) -> list[T]:
        """Give what a disk may say: the last acknowledged, or the one that was under way."""
        last = self._at(steps)
        return [value for _, value in self.values[last : last + 2]]

    def held(self, steps: int) -> list[T]:
        """Give what the TPM may hold, which is told between two steps: at that moment the old or the new value."""
        first = last = self._at(steps)
        while first and self.values[first][0] == steps:
            first -= 1
        return [value for _, value in self.values[first : last + 1]]

    def _at(self, steps: int) -> int:
        return max(index for index, (since, _) in enumerate(self.values) if since <= steps)


# --- a life ----------------------------------------------------------------------------------------


@dataclass
class Findings:
    """What was looked at, so that a test can tell that it looked."""

    cuts: int = 0
    went_on: int = 0
    boots: int = 0
    anchors: int = 0
    closed: int = 0
    grown: int = 0
    full: int = 0
    shrunk: int = 0
    scrubbed: int = 0
    rounds: int = 0
    taken_back: int = 0
    rotated: int = 0


class Life:
    """A store on a recorded disk, what it must hold, and what the TPM holds, since the power came on."""

    def __init__(self, image: bytes, findings: Findings, *, most: int, growable: bool = True) -> None:
        self.findings, self.most, self.growable = findings, most, growable
        self._begin(image, None)

    def _begin(self, image: bytes, durable: bytes | None) -> None:
        """Open what a power cut left, as the manager does: everything starts anew, the TPM's PCRs too."""
        self.disk = RecordingDisk(start=image, growable_disk=self.growable)
        self.store = reopen(self.disk)
        self.disk.steps.clear()
        self.model = Model(*content(self.store))
        self.contents: Timeline[Rows] = Timeline([(0, rows_of(self.model))])
        self.boots: Timeline[bytes] = Timeline([(0, self.store.boot_area)])
        self.sequences: Timeline[int] = Timeline([(0, self.store.sequence)])
        self.durable = Timeline([(0, self.store.digest() if durable is None else durable)])
        self.pcr = Timeline([(0, AFTER_RESET)])
        self.notes = anchor.Notes.unpack(self.store.volatile_expected)
        self.store.note_anchored(self.durable.last)
        self.served = False

    # what is done

    def commit(self, changes: list[Change]) -> None:
        before = self.store.statistics().checkpoints
        try:
            self.store.commit(changes)
        except StorageFull:
            self.findings.full += 1
            return
        self.model.apply(changes)
        self.contents.note(len(self.disk.steps), rows_of(self.model))
        self._settled(before)

    def checkpoint(self) -> None:
        before = self.store.statistics().checkpoints
        try:
            self.store.checkpoint()
        except StorageFull:
            self.findings.full += 1
        self._settled(before)

    def compact(self, floor: int) -> None:
        before = len(self.disk.content)
        try:
            self.store.compact(floor)
        except StorageFull:
            self.findings.full += 1
        self.findings.shrunk += len(self.disk.content) < before
        self._settled()

    def scrub(self) -> Iterator[None]:
        """Yield after each step of a scrub."""
        try:
            for _ in self.store.scrub():
                self.findings.scrubbed += 1
                self._settled()
                yield
        except StorageFull:
            self.findings.full += 1
        self._settled()

    def rotate(self, group: UUID) -> None:
        """Give a group its next key."""
        record = rotated(self.store.groups()[group])
        try:
            self.store.rotate_group(record, key_of(record))
        except StorageFull:
            self.findings.full += 1
        else:
            self.model.groups[group] = record
            self.contents.note(len(self.disk.steps), rows_of(self.model))
            self.findings.rotated += 1
        self._settled()

    def boot(self, area: bytes) -> None:
        self.store.write_boot_area(area)
        self.boots.note(len(self.disk.steps), area)
        self.findings.boots += 1
        self._settled()

    def anchor(self) -> None:
        """Write both anchors as `manager.anchoring` does; the first time after an open its checkpoint comes first."""
        if not self.served:
            self.checkpoint()
            self.served = True
        self._extend()
        digest = self.store.digest()
        self._note(pending=digest)
        self.durable.note(len(self.disk.steps), digest)
        self.store.note_anchored(digest)
        self.findings.anchors += 1

    def _extend(self) -> None:
        digest, before = self.store.digest(), self.pcr.last
        self._note(pcr_before=before, extending=digest)
        self.store.commit([], notes=True)
        self._settled()
        self.pcr.note(len(self.disk.steps), anchor.extended(before, digest))

    def _note(self, **changes: bytes) -> None:
        self.notes = replace(self.notes, **changes)
        self.store.note_volatile(self.notes.pack())

    def reopen(self, rng: random.Random, share: float) -> None:
        """Kill the process and open the same disk again, with a part of the groups."""
        self.store.close()
        self.store = reopen(self.disk, unlock=False)
        self.store.note_anchored(self.durable.last)
        self.notes = anchor.Notes.unpack(self.store.volatile_expected)
        self.served = False
        for group, record in sorted(self.store.groups().items()):
            if rng.random() < share:
                self.store.unlock_group(group, key_of(record))
            else:
                self.findings.closed += 1

    def unlock(self) -> None:
        for group, record in sorted(self.store.groups().items()):
            self.store.unlock_group(group, key_of(record))

    def closed(self) -> set[UUID]:
        return {group for group in self.store.groups() if not self.store.is_open(group)}

    def open_rows(self) -> list[UUID]:
        closed = self.closed()
        return sorted(uuid for uuid, row in self.model.rows.items() if row[0] not in closed)

    def _settled(self, checkpoints: int | None = None) -> None:
        if checkpoints is not None:
            self.findings.rounds += self.store.statistics().checkpoints - checkpoints > 1
        self.sequences.note(len(self.disk.steps), self.store.sequence)

    # what must hold

    def cuts(self, seed: int) -> Iterator[Cut]:
        return self.disk.all_cuts(random.Random(seed), subsets=3, window=3)

    def check(self, seed: int) -> bytes:
        """Check all cuts of what was done since the power came on, or `most` of them; return an image of one."""
        rng = random.Random(seed)
        count = sum(1 for _ in self.cuts(seed))
        chosen = set(range(count)) if count <= self.most else set(rng.sample(range(count), self.most))
        last = rng.choice(sorted(chosen))
        left = b""
        self.findings.grown += len(self.disk.content) > len(self.disk.start)
        for number, cut in enumerate(islice(self.cuts(seed), count)):
            if number in chosen:
                image = cut.image()
                self._check(cut, image, go_on=number % 40 == 0)
                if number == last:
                    left, self._left = image, cut
        return left

    def restart(self, seed: int) -> None:
        """Cut the power, check, and go on with what one of the cuts left."""
        image = self.check(seed)
        self._begin(image, random.Random(seed).choice(self.durable.held(self._left.steps)))

    def _check(self, cut: Cut, image: bytes, *, go_on: bool) -> None:
        self.findings.cuts += 1
        try:
            with reopen(MemoryDisk(image)) as store:
                self._compare(cut, image, store)
                self.findings.taken_back += store._state.root.sequence < newest_root(image)
            if go_on:
                self._go_on(image)
        except (StorageError, ManagerError) as error:
            raise CrashError(f"cut after step {cut.steps}: refused: {error}", image) from error

    def _compare(self, cut: Cut, image: bytes, store: Store) -> None:
        steps = cut.steps
        found = rows_in(store)
        if store.damage:
            raise CrashError(f"cut after step {steps}: {store.damage[0]}", image)
        if found not in self.contents.possible(steps):
            raise CrashError(f"cut after step {steps}: {difference(found, self.contents.possible(steps)[0])}", image)
        if store.boot_area not in self.boots.possible(steps):
            raise CrashError(f"cut after step {steps}: boot area {store.boot_area[:20]!r}", image)
        if store.sequence < self.sequences.possible(steps)[0]:
            raise CrashError(f"cut after step {steps}: sequence {store.sequence} went back", image)
        position = position_of(store)
        for durable in self.durable.held(steps):
            for pcr in self.pcr.held(steps) if cut.whole else [AFTER_RESET]:
                anchor.judge(position, durable, pcr)

    def _go_on(self, image: bytes) -> None:
        disk = MemoryDisk(image)
        store = reopen(disk)
        model = Model(*content(store))
        changes = model.some_changes(random.Random(len(image)), 5)
        store.commit(changes)
        model.apply(changes)
        store.checkpoint()
        store.close()
        with reopen(disk) as again:
            if again.damage or content(again) != model.content():
                raise CrashError("what was left does not go on", image)
        self.findings.went_on += 1


def newest_root(image: bytes) -> int:
    """Return the sequence that the newest root's header says, whether or not the rest of it is there."""
    return max(fmt.RootHeader.unpack(image, place * SECTOR).sequence for place in fmt.ROOT_SECTORS)
