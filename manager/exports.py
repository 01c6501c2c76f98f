"""State blobs on their way out: a key for each export, wrapped so that only this manager can open it again.

What lives here: what an instance is given to encrypt its vTPM's state with, whether an export still is the newest
state, and the way back from a header to its key. Who may start from one: `imports`.
"""

import os
import time
from uuid import UUID

from frontend_backend import messages_instance as m
from frontend_backend.errors import BlobFormatError
from frontend_backend.messages_blobs import Export, ExportReply
from frontend_backend.state_blob import EXPORT_ID_BYTES, KEY_BYTES, BlobHeader, Part, unwrap, wrap
from manager.blob_events import BlobEvents
from manager.running import Running, Stage
from storage.errors import StorageError
from storage.store import Store
from storage.store_records import RecordFlags, VtpmRecord


def family_of(record: VtpmRecord) -> str:
    """Return the TCG family of a vTPM as users write it."""
    return "1.2" if record.flags & RecordFlags.TPM12 else "2.0"


def is_fresh(header: BlobHeader, record: VtpmRecord) -> bool:
    """Tell whether an export is of the very state that its vTPM's record names.

    The digest says so even where a generation comes again: for a UUID that is used anew, and after a rollback of the
    store that was accepted. A vTPM that was reset has no state that could be the one.
    """
    return (
        not record.flags & RecordFlags.FRESH
        and header.generation == record.generation
        and header.state == record.digest
    )


class Exports:
    """Makes headers and keys of exports, and opens those it made."""

    def __init__(self, store: Store, key: bytes, events: BlobEvents) -> None:
        """Wrap under `key` (manager.keys.state_blob_key)."""
        self._store, self._key, self._events = store, key, events

    @property
    def store(self) -> UUID:
        """The store whose exports these are."""
        return self._store.uuid

    def export(self, running: Running, request: Export) -> m.Reply:
        """Answer an instance that wants to let its vTPM's state out."""
        parts = frozenset(Part(part) for part in request.parts if part in list(Part))
        if len(parts) != len(request.parts) or not {Part.PERMANENT, Part.VOLATILE} <= parts:
            return m.Refusal(m.RefusalCode.MALFORMED, "an export has a permanent and a volatile part")
        if running.stage is not Stage.RUNNING:
            return m.Refusal(m.RefusalCode.UNAVAILABLE, f"it is {running.stage.value}")
        try:
            record = self._store.get(running.vtpm)
        except StorageError as error:
            return m.Refusal(m.RefusalCode.UNKNOWN_VTPM, str(error)[:200])
        if request.generation != record.generation or record.flags & RecordFlags.FRESH:
            text = f"generation {request.generation} is not the newest, which is {record.generation}"
            return m.Refusal(m.RefusalCode.STALE_GENERATION, text)
        header, key = self.make(record, parts)
        self._events.routine("exported", running.vtpm, f"state of generation {record.generation}")
        return ExportReply(header.pack(), key)

    def make(self, record: VtpmRecord, parts: frozenset[Part]) -> tuple[BlobHeader, bytes]:
        """Return the header of an export of what `record` names, and its key."""
        key = os.urandom(KEY_BYTES)
        header = BlobHeader(
            family=family_of(record),
            parts=parts,
            store=self._store.uuid,
            vtpm=record.uuid,
            export=os.urandom(EXPORT_ID_BYTES),
            generation=record.generation,
            made=int(time.time()),
            state=record.digest,
        )
        return wrap(self._key, header, key), key

    @staticmethod
    def header_of(untrusted: bytes) -> BlobHeader:
        """Return the header that `untrusted` is; it is not authentic before `unwrap`.

        Raises:
            BlobFormatError: it is none.

        """
        if len(untrusted) != BlobHeader.SIZE:
            raise BlobFormatError(f"a header of a state blob has {BlobHeader.SIZE} bytes, not {len(untrusted)}")
        return BlobHeader.unpack(untrusted)

    def unwrap(self, header: BlobHeader) -> bytes:
        """Return the key of an export that this manager made.

        Raises:
            BlobDamagedError: it did not, or the header was altered.

        """
        return unwrap(self._key, header)
