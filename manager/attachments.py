"""Which vTPM runs for which guest: attach, detach, platform reset. What happens without being asked: supervision."""

import logging
from collections.abc import Callable
from dataclasses import replace
from uuid import UUID
from weakref import WeakValueDictionary

import trio

from frontend_backend.release import RELEASE
from manager.attach_options import AttachOptions, attachment_of, refuse_taken_ports
from manager.attachment_epochs import stale_removed
from manager.attachment_marks import Marks
from manager.attachment_words import after_reset
from manager.boot_measurements import Boots
from manager.capacity import Capacity
from manager.config import Config, Layout
from manager.crash_budget import CrashBudget
from manager.errors import ConflictError, KeeperError, ManagerError
from manager.instances import Instances
from manager.registry import Registry
from manager.running import Running, Stage
from manager.sleepers import Sleepers
from manager.starts import Starts
from manager.xen_binding import Bindings
from manager.xen_launch import admit_elsewhere
from storage.catalogue import AttachmentRow, Happened, VtpmRow
from storage.errors import CatalogueError, StorageError
from storage.store_records import RecordFlags, next_epoch

_log = logging.getLogger("vtpm.life")


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
        sleepers: Sleepers,
    ) -> None:
        """Keep attachments of `registry`'s vTPMs with `instances`; `store` is the store's UUID."""
        self._starts = Starts(registry, instances, layout, config, store, capacity, sleepers)
        self._registry, self._instances = registry, instances
        self._catalogue, self._marks = registry.catalogue, Marks(registry)
        self._layout, self._config = layout, config
        self.capacity, self.sleepers = capacity, sleepers
        self.boots = Boots(self._catalogue.find_attachment, self._catalogue.renew, instances.release_of)
        self._changing = WeakValueDictionary[UUID, trio.Lock]()  # of those that somebody holds or waits for
        self._budgets: dict[UUID, CrashBudget] = {}
        self.start_again, self.wake, self.verified = self._starts.start_again, self._starts.wake, self._starts.verified
        self.bindings = Bindings()
        self.on_detached: Callable[[UUID], None] = lambda _vtpm: None

    def running(self, vtpm: UUID) -> Running | None:
        """Return the instance of a vTPM, None where there is none."""
        return self._instances.running.get(vtpm)

    def release(self, vtpm: UUID) -> str | None:
        """Return the release of the code that a vTPM's instance runs, None where there is none or it is not known."""
        running = self.running(vtpm)
        return None if running is None or running.elsewhere else self._instances.release_of(running)

    def is_outdated(self, vtpm: UUID) -> bool:
        """Tell whether a vTPM's instance runs other code than this manager: of before an upgrade."""
        running = self.running(vtpm)
        return running is not None and not running.elsewhere and self.release(vtpm) != RELEASE

    @property
    def count(self) -> int:
        """How many vTPMs run or are being started."""
        return self._starts.count

    @property
    def stopping(self) -> bool:
        """Whether everything is being stopped, so that nothing is started any more."""
        return self._starts.stopping

    def reason(self, vtpm: UUID) -> str | None:
        """Return in words why an attached vTPM is not as it should be, None where nothing is known to be wrong."""
        running = self.running(vtpm)
        if running is None:
            return self._starts.reasons.get(vtpm)
        return running.report.text or None if running.stage is Stage.NEEDS_RESET and running.report else None

    def note_down(self, vtpm: UUID, reason: str) -> None:
        """Keep what `reason` returns while no instance runs."""
        self._starts.reasons[vtpm] = reason

    def forget_reason(self, vtpm: UUID) -> None:
        """Drop what `note_down` kept."""
        self._starts.reasons.pop(vtpm, None)

    def crashed(self, vtpm: UUID) -> float | None:
        """Count a crash; return how long to wait before the next start, None when it is to be left down."""
        return self._budgets.setdefault(vtpm, CrashBudget.of(self._config.instance)).spend()

    async def attach(self, row: VtpmRow, options: AttachOptions, caller_uid: int) -> AttachmentRow:
        """Start a vTPM for a guest; returns its attachment when its state is verified and it answers.

        Raises:
            ConflictError: it is attached, or its ports are another's. QuarantinedError: its state does not load (kept).
            DeniedError, NotFoundError, UsageError, KeeperError, BusyError: see their messages.

        """
        wanted = attachment_of(row, options, caller_uid, self._config.quota)
        async with self.lock(row.uuid):
            attached = self._catalogue.find_attachment(row.uuid)
            if attached is not None:
                self._marks.refuse_stale(attached)
                raise ConflictError(f"vTPM {row.name} is attached to guest {attached.guest} already")
            refuse_taken_ports(self._catalogue, wanted)
            attachment = replace(wanted, epoch=next_epoch(self._registry.record(row.uuid).epoch))
            try:
                return await self._attach(row, attachment)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._undo_attach(row)
                    await self.sleepers.ports.close(row.uuid, options.frontend)
                raise

    async def _attach(self, row: VtpmRow, attachment: AttachmentRow) -> AttachmentRow:
        """Start the instance, whose first commit marks the record, then add the row (manager.attachment_epochs)."""
        text = f"{row.name} to guest {attachment.guest} by {attachment.frontend}"
        if attachment.instance_domain:
            await admit_elsewhere(self._registry, row, attachment)
            happened = Happened("attached", f"{text}, from {attachment.instance_domain}")
            return self._catalogue.attach(attachment, happened)
        running = await self._starts.start(row, attachment, attachment.startup)
        await self._registry.mark_attached(row.uuid, attachment.epoch)
        if self.running(row.uuid) is not running:
            raise KeeperError(
                f"the instance of vTPM {row.name} ended as soon as it was ready; look at the manager's log"
            )
        attached = self._catalogue.attach(replace(attachment, measured=running.measured), Happened("attached", text))
        running.unused = True
        return attached

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
                self.on_detached(row.uuid)
                return
            clean = await self._starts.stop(row, attachment)
            how = "cleanly" if clean else "without a clean stop"
            text = f"{row.name} from guest {attachment.guest}, {how}"
            self._catalogue.detach(row.uuid, Happened("detached", text))
            self.on_detached(row.uuid)
            await self.sleepers.ports.close(row.uuid, attachment.frontend)
            self._budgets.pop(row.uuid, None)
            self._starts.reasons.pop(row.uuid, None)
            await self._marks.take_away(row.uuid)

    async def _take_lone_mark(self, row: VtpmRow) -> None:
        """Take away the mark of an attach or detach that was cut short. Raises ConflictError: there is none."""
        if not self._marks.is_marked(row.uuid):
            raise _not_attached(row)
        await self._marks.take_away(row.uuid)
        self._catalogue.log("detached", row.uuid, f"{row.name}: its record said attached, without a row")

    async def let_go(self, row: VtpmRow, why: str) -> None:
        """End a vTPM's instance unheard, and forget its guest: its state is another manager's. The caller has the lock.

        Done again where it was cut short.
        """
        running = self.running(row.uuid)
        if running is not None:
            running.awaited = True
            await self._instances.kill(running)
        await self.sleepers.forget(row.uuid)
        attachment = self._catalogue.find_attachment(row.uuid)
        if attachment is not None:
            text = f"{row.name} from guest {attachment.guest}: {why}"
            self._catalogue.detach(row.uuid, Happened("detached", text))
            self.on_detached(row.uuid)
            await self.sleepers.ports.close(row.uuid, attachment.frontend)
        self._budgets.pop(row.uuid, None)
        self._starts.reasons.pop(row.uuid, None)
        await self._marks.take_away(row.uuid)

    async def reset_platform(self, row: VtpmRow) -> None:
        """Do what a guest's platform reset does: load the last state and start it up.

        Raises:
            ConflictError: it is not attached. BusyError, QuarantinedError: it did not come back.

        """
        async with self.lock(row.uuid):
            attachment = self._attachment(row)
            running = await self._starts.awake(row, attachment)
            attachment = self.boots.under_a_guest(attachment)
            self._budgets.pop(row.uuid, None)
            if attachment.instance_domain and (running is None or running.stage is Stage.WAITING):
                await self._let_it_try(row, attachment)
                return
            if running is None:
                running = await self._starts.start_again(row, attachment, after_reset(attachment))
            elif self.is_outdated(row.uuid):  # of before an upgrade: this is the moment for one of the installed code
                await self._instances.stop(running)
                running = await self._starts.start_again(row, attachment, after_reset(attachment))
            else:
                running = await self._starts.reset(row, attachment, running)
            if running.stage is Stage.NEEDS_RESET:
                said = running.report.text if running.report is not None else ""
                raise ManagerError(f"vTPM {row.name} did not come back: {said}. It answers failure; its state is kept")
            self._catalogue.log("platform-reset", row.uuid, row.name)

    async def power_cycle(self, row: VtpmRow, attachment: AttachmentRow) -> Running:
        """Give a guest that boots a new instance, started up as its attachment says; the caller has the lock.

        Raises:
            BusyError, KeeperError, QuarantinedError: it did not come up, and is down now.

        """
        await self._starts.stop(row, attachment)
        self._budgets.pop(row.uuid, None)
        try:
            return await self.start_again(row, attachment, attachment.startup)
        except (ManagerError, StorageError, OSError) as error:
            self.note_down(row.uuid, f"its guest booted, and it did not start: {error}")
            raise

    async def _let_it_try(self, row: VtpmRow, attachment: AttachmentRow) -> None:
        """Let the instance in another domain load its state once more. Raises ConflictError: nothing is in its way."""
        if not self._registry.record(row.uuid).flags & RecordFlags.QUARANTINED:
            raise ConflictError(
                f"the instance of vTPM {row.name} lives in domain {attachment.instance_domain}, which is not there: "
                f"nothing was reset. Reset it once 'vtpm-list' does not say waiting"
            )
        await self._registry.flag(row.uuid, drop=RecordFlags.QUARANTINED)

    def _attachment(self, row: VtpmRow) -> AttachmentRow:
        attachment = self._catalogue.find_attachment(row.uuid)
        if attachment is None:
            raise _not_attached(row)
        return attachment

    async def awake(self, row: VtpmRow) -> Running | None:
        """Return a vTPM's instance, woken where it sleeps; None where there is none. The caller holds its lock."""
        attachment = self._catalogue.find_attachment(row.uuid)
        return None if attachment is None else await self._starts.awake(row, attachment)

    def lock(self, vtpm: UUID) -> trio.Lock:
        """Return the lock that whoever starts, stops, resets or removes this vTPM holds meanwhile."""
        return self._changing.setdefault(vtpm, trio.Lock())

    async def stop_all(self) -> int:
        """Stop every instance cleanly, but those that live elsewhere; returns how many did not. Attachments stay."""
        self._starts.stopping = True
        outcomes: list[bool] = []

        async def stop(vtpm: UUID) -> None:
            async with self.lock(vtpm):  # one that is being started now is stopped after that
                running = self.running(vtpm)
                if running is not None and running.elsewhere:
                    await self._instances.silence(running)
                elif running is not None:
                    outcomes.append(await self._instances.stop(running))

        async with trio.open_nursery() as nursery:
            for vtpm in {*self._instances.running, *self._changing}:
                nursery.start_soon(stop, vtpm)
        return outcomes.count(False)


def _not_attached(row: VtpmRow) -> ConflictError:
    return ConflictError(f"vTPM {row.name} is not attached; 'vtpm-attach {row.name} GUEST' attaches it")
