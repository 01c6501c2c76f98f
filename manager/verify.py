"""Is everything as it was written? Judges store, catalogue and state images; changes nothing, knows no TPM.

The same for an online and an offline verification: they only differ in how the store was opened.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final
from uuid import UUID

from manager import state_files
from manager.findings import Finding, Subject, Verdict
from manager.migration_records import is_frozen, is_incoming
from manager.named_path import open_named
from manager.verify_catalogue import seal_name, verify_attachment, verify_catalogue
from storage.catalogue_rows import AttachmentRow, VtpmRow
from storage.errors import (
    GroupClosed,
    ImageForeign,
    NoMatchingSlot,
    NoSuchVtpm,
    StorageError,
    StoreDamaged,
    VtpmRemoved,
)
from storage.state_image import StateImage
from storage.store import Store
from storage.store_records import RecordFlags, VtpmRecord

_TRIES: Final = 5  # to read a state image between two saves of its instance
_IMAGE_SUFFIX: Final = ".img"


def verify_all(subject: Subject) -> Iterator[Finding]:
    """Judge catalogue, records and state images, one finding or more for each vTPM. The store: `verify_store`."""
    yield from verify_catalogue(subject)
    named = {row.uuid for row in subject.audit.vtpms}
    attachments = {row.vtpm: row for row in subject.audit.attachments}
    for row in sorted(subject.audit.vtpms, key=lambda row: row.name):
        yield from verify_attachment(subject, row.uuid, row.name, attachments.get(row.uuid))
        yield from _verify_record(subject, row, attachments.get(row.uuid))
    for vtpm in subject.stored:
        if vtpm not in named:
            with suppress(NoSuchVtpm):  # removed meanwhile
                image = _verify_image(subject, vtpm, None, subject.state_images / f"{vtpm}{_IMAGE_SUFFIX}")
                text = "the store has a record that no name in the catalogue leads to"
                yield Finding("record", Verdict.DISAGREES, text, vtpm)
                yield image
    yield from _strays(subject, named)


def verify_store(opened: Store, again: Store) -> Iterator[Finding]:
    """Judge the store's image: `again` was opened from it just now (all groups closed), `opened` is in use.

    For an installation that is not running both may be the same.
    """
    for damage in again.damage:
        yield Finding("store", Verdict.DAMAGED, f"{damage.where}: {damage.problem}")
    if again.digest() != opened.digest() or again.groups().keys() != opened.groups().keys():
        yield Finding("store", Verdict.DISAGREES, "what the image holds is not what the manager has in memory")
        return
    for uuid, record in opened.groups().items():
        yield from _verify_group(opened, again, uuid, seal_name(record.blob, uuid))
    if not again.damage:
        figures = again.statistics()
        yield Finding("store", Verdict.OK, f"sequence {figures.sequence}, every sector of {figures.bytes} bytes in use")


def _verify_group(opened: Store, again: Store, group: UUID, name: str) -> Iterator[Finding]:
    try:
        if again is not opened:
            opened.unlock_in(again, group)
        records = sum(1 for _ in again.vtpms(group))
    except GroupClosed:
        text = "closed: its records' sectors are those that were written, what they say could not be read"
        yield Finding("group", Verdict.UNCHECKED, text, None, name)
        return
    except StorageError as error:
        yield Finding("group", Verdict.DAMAGED, str(error), None, name)
        return
    graves = sorted(again.tombstones(group), key=lambda found: found.uuid)
    removed = f", {len(graves)} tombstones" if graves else ""
    yield Finding("group", Verdict.OK, f"{records} records{removed}", None, name)
    if graves != sorted(opened.tombstones(group), key=lambda found: found.uuid):
        yield Finding("group", Verdict.DISAGREES, "the image holds other tombstones than the manager", None, name)
    if again is opened:
        return
    for record in opened.vtpms(group):
        try:
            same = again.get(record.uuid) == record
        except StorageError:
            text = "its record is in memory only, the sector that holds it is damaged; its next save writes it anew"
            yield Finding("record", Verdict.DAMAGED, text, record.uuid)
            continue
        if not same:
            yield Finding("record", Verdict.DISAGREES, "the image holds another record than the manager", record.uuid)


def verify_vtpm(subject: Subject, row: VtpmRow) -> Iterator[Finding]:
    """Judge one vTPM: its attachment and its row beside its record, its state image beside its record."""
    attachment = next((found for found in subject.audit.attachments if found.vtpm == row.uuid), None)
    yield from verify_attachment(subject, row.uuid, row.name, attachment)
    yield from _verify_record(subject, row, attachment)


def _verify_record(subject: Subject, row: VtpmRow, attachment: AttachmentRow | None) -> Iterator[Finding]:
    path = state_files.image_path(subject.state_images, row.uuid, row.state_image)
    try:
        findings = [*_compare(subject.store.get(row.uuid), row)]
        if attachment is not None and attachment.instance_domain:
            text = f"on the disk of domain {attachment.instance_domain}, whose instance checks it at each load"
            findings.append(Finding("state image", Verdict.ELSEWHERE, text, row.uuid, row.name))
        else:
            findings.append(_verify_image(subject, row.uuid, row.name, path))
    except GroupClosed:
        findings = [Finding("record", Verdict.UNCHECKED, "its group is closed", row.uuid, row.name)]
    except NoSuchVtpm as error:
        text = "the catalogue names it, the store has no record of it"
        if isinstance(error, VtpmRemoved):
            text = "its record says that it was removed, its name is still there: run 'vtpm-remove' again"
        missing = subject.still_named(row.uuid)
        findings = [Finding("record", Verdict.MISSING, text, row.uuid, row.name)] if missing else []
    except StoreDamaged as error:
        findings = [Finding("record", Verdict.DAMAGED, str(error), row.uuid, row.name)]
    yield from findings


def _compare(record: VtpmRecord, row: VtpmRow) -> Iterator[Finding]:
    family = "1.2" if record.flags & RecordFlags.TPM12 else "2.0"
    for what, said, is_so in (("group", row.group, record.group), ("TPM family", row.family, family)):
        if said != is_so:
            text = f"the catalogue says {what} {said}, the record {is_so}"
            yield Finding("record", Verdict.DISAGREES, text, row.uuid, row.name)


def _verify_image(subject: Subject, vtpm: UUID, name: str | None, path: Path) -> Finding:
    """Judge a state image by its record. An instance may save meanwhile: then the newer record counts."""
    for _ in range(_TRIES):
        record = subject.store.get(vtpm)
        verdict, text = _judge_image(record, path, subject.store.uuid)
        if verdict is Verdict.OK or subject.store.get(vtpm) == record:
            return Finding("state image", verdict, text, vtpm, name)
    text = "it is saved more often than it can be read; try again"
    return Finding("state image", Verdict.UNCHECKED, text, vtpm, name)


def _judge_image(record: VtpmRecord, path: Path, store: UUID) -> tuple[Verdict, str]:
    if record.flags & RecordFlags.FRESH:
        waits = is_incoming(record.flags)
        return Verdict.OK, f"{'incoming, to be claimed' if waits else 'never started'}: it has no state yet"
    try:
        return Verdict.OK, _read_image(record, path, store)
    except FileNotFoundError:
        return Verdict.MISSING, f"{path} is not there"
    except ImageForeign as error:
        return Verdict.FOREIGN, f"{path}: {error}"
    except NoMatchingSlot as error:
        return _without_slot(error), f"{path}: {error}"
    except (StorageError, OSError) as error:
        return Verdict.DAMAGED, f"{path}: {error}"


def _read_image(record: VtpmRecord, path: Path, store: UUID) -> str:
    """Find the slot that the record names and decrypt it; returns what to say of it. Reads without the image's lock."""
    with _readable(path) as descriptor:
        image = StateImage.open(descriptor, record.uuid, store)
        size = image.load(record.key, record.digest, record.generation).size
        other = next(str(slot) for slot in image.describe() if slot.slot != image.live_slot)
    text = f"generation {record.generation} in slot {image.live_slot}, {size} bytes, decrypted; {other}"
    if is_frozen(record.flags):
        return f"{text}; frozen: another manager claimed it"
    return f"{text}; quarantined: attach it again" if record.flags & RecordFlags.QUARANTINED else text


def _without_slot(error: NoMatchingSlot) -> Verdict:
    """Tell an image of another time from a damaged one: does a slot claim to be the one that is asked for?"""
    claims = [claim for claim in error.claims if "claims generation" in claim]
    same = any(claim.endswith(f" {error.generation}") for claim in claims)
    return Verdict.DISAGREES if claims and not same and len(claims) == len(error.claims) else Verdict.DAMAGED


@contextmanager
def _readable(path: Path) -> Iterator[int]:
    """Open an image to read, without its lock, which its instance holds."""
    descriptor = open_named(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _strays(subject: Subject, named: set[UUID]) -> Iterator[Finding]:
    """Find state images in our directory that no record asks for."""
    if not subject.state_images.is_dir():
        return
    for path in sorted(subject.state_images.glob(f"*{_IMAGE_SUFFIX}")):
        try:
            vtpm = UUID(path.stem)
        except ValueError:
            yield Finding("state image", Verdict.DISAGREES, f"{path} is not named after a vTPM")
            continue
        if vtpm in named:
            continue
        try:
            subject.store.get(vtpm)
        except NoSuchVtpm:
            text = f"{path}: an image without a record: an import that was cut short left it, or the store is older"
            yield Finding("state image", Verdict.DISAGREES, text, vtpm)
        except StorageError as error:
            yield Finding("state image", Verdict.UNCHECKED, f"{path}: {error}", vtpm)
