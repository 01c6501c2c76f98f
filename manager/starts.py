"""Instances of attached vTPMs: started, woken, stopped, reset. Which are to run, and for whom: `attachments`.

The caller of everything here holds the vTPM's lock.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from uuid import UUID

from frontend_backend.orders import Orders
from manager import state_files
from manager.attachment_marks import Marks
from manager.attachment_words import after_reset, rest_after
from manager.capacity import Capacity
from manager.config import Config, Layout
from manager.errors import BusyError, ConflictError, KeeperError, ManagerError, QuarantinedError
from manager.instances import Instances
from manager.launch_words import launch_for
from manager.migration_records import refuse_start
from manager.ports import Port
from manager.quotas import quota_of
from manager.registry import Registry
from manager.running import Running, Stage
from manager.sleepers import Sleepers
from manager.sockets import LISTENERS_OF
from storage.catalogue import AttachmentRow, VtpmRow
from storage.errors import StorageError
from storage.store_records import RecordFlags

_log = logging.getLogger("vtpm.life")


def _nothing() -> None:
    """Nothing to record."""


class Starts:
    """Starts and stops instances; `reasons` says why an attached vTPM has none."""

    def __init__(
        self,
        registry: Registry,
        instances: Instances,
        layout: Layout,
        config: Config,
        store: UUID,
        capacity: Capacity,
        sleepers: Sleepers,
    ) -> None:
        """Start vTPMs of `registry` with `instances`; `store` is the store's UUID."""
        self._registry, self._instances = registry, instances
        self._catalogue, self._marks = registry.catalogue, Marks(registry)
        self._layout, self._config, self._store = layout, config, store
        self.capacity, self.sleepers = capacity, sleepers
        self._starting = 0
        self.reasons: dict[UUID, str] = {}
        self.stopping = False

    @property
    def count(self) -> int:
        """How many vTPMs run or are being started."""
        return len(self._instances.running) + self._starting

    def running(self, vtpm: UUID) -> Running | None:
        """Return the instance of a vTPM, None where there is none."""
        return self._instances.running.get(vtpm)

    async def start(
        self, row: VtpmRow, attachment: AttachmentRow, startup: str, record: Callable[[], None] = _nothing
    ) -> Running:
        """Start an instance on fresh sockets and wait until its state is verified; the caller has the vTPM's lock.

        `record` makes a new lease durable; that is waited for while the process is being made, and is done before the
        instance is told anything. A crash between the two leaves an instance without its lease, which the next
        manager ends.

        Raises:
            BusyError: there is no room, or we are stopping. And see `attach`.

        """
        if attachment.instance_domain:
            raise ConflictError(
                f"the instance of vTPM {row.name} lives in domain {attachment.instance_domain}, which is not there: "
                f"nothing was started. Start that domain, or attach its vTPM to it"
            )
        if self.stopping:
            raise BusyError("the manager is stopping; nothing was started")
        self.capacity.check(self.count)
        await self.sleepers.forget(row.uuid)
        self._starting += 1
        try:
            running = await self._launch(row, attachment, startup, record)
        finally:
            self._starting -= 1
        self.reasons.pop(row.uuid, None)
        await self.verified(row, running)
        await self.sleepers.ports.ready(attachment)
        return running

    async def start_again(self, row: VtpmRow, attachment: AttachmentRow, startup: str) -> Running:
        """Start an attached vTPM whose instance is gone, under a new lease. Raises what `start` does."""
        renewed = self._marks.renewed(attachment)
        return await self.start(row, renewed, startup, lambda: self._catalogue.renew(renewed))

    async def wake(self, row: VtpmRow, attachment: AttachmentRow, *, briefly: bool = False) -> Running:
        """Have a hibernated vTPM go on, as its guest knows it; the caller has its lock.

        One that is woken `briefly`, to be stopped, needs no room: to make some is why others are detached.

        Raises:
            BusyError, KeeperError, ConflictError: it was not started, and sleeps on, or it ended before it was ready.
            QuarantinedError: its state cannot be loaded. StaleAttachmentError: its row was put back.
            DeniedError: its group is closed; it sleeps on.

        """
        if self.stopping:
            raise BusyError("the manager is stopping; nothing was started")
        self._marks.refuse_stale(attachment)
        self._registry.record(row.uuid)  # no process is made for one of a closed group: its connections would end
        if not briefly:
            self.capacity.check(self.count)
        self._starting += 1
        try:
            running = await self.sleepers.launch(row, attachment)
        finally:
            self._starting -= 1
        self.reasons.pop(row.uuid, None)
        await self.verified(row, running)
        await self.sleepers.ports.ready(attachment)
        return running

    async def awake(self, row: VtpmRow, attachment: AttachmentRow, *, briefly: bool = False) -> Running | None:
        """Return the instance, having woken a hibernated vTPM for it; None where there is none, or it cannot be had."""
        running = self.running(row.uuid)
        if running is not None and running.stage is Stage.HIBERNATED:
            await running.ended.wait()
        if row.uuid in self.sleepers:
            try:
                return await self.wake(row, attachment, briefly=briefly)
            except (ManagerError, StorageError) as error:
                _log.warning("vTPM %s: it does not wake: %s", row.uuid, error)
        return self.running(row.uuid)

    async def stop(self, row: VtpmRow, attachment: AttachmentRow) -> bool:
        """Stop a vTPM cleanly, which a hibernated one is woken for. Returns whether it was clean.

        Of one that lives elsewhere the record tells: it may have stopped, or gone, before.
        """
        if attachment.instance_domain:
            running = self.running(row.uuid)
            if running is not None:
                await self._instances.stop(running)
            return self._has_stopped(row)
        while True:
            slept = row.uuid in self.sleepers
            running = await self.awake(row, attachment, briefly=True)
            if running is None:
                await self.sleepers.forget(row.uuid)
                return not slept
            clean = await self._instances.stop(running)
            if running.stage is not Stage.HIBERNATED:  # the order came when it had fallen asleep already
                return clean

    def _has_stopped(self, row: VtpmRow) -> bool:
        try:
            flags = self._registry.record(row.uuid).flags
        except ManagerError:
            return False
        return bool(flags & (RecordFlags.RESUMABLE | RecordFlags.FRESH))

    async def _launch(
        self, row: VtpmRow, attachment: AttachmentRow, startup: str, record: Callable[[], None]
    ) -> Running:
        flags = self._registry.record(row.uuid).flags
        refuse_start(row, flags, attachment.frontend)
        fresh = bool(flags & RecordFlags.FRESH)
        path = self._registry.image_path(row)
        image = state_files.open_locked(path, create=fresh and not row.state_image)
        ports: Sequence[Port] = ()
        try:
            if fresh:
                state_files.make_image(image, path, row.uuid, self._store, row.family)
            ports = self.sleepers.ports.open(row, attachment)
            launch = replace(
                launch_for(row, attachment, startup),
                listeners=LISTENERS_OF[attachment.frontend],
                rest_after=rest_after(attachment, self._config.instance),
                quota=quota_of(attachment),
            )
            return await self._instances.start(launch, image, ports, record)
        finally:
            os.close(image)
            for port in ports:
                port.close()

    async def verified(self, row: VtpmRow, running: Running) -> None:
        """Wait for an instance's first word; quarantine the vTPM if its state could not be loaded."""
        try:
            await self._instances.settle(running, self._config.instance.start_timeout)
        except BusyError:
            if running.stage is Stage.STARTING:
                await self._instances.kill(running)
            raise
        if running.stage in (Stage.RUNNING, Stage.NEEDS_RESET, Stage.HIBERNATED):
            return
        await self._instances.see_off(running)
        report = running.report
        if running.stage is Stage.FAILED and report is not None:
            await self._registry.flag(row.uuid, add=RecordFlags.QUARANTINED)
            self._catalogue.log("quarantined", row.uuid, report.text)
            where = "its domain's disk" if running.elsewhere else self._registry.image_path(row)
            raise QuarantinedError(
                f"vTPM {row.name} is quarantined: {report.text}. Every byte of {where} is kept. Put the right "
                f"image back and attach again, or give the vTPM up with 'vtpm-reset {row.name} --yes'"
            )
        raise KeeperError(f"the instance of vTPM {row.name} ended before it was ready; look at the manager's log")

    async def reset(self, row: VtpmRow, attachment: AttachmentRow, running: Running) -> Running:
        """Have an instance reset its platform; one that falls asleep over it is woken."""
        while True:
            running.order(Orders.RESET)
            await self.verified(row, running)
            if running.stage is not Stage.HIBERNATED:
                return running
            awake = await self.awake(row, attachment)
            if awake is None:
                return await self.start_again(row, attachment, after_reset(attachment))
            running = awake
