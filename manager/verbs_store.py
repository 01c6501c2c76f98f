"""The verbs `scrub` and `compact`: both work on the store while vTPMs run and save."""

import os
from collections.abc import AsyncGenerator, Iterator
from typing import Final

import trio

from frontend_backend.messages_admin import Note
from manager import state_files
from manager.errors import ConflictError, ManagerError, UsageError
from manager.event_retention import prune
from manager.services import Arguments, Caller, Document, Services
from manager.verb_table import SCHEMA_VERSION
from storage.catalogue_rows import VtpmRow
from storage.errors import CatalogueError, StorageError, StorageFull
from storage.state_scrub import scrub_image
from storage.store_compact import Compacted
from storage.store_records import RecordFlags
from storage.store_scrub import Scrubbed

_NOTES: Final = 10  # on the way, at most
_IMAGES_EACH_NOTE: Final = 1000
_NOT_REACHED: Final = (
    "backups and other copies, snapshots of the file system or disk, blocks that the file system gave back "
    "earlier, and what the disk itself keeps (flash translation layer)"
)


async def scrub(services: Services, _caller: Caller, arguments: Arguments) -> AsyncGenerator[Document | Note]:
    """Overwrite what the store's image, and with `state_images` state images, still hold of keys and states of before.

    Raises:
        ConflictError: no room for the checkpoint that it begins with; nothing was overwritten. ManagerError: see there.

    """
    registry = services.registry
    store = registry.committer.store
    steps = store.scrub()
    found: Scrubbed | None = None
    told = 0
    try:
        while (progress := await _next(services, steps)) is not None:
            found = progress
            if found.done * _NOTES // max(found.sectors, 1) > told and found.done < found.sectors:
                told = found.done * _NOTES // found.sectors
                yield Note(f"{found.done} of {found.sectors} sectors overwritten")
    except StorageFull as error:
        raise ConflictError(f"not scrubbed, nothing was overwritten: {error}") from error
    except StorageError as error:
        raise ManagerError(f"the scrub did not come to its end: {error}. Every record is kept; run it again") from error
    assert found is not None, "the first step tells how far it is"
    with trio.CancelScope(shield=True):
        await registry.anchoring.write_durable()  # an image from before, put back, is refused from now on
    done = kept = 0
    if arguments["state_images"]:
        rows = await trio.to_thread.run_sync(lambda: registry.catalogue.audit().vtpms)
        for count, row in enumerate(rows, 1):
            scrubbed = await _scrub_state_image(services, row)
            done, kept = done + (scrubbed is True), kept + (scrubbed is False)
            if count % _IMAGES_EACH_NOTE == 0:
                yield Note(f"{count} of {len(rows)} vTPMs' state images looked at")
    closed = ", ".join(map(registry.group_name, found.closed)) or None
    registry.catalogue.log("scrubbed", None, f"{found.done} sectors; closed groups: {closed or 'none'}")
    yield {
        "schema": SCHEMA_VERSION,
        "sectors": found.done,
        "closed_groups": closed,
        "damaged_leaves": found.damaged,
        "state_images": done,
        "state_images_kept": kept,
        "not_reached": _NOT_REACHED,
    }


async def _next(services: Services, steps: Iterator[Scrubbed]) -> Scrubbed | None:
    """Do one step of a scrub while nothing is committed; a thread that has begun cannot be called back."""
    with trio.CancelScope(shield=True):
        async with services.registry.committer.hold():
            progress = await trio.to_thread.run_sync(lambda: next(steps, None))
    return progress


async def _scrub_state_image(services: Services, row: VtpmRow) -> bool | None:
    """Scrub one state image; False: it was kept as it is, None: there is nothing to be scrubbed."""
    registry = services.registry
    async with services.attachments.lock(row.uuid):
        path = registry.image_path(row)
        try:
            record = registry.committer.store.get(row.uuid)
            if record.flags & RecordFlags.FRESH:
                return None
            descriptor = state_files.open_locked(path, create=False)
        except (StorageError, ManagerError):  # in use by its instance, whose next save overwrites it; closed; missing
            return False
        try:
            return await trio.to_thread.run_sync(
                scrub_image, descriptor, row.uuid, registry.committer.store.uuid, record.digest
            )
        except StorageError:  # damaged, foreign: vtpm-verify tells which
            return False
        finally:
            os.close(descriptor)


async def compact(services: Services, _caller: Caller, arguments: Arguments) -> AsyncGenerator[Document | Note]:
    """Take away what is not needed, and make the store's image as small as it can be.

    Raises:
        UsageError: a size that is none. ConflictError: no room to work in; nothing is lost. ManagerError: see there.

    """
    floor = services.config.store.size if arguments["to_size"] is None else arguments["to_size"]
    if floor < 0:
        raise UsageError("--to-size is a number of bytes: 0 for as small as possible")
    registry = services.registry
    try:
        tombstones = await registry.tombstones.drop_expired()
        yield Note(f"{tombstones} tombstones whose time is over were taken away")
        done = await _compact_store(services, floor)
    except StorageFull as error:
        raise ConflictError(f"not compacted: {error}. Every record is kept") from error
    except StorageError as error:
        raise ManagerError(f"the compaction did not come to its end: {error}. Every record is kept") from error
    yield Note(f"the store's image has {done.bytes_after} bytes, {done.bytes_before} before")
    try:
        events = await prune(registry.catalogue, services.config.catalogue)
        async with registry.adding:
            await trio.to_thread.run_sync(registry.catalogue.compact)
    except CatalogueError as error:
        raise ManagerError(
            f"the store was compacted ({done.bytes_after} bytes, {done.bytes_before} before), the catalogue was not: "
            f"{error}"
        ) from error
    text = f"{done.bytes_before} to {done.bytes_after} bytes, {done.leaves_before} to {done.leaves_after} leaves"
    registry.catalogue.log("compacted", None, text)
    yield {
        "schema": SCHEMA_VERSION,
        "bytes_before": done.bytes_before,
        "bytes": done.bytes_after,
        "leaves_before": done.leaves_before,
        "leaves": done.leaves_after,
        "tombstones_dropped": tombstones,
        "tombstones": registry.committer.store.statistics().tombstones,
        "events_dropped": events,
        "closed_groups": ", ".join(map(registry.group_name, done.closed)) or None,
        "sectors_not_moved": done.kept,
    }


async def _compact_store(services: Services, floor: int) -> Compacted:
    """Compact the store while nothing is committed, then anchor it."""
    registry = services.registry
    with trio.CancelScope(shield=True):
        async with registry.committer.hold():
            done = await trio.to_thread.run_sync(registry.committer.store.compact, floor)
        await registry.anchoring.write_durable()
    return done
