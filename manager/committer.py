"""The one writer of the store: gathers what waits into groups and commits each group with one flush.

At most one flush is in flight; what arrives meanwhile is the next group. An entry is acknowledged only when its
group is durable. A group that one bad entry spoils is committed entry by entry, so that a caller's error costs
only itself; a failing device fails them all.

On a quick disk a group is committed where it was gathered (`proceed`), without a turn of another task: an instance
that waits for its save waits for the flush and hardly anything else. On a slow one a worker thread takes the flush.

What changes a record that an instance may change, too, is worked out when its turn comes (`change`), and what the
instance asks for from then on waits for it: two changes that began with the same record would undo each other.
"""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

import trio

from manager.errors import BusyError, ManagerError
from storage.errors import DeviceError, StorageError
from storage.store import Store
from storage.store_records import Change

# seconds; a thread hop costs about 0.16 ms here (reference/performance.md 6), and a loop that waits as long as this
# for one flush still answers everybody else within a millisecond
_INLINE_BELOW: Final = 0.0006
_LONGEST: Final = 4 * _INLINE_BELOW  # that one flush counts for: a CPU that was given to others is no slow disk
_ENTRY_BYTES: Final = 128  # of the log that one entry takes at most: a record has 93, a frame's own share is small
_LATENCY_WEIGHT: Final = 0.1  # of the newest flush in the moving average

Acknowledge = Callable[[Exception | None], None]
Changes = Callable[[Store], Sequence[Change]]  # what there is to change by what the store says; in any thread
_Entry = tuple[Sequence[Change] | Changes, Acknowledge]


@dataclass(slots=True)
class _Changing:
    """How many changes of one vTPM wait for their turn, and who waits for these."""

    count: int = 0
    waiting: list[Callable[[], None]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CommitterStatistics:
    """What the committer has done: groups and entries committed, entries waiting, mean flush in seconds.

    The mean decides who waits for a flush (`Committer`), so of a very slow disk it is less than the truth.
    """

    groups: int
    entries: int
    waiting: int
    flush_seconds: float


class Committer:
    """Owns the store's write side. `on_group` is called after each group that changed something."""

    def __init__(self, store: Store, on_group: Callable[[], None]) -> None:
        """Take over `store`; nobody else may call its commit any more."""
        self.store = store
        self.lock = trio.Lock()  # held while the store changes: whoever reads its digest takes it too
        self.before_acknowledge: Callable[[], Awaitable[None]] | None = None  # strict mode: the anchor is awaited
        self._on_group = on_group
        self._queue: list[_Entry] = []
        self._changing: dict[UUID, _Changing] = {}
        self._wake = trio.Event()
        self._latency = 0.0
        self._groups = self._entries = 0
        self._ended = False
        self._waiting: set[trio.CancelScope] = set()  # of those who wait for us, even where they are shielded

    def enqueue(self, changes: Sequence[Change] | Changes, acknowledge: Acknowledge) -> None:
        """Put one entry into the next group; `acknowledge(None)` is called when it is durable, else with the error.

        Nothing happens before the caller has enqueued all it has at the moment and calls `proceed`.
        """
        self._queue.append((changes, acknowledge))

    def proceed(self) -> None:
        """Have what waits committed: here and now where the disk is quick, else as soon as its turn comes."""
        if not self._queue:
            return
        if self._may_block() and self.before_acknowledge is None and not self.lock.locked():
            group = self._next_group()  # nobody takes the lock meanwhile: no other task runs before this returns
            self._acknowledge(group, self._outcomes_inline(group))
        if self._queue:
            self._wake.set()

    async def commit(self, *changes: Change) -> None:
        """Commit `changes` together and return when they are durable.

        Raises:
            StorageError: what the store says; nothing of these changes is in it. BusyError: the manager stops.

        """
        await self._enqueued(changes, lambda: None)

    async def change(self, vtpms: Collection[UUID], changes: Changes) -> None:
        """Commit what `changes` makes of these vTPMs' records when its turn has come, and return when it is durable.

        Raises:
            StorageError: what `changes` or the store says; nothing is changed. BusyError: the manager stops.

        """
        for vtpm in vtpms:
            self._changing.setdefault(vtpm, _Changing()).count += 1

        def changed() -> None:
            for vtpm in vtpms:
                changing = self._changing[vtpm]
                changing.count -= 1
                if not changing.count:
                    for again in self._changing.pop(vtpm).waiting:
                        again()

        await self._enqueued(changes, changed)

    def is_changing(self, vtpm: UUID) -> bool:
        """Tell whether a change of a vTPM's record waits for its turn, perhaps of somebody who has gone."""
        return vtpm in self._changing

    def defer(self, vtpm: UUID, again: Callable[[], None]) -> bool:
        """Tell whether a vTPM's record is about to change; if so, `again` is called when that is done or has failed."""
        if vtpm not in self._changing:
            return False
        self._changing[vtpm].waiting.append(again)
        return True

    async def _enqueued(self, changes: Sequence[Change] | Changes, then: Callable[[], None]) -> None:
        done = trio.Event()
        outcome: list[Exception | None] = []

        def acknowledge(error: Exception | None) -> None:
            outcome.append(error)
            done.set()
            then()  # also where nobody waits any more

        self.enqueue(changes, acknowledge)
        self._wake.set()  # not `proceed`: an administrator can wait, and many at once share a flush
        await self._until_ended(done.wait)
        if outcome[0] is not None:
            raise outcome[0]

    async def run(self) -> None:
        """Commit groups until cancelled; a group in flight is finished first. Nobody waits for another one then."""
        try:
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                while self._queue:
                    await self._commit_group(self._next_group())
        finally:
            self._ended = True
            for scope in self._waiting:
                scope.cancel()

    @asynccontextmanager
    async def hold(self, lock: trio.Lock | None = None) -> AsyncGenerator[None]:
        """Hold `lock` (the store's), within a shield, too: a stop takes it for good, and must not be waited for.

        Raises:
            BusyError: the manager stops.

        """
        lock = lock or self.lock
        try:
            lock.acquire_nowait()
        except trio.WouldBlock:
            await self._until_ended(lock.acquire)
        try:
            yield
        finally:
            lock.release()

    async def _until_ended(self, wait: Callable[[], Awaitable[None]]) -> None:
        with trio.CancelScope() as scope:
            self._waiting.add(scope)
            if self._ended:
                scope.cancel()
            try:
                await wait()
            finally:
                self._waiting.discard(scope)
        if scope.cancelled_caught:
            raise BusyError("the manager stops; whether this was done can be seen when it runs again")

    def _next_group(self) -> list[_Entry]:
        limit = max(1, self.store.max_commit_bytes // _ENTRY_BYTES)
        # what is worked out at its turn sees all that came before it, so it is a group of its own
        limit = next((max(1, at) for at, (what, _) in enumerate(self._queue[:limit]) if callable(what)), limit)
        group, self._queue = self._queue[:limit], self._queue[limit:]
        return group

    async def _commit_group(self, group: list[_Entry]) -> None:
        async with self.lock:
            with trio.CancelScope(shield=True):  # a thread that has begun cannot be called back
                if self._may_block():
                    outcomes = self._outcomes_inline(group)
                else:
                    outcomes = await trio.to_thread.run_sync(self._outcomes_inline, group)
        if self.before_acknowledge is not None and None in outcomes:
            refused = await self._anchored(self.before_acknowledge)
            outcomes = [outcome or refused for outcome in outcomes]
        self._acknowledge(group, outcomes)

    def _acknowledge(self, group: list[_Entry], outcomes: list[Exception | None]) -> None:
        self._groups += 1
        self._entries += len(group)
        for (_, acknowledge), outcome in zip(group, outcomes, strict=True):
            acknowledge(outcome)
        if None in outcomes:
            self._on_group()

    def _may_block(self) -> bool:
        """Tell whether a flush is so short that nobody need be spared it; not known before the first."""
        return self._groups > 0 and self._latency < _INLINE_BELOW

    def _outcomes_inline(self, group: list[_Entry]) -> list[Exception | None]:
        """Commit a group and return each entry's error or None; blocks for as long as the disk takes."""
        gathered: list[Change] = []
        for changes, _ in group:
            if callable(changes):
                return [self._try(changes)]  # the only one of its group
            gathered += changes
        error = self._try(gathered)
        if error is None or isinstance(error, DeviceError) or len(group) == 1:
            return [error] * len(group)
        return [self._try(changes) for changes, _ in group]

    @staticmethod
    async def _anchored(anchor: Callable[[], Awaitable[None]]) -> Exception | None:
        try:
            await anchor()
        except ManagerError as error:
            return error
        return None

    def _try(self, changes: Sequence[Change] | Changes) -> Exception | None:
        started, worked = time.monotonic(), time.thread_time()
        try:
            self.store.commit(changes(self.store) if callable(changes) else changes)
        except StorageError as error:
            return error
        finally:
            # what a thread could spare the others is the wait; the work holds the interpreter wherever it is done
            waited = time.monotonic() - started - (time.thread_time() - worked)
            self._latency += _LATENCY_WEIGHT * (min(waited, _LONGEST) - self._latency)
        return None

    def statistics(self) -> CommitterStatistics:
        """Return the counters."""
        return CommitterStatistics(self._groups, self._entries, len(self._queue), self._latency)
