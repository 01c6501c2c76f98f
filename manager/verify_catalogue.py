"""Does the catalogue agree with the store? Rows, groups and attachments; vTPMs by themselves: `verify`."""

from collections.abc import Iterator
from uuid import UUID

from manager.attachment_epochs import problem_of
from manager.errors import IntegrityError
from manager.findings import Finding, Subject, Verdict
from manager.group_rows import difference, group_row
from manager.keys import GroupSeal
from storage.catalogue_rows import AttachmentRow, GroupRow
from storage.errors import StorageError
from storage.store_records import GroupRecord, RecordFlags


def verify_catalogue(subject: Subject) -> Iterator[Finding]:
    """Judge the rows as a whole: their MACs, attachments without a vTPM, groups."""
    audit = subject.audit
    for tampered in audit.tampered:
        yield Finding("catalogue", Verdict.DAMAGED, str(tampered))
    named = {row.uuid for row in audit.vtpms}
    for attachment in audit.attachments:
        if attachment.vtpm not in named:
            text = f"an attachment to guest {attachment.guest} of a vTPM without a name"
            yield Finding("catalogue", Verdict.DISAGREES, text, attachment.vtpm)
    yield from _verify_groups(subject)
    if not audit.tampered:
        yield Finding("catalogue", Verdict.OK, f"{len(audit.vtpms)} names, {len(audit.attachments)} attachments")


def _verify_groups(subject: Subject) -> Iterator[Finding]:
    known = {row.uuid: row for row in subject.groups}
    stored = subject.store.groups()
    for uuid in known.keys() | stored.keys():
        text = _group_problem(known.get(uuid), stored.get(uuid))
        if text is not None:
            name = known[uuid].name if uuid in known else seal_name(stored[uuid].blob, uuid)
            yield Finding("catalogue", Verdict.DISAGREES, f"group {uuid} {text}", None, name)


def _group_problem(row: GroupRow | None, record: GroupRecord | None) -> str | None:
    if row is None:
        return "is in the store only"
    if record is None:
        return "is in the catalogue only"
    try:
        return difference(row, group_row(row.uuid, GroupSeal.unpack(record.blob)))
    except IntegrityError:
        return None if row.name == str(row.uuid) else "has a record in the store that cannot be read"


def verify_attachment(subject: Subject, vtpm: UUID, name: str | None, row: AttachmentRow | None) -> Iterator[Finding]:
    """Judge a vTPM's attachment by its record; what seems wrong is looked at again, as it may be changing."""
    text = _attachment_problem(subject, row, vtpm in subject.marked)
    if text is not None and subject.attachment_now is not None:
        if subject.changing(vtpm):
            return
        try:
            row = subject.attachment_now(vtpm)
            marked = bool(subject.store.get(vtpm).flags & RecordFlags.ATTACHED)
        except StorageError:
            return  # tampered, or gone: another finding says so
        text = _attachment_problem(subject, row, marked)
        if subject.changing(vtpm):
            return
    if text is not None:
        yield Finding("attachment", Verdict.DISAGREES, text, vtpm, name)


def _attachment_problem(subject: Subject, row: AttachmentRow | None, marked: bool) -> str | None:
    if row is None and marked:
        return (
            "the store says that it is attached, no row says to whom: an attach or detach was cut short, or the row "
            "was deleted. It counts as detached: attach it again, or take the mark away with vtpm-detach"
        )
    problem = None if row is None else problem_of(subject.store, row)
    if row is None or problem is None:
        return None
    text = f"an old attachment to guest {row.guest} was put back: {problem}"
    return f"{text}. It is not started; vtpm-detach takes it out"


def seal_name(blob: bytes, group: UUID) -> str:
    """Return a group's name as its record has it, its UUID where that cannot be read."""
    try:
        return GroupSeal.unpack(blob).name
    except IntegrityError:
        return str(group)
