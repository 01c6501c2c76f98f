"""What becomes of a vTPM's record and row when its instance is to live in a domain of Xen of its own."""

from dataclasses import replace
from typing import Final
from uuid import UUID

from manager.attachment_words import next_startup
from manager.launch_words import launch_for
from manager.launches import Launch
from manager.migration_records import refuse_start
from manager.registry import Registry
from storage.catalogue_rows import AttachmentRow, VtpmRow
from storage.store_records import RecordFlags

_NOT_RESUMED: Final = RecordFlags.RESUMABLE | RecordFlags.HIBERNATED


async def admit_elsewhere(registry: Registry, row: VtpmRow, attachment: AttachmentRow) -> None:
    """Make the record ready for an attachment whose instance joins later.

    Unless it is to begin with Startup(STATE), what it could resume it cannot any more: the first instance may come and
    go before it has asked for anything, and the next one would resume what was another guest's.

    Raises:
        ConflictError: it is frozen or incoming.

    """
    refuse_start(row, registry.record(row.uuid).flags, attachment.frontend)
    if attachment.startup != "state":
        await registry.flag(row.uuid, drop=_NOT_RESUMED)
    await registry.mark_attached(row.uuid, attachment.epoch)


def launch_of(row: VtpmRow, attachment: AttachmentRow, flags: RecordFlags, store: UUID) -> Launch:
    """Return what the next instance of an attachment is told; `flags` are its vTPM's record's, in this `store`."""
    first = attachment.bound_domain is None
    return replace(
        launch_for(row, attachment, attachment.startup if first else next_startup(attachment, flags)),
        terms={
            "localities": attachment.localities,
            "maintenance": attachment.maintenance,
            "trace": attachment.trace,
            "compat": attachment.compat,
            "store": store.bytes,
        },
    )
