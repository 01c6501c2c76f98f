"""Which vTPMs there are: add, find, reset, remove. The store's record is the authority; the catalogue has the names."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final
from uuid import UUID, uuid4

import trio

from manager import state_files
from manager.anchoring import Anchoring
from manager.committer import Committer
from manager.errors import ConflictError, DeniedError, GroupClosedError, IntegrityError, NotFoundError, UsageError
from manager.group_rows import find_group
from manager.keys import GroupSeal
from manager.migration_records import is_away, refuse_change, refuse_reset
from manager.tombstones import Tombstones, iso
from storage.catalogue import Catalogue, GroupRow, Happened, VtpmRow
from storage.errors import GroupClosed, NoSuchVtpm, StoreDamaged
from storage.secrets import StateKey
from storage.store_records import PutVtpm, RecordFlags, VtpmRecord, random_epoch

NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NO_FLAGS: Final = RecordFlags(0)
_NOTHING: Final = bytes(32)  # key and digest of a vTPM that has never been started


def check_name(text: str, what: str) -> str:
    """Return `text` if it can be a name.

    Raises:
        UsageError: it cannot, or it looks like a UUID.

    """
    if not NAME.fullmatch(text):
        raise UsageError(f"'{text[:80]}' is no {what}: use 1 to 64 of A-Z a-z 0-9 . _ -")
    with suppress(ValueError):
        UUID(text)
        raise UsageError(f"'{text}' is no {what}: it reads as a UUID")
    return text


class Registry:
    """Every vTPM of this manager."""

    def __init__(
        self,
        committer: Committer,
        catalogue: Catalogue,
        anchoring: Anchoring,
        state_images: Path,
        tombstones: Tombstones,
        quota: int = 0,
        closed: Mapping[UUID, str] = MappingProxyType({}),
    ) -> None:
        """Work on an open store and catalogue; `state_images` is the directory of images without a name.

        `quota`: vTPMs that a group may have, 0 for any number; `closed`: why a closed group is closed.
        """
        self._quota, self.closed = quota, closed
        self._committer, self.catalogue, self._anchoring = committer, catalogue, anchoring
        self._state_images, self.tombstones = state_images, tombstones
        self.adding = trio.Lock()  # between looking whether a name is free and taking it

    @property
    def committer(self) -> Committer:
        """The one writer of the store."""
        return self._committer

    @property
    def anchoring(self) -> Anchoring:
        """What keeps the hardware TPM's anchors up to date."""
        return self._anchoring

    def find(self, text: str) -> VtpmRow:
        """Return the vTPM with this UUID or name.

        Raises:
            NotFoundError: there is none.

        """
        row = None
        with suppress(ValueError):
            row = self.catalogue.find_vtpm(UUID(text))
        if row is None:
            row = self.catalogue.find_vtpm_by_name(text)
        if row is None:
            self._refuse_removed(text)
            raise NotFoundError(f"there is no vTPM '{text[:80]}'; 'vtpm-list' shows what there is")
        return row

    def _refuse_removed(self, text: str) -> None:
        tombstone = self.tombstones.find(text)
        if tombstone is not None:
            raise NotFoundError(
                f"vTPM {tombstone.uuid} was removed on {iso(tombstone.removed)}, and its key with it: it cannot be had "
                f"back. 'vtpm-list --removed' shows all of them"
            )

    def record(self, vtpm: UUID) -> VtpmRecord:
        """Return a vTPM's record.

        Raises:
            DeniedError: its group is closed, or not settled yet (Groups.open). NotFoundError: the store does not know
            it. IntegrityError: a damaged sector may have had it.

        """
        record = self._stored(vtpm)
        if record.group in self.closed:
            raise self.closed_group(record.group)
        return record

    def _stored(self, vtpm: UUID) -> VtpmRecord:
        """Return what the store says, also of a group that is not settled yet. Raises what `record` does."""
        try:
            return self._committer.store.get(vtpm)
        except GroupClosed as error:
            row = self.catalogue.find_vtpm(vtpm)
            if row is None or not self._committer.store.is_open(row.group):
                raise self.closed_group(error.groups[0] if row is None else row.group) from error
            raise NotFoundError(f"the catalogue knows vTPM {vtpm}, its group in the store does not") from error
        except NoSuchVtpm as error:
            raise NotFoundError(f"the catalogue knows vTPM {vtpm}, the store does not: {error}") from error
        except StoreDamaged as error:
            raise IntegrityError(str(error)) from error

    def generation(self, vtpm: UUID) -> int | None:
        """Return a vTPM's generation, None where the store cannot tell (closed group, damaged sector)."""
        try:
            return self.record(vtpm).generation
        except (DeniedError, NotFoundError, IntegrityError):
            return None

    def group_name(self, group: UUID) -> str:
        """Return a group's name, or its UUID where the catalogue has none."""
        return next((row.name for row in self.catalogue.groups() if row.uuid == group), str(group))

    def closed_group(self, group: UUID) -> GroupClosedError:
        """Return the error for whoever wants something of a closed group."""
        return GroupClosedError(self.group_name(group), self.closed.get(group))

    def image_path(self, row: VtpmRow) -> Path:
        """Return where the state image of `row` lies."""
        return state_files.image_path(self._state_images, row.uuid, row.state_image)

    async def add(
        self,
        name: str | None,
        uuid: str | None,
        group: str,
        family: str,
        state_image: str,
        labels: Mapping[str, str] | None = None,
    ) -> VtpmRow:
        """Make a vTPM's record, durable and anchored; its TPM is made when it is first attached.

        Raises:
            UsageError: not a name or UUID. ConflictError: name, UUID or state image are taken.
            NotFoundError: no such group. DeniedError: the group is closed.

        """
        vtpm = uuid_of(uuid) if uuid is not None else uuid4()
        name = check_name(name, "name") if name is not None else f"vtpm-{vtpm.hex[:12]}"
        group_row = find_group(self.catalogue, group)
        async with self.adding:
            if uuid is not None:
                self.refuse_in_use(vtpm)
                self.tombstones.refuse_known(vtpm)
            row = VtpmRow(uuid=vtpm, name=name, group=group_row.uuid, family=family, state_image=state_image)
            return await self.make(row, group_row, labels or {})

    def refuse_beyond_quota(self, group: GroupRow, adding: int) -> None:
        """Check that a group may have `adding` vTPMs more; the caller holds `adding`.

        Raises:
            DeniedError: it may not, or it is closed.

        """
        store = self._committer.store
        if not store.is_open(group.uuid):
            raise self.closed_group(group.uuid)
        own = GroupSeal.unpack(store.group(group.uuid).blob).quota
        quota = min((limit for limit in (own, self._quota) if limit), default=0)
        if not quota:
            return
        have = store.count(group.uuid)
        if have + adding > quota:
            where = "the group's own quota" if quota == own else "quota.vtpms_per_group"
            how = f"'vtpm-group-update {group.name} --quota N'" if quota == own else "the configuration and a restart"
            raise DeniedError(
                f"group {group.name} has {have} of the {quota} vTPMs that {where} allows, so {adding} more were not "
                f"made. Remove some, or raise the quota by {how}"
            )

    async def make(
        self,
        row: VtpmRow,
        group: GroupRow,
        labels: Mapping[str, str],
        flags: RecordFlags = _NO_FLAGS,
        record: VtpmRecord | None = None,
        how: str = "",
    ) -> VtpmRow:
        """Make a record (a new one, or `record`), `flags` beside its own, and its name; the caller holds `adding`.

        `how` is for the event. Raises what `add` does.
        """
        self.refuse_taken(row.uuid, row.name, row.state_image)
        self.refuse_beyond_quota(group, 1)
        record = record or new_record(row)
        try:
            await self._committer.commit(PutVtpm(replace(record, flags=record.flags | flags)))
        except GroupClosed as error:
            raise self.closed_group(group.uuid) from error
        how = how or (", incoming" if flags else "")
        happened = Happened("added", f"{row.name}, TPM {row.family}, group {group.name}{how}")
        row = self.catalogue.add_vtpm(row, happened, labels)
        await self._anchoring.write_durable()
        return row

    def refuse_taken(self, vtpm: UUID, name: str, state_image: str) -> None:
        """Refuse a UUID, name or state image that another vTPM has. Raises ConflictError."""
        if self.catalogue.find_vtpm(vtpm) is not None:
            raise ConflictError(f"there is a vTPM {vtpm} already")
        if self.catalogue.find_vtpm_by_name(name) is not None:
            raise ConflictError(f"there is a vTPM named '{name}' already")
        if state_image and self.catalogue.find_vtpm_by_image(state_image) is not None:
            raise ConflictError(f"{state_image} is the state image of another vTPM")

    def refuse_in_use(self, vtpm: UUID) -> None:
        """Refuse a UUID, chosen by an administrator, under which an open group of the store has a used vTPM.

        An add that was cut short leaves a record that no name leads to; it holds nothing, and may be taken up again.
        A damaged sector may have had the UUID: then it is refused, too. A UUID drawn by chance was in none.
        """
        try:
            record = self._committer.store.get(vtpm)
        except (NoSuchVtpm, GroupClosed):
            return
        except StoreDamaged as error:
            raise IntegrityError(str(error)) from error
        if record.generation != 0 or not record.flags & RecordFlags.FRESH or is_away(record.flags):
            raise ConflictError(f"there is a vTPM {vtpm} already")

    async def reset(self, row: VtpmRow) -> None:
        """Give a detached vTPM's state up: its key is gone, and the next attach makes a new TPM under the same UUID."""
        self.refuse_attached(row)
        record = self.record(row.uuid)
        refuse_reset(row, record.flags)
        flags = RecordFlags.FRESH | (record.flags & RecordFlags.TPM12)
        await self._committer.commit(PutVtpm(replace(record, key=StateKey(_NOTHING), digest=_NOTHING, flags=flags)))
        await self._anchoring.write_durable()
        state_files.discard(self.image_path(row), row.uuid, ours=not row.state_image)
        self.catalogue.log("reset", row.uuid, f"{row.name}: state of generation {record.generation} given up")

    async def remove(self, row: VtpmRow, event: str, *, departed: bool = False) -> None:
        """Remove a detached vTPM: record and key first, then the state image and the name; keep `event` of it.

        `departed`: it is frozen, and with another manager.
        """
        self.refuse_attached(row)
        if not self._removed_before(row.uuid):
            if not departed:
                refuse_change(row, self.record(row.uuid).flags)
            await self._committer.commit(self.tombstones.burial(row.uuid))
            self.tombstones.buried()
        await self._anchoring.write_durable()  # the removal that was cut short may not have come to it
        state_files.discard(self.image_path(row), row.uuid, ours=not row.state_image)
        self.catalogue.remove_vtpm(row.uuid, Happened("removed", event))

    def _removed_before(self, vtpm: UUID) -> bool:
        """Tell whether a removal that was cut short took the record away already."""
        try:
            self.record(vtpm)
        except NotFoundError:
            return True
        return False

    async def flag(self, vtpm: UUID, *, add: RecordFlags = _NO_FLAGS, drop: RecordFlags = _NO_FLAGS) -> None:
        """Change flags of a record, durably; nothing is written when they are as wanted."""
        await self._change(vtpm, lambda record: replace(record, flags=(record.flags | add) & ~drop))

    async def mark_attached(self, vtpm: UUID, epoch: int) -> None:
        """Say in the record that the attachment of this epoch counts, durably; mostly its instance's commits did so."""

        def marked(record: VtpmRecord) -> VtpmRecord:
            flags = (record.flags | RecordFlags.ATTACHED) & ~RecordFlags.QUARANTINED
            return replace(record, flags=flags, epoch=epoch)

        await self._change(vtpm, marked)

    async def _change(self, vtpm: UUID, changed: Callable[[VtpmRecord], VtpmRecord]) -> None:
        record = self._stored(vtpm)  # who settles a group ends attachments
        if changed(record) != record or self._committer.is_changing(vtpm):
            await self._committer.change([vtpm], lambda store: [PutVtpm(changed(store.get(vtpm)))])

    def refuse_attached(self, row: VtpmRow) -> None:
        """Refuse what needs a detached vTPM. Raises ConflictError."""
        attachment = self.catalogue.find_attachment(row.uuid)
        if attachment is not None:
            raise ConflictError(
                f"vTPM {row.name} is attached to guest {attachment.guest}: run 'vtpm-detach {row.name}' first"
            )


def new_record(row: VtpmRow) -> VtpmRecord:
    """Return the record of a vTPM that was never started."""
    flags = RecordFlags.FRESH | (RecordFlags.TPM12 if row.family == "1.2" else _NO_FLAGS)
    return VtpmRecord(row.uuid, row.group, StateKey(_NOTHING), _NOTHING, 0, flags, random_epoch())


def uuid_of(text: str) -> UUID:
    """Return the UUID that an administrator wrote. Raises UsageError."""
    try:
        vtpm = UUID(text)
    except ValueError:
        raise UsageError(f"'{text[:80]}' is no UUID") from None
    if not vtpm.int:
        raise UsageError("the zero UUID names no vTPM")
    return vtpm
