"""What happens to attached vTPMs without being asked: a crash, the end of a keeper, the start of a manager."""

import logging
from typing import Final
from uuid import UUID

import trio

from frontend_backend.messages_keeper import Kept
from manager.attachment_words import after_reset, next_startup, rest_after
from manager.attachments import Attachments
from manager.config import InstanceConfig
from manager.errors import BusyError, ConflictError, DeniedError, KeeperError, ManagerError, QuarantinedError
from manager.hardware_pcrs import bit_map
from manager.hibernation import Hibernation
from manager.instances import Instances
from manager.launches import Adoption
from manager.ports import PROXY
from manager.registry import Registry
from manager.running import Running, Stage
from manager.sleepers import is_hibernated
from storage.catalogue import AttachmentRow, VtpmRow
from storage.errors import StorageError
from storage.store_records import RecordFlags

_log = logging.getLogger("vtpm.life")
_PARALLEL_STARTS: Final = 8  # instances started at once when the manager starts


class Supervision:
    """Starts attached vTPMs again, within their budgets. Whatever goes wrong with one is logged and shown with it."""

    def __init__(
        self,
        registry: Registry,
        attachments: Attachments,
        instances: Instances,
        nursery: trio.Nursery,
        config: InstanceConfig,
    ) -> None:
        """Look after `attachments`; waits between two starts are tasks of `nursery`."""
        self._config = config
        self._registry, self._attachments, self._instances = registry, attachments, instances
        self._catalogue, self._nursery = registry.catalogue, nursery

    async def ended(self, running: Running, status: int | None) -> None:
        """Deal with an ended process: it comes back, from its clean stop or in failure until a platform reset.

        Whatever goes wrong is logged: one vTPM's end must not be the manager's.
        """
        if running.elsewhere or running.awaited or not running.came_up or self._attachments.stopping:
            return  # whoever stopped, started or joined it deals with its end
        try:
            await self._ended(running, status)
        except (ManagerError, StorageError, OSError) as error:
            self._give_up(running.vtpm, f"its instance ended and was not started again: {error}")

    async def _ended(self, running: Running, status: int | None) -> None:
        if running.stage is Stage.FAILED:
            said = running.report.text if running.report is not None else ""
            self._give_up(running.vtpm, f"its state could not be loaded ({said}); vtpm-reset-platform tries again")
            return
        row = self._catalogue.find_vtpm(running.vtpm)
        attachment = self._catalogue.find_attachment(running.vtpm)
        if row is None or attachment is None or attachment.lease != running.lease:
            return
        if running.stage is Stage.ENDED:
            _log.error("vTPM %s: its instance ended unexpectedly (status %s)", running.vtpm, status)
            self._catalogue.log("crashed", running.vtpm, f"instance {running.pid} ended with status {status}")
        await self.later(row, f"its instance ended with status {status}")

    async def later(self, row: VtpmRow, why: str) -> None:
        """Start a vTPM that should run after as long a wait as its crashes ask for, until it runs or may not."""
        while (delay := self._attachments.crashed(row.uuid)) is not None:
            self._attachments.note_down(row.uuid, f"{why}; it is started again in {delay:g} s")
            await trio.sleep(delay)
            failure = await self._try(row)
            if failure is None:
                return
            why = failure
        self._give_up(row.uuid, f"crashed too often ({why}); left down until vtpm-reset-platform or detach")
        self._catalogue.log("left-down", row.uuid, why)

    async def _try(self, row: VtpmRow) -> str | None:
        """Start a vTPM if it should run and does not. Returns why it failed where another try may help."""
        async with self._attachments.lock(row.uuid):
            attachment = self._catalogue.find_attachment(row.uuid)
            if attachment is None or self._attachments.running(row.uuid) is not None or self._attachments.stopping:
                return None
            if row.uuid in self._attachments.sleepers:
                return None
            try:
                await self._start(row, attachment)
            except (KeeperError, BusyError, ConflictError, OSError) as error:
                # busy: slow just now; conflict: the last instance has closed its ring, but not yet its state image
                _log.warning("vTPM %s did not start: %s", row.uuid, error)
                return str(error)
            except (ManagerError, StorageError) as error:
                self._give_up(row.uuid, f"it does not start: {error}")
            return None

    async def _start(self, row: VtpmRow, attachment: AttachmentRow) -> None:
        flags = self._registry.record(row.uuid).flags
        if flags & RecordFlags.QUARANTINED:
            raise QuarantinedError("it is quarantined: its state could not be loaded")
        await self._attachments.start_again(row, attachment, next_startup(attachment, flags))

    def _give_up(self, vtpm: UUID, why: str) -> None:
        _log.error("vTPM %s: %s", vtpm, why)
        self._attachments.note_down(vtpm, why)

    async def take_over(self, kept: list[Kept], hibernation: Hibernation) -> None:
        """Adopt the instances that outlived the last manager, and start the attached ones that did not.

        Hibernated ones sleep on.
        """
        await self._attachments.sleepers.ports.found(filter(self._is_of_device, kept))
        with self._instances.held():
            for instance in kept:
                try:
                    await self._take_over_one(instance)
                except KeeperError as error:
                    _log.error(
                        "vTPM %s: instance %d was not taken over: %s", UUID(bytes=instance.vtpm), instance.pid, error
                    )
        limit = trio.CapacityLimiter(_PARALLEL_STARTS)
        async with trio.open_nursery() as nursery:
            for attachment in self._catalogue.each_attachment():
                if (
                    self._attachments.running(attachment.vtpm) is not None
                    or attachment.vtpm in self._attachments.sleepers
                    or attachment.instance_domain  # that domain's instance joins when it wants to
                ):
                    continue  # first of all: thousands were adopted, and their saves wait for this loop
                row = self._catalogue.find_vtpm(attachment.vtpm)
                if row is not None:
                    nursery.start_soon(self._first_start, row, attachment, hibernation, limit)

    async def start_group(self, group: UUID, hibernation: Hibernation) -> int:
        """Start the attached vTPMs of a group that was just opened; returns how many. What fails is logged."""
        limit, count = trio.CapacityLimiter(_PARALLEL_STARTS), 0
        async with trio.open_nursery() as nursery:
            for attachment in self._catalogue.each_attachment():
                if attachment.instance_domain:
                    continue
                row = self._catalogue.find_vtpm(attachment.vtpm)
                if row is not None and row.group == group and self._attachments.running(row.uuid) is None:
                    nursery.start_soon(self._first_start, row, attachment, hibernation, limit)
                    count += 1
        return count

    async def _first_start(
        self, row: VtpmRow, attachment: AttachmentRow, hibernation: Hibernation, limit: trio.CapacityLimiter
    ) -> None:
        async with limit:
            if await hibernation.find(row, attachment):
                return
            failure = await self._try(row)
        if failure is not None:
            self._nursery.start_soon(self.later, row, failure)  # nobody who administers waits for it

    async def _take_over_one(self, instance: Kept) -> None:
        vtpm = UUID(bytes=instance.vtpm)
        row, attachment = self._catalogue.find_vtpm(vtpm), self._catalogue.find_attachment(vtpm)
        holds_lease = attachment is not None and attachment.lease == instance.lease
        flags = self._flags(vtpm)
        sleeps = is_hibernated(flags)
        if not instance.alive:
            # what a keeper watches does sleep, also where its record cannot be read: its group is closed just now
            sleeps = sleeps or (not instance.pid and self._is_closed(vtpm))
            if row is not None and holds_lease and sleeps and await self._parked(instance):
                self._attachments.sleepers.found(row, instance.lease)
            else:
                await self._instances.endings.forget(vtpm, instance.lease)
        elif attachment is None or not holds_lease:
            _log.error("vTPM %s: instance %d holds no lease; ending it", vtpm, instance.pid)
            await self._instances.endings.end(vtpm, instance.lease)
        else:
            startup = next_startup(attachment, flags)
            rest = rest_after(attachment, self._config)
            hw_pcrs = bit_map(attachment.hw_pcrs)
            measures = (attachment.measure, attachment.measured)
            adoption = Adoption(startup, after_reset(attachment), attachment.epoch, rest, hw_pcrs, *measures)
            await self._instances.adopt(instance, adoption, sleeps=sleeps)
            _log.info("vTPM %s: instance %d taken over", vtpm, instance.pid)

    def _is_of_device(self, instance: Kept) -> bool:
        """Tell whether an instance answers a device that stays; of one without a lease the device ends with it."""
        if instance.frontend != PROXY:
            return False
        attachment = self._catalogue.find_attachment(UUID(bytes=instance.vtpm))
        return attachment is not None and attachment.lease == instance.lease

    async def _parked(self, instance: Kept) -> bool:
        """Tell whether the keeper watches for one that hibernated; one that has just ended is put under watch."""
        return not instance.pid or await self._instances.endings.park(UUID(bytes=instance.vtpm), instance.lease)

    def _is_closed(self, vtpm: UUID) -> bool:
        try:
            self._registry.record(vtpm)
        except ManagerError as error:
            return isinstance(error, DeniedError)
        return False

    def _flags(self, vtpm: UUID) -> RecordFlags:
        """Return the flags of a record, none where it cannot be read: whoever starts the vTPM meets that."""
        try:
            return self._registry.record(vtpm).flags
        except ManagerError:
            return RecordFlags.NONE
