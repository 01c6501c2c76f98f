"""The marks of attachments in the store's records, beside the rows in the catalogue (see attachment_epochs)."""

import logging
import time
from dataclasses import replace
from typing import Final
from uuid import UUID

from manager.attachment_epochs import refuse_stale
from manager.errors import DeniedError, IntegrityError, ManagerError, NotFoundError, StaleAttachmentError
from manager.registry import Registry
from storage.catalogue_rows import AttachmentRow
from storage.errors import StorageError
from storage.store_records import RecordFlags

_log = logging.getLogger("vtpm.life")
_MICROSECOND: Final = 1000  # nanoseconds


def new_lease() -> int:
    """Return a lease that is larger than every earlier one, unless the clock was put back."""
    return time.time_ns() // _MICROSECOND


class Marks:
    """What records say of attachments."""

    def __init__(self, registry: Registry) -> None:
        """Read and change `registry`'s records."""
        self._registry = registry

    def is_marked(self, vtpm: UUID) -> bool:
        """Tell whether the record says attached; no where it cannot be read."""
        try:
            return bool(self._registry.record(vtpm).flags & RecordFlags.ATTACHED)
        except (DeniedError, NotFoundError, IntegrityError):
            return False

    def refuse_stale(self, attachment: AttachmentRow) -> None:
        """Refuse a row that the record does not vouch for. Raises StaleAttachmentError."""
        refuse_stale(self._registry.committer.store, attachment)

    def is_stale(self, attachment: AttachmentRow) -> bool:
        """Tell whether it is one that somebody put back."""
        try:
            self.refuse_stale(attachment)
        except StaleAttachmentError:
            return True
        return False

    async def take_away(self, vtpm: UUID) -> None:
        """Say in the record that no attachment counts. Where that cannot be said, only the row's absence does."""
        try:
            await self._registry.flag(vtpm, drop=RecordFlags.ATTACHED)
        except (ManagerError, StorageError) as error:
            _log.warning("vTPM %s is detached, but its record still says attached: %s", vtpm, error)

    def renewed(self, attachment: AttachmentRow) -> AttachmentRow:
        """Return an attachment with the lease of its next instance, not durable yet.

        Raises:
            StaleAttachmentError: it is not the one that the store vouches for.

        """
        self.refuse_stale(attachment)
        return replace(attachment, lease=max(attachment.lease + 1, new_lease()))
