"""A vTPM that begins with a state from elsewhere: image first, then record and name, then the anchor.

A crash in between leaves an encrypted file `UUID.img` whose key nobody has (`vtpm-verify --all` lists it), or a record
without a name (it lists that, too, and a rebuilt catalogue names it); never a record whose state is not durable.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

import trio

from manager import state_files
from manager.durable import sync_directory
from manager.errors import IntegrityError, ManagerError
from manager.group_rows import find_group
from manager.registry import Registry, check_name, uuid_of
from storage.catalogue import VtpmRow
from storage.errors import NoSuchVtpm, StorageError
from storage.state_format import Blobs
from storage.state_image import Saved, StateImage
from storage.store_records import RecordFlags, VtpmRecord, random_epoch

_FIRST: Final = 1  # generation of a state that was adopted


async def adopt(
    registry: Registry,
    name: str | None,
    uuid: str | None,
    group: str,
    family: str,
    labels: Mapping[str, str],
    blobs: Blobs,
    origin: str,
) -> tuple[VtpmRow, int]:
    """Make a vTPM that starts with `blobs`; returns it and its generation. `origin` is for the events.

    Raises:
        UsageError: not a name or UUID. ConflictError: taken. NotFoundError: no such group. DeniedError: it is closed,
        or full. ManagerError: the image was not made.

    """
    vtpm = uuid_of(uuid) if uuid is not None else uuid4()
    name = check_name(name, "name") if name is not None else f"vtpm-{vtpm.hex[:12]}"
    group_row = find_group(registry.catalogue, group)
    row = VtpmRow(uuid=vtpm, name=name, group=group_row.uuid, family=family, state_image="")
    async with registry.adding:
        if uuid is not None:
            registry.refuse_in_use(vtpm)
            registry.tombstones.refuse_known(vtpm)
        registry.refuse_taken(vtpm, name, "")
        registry.refuse_beyond_quota(group_row, 1)
        path, store = registry.image_path(row), registry.committer.store.uuid
        with trio.CancelScope(shield=True):
            saved = await trio.to_thread.run_sync(_write_image, path, row, store, blobs)
            try:
                flags = RecordFlags.TPM12 if family == "1.2" else RecordFlags.NONE
                record = VtpmRecord(vtpm, row.group, saved.key, saved.digest, saved.generation, flags, random_epoch())
                row = await registry.make(row, group_row, labels, record=record, how=f", from {origin}")
            except BaseException:
                if not _recorded(registry, vtpm):  # it is where the catalogue or the anchor failed: then it is kept
                    path.unlink(missing_ok=True)
                raise
    return row, saved.generation


def _recorded(registry: Registry, vtpm: UUID) -> bool:
    try:
        registry.committer.store.get(vtpm)
    except NoSuchVtpm:
        return False
    return True


def _write_image(path: Path, row: VtpmRow, store: UUID, blobs: Blobs) -> Saved:
    """Make a state image with one state in it, durable; half of one is taken away. Blocks."""
    descriptor = state_files.open_locked(path, create=True)
    try:
        state_files.make_image(descriptor, path, row.uuid, store, row.family)
        image = StateImage.open(descriptor, row.uuid, store)
        image.assume_fresh()
        image.ensure_room(blobs.size)
        saved = image.save(blobs, _FIRST)
        sync_directory(path.parent)
    except (StorageError, OSError) as error:
        path.unlink(missing_ok=True)
        raise ManagerError(f"the state image {path} was not made: {error}; nothing was adopted") from error
    finally:
        os.close(descriptor)
    return saved


def stored_blobs(path: Path, record: VtpmRecord) -> Blobs:
    """Return the state that a record names. Blocks.

    Raises:
        IntegrityError: the image does not hold it. ConflictError: an instance has it.

    """
    descriptor = state_files.open_locked(path, create=False)
    try:
        return StateImage.open(descriptor, record.uuid).load(record.key, record.digest, record.generation)
    except StorageError as error:
        raise IntegrityError(str(error)) from error
    finally:
        os.close(descriptor)
