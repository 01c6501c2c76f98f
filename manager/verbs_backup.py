"""The verb `backup`: consistent while vTPMs run and save.

State images are copied first, while everything goes on; then, with commits held back, those whose record has moved on
since, the store and the catalogue. So saves wait for the few that were busy, not for all.
"""

import os
import stat
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import UUID

import trio

from frontend_backend.messages_admin import Note
from manager import state_files
from manager.backup import CATALOGUE, CONFIG, STORE, BackupWriter, add_image, copy_image, image_member
from manager.catalogue_place import without_password
from manager.errors import ConflictError, ManagerError, UsageError
from manager.services import Arguments, Caller, Document, Services
from manager.verb_table import SCHEMA_VERSION
from storage.errors import RowTampered, StorageError
from storage.store_records import RecordFlags, VtpmRecord

_AT_ONCE: Final = 50  # images that a thread copies before others get a turn
_NOTE_EVERY: Final = 1000


@dataclass(slots=True)
class _Images:
    """State images of a backup: where they lie, and of which record the copy is (SHA-256 of the slot)."""

    named: dict[UUID, str]
    directory: Path
    copied: dict[UUID, bytes] = field(default_factory=dict)
    seen: set[UUID] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    elsewhere: dict[UUID, str] = field(default_factory=dict)  # those of instances in domains of Xen, and which
    not_here: list[UUID] = field(default_factory=list)
    unseen: list[UUID] = field(default_factory=list)  # of closed groups: which state each must hold is not known

    def member(self, vtpm: UUID) -> str:
        return image_member(vtpm, bool(self.named.get(vtpm)))

    def copy(self, writer: BackupWriter, record: VtpmRecord) -> bool | None:
        """Copy one image; None: there is none."""
        path = state_files.image_path(self.directory, record.uuid, self.named.get(record.uuid, ""))
        try:
            matches = copy_image(writer, self.member(record.uuid), record, path)
        except FileNotFoundError:
            return None
        self.seen.add(record.uuid)
        if matches:
            self.copied[record.uuid] = record.digest
        return matches

    def copy_unseen(self, writer: BackupWriter) -> list[UUID]:
        """Copy the images of closed groups' vTPMs as they are; nothing can be saved there. Returns whose."""
        copied = []
        for vtpm in self.unseen:
            path = state_files.image_path(self.directory, vtpm, self.named.get(vtpm, ""))
            with suppress(FileNotFoundError):  # never started, or missing: nobody can tell which
                add_image(writer, self.member(vtpm), path)
                copied.append(vtpm)
        return copied

    def copy_all(self, writer: BackupWriter, records: list[VtpmRecord]) -> None:
        """Copy images as they are now; those that do not match their records are looked at again at the end."""
        for record in records:
            self.copy(writer, record)


async def backup(services: Services, caller: Caller, arguments: Arguments) -> AsyncGenerator[Document | Note]:
    """Write a backup to the file that the caller opened.

    Raises:
        UsageError: no regular file. ConflictError: it is not empty. ManagerError: not written.

    """
    writer = BackupWriter(_target(caller))
    registry = services.registry
    try:
        records, images = await _survey(services)
        for start in range(0, len(records), _AT_ONCE):
            await trio.to_thread.run_sync(images.copy_all, writer, records[start : start + _AT_ONCE])
            if start and start % _NOTE_EVERY == 0:
                yield Note(f"{start} of {len(records)} state images copied")
        async with registry.adding, registry.committer.lock:
            document = await trio.to_thread.run_sync(_finish, services, writer, images)
    except (OSError, StorageError) as error:
        raise ManagerError(
            f"no backup was made: {error}. Its file was emptied, everything else is as before"
        ) from error
    finally:
        writer.close()
    if images.unseen:
        yield Note(f"{len(images.unseen)} vTPMs are in closed groups: their state images were copied unseen")
    if images.not_here:
        first = images.elsewhere[images.not_here[0]]
        yield Note(f"{len(images.not_here)} state images lie in other domains, {first} first: back their disks up, too")
    for what, uuids in (("missing", images.missing), ("not what their records ask for", images.unmatched)):
        if uuids:
            yield Note(f"{len(uuids)} state images are {what}, {uuids[0]} first: look with 'vtpm verify --all'")
    registry.catalogue.log("backed-up", None, f"store sequence {document['sequence']}, {document['vtpms']} vTPMs")
    yield document | {"file": arguments["file"]}


def _target(caller: Caller) -> int:
    if len(caller.descriptors) != 1:
        raise UsageError("the backup's descriptor did not come with the request")
    status = os.fstat(caller.descriptors[0])
    if not stat.S_ISREG(status.st_mode):
        raise UsageError("a backup is written to a regular file")
    if status.st_size:
        raise ConflictError("the file for the backup is not empty; nothing was written. Name a new one")
    return caller.descriptors[0]


async def _survey(services: Services) -> tuple[list[VtpmRecord], _Images]:
    """List the vTPMs that have a state, and where it lies."""
    registry = services.registry
    audit = await trio.to_thread.run_sync(registry.catalogue.audit)
    images = _Images({row.uuid: row.state_image for row in audit.vtpms}, services.layout.state_images)
    images.unseen = [row.uuid for row in audit.vtpms if row.group in services.groups.closed]
    images.elsewhere = {row.vtpm: row.instance_domain for row in audit.attachments if row.instance_domain}
    async with registry.committer.lock:
        return await trio.to_thread.run_sync(_stateful, services), images


def _stateful(services: Services) -> list[VtpmRecord]:
    store = services.registry.committer.store
    return [record for record in store.vtpms() if not record.flags & RecordFlags.FRESH]


def _finish(services: Services, writer: BackupWriter, images: _Images) -> Document:
    """Copy what has changed since, then everything that the images belong to. Nothing is committed meanwhile."""
    store = services.registry.committer.store
    records = _stateful(services)
    for record in records:
        if record.uuid not in images.named:  # added since; or its row was edited, then its image is looked for as ours
            with suppress(RowTampered):
                row = services.registry.catalogue.find_vtpm(record.uuid)
                images.named[record.uuid] = row.state_image if row else ""
        if images.copied.get(record.uuid) != record.digest:
            matches = images.copy(writer, record)
            if matches is None and record.uuid in images.elsewhere:
                images.not_here.append(record.uuid)
            elif matches is None:
                images.missing.append(str(record.uuid))
            elif not matches:
                images.unmatched.append(str(record.uuid))
    known = {record.uuid for record in records}
    images.unseen = [vtpm for vtpm in images.unseen if vtpm not in known]  # a group may have been opened meanwhile
    unseen = images.copy_unseen(writer)
    for vtpm in images.seen.difference(known):  # removed or reset meanwhile
        writer.drop(images.member(vtpm))
    figures = store.statistics()
    descriptor = os.open(services.layout.store, os.O_RDONLY | os.O_CLOEXEC)
    try:
        writer.add_file(STORE, descriptor, figures.bytes)
    finally:
        os.close(descriptor)
    writer.add(CATALOGUE, services.registry.catalogue.snapshot())
    for name, content in services.migration.box.files():
        writer.add(name, content)
    writer.add(CONFIG, without_password(services.config).to_toml().encode())
    backed_up = [*(record.uuid for record in records), *unseen]
    places = {str(vtpm): images.named[vtpm] for vtpm in backed_up if images.named.get(vtpm)}
    about = {"store": str(store.uuid), "sequence": figures.sequence, "vtpms": figures.vtpms, "named": places}
    about |= {"missing": images.missing, "unmatched": images.unmatched}
    size = writer.finish(about)
    return {
        "schema": SCHEMA_VERSION,
        "file": None,
        "store": str(store.uuid),
        "sequence": figures.sequence,
        "vtpms": figures.vtpms,
        "state_images": len(records) - len(images.missing) - len(images.not_here) + len(unseen),
        "missing": len(images.missing),
        "unmatched": len(images.unmatched),
        "bytes": size,
    }
