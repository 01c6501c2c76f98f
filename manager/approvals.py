"""Approvals while the manager runs: install, use, revoke. The hardware TPM is asked in its own lane.

The order is the promise: an approval is durable and anchored before anything older is revoked, and what the store says
is revoked is written to the revocation index afterwards. A crash in between is made up for at the next start.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from uuid import UUID

import trio

from manager import approval_records as records
from manager.anchoring import Anchoring
from manager.approval import Approval, Kind
from manager.approval_errors import ApprovalElsewhere, RevocationDenied, RevocationMissing
from manager.approval_install import check_installable, installed_in, installed_text, refuse_closing
from manager.approval_target import PLATFORM_NAME, Target
from manager.committer import Committer
from manager.errors import ConflictError
from manager.hardware import Hardware
from manager.hwtpm_records import AnchorInfo
from manager.keys import BootArea, GroupSeal
from manager.opening import Opened
from manager.revocation_writer import RevocationWriter
from storage.catalogue import Catalogue
from storage.errors import StorageFull
from storage.store_records import PutGroup

_log = logging.getLogger("vtpm.approval")
Record = BootArea | GroupSeal


class Approvals:
    """The approvals of a running manager: the platform object's, and its groups'."""

    def __init__(
        self,
        opened: Opened,
        committer: Committer,
        catalogue: Catalogue,
        anchoring: Anchoring,
        hardware: Hardware,
        pcrs: str,
    ) -> None:
        """Change the approvals in an open store; `pcrs` is the installation's selection."""
        self._opened, self._pcrs = opened, pcrs
        self._committer, self._catalogue, self._anchoring = committer, catalogue, anchoring
        self._hardware = hardware
        self._writer = RevocationWriter.of(opened.secret.store_key, opened.store.uuid)
        self.changing = trio.Lock()  # held while records of groups, or the boot area, are read and written back

    # --- looking -----------------------------------------------------------------------------------

    def boot(self) -> BootArea:
        """Return the boot area as the store vouches for it."""
        return BootArea.unpack(self._committer.store.boot_area)

    def record(self, group: UUID | None) -> Record:
        """Return a group's record, or for None the boot area, whose approvals open the platform object."""
        if group is None:
            return self.boot()
        return GroupSeal.unpack(self._committer.store.groups()[group].blob)

    def target(self, group: UUID | None) -> Target:
        """Return what approvals of a group (None: the platform object) are made for. Raises UsageError: no approver."""
        store = self._committer.store.uuid
        record = self.record(group)
        if isinstance(record, BootArea):
            return records.platform_target(store, record, self._pcrs)
        assert group is not None, "a group's record"
        return records.group_target(store, self.boot(), group, record, self._pcrs)

    async def present(self, selection: set[int]) -> dict[int, bytes]:
        """Return the present values of these PCRs."""
        return await self._hardware.lane.run(self._hardware.tpm.pcr_read, selection) if selection else {}

    # --- changing ----------------------------------------------------------------------------------

    async def keep_migration(self, digest: str, identity: str) -> None:
        """Have the boot area say which data about migration, and which identity, count; durable, not yet anchored."""
        async with self.changing, self._committer.hold():
            boot = self.boot()
            if (boot.migration, boot.identity) != (digest, identity):
                packed = replace(boot, migration=digest, identity=identity).pack()
                await trio.to_thread.run_sync(self._committer.store.write_boot_area, packed)
                self._opened.boot = self.boot()

    async def slot(self) -> tuple[int, int]:
        """Return a free slot of the revocation index, which is defined if there is none yet, and what it holds.

        The caller holds `changing`, so that nobody takes the slot meanwhile.

        Raises:
            ApprovalRoom: every slot is taken. TpmError: the hardware TPM did not define or read it.

        """
        info = self.boot().revocation
        if info is None:
            info = await self._hardware.lane.run(self._hardware.tpm.revocations.place, self._writer.point)
            await self._define(info)
        held = await self._hardware.lane.run(self._hardware.tpm.revocations.read, info)
        seals = (GroupSeal.unpack(record.blob) for record in self._committer.store.groups().values())
        return records.free_slot(seals, held)

    async def _define(self, info: AnchorInfo) -> None:
        with trio.CancelScope(shield=True):
            await self._hardware.lane.run(self._hardware.tpm.revocations.ensure, info, self._writer, {})
            await self._rewrite(None, lambda boot: replace(boot, revocation=info))  # type: ignore[arg-type]
        self._catalogue.log("revocation-index", None, f"NV index 0x{info.index:08x} holds the groups' sequences")

    async def install(
        self, text: str, group: UUID | None = None, *, revoke_older: bool = False, confirmed: bool = False
    ) -> Approval:
        """Keep an approval, durable and anchored; with `revoke_older` those with lower sequences never open again.

        `group`: the one it must be for, None for whatever it is for.

        Raises:
            ApprovalUnreadable, ApprovalForged, ApprovalElsewhere, ApprovalStale, ApprovalUntimely, ApprovalRoom: it
            cannot be used. ConflictError: it would close this platform, and that was not confirmed. TpmError.

        """
        approval = Approval.from_armoured(text)
        place = None if approval.kind is Kind.PLATFORM else approval.group
        if group not in (None, place):
            raise ApprovalElsewhere("The approval", f"it is for {approval.name} ({place or 'the platform object'})")
        if place is not None and place not in self._committer.store.groups():
            raise ApprovalElsewhere("The approval", f"there is no group {place} here")
        async with self.changing:
            held = await self._held(approval.slot, place)
            check_installable(approval, self.target(place), self.record(place), held)
            if revoke_older and not confirmed:
                refuse_closing(approval, await self.present(set(approval.selection)))
            with trio.CancelScope(shield=True):
                await self._rewrite(place, lambda record: installed_in(record, approval, revoke_older=revoke_older))
                self._catalogue.log("approved", None, installed_text(approval, revoke_older=revoke_older))
                if revoke_older:
                    await self._raise(approval.slot, approval.sequence)
        return approval

    async def _held(self, slot: int, place: UUID | None) -> int:
        """Return what the revocation index holds in a slot. Raises UsageError: there is no approver."""
        self.target(place)
        info = self.boot().revocation
        assert info is not None, "a target has one"
        held = await self._hardware.lane.run(self._hardware.tpm.revocations.read, info)
        return held[slot]

    async def raise_used(self, only: UUID | None = None) -> None:
        """Revoke what is older than the approvals in use: of the platform object and all open groups, or one group.

        Called after a start that succeeded, and after a group was opened: a configuration that came up is not gone
        back from. Two commands to the TPM, and two writes for each approval that is used for the first time. An index
        that was taken away opens nothing any more; what the store keeps is what a new one begins with.

        Raises:
            TpmError: the hardware TPM did not do it.

        """
        store = self._committer.store
        async with self.changing:
            places: list[UUID | None] = [uuid for uuid in store.groups() if store.is_open(uuid)]
            places = [None, *places] if only is None else [only]
            kept = {place: self.record(place) for place in places}
            approved = {place: record for place, record in kept.items() if record.approvals}
            present = await self.present(records.pcrs_of(approved.values()))
            for place, record in approved.items():
                used = records.sequence_in_use(record, present, time.time()) or 0
                if used > record.least:
                    await self._rewrite(place, lambda changed, to=used: records.with_least(changed, to))  # type: ignore[misc]
            if approved:
                await self._raise_all(list(approved))

    async def _raise_all(self, places: list[UUID | None]) -> None:
        """Have the index hold what the store says of these."""
        info = self.boot().revocation
        assert info is not None, "there is an approval"
        try:
            held = await self._hardware.lane.run(self._hardware.tpm.revocations.read, info)
            for record in map(self.record, places):
                assert record.slot is not None, "there is an approval"
                if record.least > held[record.slot]:
                    await self._raise(record.slot, record.least)
                    name = record.name if isinstance(record, GroupSeal) else PLATFORM_NAME
                    _log.info("approvals of %s below %d are revoked", name, record.least)
                    self._catalogue.log("approvals-revoked", None, f"{name}: all below {record.least}")
        except (RevocationMissing, RevocationDenied) as error:
            _log.error("nothing was revoked in the hardware TPM: %s", error)

    async def _raise(self, slot: int, sequence: int) -> None:
        info = self.boot().revocation
        assert info is not None, "there is an approval"
        await self._hardware.lane.run(self._hardware.tpm.revocations.raise_to, info, self._writer, slot, sequence)

    async def _rewrite(self, place: UUID | None, change: Callable[[Record], Record]) -> None:
        """Change a group's record, or the boot area, durable and anchored."""
        store = self._committer.store
        try:
            if place is None:
                async with self._committer.hold():
                    packed = change(self.boot()).pack()
                    await trio.to_thread.run_sync(store.write_boot_area, packed)
                self._opened.boot = self.boot()
            else:
                found = store.groups()[place]
                await self._committer.commit(PutGroup(replace(found, blob=change(self.record(place)).pack())))
        except StorageFull as error:
            raise ConflictError(f"the store has no room, nothing was changed: {error}") from error
        await self._anchoring.write_durable()
