"""Hibernated vTPMs: which there are, and the steps of putting them under watch and of waking them.

What lives here: what the manager knows of each, and single steps with the keeper. When they are taken: `hibernation`.
A sleeping vTPM has no process and no ring; its keeper has its listening sockets and open connections. It keeps its
lease: the process that had it has ended for certain (the keeper reaped it) before there is another with the same.
"""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from uuid import UUID

import trio

from frontend_backend import messages_keeper as k
from frontend_backend.release import RELEASE
from manager import state_files
from manager.attachment_words import rest_after
from manager.config import InstanceConfig
from manager.endings import Endings
from manager.errors import KeeperError
from manager.instances import Instances
from manager.keepers import Keepers
from manager.launch_words import launch_for
from manager.ports import Port, Ports
from manager.quotas import quota_of
from manager.registry import Registry
from manager.running import Running
from manager.sockets import LISTENERS_OF
from storage.catalogue import AttachmentRow, VtpmRow
from storage.store_records import RecordFlags

_RETRY_SECONDS: Final = 1.0
LONGEST_RETRY: Final = 60.0  # seconds
_DOUBLINGS: Final = 6  # that reach it
_AT_ONCE: Final = 32  # are armed or woken: each takes descriptors meanwhile, and all may be wanted at the same moment
_ASLEEP: Final = RecordFlags.RESUMABLE | RecordFlags.HIBERNATED


@dataclass(slots=True)
class Asleep:
    """One hibernated vTPM.

    `since`: seconds since 1970; `freed`: bytes of memory that its process had for itself, None where not known;
    `failures`: how often, one after the other, it did not wake.
    """

    lease: int
    since: float
    freed: int | None = None
    failures: int = 0

    def pause(self) -> float:
        """Count another failure; return the seconds before it is watched again, twice as many after each."""
        pause = _RETRY_SECONDS * 2.0 ** min(self.failures, _DOUBLINGS)
        self.failures += 1
        return min(pause, LONGEST_RETRY)


def is_hibernated(flags: RecordFlags) -> bool:
    """Tell whether a record says that its state is that of a hibernated vTPM, not resumed yet."""
    return flags & _ASLEEP == _ASLEEP


class Sleepers:
    """Every hibernated vTPM, as far as its manager has seen to it."""

    def __init__(
        self, registry: Registry, instances: Instances, keepers: Keepers, sockets: Path, config: InstanceConfig
    ) -> None:
        """Know of none yet."""
        self._registry, self._instances, self._keepers = registry, instances, keepers
        self._config = config
        self.ports = Ports(sockets, keepers)
        self._endings = Endings(keepers)
        self._at_once = trio.CapacityLimiter(_AT_ONCE)
        self.asleep: dict[UUID, Asleep] = {}

    def __contains__(self, vtpm: UUID) -> bool:
        return vtpm in self.asleep

    @property
    def freed(self) -> int:
        """Bytes of memory that the processes of those that sleep had for themselves, as far as it was seen."""
        return sum(entry.freed or 0 for entry in self.asleep.values())

    def since(self, vtpm: UUID) -> float:
        """Return since when a vTPM sleeps, in seconds since 1970; 0 when it does not."""
        entry = self.asleep.get(vtpm)
        return 0.0 if entry is None else entry.since

    def fell_asleep(self, running: Running) -> None:
        """Take note of one whose instance has committed and ended."""
        self.asleep[running.vtpm] = Asleep(running.lease, time.time(), running.private_bytes)

    def found(self, row: VtpmRow, lease: int) -> None:
        """Take note of one that slept before this manager was there: since its state image was written."""
        try:
            since = self._registry.image_path(row).stat().st_mtime
        except OSError:
            since = time.time()  # whoever wakes it meets that, with words of his own
        self.asleep[row.uuid] = Asleep(lease, since)

    # steps

    async def arm(self, row: VtpmRow, attachment: AttachmentRow) -> None:
        """Have new listening sockets watched: the keeper has nothing of this one.

        Raises:
            KeeperError, BusyError: no keeper takes them. ManagerError: they cannot be made.

        """
        async with self._at_once:
            await self._arm(row, attachment)
        if row.uuid not in self.asleep:
            self.found(row, attachment.lease)

    async def _arm(self, row: VtpmRow, attachment: AttachmentRow) -> None:
        made = self.ports.open(row, attachment)
        names = LISTENERS_OF[attachment.frontend]
        try:
            arm = k.Arm(row.uuid.bytes, attachment.lease, attachment.frontend, names)
            await self._keepers.ask(arm, tuple(sock.fileno() for sock in made))
        finally:
            for sock in made:
                sock.close()

    async def watch_again(self, row: VtpmRow, attachment: AttachmentRow) -> None:
        """Have one watched that could not be woken, with new sockets where its keeper has died; see `arm`."""
        if self._keepers.release_of(row.uuid.bytes, attachment.lease) != RELEASE:
            # of before an upgrade: its keeper's spawner may be gone, and would be of code that it does not understand
            await self._endings.forget(row.uuid, attachment.lease)
            await self.arm(row, attachment)
            return
        try:
            await self._keepers.ask(k.Arm(row.uuid.bytes, attachment.lease, attachment.frontend, ()))
        except KeeperError:
            await self.arm(row, attachment)

    async def launch(self, row: VtpmRow, attachment: AttachmentRow) -> Running:
        """Start the next instance of one that sleeps, on what its keeper has; from then on it is no sleeper.

        Raises:
            KeeperError, BusyError, ConflictError: it was not started, and goes on to sleep, unwatched.

        """
        async with self._at_once:
            running = await self._launch(row, attachment)
            self.asleep.pop(row.uuid, None)
        return running

    async def _launch(self, row: VtpmRow, attachment: AttachmentRow) -> Running:
        image = state_files.open_locked(self._registry.image_path(row), create=False)
        try:
            launch = replace(
                launch_for(row, attachment, "state"),
                rest_after=rest_after(attachment, self._config),
                quota=quota_of(attachment),
                wakes=True,
            )
            return await self._instances.start(launch, image, _NO_SOCKETS, _nothing)
        finally:
            os.close(image)

    async def forget(self, vtpm: UUID) -> None:
        """Let go of one, its sockets and connections with it: it could not be woken to be stopped."""
        entry = self.asleep.pop(vtpm, None)
        if entry is not None:
            await self._endings.forget(vtpm, entry.lease)


_NO_SOCKETS: Final[list[Port]] = []


def _nothing() -> None:
    """Nothing to record: the lease stays."""
