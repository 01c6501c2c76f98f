"""Which vTPM runs for which guest: attach, detach, platform reset, crash, and taking over after a restart."""

import logging
import os
import socket
from dataclasses import dataclass
from typing import Final
from uuid import UUID
from weakref import WeakValueDictionary

import trio

from frontend_backend.messages_instance import Orders
from frontend_backend.messages_keeper import Kept
from manager import state_files
from manager.attachment_epochs import stale_removed
from manager.attachment_marks import Marks, new_lease
from manager.config import Config, Layout
from manager.errors import (
    BusyError,
    ConflictError,
    KeeperError,
    ManagerError,
    QuarantinedError,
)
from manager.instances import CrashBudget, Instances, Launch
from manager.registry import Registry, check_name
from manager.running import Running, Stage
from manager.sockets import LISTENERS_OF, Owner, SocketFolder, parse_mode
from storage.catalogue import AttachmentRow, Happened, VtpmRow
from storage.errors import CatalogueError, StorageError
from storage.store_records import RecordFlags, next_epoch

_log = logging.getLogger("vtpm.life")
_PARALLEL_STARTS: Final = 8  # instances started at once when the manager starts


@dataclass(frozen=True, slots=True)
class AttachOptions:
    """How a vTPM is attached; the fields are vtpm-attach's options."""

    guest: str
    frontend: str = "socket"
    owner: str | None = None
    mode: str = "0660"
    startup: str = "clear"


class Attachments:
    """Every attachment. At most one instance per vTPM: its lease is in every commit, its lock on the state image."""

    def __init__(self, registry: Registry, instances: Instances, layout: Layout, config: Config, store: UUID) -> None:
        """Keep attachments of `registry`'s vTPMs with `instances`; `store` is the store's UUID."""
        self._registry, self._instances = registry, instances
        self._catalogue, self._marks = registry.catalogue, Marks(registry)
        self._layout, self._config, self._store = layout, config, store
        self._changing = WeakValueDictionary[UUID, trio.Lock]()  # of those that somebody holds or waits for
        self._budgets: dict[UUID, CrashBudget] = {}
        self.stopping = False

    def running(self, vtpm: UUID) -> Running | None:
        """Return the instance of a vTPM, None where there is none."""
        return self._instances.running.get(vtpm)

    async def attach(self, row: VtpmRow, options: AttachOptions, caller_uid: int) -> None:
        """Start a vTPM for a guest; returns when its state is verified and it answers.

        Raises:
            ConflictError: it is attached already. QuarantinedError: its state cannot be loaded (nothing is changed).
            DeniedError, NotFoundError, UsageError, KeeperError, BusyError: see their messages.

        """
        check_name(options.guest, "guest's name")
        owner = Owner.parse(options.owner, caller_uid)
        parse_mode(options.mode)
        async with self.lock(row.uuid):
            attached = self._catalogue.find_attachment(row.uuid)
            if attached is not None:
                self._marks.refuse_stale(attached)
                raise ConflictError(f"vTPM {row.name} is attached to guest {attached.guest} already")
            record = self._registry.record(row.uuid)
            attachment = AttachmentRow(
                vtpm=row.uuid,
                guest=options.guest,
                frontend=options.frontend,
                owner=f"{owner.uid}:{owner.gid}",
                mode=options.mode,
                startup=options.startup,
                lease=new_lease(),
                epoch=next_epoch(record.epoch),
            )
            try:
                await self._attach(row, attachment)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._undo_attach(row)
                SocketFolder(self._layout.sockets, row.uuid, options.frontend).remove()
                raise

    async def _attach(self, row: VtpmRow, attachment: AttachmentRow) -> None:
        """Start the instance, whose first commit marks the record, then add the row (manager.attachment_epochs)."""
        running = await self._start(row, attachment, attachment.startup)
        await self._registry.mark_attached(row.uuid, attachment.epoch)
        if self.running(row.uuid) is not running:
            raise KeeperError(
                f"the instance of vTPM {row.name} ended as soon as it was ready; look at the manager's log"
            )
        text = f"{row.name} to guest {attachment.guest} by {attachment.frontend}"
        self._catalogue.attach(attachment, Happened("attached", text))

    async def _undo_attach(self, row: VtpmRow) -> None:
        """Leave no instance, row and mark behind; what cannot be unmarked is shown by vtpm-verify."""
        running = self.running(row.uuid)
        if running is not None:
            await self._instances.stop(running)
        try:
            if self._catalogue.find_attachment(row.uuid) is not None:  # committed, and the answer was lost
                self._catalogue.detach(row.uuid)
        except CatalogueError as error:
            # a row without the mark would be taken for one that was put back: the manager would not start
            _log.error("vTPM %s: whether it is attached now is not known, 'vtpm-show' tells: %s", row.uuid, error)
            return
        await self._marks.take_away(row.uuid)

    async def _start(self, row: VtpmRow, attachment: AttachmentRow, startup: str) -> Running:
        """Start an instance on fresh sockets and wait until its state is verified."""
        if self.stopping:
            raise BusyError("the manager is stopping; nothing was started")
        fresh = bool(self._registry.record(row.uuid).flags & RecordFlags.FRESH)
        path = self._registry.image_path(row)
        image = state_files.open_locked(path, create=fresh and not row.state_image)
        sockets: list[socket.socket] = []
        try:
            if fresh:
                state_files.make_image(image, path, row.uuid, self._store, row.family)
            owner = Owner.parse(attachment.owner, os.geteuid())
            folder = SocketFolder(self._layout.sockets, row.uuid, attachment.frontend)
            sockets = folder.listen(owner, parse_mode(attachment.mode))
            launch = Launch(
                vtpm=row.uuid,
                lease=attachment.lease,
                family=row.family,
                frontend=attachment.frontend,
                owner_uid=owner.uid,
                startup=startup,
                after_reset=_after_reset(attachment),
                listeners=LISTENERS_OF[attachment.frontend],
                epoch=attachment.epoch,
            )
            running = await self._instances.start(launch, image, sockets)
        finally:
            os.close(image)
            for sock in sockets:
                sock.close()
        await self._verified(row, running)
        return running

    async def _verified(self, row: VtpmRow, running: Running) -> None:
        """Wait for an instance's first word; quarantine the vTPM if its state could not be loaded."""
        try:
            await self._instances.settle(running, self._config.instance.start_timeout)
        except BusyError:
            if running.stage is Stage.STARTING:
                self._instances.kill(running)
                await running.ended.wait()
            raise
        if running.stage in (Stage.RUNNING, Stage.NEEDS_RESET):
            return
        await running.ended.wait()
        report = running.report
        if running.stage is Stage.FAILED and report is not None:
            await self._registry.flag(row.uuid, add=RecordFlags.QUARANTINED)
            self._catalogue.log("quarantined", row.uuid, report.text)
            raise QuarantinedError(
                f"vTPM {row.name} is quarantined: {report.text}. Every byte of {self._registry.image_path(row)} is "
                f"kept. Put the right image back and attach again, or give the vTPM up with "
                f"'vtpm-reset {row.name} --yes'"
            )
        raise KeeperError(f"the instance of vTPM {row.name} ended before it was ready; look at the manager's log")

    async def detach(self, row: VtpmRow) -> None:
        """Stop a vTPM cleanly and forget its guest.

        Also what an administrator does about a row that was put back, or a mark without a row (vtpm-verify).

        Raises:
            ConflictError: it is not attached.

        """
        async with self.lock(row.uuid):
            attachment = self._catalogue.find_attachment(row.uuid)
            if attachment is None:
                await self._take_lone_mark(row)
                return
            running = self.running(row.uuid)
            if running is None and self._marks.is_stale(attachment):
                self._catalogue.detach(row.uuid, stale_removed(attachment, row.name))
                return
            clean = True
            if running is not None:
                clean = await self._instances.stop(running)
            how = "cleanly" if clean else "without a clean stop"
            text = f"{row.name} from guest {attachment.guest}, {how}"
            self._catalogue.detach(row.uuid, Happened("detached", text))
            SocketFolder(self._layout.sockets, row.uuid, attachment.frontend).remove()
            self._budgets.pop(row.uuid, None)
            await self._marks.take_away(row.uuid)

    async def _take_lone_mark(self, row: VtpmRow) -> None:
        """Take away the mark of an attach or detach that was cut short. Raises ConflictError: there is none."""
        if not self._marks.is_marked(row.uuid):
            raise _not_attached(row)
        await self._marks.take_away(row.uuid)
        self._catalogue.log("detached", row.uuid, f"{row.name}: its record said attached, without a row")

    async def reset_platform(self, row: VtpmRow) -> None:
        """Do what a guest's platform reset does: load the last state and start it up.

        Raises:
            ConflictError: it is not attached. BusyError, QuarantinedError: it did not come back.

        """
        async with self.lock(row.uuid):
            attachment = self._attachment(row)
            running = self.running(row.uuid)
            self._budgets.pop(row.uuid, None)
            if running is None:
                running = await self._start(row, self._marks.renewed(attachment), _after_reset(attachment))
            else:
                running.order(Orders.RESET)
                await self._verified(row, running)
            if running.stage is Stage.NEEDS_RESET:
                said = running.report.text if running.report is not None else ""
                raise ManagerError(f"vTPM {row.name} did not come back: {said}. It answers failure; its state is kept")
            self._catalogue.log("platform-reset", row.uuid, row.name)

    def _attachment(self, row: VtpmRow) -> AttachmentRow:
        attachment = self._catalogue.find_attachment(row.uuid)
        if attachment is None:
            raise _not_attached(row)
        return attachment

    def lock(self, vtpm: UUID) -> trio.Lock:
        """Return the lock that whoever starts, stops, resets or removes this vTPM holds meanwhile."""
        return self._changing.setdefault(vtpm, trio.Lock())

    # --- what happens by itself --------------------------------------------------------------------

    async def ended(self, running: Running, status: int | None) -> None:
        """Deal with an ended process: it comes back, from its clean stop or in failure until a platform reset.

        Whatever goes wrong is logged: one vTPM's end must not be the manager's.
        """
        try:
            await self._ended(running, status)
        except (ManagerError, StorageError, OSError) as error:
            _log.error("vTPM %s: its instance ended and stays down: %s", running.vtpm, error)

    async def _ended(self, running: Running, status: int | None) -> None:
        if running.stage is Stage.FAILED or self.stopping:
            return
        row = self._catalogue.find_vtpm(running.vtpm)
        attachment = self._catalogue.find_attachment(running.vtpm)
        if row is None or attachment is None or attachment.lease != running.lease or not running.settled.is_set():
            return
        if running.stage is Stage.ENDED:
            _log.error("vTPM %s: its instance ended unexpectedly (status %s)", running.vtpm, status)
            self._catalogue.log("crashed", running.vtpm, f"instance {running.pid} ended with status {status}")
        if not self._may_restart(running.vtpm):
            _log.error("vTPM %s: crashed too often; left down until vtpm-reset-platform or detach", running.vtpm)
            return
        await self._restart(row, attachment, trio.CapacityLimiter(1))

    def _may_restart(self, vtpm: UUID) -> bool:
        budget = self._budgets.setdefault(vtpm, CrashBudget.of(self._config.instance))
        return budget.spend()

    async def _bring_back(self, row: VtpmRow, startup: str) -> None:
        """Start an attached vTPM without its administrator."""
        attachment = self._catalogue.find_attachment(row.uuid)
        if attachment is None or self.running(row.uuid) is not None or self.stopping:
            return
        await self._start(row, self._marks.renewed(attachment), startup)

    async def take_over(self, kept: list[Kept]) -> None:
        """Adopt the instances that outlived the last manager, and start the attached ones that did not."""
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
                if self.running(attachment.vtpm) is not None:
                    continue  # first of all: thousands were adopted, and their saves wait for this loop
                row = self._catalogue.find_vtpm(attachment.vtpm)
                if row is not None:
                    nursery.start_soon(self._restart, row, attachment, limit)

    async def _take_over_one(self, instance: Kept) -> None:
        vtpm = UUID(bytes=instance.vtpm)
        attachment = self._catalogue.find_attachment(vtpm)
        if not instance.alive:
            await self._instances.forget(vtpm, instance.lease)
        elif attachment is None or attachment.lease != instance.lease:
            _log.error("vTPM %s: instance %d holds no lease; ending it", vtpm, instance.pid)
            await self._instances.end(instance)
        else:
            await self._instances.adopt(instance, _after_reset(attachment), attachment.epoch)
            _log.info("vTPM %s: instance %d taken over", vtpm, instance.pid)

    async def _restart(self, row: VtpmRow, attachment: AttachmentRow, limit: trio.CapacityLimiter) -> None:
        """Start an attached vTPM again after the manager was stopped, or worse; what goes wrong is logged and kept."""
        async with limit, self.lock(row.uuid):
            try:
                await self._restart_now(row, attachment)
            except (ManagerError, StorageError, OSError) as error:
                _log.error("vTPM %s does not start: %s", row.uuid, error)

    async def _restart_now(self, row: VtpmRow, attachment: AttachmentRow) -> None:
        flags = self._registry.record(row.uuid).flags
        if flags & RecordFlags.QUARANTINED:
            _log.error("vTPM %s is quarantined and does not start", row.uuid)
        elif flags & RecordFlags.FRESH:
            await self._bring_back(row, attachment.startup)
        else:
            await self._bring_back(row, "state" if flags & RecordFlags.RESUMABLE else "failed")

    async def stop_all(self) -> int:
        """Stop every instance cleanly; attachments stay. Returns how many did not stop cleanly."""
        self.stopping = True
        outcomes: list[bool] = []

        async def stop(vtpm: UUID) -> None:
            async with self.lock(vtpm):  # one that is being started now is stopped after that
                running = self.running(vtpm)
                if running is not None:
                    outcomes.append(await self._instances.stop(running))

        async with trio.open_nursery() as nursery:
            for vtpm in {*self._instances.running, *self._changing}:
                nursery.start_soon(stop, vtpm)
        return outcomes.count(False)


def _not_attached(row: VtpmRow) -> ConflictError:
    return ConflictError(f"vTPM {row.name} is not attached; 'vtpm-attach {row.name} GUEST' attaches it")


def _after_reset(attachment: AttachmentRow) -> str:
    """Return the startup after a platform reset: what the attachment asks for, but never an old state again."""
    return "none" if attachment.startup == "none" else "clear"
