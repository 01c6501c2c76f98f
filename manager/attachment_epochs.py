"""Which attachment rows count: the store's record of a vTPM says whether it is attached, and by the how-manieth row.

The catalogue is not anchored, the store is. So a genuine row of an earlier attachment that somebody puts back is found
out: its epoch is not the record's, or the record says detached. Order of writes: an attach marks the record first
and adds the row then; a detach removes the row first. A crash in between leaves a marked record without a row.
"""

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Final
from uuid import UUID

import trio

from manager.committer import Committer
from manager.errors import StaleAttachmentError
from manager.group_rows import group_row
from manager.keys import GroupSeal
from storage.catalogue import Catalogue
from storage.catalogue_rows import AttachmentRow, Happened
from storage.errors import StorageError
from storage.store import Store
from storage.store_records import (
    GroupFlags,
    PutGroup,
    PutVtpm,
    RecordFlags,
    VtpmRecord,
    next_epoch,
    random_epoch,
)

_log = logging.getLogger("vtpm.life")
_AT_ONCE: Final = 500  # records in one commit


def staleness(record: VtpmRecord, row: AttachmentRow) -> str | None:
    """Return what is wrong with an attachment's row by the vTPM's record, None where it is the newest."""
    if not record.flags & RecordFlags.ATTACHED:
        return f"the store says that it is detached (epoch {record.epoch}), the row is of epoch {row.epoch}"
    if record.epoch != row.epoch:
        return f"the store says that it is attached with epoch {record.epoch}, the row is of epoch {row.epoch}"
    return None


def refuse_stale(store: Store, row: AttachmentRow) -> None:
    """Refuse a row that is not the newest; one of a vTPM whose record cannot be read is not judged here.

    Raises:
        StaleAttachmentError: an old row was put back.

    """
    try:
        record = store.get(row.vtpm)
    except StorageError:
        return  # closed group, damaged sector, no record: whoever starts it meets that, with its own words
    problem = staleness(record, row)
    if problem is not None:
        raise StaleAttachmentError(row.vtpm, row.guest, problem)


def _not_adopted(store: Store) -> set[UUID]:
    return {uuid for uuid, record in store.groups().items() if not record.flags & GroupFlags.EPOCHS}


def _is_older(store: Store, waiting: set[UUID], row: AttachmentRow) -> bool:
    """Tell whether a row is of catalogue schema 1, and its group's rows are still to be adopted."""
    if row.epoch or not waiting:
        return False
    try:
        return store.get(row.vtpm).group in waiting
    except StorageError:
        return False


def problem_of(store: Store, row: AttachmentRow) -> str | None:
    """Return what is wrong with a row, None also where it cannot be judged or waits for its adoption."""
    try:
        record = store.get(row.vtpm)
    except StorageError:
        return None
    return None if _is_older(store, _not_adopted(store), row) else staleness(record, row)


def refuse_any_stale(store: Store, catalogue: Catalogue) -> None:
    """Check every attachment before anything is served. Raises StaleAttachmentError, CatalogueError."""
    waiting = _not_adopted(store)
    with closing(catalogue.each_attachment()) as rows:
        for row in rows:
            if not _is_older(store, waiting, row):
                refuse_stale(store, row)


def renumber(store: Store, catalogue: Catalogue | None) -> None:
    """Give the vTPMs of open groups epochs at random, and the rows that count the same: a time is given up.

    Its rows may have been kept by somebody, and counting on from the same number would meet theirs. A cut between
    records and rows leaves rows that do not count.
    Raises: StorageError, CatalogueError.
    """
    waiting = _not_adopted(store)
    numbered = [
        replace(record, epoch=next_epoch(random_epoch())) for record in store.vtpms() if record.group not in waiting
    ]
    rows = {} if catalogue is None else {row.vtpm: row for row in catalogue.attachments()}
    count = {uuid for uuid, row in rows.items() if problem_of(store, row) is None}
    for start in range(0, len(numbered), _AT_ONCE):
        store.commit([PutVtpm(record) for record in numbered[start : start + _AT_ONCE]])
    for record in numbered:
        if catalogue is not None and record.uuid in count:
            catalogue.renew(replace(rows[record.uuid], epoch=record.epoch))


async def adopt_older_rows(committer: Committer, catalogue: Catalogue) -> None:
    """Give rows that an older manager wrote their epoch, once for each group; a cut adoption is taken up again.

    Records first, then rows, then the group's flag, after which no row without an epoch counts any more. Groups that
    are closed wait until they are open.
    """
    store = committer.store
    waiting = {group for group in _not_adopted(store) if store.is_open(group)}
    if not waiting:
        return
    older = [row for row in catalogue.each_attachment() if _is_older(store, waiting, row)]
    for start in range(0, len(older), _AT_ONCE):
        await _mark(committer, older[start : start + _AT_ONCE])
    for row in older:
        catalogue.renew(replace(row, epoch=store.get(row.vtpm).epoch))
        await trio.lowlevel.checkpoint()
    said = {row.uuid: row for row in catalogue.groups()}
    for group in waiting:
        record = store.groups()[group]
        if group in said:  # schema 1 did not have a group's public data
            stored = group_row(group, GroupSeal.unpack(record.blob), said[group].created)
            catalogue.change_group(replace(stored, name=said[group].name))
        await committer.commit(PutGroup(replace(record, flags=record.flags | GroupFlags.EPOCHS)))
    if older:
        _log.info(
            "%d attachments of an older catalogue were adopted: the store vouches for them from now on", len(older)
        )
        catalogue.log("adopted", None, f"{len(older)} attachments got their epoch")


async def _mark(committer: Committer, rows: Sequence[AttachmentRow]) -> None:
    """Say in the rows' records that they are attached; what else a record says by then stays."""
    vtpms = [row.vtpm for row in rows]

    def marked(store: Store) -> list[PutVtpm]:
        records = [store.get(vtpm) for vtpm in vtpms]  # of an instance that ran on while its group was closed, too
        return [
            PutVtpm(replace(record, flags=record.flags | RecordFlags.ATTACHED, epoch=next_epoch(record.epoch)))
            for record in records
            if not record.flags & RecordFlags.ATTACHED
        ]

    await committer.change(vtpms, marked)


def stale_removed(row: AttachmentRow, name: str) -> Happened:
    """Return the event of an operator's detach of a row that was put back."""
    return Happened("detached", f"{name}: an old attachment to guest {row.guest}, epoch {row.epoch}, was taken out")
