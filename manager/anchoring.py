"""Keeps both anchors up to date while the manager runs. No guest command and no routine save waits for it."""

import hmac
import logging
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import trio

from manager import anchor
from manager.committer import Committer
from manager.errors import ManagerError, RolledBackError
from manager.hardware import Hardware
from manager.hwtpm_records import AnchorInfo
from storage.errors import StorageError, StorageFull
from storage.store import Store

_log = logging.getLogger("vtpm.anchor")
_RETRY_SECONDS: Final = 5.0
_COALESCE_SECONDS: Final = 0.05  # saves within this time share one extend of PCR 22
_WATCH_SECONDS: Final = 60.0  # without saves: how long a TPM that was reset meanwhile goes unnoticed


@dataclass(frozen=True, slots=True)
class AnchorStatistics:
    """Writes of the durable anchor, extends of the volatile one, and when the durable one was last written (UTC).

    All since this manager started; `resets` counts how often it found PCR 22 with another value than it had left there.
    """

    durable_writes: int
    volatile_extends: int
    last_durable: float
    resets: int


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
        self._durable_unknown = False  # a write failed, and whether the TPM carried it out is not known
        self._durable_lock = trio.Lock()
        self._group_done = trio.Event()
        self._durable_writes = self._volatile_extends = 0
        self._last_durable = 0.0
        self._notes = anchor.Notes.unpack(committer.store.volatile_expected)
        self._pcr22: tuple[bytes, ...] = ()  # one of these PCR 22 must hold: two while an extend may or may not be done
        self._resets = 0
        self._unprotected = False  # PCR 22 was reset, and no durable anchor has been written since
        self._renewed = -math.inf  # when it was; no more often than we look, whoever else extends PCR 22

    @property
    def hardware(self) -> Hardware:
        """The hardware TPM that holds the anchors."""
        return self._hardware

    @property
    def index(self) -> int:
        """The durable anchor's NV index."""
        return self._info.index

    def group_committed(self) -> None:
        """Tell that the store has changed (called by the committer)."""
        self._group_done.set()

    async def write_opening(self, *, unclean: bool = False) -> None:
        """Make this open a state of its own, and both anchors stand for it; before anything is served.

        The image as it was opened may have been opened before. Were its digest anchored a second time, the saves
        made after the first open and those made after the second would both descend from the anchor: a fork.
        After an unclean stop a checkpoint comes first: what is anchored must not hang on a checkpoint that was cut
        short, whose damage would be answered by going back to the root before it (docs/format.md).

        Raises:
            TpmError: the hardware TPM did not do it. StorageError: the store took no frame.

        """
        store = self._committer.store
        if unclean:
            try:
                await trio.to_thread.run_sync(store.checkpoint)
            except StorageFull as error:
                _log.warning("no room for a checkpoint, the log stays as it is: %s", error)
        if self._volatile:
            await self.extend_volatile()
        else:
            async with self._committer.lock:
                await trio.to_thread.run_sync(partial(store.commit, (), notes=True))
        await self.write_durable()

    async def write_durable(self) -> None:
        """Make the durable anchor stand for the store as it is now, or for a newer state.

        Raises:
            TpmError: the hardware TPM did not do it; the old anchor stands, or the new one (told apart next time).
            RolledBackError: somebody else has written the index.

        """
        async with self._committer.hold(self._durable_lock):
            store = self._committer.store
            if self._durable_unknown:
                await self._find_out()
            async with self._committer.hold():
                digest = store.digest()
                self._note(pending=digest)  # before the write: power may fail on either side of it
            self._durable_unknown = True
            await self._hardware.lane.run(self._hardware.tpm.anchor_write, self._info, self._auth, digest)
            store.note_anchored(digest)
            self._durable_unknown = False
            self._durable_writes += 1
            self._last_durable = time.time()

    async def _find_out(self) -> None:
        """Read what the index holds after a failed write: frames must name that value before they name another."""
        held = await self._hardware.lane.run(self._hardware.tpm.anchor_read, self._info, self._auth)
        store = self._committer.store
        if not any(hmac.compare_digest(held, known) for known in (store.anchored, self._notes.pending)):
            raise RolledBackError(
                "the hardware TPM's durable anchor holds what this manager did not write: another manager uses it. "
                "Nothing was changed. Stop one of the two"
            )
        store.note_anchored(held)
        self._durable_unknown = False

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
            sequence = self._committer.store.sequence
            if sequence == written_at:
                continue
            try:
                await self.write_durable()
            except (ManagerError, StorageError) as error:
                _log.warning("the durable anchor was not written: %s", error)
                continue
            written_at = sequence

    async def run_volatile(self) -> None:
        """Extend PCR 22 after groups, coalesced, until cancelled. Returns at once without a volatile anchor."""
        if not self._volatile:
            return
        while True:
            with trio.move_on_after(_WATCH_SECONDS):
                await self._group_done.wait()
            try:
                if self._group_done.is_set():
                    await trio.sleep(_COALESCE_SECONDS)
                    self._group_done = trio.Event()
                    await self.extend_volatile()
                else:
                    await self._look_for_a_reset()
            except (ManagerError, StorageError) as error:
                _log.warning("PCR 22 was not extended, will be retried: %s", error)
                self._group_done.set()
                await trio.sleep(_RETRY_SECONDS)

    async def extend_volatile(self) -> None:
        """Extend PCR 22 with the store's digest; the store first records what the PCR will hold.

        The PCR is read each time: a machine that was suspended comes back with it reset, and a note that starts from
        a remembered value would lock the newest store out.

        A value that we did not leave there means that the TPM was reset: then only the durable anchor stands, for
        what may be an hour old, so it is written too.

        Raises:
            TpmError: the hardware TPM did not do it. StorageError: the store did not take the note.

        """
        store = self._committer.store
        before = await self._hardware.lane.run(self._hardware.tpm.pcr22_read)
        self._compare(before)
        async with self._committer.lock:
            digest = store.digest()
            self._note(pcr_before=before, extending=digest)
            await trio.to_thread.run_sync(partial(store.commit, (), notes=True))
        self._pcr22 = before, anchor.extended(before, digest)
        await self._hardware.lane.run(self._hardware.tpm.pcr22_extend, digest)
        self._pcr22 = (anchor.extended(before, digest),)
        self._volatile_extends += 1
        if self._unprotected and trio.current_time() >= self._renewed + _WATCH_SECONDS:
            await self.write_durable()
            self._unprotected, self._renewed = False, trio.current_time()

    async def _look_for_a_reset(self) -> None:
        """Have both anchors stand again if the TPM was reset; nothing is written otherwise."""
        if not self._compare(await self._hardware.lane.run(self._hardware.tpm.pcr22_read)):
            await self.extend_volatile()

    def _compare(self, present: bytes) -> bool:
        """Return whether PCR 22 holds what we left there; where it does not, both anchors have to be renewed."""
        if not self._pcr22 or present in self._pcr22:
            return not self._unprotected
        self._pcr22 = ()
        self._resets += 1
        self._unprotected = True
        _log.warning(
            "PCR 22 holds another value than we left there: the hardware TPM was reset while this manager ran, as by a "
            "suspend, or somebody else extends it; both anchors are written anew"
        )
        return False

    def _note(self, **changes: bytes) -> None:
        """Change what the store carries of the anchors, from its next frame on."""
        self._notes = replace(self._notes, **changes)
        self._committer.store.note_volatile(self._notes.pack())

    def statistics(self) -> AnchorStatistics:
        """Return the counters."""
        return AnchorStatistics(self._durable_writes, self._volatile_extends, self._last_durable, self._resets)


def note_present(store: Store, pcr22: bytes | None) -> None:
    """Have the frames that follow say that PCR 22 holds what it holds now (None: there is no volatile anchor).

    For whoever changes an opened store outside a run: after a clean stop the PCR may have moved on without us.
    """
    if pcr22 is not None:
        notes = anchor.Notes.unpack(store.volatile_expected)
        store.note_volatile(replace(notes, pcr_before=pcr22, extending=bytes(anchor.DIGEST_SIZE)).pack())


def position_of(store: Store) -> anchor.StorePosition:
    """Return what an open store says of itself, for `anchor.judge`."""
    return anchor.StorePosition(store.digest(), store.anchored, anchor.Notes.unpack(store.volatile_expected))
