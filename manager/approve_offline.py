"""`vtpm-manager approve` and `approvals` while no manager runs.

This is how an installation gets its first approvals, and how it comes back after an upgrade that nobody had approved
before: the approvals that are given open the store that they are then kept in.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from manager.anchor import clean_stop
from manager.anchoring import note_present
from manager.approval import SLOTS, Approval, Kind
from manager.approval_errors import ApprovalElsewhere, RevocationDenied, RevocationMissing
from manager.approval_files import target_document, targets_of
from manager.approval_install import (
    check_installable,
    installed_document,
    installed_in,
    installed_text,
    refuse_closing,
)
from manager.approval_records import approvals_in, group_target, pcrs_of, platform_target
from manager.approval_target import NO_GROUP, Target, choose
from manager.catalogue_place import place_of
from manager.config import Config, Layout
from manager.errors import ManagerError
from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import PolicyMismatch
from manager.hwtpm_records import SealedBlob
from manager.keys import BootArea, GroupSeal, catalogue_key
from manager.opening import Opened, integrity, locked_store, open_store, open_tpm, pin_srk, read_boot_area
from manager.policy import parse_pcrs
from manager.revocation_writer import RevocationWriter
from storage.catalogue import Catalogue
from storage.store_records import PutGroup

_log = logging.getLogger("vtpm.approval")
Record = BootArea | GroupSeal


@dataclass(frozen=True, slots=True)
class Wish:
    """What `approve` was asked for."""

    approvals: Sequence[Approval]
    revoke_older: bool = False
    confirmed: bool = False


def approve(layout: Layout, config: Config, wish: Wish) -> list[dict[str, Any]]:
    """Install approvals in a store that no manager serves; they may be what opens it.

    Raises:
        NotApproved: neither what is installed nor what was given opens the store on this platform as it is.
        ApprovalError: one cannot be used; nothing was changed. ManagerError: see the messages.

    """
    with (
        locked_store(layout) as descriptor,
        open_tpm(layout, config) as tpm,
        _opened(descriptor, tpm, config, wish.approvals) as opened,
    ):
        work = _Install(tpm, opened, config.tpm.pcrs, wish)
        for approval in wish.approvals:
            work.check(approval)
        done = work.run()
        _tell_catalogue(layout, config, opened, wish)
    return done


@contextlib.contextmanager
def _opened(descriptor: int, tpm: HardwareTpm, config: Config, approvals: Sequence[Approval]) -> Iterator[Opened]:
    """Open a store by its own approvals and by these, each for the object that it refers to."""

    def unseal(blob: SealedBlob) -> bytes:
        given = tuple(one.to_bytes() for one in approvals if one.reference == blob.policy.reference)
        return tpm.unseal(replace(blob, approvals=(*blob.approvals, *given)))

    opened = open_store(descriptor, tpm, config, unseal)
    try:
        yield opened
    finally:
        opened.store.close()
        opened.secret.wipe()


class _Install:
    """Approvals on their way into an opened store."""

    def __init__(self, tpm: HardwareTpm, opened: Opened, pcrs: str, wish: Wish) -> None:
        self._tpm, self._opened, self._store, self._pcrs, self._wish = tpm, opened, opened.store, pcrs, wish

    def _place(self, approval: Approval) -> tuple[Record, Target]:
        """Return the record that an approval is for, as it is now, and the target of it."""
        boot, store = self._opened.boot, self._store.uuid
        if approval.kind is Kind.PLATFORM:
            return boot, platform_target(store, boot, self._pcrs)
        found = self._store.groups().get(approval.group)
        if found is None:
            raise ApprovalElsewhere(f"Approval {approval.sequence}", f"there is no group {approval.group} here")
        seal = GroupSeal.unpack(found.blob)
        return seal, group_target(store, boot, approval.group, seal, self._pcrs)

    def check(self, approval: Approval) -> None:
        """Raise what is wrong with an approval; nothing was changed then."""
        record, target = self._place(approval)
        revocation = self._opened.boot.revocation
        assert revocation is not None, "a target has one"
        check_installable(approval, target, record, self._tpm.revocations.read(revocation)[approval.slot])
        if self._wish.revoke_older and not self._wish.confirmed:
            refuse_closing(approval, self._tpm.pcr_read(approval.selection))

    def _changed(self) -> dict[UUID, Record]:
        """Return what the records become, before any of them is written. Raises ApprovalRoom."""
        changed: dict[UUID, Record] = {}
        for approval in self._wish.approvals:
            record = changed.get(approval.group) or self._place(approval)[0]
            changed[approval.group] = installed_in(record, approval, revoke_older=self._wish.revoke_older)
        return changed

    def run(self) -> list[dict[str, Any]]:
        """Commit and anchor; then revoke, where that was asked for."""
        changed = self._changed()
        note_present(self._store, self._tpm.pcr22_read() if self._tpm.locality == 2 else None)
        for group, record in changed.items():
            if isinstance(record, BootArea):
                self._store.write_boot_area(record.pack())
                self._opened.boot = record
            else:
                found = self._store.groups()[group]
                self._store.commit([PutGroup(replace(found, blob=record.pack()))])
        boot, secret = self._opened.boot, self._opened.secret
        self._tpm.anchor_write(boot.anchor, secret.anchor_auth, clean_stop(self._store.digest()))
        if self._wish.revoke_older:
            assert boot.revocation is not None, "checked before"
            writer = RevocationWriter.of(secret.store_key, self._store.uuid)
            for approval in self._wish.approvals:
                self._tpm.revocations.raise_to(boot.revocation, writer, approval.slot, approval.sequence)
        return [
            installed_document(approval, self._place(approval)[0].least, self._tpm.pcr_read(approval.selection))
            for approval in self._wish.approvals
        ]


def _tell_catalogue(layout: Layout, config: Config, opened: Opened, wish: Wish) -> None:
    """Keep an event of each; without a catalogue they are installed, too."""
    key = catalogue_key(opened.secret.store_key, opened.store.uuid)
    try:
        with integrity(), Catalogue.open(place_of(layout, config), key, opened.store.uuid) as catalogue:
            for approval in wish.approvals:
                catalogue.log("approved", None, installed_text(approval, revoke_older=wish.revoke_older))
    except ManagerError as error:
        _log.warning("installed, but no event says so: %s", error)


def approvals(layout: Layout, config: Config) -> list[dict[str, Any]]:
    """Tell what approvals are made for, the PCR values of now, and what holds; groups only where the store opens.

    Of a store that does not open this is what stands in clear in its image.

    Raises:
        ManagerError: there is no store, or the hardware TPM is not the one that it is sealed to.

    """
    with locked_store(layout) as descriptor, open_tpm(layout, config) as tpm:
        pin_srk(tpm, config)
        uuid, boot = read_boot_area(descriptor)
        targets, closed = targets_of(uuid, boot, {}, config.tpm.pcrs), None
        records: dict[UUID, Record] = {NO_GROUP: boot}
        try:
            with _opened(descriptor, tpm, config, ()) as opened:
                groups = opened.store.groups()
                targets = targets_of(uuid, opened.boot, groups, config.tpm.pcrs)
                records[NO_GROUP] = opened.boot
                records |= {group: GroupSeal.unpack(found.blob) for group, found in groups.items()}
        except PolicyMismatch as error:
            closed = str(error)
        held = _held(tpm, boot)
        return [
            _standing(tpm, replace(target, least=max(target.least, held[target.slot])), records[target.group])
            | {"closed": closed}
            for target in targets
        ]


def _held(tpm: HardwareTpm, boot: BootArea) -> tuple[int, ...]:
    """Return what the revocation index holds: more than the store knows, where an older store was put back."""
    try:
        return tpm.revocations.read(boot.revocation) if boot.revocation is not None else (0,) * SLOTS
    except (RevocationMissing, RevocationDenied) as error:
        _log.warning("%s", error)
        return (0,) * SLOTS


def _standing(tpm: HardwareTpm, target: Target, record: Record) -> dict[str, Any]:
    present = tpm.pcr_read(pcrs_of([record]) | set(parse_pcrs(target.pcrs)))
    choice = choose(approvals_in(record), present, time.time())
    usable = [approval.sequence for approval in choice.holding if approval.sequence >= target.least]
    return target_document(target, present) | {
        "approvals": len(record.approvals),
        "holds": usable[0] if usable else None,
        "reasons": "; ".join(choice.reasons) or None,
    }
