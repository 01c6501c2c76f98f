"""The groups of a running manager: make, change, open, rotate, remove. The store's record is the authority.

Each change is sealed by the hardware TPM first, then committed, then anchored, and only then answered. The catalogue's
row follows; where that was cut short the next start does it (`group_rows.follow_store`).
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final
from uuid import UUID, uuid4

import trio

from manager.anchoring import Anchoring
from manager.approval_target import PLATFORM_NAME
from manager.approvals import Approvals
from manager.committer import Committer
from manager.errors import ConflictError, GroupClosedError, ManagerError, NotFoundError
from manager.group_rows import find_group, group_row
from manager.group_terms import Terms, Wanted, seal_key
from manager.hardware import Hardware
from manager.hwtpm_errors import TpmError
from manager.hwtpm_records import SealedBlob
from manager.keys import BootArea, GroupSeal
from manager.opening import Opened, group_key, integrity
from manager.policy import SealPolicy
from manager.provision import DEFAULT_GROUP
from manager.registry import check_name
from storage.catalogue import Catalogue, GroupRow, Happened, now
from storage.errors import DeviceError, NoSuchGroup, StorageError, StorageFull
from storage.secrets import GroupKey
from storage.store_records import GroupFlags, GroupRecord, PutGroup, RemoveGroup

_log = logging.getLogger("vtpm.groups")
_NOT_SETTLED: Final = "It has just been opened, and what may have left of it is not frozen yet: open it again."
_NOT_SEALED: Final = SealedBlob(b"", b"", SealPolicy.build())


class Groups:
    """Every group of this manager."""

    def __init__(
        self,
        opened: Opened,
        committer: Committer,
        catalogue: Catalogue,
        anchoring: Anchoring,
        hardware: Hardware,
        pcrs: str,
        approvals: Approvals,
    ) -> None:
        """Change the groups of an open store; `pcrs` is the installation's selection."""
        self._closed, self._pcrs = opened.closed, pcrs
        self._committer, self._catalogue, self._anchoring = committer, catalogue, anchoring
        self._hardware = hardware
        self._approvals = approvals
        self._changing = approvals.changing  # between looking whether a name is free and taking it, and for one's key

    # --- looking -----------------------------------------------------------------------------------

    @property
    def closed(self) -> Mapping[UUID, str]:
        """Why each closed group is closed."""
        return self._closed

    def find(self, text: str) -> GroupRow:
        """Return the group with this UUID or name. Raises NotFoundError."""
        return find_group(self._catalogue, text)

    def record(self, group: UUID) -> GroupRecord:
        """Return a group's record, readable while it is closed, too. Raises NotFoundError."""
        try:
            return self._committer.store.group(group)
        except NoSuchGroup as error:
            text = f"the store has no group {group}: it was removed, or 'vtpm-verify --all' tells"
            raise NotFoundError(text) from error

    def seal(self, group: UUID) -> GroupSeal:
        """Return what a group's record says. Raises NotFoundError, IntegrityError."""
        return GroupSeal.unpack(self.record(group).blob)

    def terms(self, seal: GroupSeal) -> Terms:
        """Return to what a group's key is bound. Raises what `Terms.of` does."""
        boot = BootArea.unpack(self._committer.store.boot_area)
        return Terms.of(seal, self._pcrs, boot.recovery)

    def refuse_closed(self, row: GroupRow) -> None:
        """Raise GroupClosedError, with the reason, for a group that is closed, or not settled yet."""
        self.record(row.uuid)
        if not self._committer.store.is_open(row.uuid) or row.uuid in self._closed:
            raise GroupClosedError(row.name, self._closed.get(row.uuid))

    # --- changing ----------------------------------------------------------------------------------

    async def add(self, name: str, wanted: Wanted) -> GroupRow:
        """Make a group, durable and anchored.

        Raises:
            UsageError: no name, or PCRs are bound and nobody could recover it. ConflictError: the name is taken, or the
            store has no room. TpmError: the hardware TPM did not seal the key; nothing was made.

        """
        seal = replace(wanted, name=check_name(name, "name of a group")).applied(GroupSeal("", _NOT_SEALED, b""))
        terms = self.terms(seal)
        group = uuid4()
        async with self._changing:
            self._refuse_taken(name)
            with GroupKey.new() as key, trio.CancelScope(shield=True):
                seal = await self._sealed(group, key, seal, terms)
                await self._commit(PutGroup(GroupRecord(group, GroupFlags.EPOCHS, seal.pack()), key))
                row = group_row(group, seal, now())
                self._catalogue.add_group(row, Happened("group-added", f"{name}, PCRs {row.pcrs}"))
                await self._anchoring.write_durable()
        return row

    async def update(self, row: GroupRow, wanted: Wanted) -> GroupRow:
        """Change a group; its key is sealed and escrowed anew where that is asked for.

        Raises:
            ConflictError: the name is taken, or the default group's. DeniedError: it is closed. Others: as `add`.

        """
        if wanted.name is not None and wanted.name != row.name:
            check_name(wanted.name, "name of a group")
            if row.name == DEFAULT_GROUP:
                raise ConflictError(f"group {row.name} keeps its name: vTPMs are made in it where no group is named")
        async with self._changing:
            if wanted.name is not None:
                self._refuse_taken(wanted.name, row.uuid)
            changed = wanted.applied(self.seal(row.uuid))
            if wanted.reseals:
                self.refuse_closed(row)
                terms = self.terms(changed)
                with self._committer.store.group_key(row.uuid) as key:
                    changed = await self._sealed(row.uuid, key, changed, terms)
            with trio.CancelScope(shield=True):
                record = replace(self.record(row.uuid), blob=changed.pack())
                await self._commit(PutGroup(record))
                updated = group_row(row.uuid, changed, row.created)
                text = f"{updated.name}, PCRs {updated.pcrs}{', sealed anew' if wanted.reseals else ''}"
                self._catalogue.change_group(updated, Happened("group-updated", text))
                await self._anchoring.write_durable()
        return updated

    async def rotate(self, row: GroupRow) -> None:
        """Give a group a new master key: its records are encrypted anew, at once, or all of them stay as they were.

        Raises:
            DeniedError: it is closed. ConflictError: the store has no room; the old key goes on. TpmError: the new key
            was not sealed, or the anchor was not written: then the new key is in force all the same. ManagerError.

        """
        async with self._changing:
            self.refuse_closed(row)
            seal, store = self.seal(row.uuid), self._committer.store
            terms = self.terms(seal)
            with GroupKey.new() as key, trio.CancelScope(shield=True):
                seal = await self._sealed(row.uuid, key, seal, terms)
                async with self._committer.hold():
                    record = replace(self.record(row.uuid), blob=seal.pack())
                    try:
                        await trio.to_thread.run_sync(store.rotate_group, record, key)
                    except StorageFull as error:
                        raise ConflictError(f"not rotated, the old key goes on: {error}") from error
                    except DeviceError as error:
                        text = f"whether the key was rotated is not known: {error}. Every record is kept, under one key"
                        raise ManagerError(text) from error
                    except StorageError as error:
                        raise ManagerError(f"not rotated: {error}. Every record is kept") from error
                self._catalogue.log("group-rotated", None, f"{row.name}: {store.count(row.uuid)} vTPMs under a new key")
                await self._anchoring.write_durable()

    async def rewrite(self, row: GroupRow, change: Callable[[GroupSeal], GroupSeal], happened: Happened) -> None:
        """Change what a group's record keeps beside its sealed key, durable and anchored; it may be closed.

        Raises:
            ConflictError: the record or the store has no room. TpmError: the anchor was not written.

        """
        async with self._changing:
            record = replace(self.record(row.uuid), blob=change(self.seal(row.uuid)).pack())
            with trio.CancelScope(shield=True):
                await self._commit(PutGroup(record))
                self._catalogue.log(happened.kind, None, happened.text)
                await self._anchoring.write_durable()

    async def remove(self, row: GroupRow) -> None:
        """Remove a group without vTPMs and tombstones, durable and anchored.

        Raises:
            ConflictError: it has vTPMs or tombstones, or is the default group. DeniedError: it is closed.

        """
        if row.name == DEFAULT_GROUP:
            raise ConflictError(f"group {row.name} stays: vTPMs are made in it where no group is named")
        async with self._changing:
            self.refuse_closed(row)
            store = self._committer.store
            vtpms, tombstones = store.count(row.uuid), store.count_tombstones(row.uuid)
            if vtpms or tombstones:
                raise ConflictError(
                    f"group {row.name} has {vtpms} vTPMs and {tombstones} tombstones of removed ones; nothing was "
                    f"changed. Remove its vTPMs; tombstones go by themselves ('vtpm-list --removed' says when)"
                )
            named = self._catalogue.count_vtpms(row.uuid)
            if named:
                raise ConflictError(
                    f"the catalogue names {named} vTPMs in group {row.name} whose records are gone; nothing was "
                    f"changed. 'vtpm-list --group {row.name}' shows them, 'vtpm-remove' ends their removal"
                )
            with trio.CancelScope(shield=True):
                await self._commit(RemoveGroup(row.uuid))
                self._catalogue.remove_group(row.uuid, Happened("group-removed", row.name))
                await self._anchoring.write_durable()

    async def open(self, row: GroupRow) -> bool:
        """Try to unseal a closed group's key now; returns whether it was closed until then.

        For whoever wants one of its vTPMs it stays closed until `settled`: some may have left for another manager.

        Raises:
            DeniedError: it stays closed, with the reason. TpmError: the hardware TPM. IntegrityError: its records.

        """
        store = self._committer.store
        async with self._changing:
            self.record(row.uuid)
            if store.is_open(row.uuid):
                return False
            try:
                key = await self._hardware.lane.run(group_key, self._hardware.tpm.unseal, self.seal(row.uuid))
            except TpmError as error:
                self._closed[row.uuid] = str(error)
                raise
            with trio.CancelScope(shield=True), key:
                async with self._committer.hold():
                    with integrity():
                        await trio.to_thread.run_sync(store.unlock_group, row.uuid, key)
                self._closed[row.uuid] = _NOT_SETTLED
                self._catalogue.log("group-opened", None, row.name)
        await self._approvals.raise_used(row.uuid)
        _log.info("group %s is open", row.name)
        return True

    def settled(self, group: UUID) -> None:
        """Let everybody have an open group's vTPMs: those that may have left are frozen by now."""
        self._closed.pop(group, None)

    # --- inside ------------------------------------------------------------------------------------

    def _refuse_taken(self, name: str, own: UUID | None = None) -> None:
        if name == PLATFORM_NAME:
            raise ConflictError(f"no group can be named '{name}': it stands for the store key's own object")
        row = self._catalogue.find_group_by_name(name)
        if row is not None and row.uuid != own:
            raise ConflictError(f"there is a group named '{name}' already")
        for group in self._committer.store.groups():
            if group != own and self.seal(group).name == name:
                raise ConflictError(
                    f"the store has a group named '{name}' already ({group}), which the catalogue did not take: it is "
                    f"shown after the next start of the manager"
                )

    async def _sealed(self, group: UUID, key: GroupKey, seal: GroupSeal, terms: Terms) -> GroupSeal:
        if terms.saa and seal.slot is None:
            slot, least = await self._approvals.slot()
            seal = replace(seal, slot=slot, least=least)
        store = self._committer.store.uuid
        revocation = self._approvals.boot().revocation
        return await self._hardware.lane.run(
            seal_key, self._hardware.tpm, store, group, key, seal, terms, (), revocation
        )

    async def _commit(self, change: PutGroup | RemoveGroup) -> None:
        try:
            await self._committer.commit(change)
        except StorageFull as error:
            raise ConflictError(f"the store has no room, nothing was changed: {error}") from error
