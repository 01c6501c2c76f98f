"""Which vTPM runs for which guest: attach, detach, platform reset. What happens without being asked: supervision."""

import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID
from weakref import WeakValueDictionary

import trio

from frontend_backend.messages_instance import Orders
from manager import state_files
from manager.attachment_epochs import stale_removed
from manager.attachment_marks import Marks, new_lease
from manager.capacity import Capacity
from manager.config import Config, Layout
from manager.crash_budget import CrashBudget
from manager.errors import (
    BusyError,
    ConflictError,
    KeeperError,
    ManagerError,
    QuarantinedError,
    UsageError,
)
from manager.hardware_pcrs import bit_map, parse_hw_pcrs
from manager.instances import Instances, Launch
from manager.registry import Registry, check_name
from manager.running import Running, Stage
from manager.sockets import LISTENERS_OF, Owner, SocketFolder, parse_mode
from storage.catalogue import AttachmentRow, Happened, VtpmRow
from storage.errors import CatalogueError
from storage.store_records import RecordFlags, next_epoch

_log = logging.getLogger("vtpm.life")


@dataclass(frozen=True, slots=True)
class AttachOptions:
    """How a vTPM is attached; the fields are vtpm-attach's options."""

    guest: str
    frontend: str = "socket"
    owner: str | None = None
    mode: str = "0660"
    startup: str = "clear"
    hwinitpcrs: str | None = None


def _nothing() -> None:
    """Nothing to record."""


class Attachments:
    """Every attachment. At most one instance per vTPM: its lease is in every commit, its lock on the state image."""

    def __init__(
        self,
        registry: Registry,
        instances: Instances,
        layout: Layout,
        config: Config,
        store: UUID,
        capacity: Capacity,
    ) -> None:
        """Keep attachments of `registry`'s vTPMs with `instances`; `store` is the store's UUID."""
        self._registry, self._instances = registry, instances
        self._catalogue, self._marks = registry.catalogue, Marks(registry)
        self._layout, self._config, self._store = layout, config, store
        self.capacity = capacity
        self._starting = 0
        self._changing = WeakValueDictionary[UUID, trio.Lock]()  # of those that somebody holds or waits for
        self._budgets: dict[UUID, CrashBudget] = {}
        self._reasons: dict[UUID, str] = {}
        self.stopping = False

    def running(self, vtpm: UUID) -> Running | None:
        """Return the instance of a vTPM, None where there is none."""
        return self._instances.running.get(vtpm)

    @property
    def count(self) -> int:
        """How many vTPMs run or are being started."""
        return len(self._instances.running) + self._starting

    def reason(self, vtpm: UUID) -> str | None:
        """Return in words why an attached vTPM is not as it should be, None where nothing is known to be wrong."""
        running = self.running(vtpm)
        if running is None:
            return self._reasons.get(vtpm)
        return running.report.text or None if running.stage is Stage.NEEDS_RESET and running.report else None

    def note_down(self, vtpm: UUID, reason: str) -> None:
        """Keep what `reason` returns while no instance runs."""
        self._reasons[vtpm] = reason

    def crashed(self, vtpm: UUID) -> float | None:
        """Count a crash; return how long to wait before the next start, None when it is to be left down."""
        return self._budgets.setdefault(vtpm, CrashBudget.of(self._config.instance)).spend()

    async def attach(self, row: VtpmRow, options: AttachOptions, caller_uid: int) -> None:
        """Start a vTPM for a guest; returns when its state is verified and it answers.

        Raises:
            ConflictError: it is attached already. QuarantinedError: its state cannot be loaded (nothing is changed).
            DeniedError, NotFoundError, UsageError, KeeperError, BusyError: see their messages.

        """
        check_name(options.guest, "guest's name")
        owner = Owner.parse(options.owner, caller_uid)
        parse_mode(options.mode)
        hw_pcrs = parse_hw_pcrs(options.hwinitpcrs)
        if hw_pcrs and options.startup == "none":
            raise UsageError("--hwinitpcrs needs a start that the host does: not --startup none. Nothing was done")
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
                hw_pcrs=hw_pcrs,
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
        running = await self.start(row, attachment, attachment.startup)
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
        if self.stopping:
            raise BusyError("the manager is stopping; nothing was started")
        self.capacity.check(self.count)
        self._starting += 1
        try:
            running = await self._launch(row, attachment, startup, record)
        finally:
            self._starting -= 1
        self._reasons.pop(row.uuid, None)
        await self._verified(row, running)
        return running

    async def _launch(
        self, row: VtpmRow, attachment: AttachmentRow, startup: str, record: Callable[[], None]
    ) -> Running:
        fresh = bool(self._registry.record(row.uuid).flags & RecordFlags.FRESH)
        path = self._registry.image_path(row)
        image = state_files.open_locked(path, create=fresh and not row.state_image)
        sockets: list[socket.socket] = []
        try:
            if fresh:
                state_files.make_image(image, path, row.uuid, self._store, row.family)
            uid, gid = map(int, attachment.owner.split(":"))
            folder = SocketFolder(self._layout.sockets, row.uuid, attachment.frontend)
            sockets = folder.listen(Owner(uid, gid), parse_mode(attachment.mode))
            launch = Launch(
                vtpm=row.uuid,
                lease=attachment.lease,
                family=row.family,
                frontend=attachment.frontend,
                owner_uid=uid,
                startup=startup,
                after_reset=after_reset(attachment),
                listeners=LISTENERS_OF[attachment.frontend],
                epoch=attachment.epoch,
                hw_pcrs=bit_map(attachment.hw_pcrs),
            )
            return await self._instances.start(launch, image, sockets, record)
        finally:
            os.close(image)
            for sock in sockets:
                sock.close()

    async def _verified(self, row: VtpmRow, running: Running) -> None:
        """Wait for an instance's first word; quarantine the vTPM if its state could not be loaded."""
        try:
            await self._instances.settle(running, self._config.instance.start_timeout)
        except BusyError:
            if running.stage is Stage.STARTING:
                await self._instances.kill(running)
            raise
        if running.stage in (Stage.RUNNING, Stage.NEEDS_RESET):
            return
        await self._instances.see_off(running)
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
            self._reasons.pop(row.uuid, None)
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
                running = await self.start_again(row, attachment, after_reset(attachment))
            else:
                running.order(Orders.RESET)
                await self._verified(row, running)
            if running.stage is Stage.NEEDS_RESET:
                said = running.report.text if running.report is not None else ""
                raise ManagerError(f"vTPM {row.name} did not come back: {said}. It answers failure; its state is kept")
            self._catalogue.log("platform-reset", row.uuid, row.name)

    async def start_again(self, row: VtpmRow, attachment: AttachmentRow, startup: str) -> Running:
        """Start an attached vTPM whose instance is gone, under a new lease. Raises what `start` does."""
        renewed = self._marks.renewed(attachment)
        return await self.start(row, renewed, startup, lambda: self._catalogue.renew(renewed))

    def _attachment(self, row: VtpmRow) -> AttachmentRow:
        attachment = self._catalogue.find_attachment(row.uuid)
        if attachment is None:
            raise _not_attached(row)
        return attachment

    def lock(self, vtpm: UUID) -> trio.Lock:
        """Return the lock that whoever starts, stops, resets or removes this vTPM holds meanwhile."""
        return self._changing.setdefault(vtpm, trio.Lock())

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


def after_reset(attachment: AttachmentRow) -> str:
    """Return the startup after a platform reset: what the attachment asks for, but never an old state again."""
    return "none" if attachment.startup == "none" else "clear"
