"""What going back to an older store would lose, as far as state images and catalogue show it. Changes nothing."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from manager import state_files
from manager.named_path import open_named
from storage.catalogue import Catalogue
from storage.catalogue_rows import AttachmentRow
from storage.errors import StorageError
from storage.state_image import SlotState, StateImage
from storage.store import Store
from storage.store_records import RecordFlags, VtpmRecord


@dataclass(frozen=True, slots=True)
class Loss:
    """One thing that is lost, or that comes back. Generations: the store's record, the newest in the state image."""

    vtpm: UUID
    name: str | None
    text: str
    recorded: int | None = None
    newest: int | None = None


def losses_of(
    store: Store, catalogue: Catalogue | None, state_images: Path, stale: Sequence[AttachmentRow]
) -> Iterator[Loss]:
    """Compare the records of an open store with the state images there are, and with the catalogue's rows.

    Slots' generations are claims until a key proves them: good enough to tell an operator, and used for nothing else.
    """
    rows = {} if catalogue is None else {row.uuid: row for row in catalogue.vtpms()}
    recorded = {record.uuid: record for record in store.vtpms()}
    for record in recorded.values():
        row = rows.get(record.uuid)
        path = state_files.image_path(state_images, record.uuid, row.state_image if row else "")
        name = row.name if row else None
        found = _beside(record, path)
        if found is not None:
            yield Loss(record.uuid, name, *found)
        if catalogue is not None and row is None:
            yield Loss(record.uuid, None, "the catalogue does not know it: it was removed since, and comes back")
    closed = {group for group in store.groups() if not store.is_open(group)}
    for row in rows.values():
        if row.uuid not in recorded and row.group not in closed:
            yield Loss(row.uuid, row.name, "it was added since: this store does not know it, its state cannot be read")
    for attachment in stale:
        named = rows.get(attachment.vtpm)
        text = f"its attachment to guest {attachment.guest} is from a later time and will be taken away"
        yield Loss(attachment.vtpm, named.name if named else None, text)


def perhaps_left(store: Store, catalogue: Catalogue | None, words: Iterable[tuple[UUID | None, str]]) -> Iterator[Loss]:
    """Tell of the vTPMs that may be with another manager by now (`migration_rollback.in_words`)."""
    for vtpm, text in words:
        row = None if catalogue is None or vtpm is None else catalogue.find_vtpm(vtpm)
        yield Loss(vtpm or store.uuid, row.name if row else None, text)


def _beside(record: VtpmRecord, path: Path) -> tuple[str, int, int | None] | None:
    """Return what is lost of one vTPM by its state image, None where record and image agree."""
    if record.flags & RecordFlags.FRESH:
        return None if not path.exists() else ("the record is of before its first start", record.generation, None)
    try:
        descriptor = open_named(path, os.O_RDONLY)
    except OSError as error:
        return f"its state image cannot be read: {error.strerror}", record.generation, None
    try:
        slots = StateImage.open(descriptor, record.uuid).describe()
    except StorageError as error:
        return f"its state image is not as it was: {error}", record.generation, None
    finally:
        os.close(descriptor)
    newest = max((slot.generation or 0 for slot in slots if slot.state is SlotState.WRITTEN), default=0)
    matches = any(slot.digest == record.digest for slot in slots)
    if matches and newest <= record.generation:
        return None
    if matches:
        return "the state after the one that this store knows is lost", record.generation, newest
    text = "its state image does not hold the state that this store knows: it will be quarantined, not used"
    return text, record.generation, newest
