"""vTPMs whose instances live in domains of Xen of their own, and reach the manager by ring.

Nothing is started, killed or hibernated here, and no state image is here: the domain has it. What the manager decides
by is the same as of its own instances: epoch, lease, and what each start is told. At most one is heard: the ring of
the one before is closed first, and what it wants to commit after that nobody takes.
"""

import logging
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import UUID

import trio

from frontend_backend.local import LocalRing
from manager.attachment_marks import Marks
from manager.attachments import Attachments
from manager.either import either
from manager.errors import BusyError, ManagerError
from manager.instances import Instances
from manager.migration_records import refuse_start
from manager.registry import Registry
from manager.running import Running, Stage
from manager.xen_launch import launch_of
from storage.catalogue_rows import AttachmentRow, VtpmRow
from storage.errors import StorageError

_log = logging.getLogger("vtpm.life")


class Elsewhere:
    """Takes on instances that join, and sees to them."""

    def __init__(
        self, registry: Registry, attachments: Attachments, instances: Instances, nursery: trio.Nursery
    ) -> None:
        """Take on instances of `attachments`; what looks after them are tasks of `nursery`."""
        self._registry, self._attachments, self._instances = registry, attachments, instances
        self._marks, self._nursery = Marks(registry), nursery

    async def join(
        self, row: VtpmRow, attachment: AttachmentRow, changes: dict[str, Any], *, back: bool
    ) -> tuple[Running, LocalRing]:
        """Serve the instance of a domain; returns it, and its end of the ring, which is the caller's to close.

        `changes`: what the attachment's row then says of the domain, of the first one once it loads; `back`: it is the
        one that was served last, and goes on with its lease. The caller holds the vTPM's lock.

        Raises:
            BusyError: there is no room, or the manager is stopping. StaleAttachmentError, ConflictError, DeniedError,
            StorageError: its record or row does not allow it.

        """
        if self._attachments.stopping:
            raise BusyError("the manager is stopping")
        self._attachments.capacity.check(self._attachments.count)
        before = self._attachments.running(row.uuid)
        if before is not None:
            before.awaited = True
            await self._instances.kill(before)
        self._marks.refuse_stale(attachment)
        record = self._registry.record(row.uuid)
        refuse_start(row, record.flags, attachment.frontend)
        first = attachment.bound_domain is None
        renewed = attachment if back else self._marks.renewed(attachment)
        if not first:
            renewed = replace(renewed, **changes)
        self._registry.catalogue.renew(renewed)
        launch = replace(
            launch_of(row, attachment, record.flags, self._registry.committer.store.uuid), lease=renewed.lease
        )
        running, end = self._instances.join(launch)
        if first:  # one that goes before it was told anything leaves the vTPM as it was, for the next to begin with
            running.at_first_load = partial(self._keep, row.uuid, changes)
        self._attachments.forget_reason(row.uuid)
        if back:
            running.ring.ring()  # "ask me": it has no reason of its own to say how it is
        self._nursery.start_soon(self._see_to, row, running, attachment.instance_domain)
        return running, end

    def _keep(self, vtpm: UUID, changes: dict[str, Any]) -> None:
        attachment = self._registry.catalogue.find_attachment(vtpm)
        if attachment is not None:
            self._registry.catalogue.renew(replace(attachment, **changes))

    async def left(self, running: Running) -> None:
        """Hear an instance no more whose domain's connection is gone."""
        await self._instances.kill(running)

    async def _see_to(self, row: VtpmRow, running: Running, domain: str) -> None:
        """Wait for its first word and its end; whatever goes wrong is logged, and shown with the vTPM."""
        why = f"waits for domain {domain}"
        try:
            await either(running.heard, running.ended)  # which may be long after: its domain has more to do
            if not running.ended.is_set():
                await self._attachments.verified(row, running)
            await running.ended.wait()
        except (ManagerError, StorageError, OSError) as error:
            _log.error("vTPM %s: its instance in domain %s: %s", row.uuid, domain, error)
            why = str(error)
        if running.stage is Stage.ENDED:
            why = f"{why}; its ring ended without a clean stop"
        if self._attachments.running(row.uuid) is None and not running.awaited:
            self._attachments.note_down(row.uuid, why)
