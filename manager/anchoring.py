"""Keeps both anchors up to date while the manager runs. No guest command and no routine save waits for it."""

import logging
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import trio

from manager import anchor
from manager.committer import Committer
from manager.hardware import Hardware
from manager.hwtpm_errors import TpmError
from manager.hwtpm_records import AnchorInfo
from storage.store import Store

_log = logging.getLogger("vtpm.anchor")
_RETRY_SECONDS: Final = 5.0
_COALESCE_SECONDS: Final = 0.05  # saves within this time share one extend of PCR 22


@dataclass(frozen=True, slots=True)
class AnchorStatistics:
    """Writes of the durable anchor, extends of the volatile one, and when the durable one was last written (UTC)."""

    durable_writes: int
    volatile_extends: int
    last_durable: float


class Anchoring:
    """Writes the durable anchor at key events and at intervals, extends the volatile one after groups."""

    def __init__(
        self,
        committer: Committer,
        hardware: Hardware,
        info: AnchorInfo,
        auth: bytes,
        *,
        volatile: bool,
        strict: bool,
    ) -> None:
        """Anchor `committer`'s store in `info`'s index; `strict`: each group waits for it (design section 7)."""
        self._committer, self._hardware = committer, hardware
        self._info, self._auth, self._volatile = info, auth, volatile
        if strict:
            committer.before_acknowledge = self.write_durable
        self._pcr22: bytes | None = None
        self._durable_lock = trio.Lock()
        self._group_done = trio.Event()
        self._durable_writes = self._volatile_extends = 0
        self._last_durable = 0.0
        self._notes = anchor.Notes.unpack(committer.store.volatile_expected)

    def group_committed(self) -> None:
        """Tell that the store has changed (called by the committer)."""
        self._group_done.set()

    async def write_durable(self) -> None:
        """Make the durable anchor stand for the store as it is now, or for a newer state.

        Raises:
            TpmError: the hardware TPM did not do it; the old anchor stands.

        """
        async with self._durable_lock:
            store = self._committer.store
            async with self._committer.lock:
                digest = store.digest()
                self._note(pending=digest)  # before the write: power may fail on either side of it
            await self._hardware.lane.run(self._hardware.tpm.anchor_write, self._info, self._auth, digest)
            store.note_anchored(digest)
            self._durable_writes += 1
            self._last_durable = time.time()

    async def write_final(self) -> None:
        """Make the durable anchor say that this was a clean stop. Nothing can be committed any more afterwards.

        Raises:
            TpmError: the hardware TPM did not do it; the next open takes this stop for an unclean one.

        """
        await self._durable_lock.acquire()
        await self._committer.lock.acquire()  # for good: a save after this anchor would be locked out with the store
        digest = anchor.clean_stop(self._committer.store.digest())
        await self._hardware.lane.run(self._hardware.tpm.anchor_write, self._info, self._auth, digest)

    async def run_interval(self, seconds: float) -> None:
        """Write the durable anchor every `seconds` when the store has changed since."""
        written_at = self._committer.store.sequence
        while True:
            await trio.sleep(seconds)
            if self._committer.store.sequence == written_at:
                continue
            try:
                await self.write_durable()
            except TpmError as error:
                _log.warning("the durable anchor was not written, the old one stands: %s", error)
            written_at = self._committer.store.sequence

    async def run_volatile(self) -> None:
        """Extend PCR 22 after groups, coalesced, until cancelled. Returns at once without a volatile anchor."""
        if not self._volatile:
            return
        while True:
            await self._group_done.wait()
            await trio.sleep(_COALESCE_SECONDS)
            self._group_done = trio.Event()
            try:
                await self.extend_volatile()
            except TpmError as error:
                _log.warning("PCR 22 was not extended, will be retried: %s", error)
                self._pcr22 = None
                self._group_done.set()
                await trio.sleep(_RETRY_SECONDS)

    async def extend_volatile(self) -> None:
        """Extend PCR 22 with the store's digest; the store first records what the PCR will hold."""
        store = self._committer.store
        if self._pcr22 is None:
            self._pcr22 = await self._hardware.lane.run(self._hardware.tpm.pcr22_read)
        async with self._committer.lock:
            digest = store.digest()
            after = anchor.extended(self._pcr22, digest)
            self._note(pcr_before=self._pcr22, pcr_after=after)
            await trio.to_thread.run_sync(partial(store.commit, (), notes=True))
        await self._hardware.lane.run(self._hardware.tpm.pcr22_extend, digest)
        self._pcr22 = after
        self._volatile_extends += 1

    def _note(self, **changes: bytes) -> None:
        """Change what the store carries of the anchors, from its next frame on."""
        self._notes = replace(self._notes, **changes)
        self._committer.store.note_volatile(self._notes.pack())

    def statistics(self) -> AnchorStatistics:
        """Return the counters."""
        return AnchorStatistics(self._durable_writes, self._volatile_extends, self._last_durable)


def position_of(store: Store) -> anchor.StorePosition:
    """Return what an open store says of itself, for `anchor.judge`."""
    return anchor.StorePosition(store.digest(), store.anchored, anchor.Notes.unpack(store.volatile_expected))
