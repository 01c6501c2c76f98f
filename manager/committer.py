"""The one writer of the store: gathers what waits into groups and commits each group with one flush.

At most one flush is in flight; what arrives meanwhile is the next group. An entry is acknowledged only when its
group is durable. A group that one bad entry spoils is committed entry by entry, so that a caller's error costs
only itself; a failing device fails them all.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from manager.errors import ManagerError
from storage.errors import DeviceError, StorageError
from storage.store import Store
from storage.store_records import Change

# seconds; a thread hop costs about 0.16 ms here (reference/performance.md 6), and a loop that waits as long as this
# for one flush still answers everybody else within a millisecond
_INLINE_BELOW: Final = 0.0006
_ENTRY_BYTES: Final = 128  # of the log that one entry takes at most: a record has 93, a frame's own share is small
_LATENCY_WEIGHT: Final = 0.1  # of the newest flush in the moving average

Acknowledge = Callable[[Exception | None], None]


@dataclass(frozen=True, slots=True)
class CommitterStatistics:
    """What the committer has done: groups and entries committed, entries waiting, mean flush in seconds."""

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
        self._queue: list[tuple[Sequence[Change], Acknowledge]] = []
        self._wake = trio.Event()
        self._latency = 0.0
        self._groups = self._entries = 0

    def enqueue(self, changes: Sequence[Change], acknowledge: Acknowledge) -> None:
        """Put one entry into the next group; `acknowledge(None)` is called when it is durable, else with the error."""
        self._queue.append((changes, acknowledge))
        self._wake.set()

    async def commit(self, *changes: Change) -> None:
        """Commit `changes` together and return when they are durable.

        Raises:
            StorageError: what the store says; nothing of these changes is in it.

        """
        done = trio.Event()
        outcome: list[Exception | None] = []

        def acknowledge(error: Exception | None) -> None:
            outcome.append(error)
            done.set()

        self.enqueue(changes, acknowledge)
        await done.wait()
        if outcome[0] is not None:
            raise outcome[0]

    async def run(self) -> None:
        """Commit groups until cancelled; a group in flight is finished first."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._queue:
                limit = max(1, self.store.max_commit_bytes // _ENTRY_BYTES)
                group, self._queue = self._queue[:limit], self._queue[limit:]
                await self._commit_group(group)

    async def _commit_group(self, group: list[tuple[Sequence[Change], Acknowledge]]) -> None:
        async with self.lock:
            with trio.CancelScope(shield=True):  # a thread that has begun cannot be called back
                outcomes = await self._outcomes(group)
        if self.before_acknowledge is not None and None in outcomes:
            refused = await self._anchored(self.before_acknowledge)
            outcomes = [outcome or refused for outcome in outcomes]
        self._groups += 1
        self._entries += len(group)
        for (_, acknowledge), outcome in zip(group, outcomes, strict=True):
            acknowledge(outcome)
        if None in outcomes:
            self._on_group()

    async def _outcomes(self, group: list[tuple[Sequence[Change], Acknowledge]]) -> list[Exception | None]:
        error = await self._try([change for changes, _ in group for change in changes])
        if error is None or isinstance(error, DeviceError) or len(group) == 1:
            return [error] * len(group)
        return [await self._try(list(changes)) for changes, _ in group]

    @staticmethod
    async def _anchored(anchor: Callable[[], Awaitable[None]]) -> Exception | None:
        try:
            await anchor()
        except ManagerError as error:
            return error
        return None

    async def _try(self, changes: list[Change]) -> Exception | None:
        try:
            if self._latency < _INLINE_BELOW and self._groups:
                self._timed_commit(changes)
            else:
                await trio.to_thread.run_sync(self._timed_commit, changes)
        except StorageError as error:
            return error
        return None

    def _timed_commit(self, changes: list[Change]) -> None:
        """Commit, and take the time where the work is done: a wait for the thread is not the disk's."""
        started = time.monotonic()
        try:
            self.store.commit(changes)
        finally:
            self._latency += _LATENCY_WEIGHT * (time.monotonic() - started - self._latency)

    def statistics(self) -> CommitterStatistics:
        """Return the counters."""
        return CommitterStatistics(self._groups, self._entries, len(self._queue), self._latency)
