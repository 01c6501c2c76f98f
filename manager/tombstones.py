"""Tombstones of removed vTPMs: how long each is kept, and the task that takes those away whose time is over.

A tombstone is in the store, in place of the record: the same commit that takes a vTPM's key away puts it there.
"""

import logging
import math
import time
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

import trio

from manager.committer import Committer
from manager.errors import ConfigurationError, ConflictError, DeniedError, ManagerError
from storage.errors import GroupClosed, NoSuchVtpm, StorageError, VtpmRemoved
from storage.store_records import BuryVtpm, Change, ForgetVtpm, RemoveVtpm, Tombstone

_log = logging.getLogger("vtpm.tombstones")
_DAY: Final = 86400.0  # seconds
_MAX_DAYS: Final = 36500.0
_AT_ONCE: Final = 200  # tombstones in one commit: 17 bytes each in the log
_COALESCE_SECONDS: Final = 3600.0  # those whose time ends within it are taken away together
_LONGEST_SLEEP: Final = _DAY  # the clock may be set, and groups be opened, meanwhile


def iso(seconds: float) -> str:
    """Return a point in time as ISO 8601 in UTC, to the second."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


class Tombstones:
    """The tombstones of one store."""

    def __init__(self, committer: Committer, days: float) -> None:
        """Keep tombstones in `committer`'s store for `days` (0: removals leave none).

        Raises:
            ConfigurationError: no such time.

        """
        if not math.isfinite(days) or not 0 <= days <= _MAX_DAYS:
            raise ConfigurationError(f"[store] tombstone_days = {days} cannot be used: 0 to {_MAX_DAYS:g} days")
        self._committer = committer
        self._seconds = days * _DAY
        self._idle = True  # nobody waits for the end of a tombstone's time
        self._buried = trio.Event()
        self._dropping = trio.Lock()

    def burial(self, vtpm: UUID) -> Change:
        """Return the change that removes a vTPM now."""
        if not self._seconds:
            return RemoveVtpm(vtpm)
        return BuryVtpm(vtpm, int(time.time()))

    def buried(self) -> None:
        """Tell that a burial is durable."""
        if self._idle:
            self._buried.set()

    def kept_until(self, tombstone: Tombstone) -> str:
        """Return when a tombstone may be taken away: ISO 8601, UTC."""
        return iso(tombstone.removed + self._seconds)

    def find(self, text: str) -> Tombstone | None:
        """Return the tombstone with this UUID, None where there is none, or `text` is no UUID."""
        try:
            return self._committer.store.tombstone(UUID(text))
        except ValueError:
            return None

    def refuse_known(self, vtpm: UUID) -> None:
        """Refuse a UUID that somebody chose for a new vTPM, if a removed one had it or that cannot be seen.

        Raises:
            ConflictError: there is a tombstone. DeniedError: a group is closed.

        """
        store = self._committer.store
        try:
            store.get(vtpm)
        except VtpmRemoved:
            tombstone = store.tombstone(vtpm)
            if tombstone is not None:
                raise ConflictError(
                    f"vTPM {vtpm} was removed on {iso(tombstone.removed)}; its UUID is free again after "
                    f"{self.kept_until(tombstone)} ([store] tombstone_days). Nothing was made. Use another UUID: the "
                    f"old state would not come back with this one"
                ) from None
        except GroupClosed as error:
            raise DeniedError(
                f"group {error.groups[0]} is closed, so it cannot be seen whether the UUID {vtpm} is in use there. "
                f"Nothing was made. Leave --uuid away, or open the group first"
            ) from error
        except NoSuchVtpm:
            return

    async def drop_expired(self) -> int:
        """Take away the tombstones whose time is over, some with each commit; returns how many.

        Raises:
            StorageError, ManagerError: the store or, in strict mode, the anchor took no commit; the others are kept.

        """
        async with self._dropping:
            expired = self._committer.store.removed_by(time.time() - self._seconds)
            for start in range(0, len(expired), _AT_ONCE):
                await self._committer.commit(*map(ForgetVtpm, expired[start : start + _AT_ONCE]))
        return len(expired)

    async def run(self) -> None:
        """Take tombstones away when their time is over, until cancelled; sleeps while there are none."""
        while True:
            with trio.move_on_after(self._until_next()):
                await self._buried.wait()
            self._buried = trio.Event()
            try:
                dropped = await self.drop_expired()
            except (ManagerError, StorageError) as error:  # in strict mode the hardware TPM may fail a commit, too
                _log.warning("tombstones whose time is over are still there: %s", error)
                await trio.sleep(_COALESCE_SECONDS)
                continue
            if dropped:
                _log.info("%d tombstones of removed vTPMs were taken away", dropped)

    def _until_next(self) -> float:
        """Return the seconds until there is something to do."""
        first = self._committer.store.first_removal()
        self._idle = first is None
        if first is None:
            return math.inf
        slack = min(_COALESCE_SECONDS, self._seconds / 10)
        return min(max(first + self._seconds - time.time(), 0) + slack, _LONGEST_SLEEP)
