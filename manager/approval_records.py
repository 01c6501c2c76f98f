"""What the store keeps of approvals, beside the sealed objects that they open: pure functions on its records.

`least` is the lowest sequence that is not revoked, as far as the store knows; the hardware TPM's revocation index is
what counts. The store is written first, the index afterwards, so `least` is never behind the index.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar
from uuid import UUID

from manager.approval import SLOTS, Approval, Kind, reference_for
from manager.approval_errors import ApprovalRoom
from manager.approval_key import ApproverPublic
from manager.approval_target import NO_GROUP, PLATFORM_NAME, Target, choose
from manager.errors import ConflictError, IntegrityError, UsageError
from manager.hwtpm_records import AnchorInfo
from manager.keys import BootArea, GroupSeal
from manager.policy import SealPolicy

Kept = TypeVar("Kept", bound=BootArea | GroupSeal)
PLATFORM_SLOT = 0


def platform_target(store: UUID, boot: BootArea, pcrs: str) -> Target:
    """Return what approvals of the platform object are made for; `pcrs` is the installation's selection."""
    return _target(
        Kind.PLATFORM, boot, boot.platform.policy, pcrs, PLATFORM_SLOT, (store, NO_GROUP, PLATFORM_NAME, boot.least)
    )


def group_target(store: UUID, boot: BootArea, group: UUID, seal: GroupSeal, pcrs: str) -> Target:
    """Return what approvals of a group are made for; `pcrs` is the installation's selection.

    Raises:
        UsageError: it has no approver.

    """
    wanted = seal.pcrs or pcrs
    return _target(Kind.GROUP, boot, seal.sealed.policy, wanted, seal.slot, (store, group, seal.name, seal.least))


def _target(
    kind: Kind,
    boot: BootArea,
    policy: SealPolicy,
    pcrs: str,
    slot: int | None,
    place: tuple[UUID, UUID, str, int],
) -> Target:
    store, group, name, least = place
    # What the TPM protects is the policy; the key in the record beside it is for people.
    point = policy.approver_point
    if point is None or slot is None or boot.revocation is None:
        raise UsageError(
            f"{name} has no approver: what may open it is in its seal ('vtpm-manager reseal', 'vtpm-group-update')"
        )
    target = Target(
        kind=kind,
        store=store,
        group=group,
        name=name,
        locality=policy.locality,
        pcrs=pcrs,
        nv_index=boot.revocation.index,
        nv_name=boot.revocation.name,
        slot=slot,
        least=least,
        approver=ApproverPublic.of_point(point).fingerprint,
    )
    if target.reference != policy.reference:
        raise IntegrityError(
            f"{name} is sealed for another revocation index or slot than there is now: no approval can open it, its "
            f"recovery key does ('vtpm-manager recover --group')"
        )
    return target


def reference_of(store: UUID, group: UUID | None, slot: int | None, revocation: AnchorInfo | None) -> bytes:
    """Return the policyRef of a group with an approver, or for None of the platform object."""
    assert slot is not None, "an approver's object has a slot"
    assert revocation is not None, "and there is an index"
    kind = Kind.PLATFORM if group is None else Kind.GROUP
    return reference_for(kind, store, NO_GROUP if group is None else group, revocation.name, slot)


def approvals_in(record: BootArea | GroupSeal) -> tuple[Approval, ...]:
    """Return the approvals that a record keeps. Raises ApprovalUnreadable."""
    return tuple(Approval.parse(bytes.fromhex(kept), "a stored approval") for kept in record.approvals)


def with_approval(record: Kept, approval: Approval) -> Kept:
    """Return the record with one more approval, in place of one with the same sequence and PCR values."""
    others = [
        one.to_bytes().hex()
        for one in approvals_in(record)
        if (one.sequence, one.values) != (approval.sequence, approval.values)
    ]
    return replace(record, approvals=(*others, approval.to_bytes().hex()))


def with_least(record: Kept, least: int) -> Kept:
    """Return the record with this lowest sequence, and without the approvals that it revokes. Never lowers it."""
    least = max(least, record.least)
    kept = tuple(one.to_bytes().hex() for one in approvals_in(record) if one.sequence >= least)
    return replace(record, approvals=kept, least=least)


def fitted(record: Kept) -> Kept:
    """Return the record if the store has room for it. Raises ApprovalRoom."""
    try:
        record.pack()
    except ConflictError as error:
        raise ApprovalRoom(
            f"another approval ({error})",
            f"{len(record.approvals)} would be kept; --revoke-older takes those with a lower sequence away.",
        ) from error
    return record


def sequence_in_use(record: BootArea | GroupSeal, present: Mapping[int, bytes], now: float) -> int | None:
    """Return the highest sequence of the approvals that hold now, None where none does."""
    holding = choose(approvals_in(record), present, now).holding
    return holding[0].sequence if holding else None


def pcrs_of(records: Iterable[BootArea | GroupSeal]) -> set[int]:
    """Return the PCRs that any of the records' approvals is about."""
    return {pcr for record in records for approval in approvals_in(record) for pcr in approval.selection}


def free_slot(seals: Iterable[GroupSeal], held: tuple[int, ...]) -> tuple[int, int]:
    """Return a slot that no group has, and the sequence that the index holds there: one never used, if possible.

    Raises:
        ApprovalRoom: every slot is taken.

    """
    taken = {seal.slot for seal in seals} | {PLATFORM_SLOT}
    free = [slot for slot in range(SLOTS) if slot not in taken]
    if not free:
        raise ApprovalRoom(
            f"another group with an approver: the revocation index has {SLOTS - 1} places for them",
            "Remove a group that has one, or make this one without.",
        )
    slot = min(free, key=lambda slot: (held[slot], slot))
    return slot, held[slot]


def leasts(boot: BootArea, seals: Iterable[GroupSeal]) -> dict[int, int]:
    """Return slot -> lowest sequence not revoked, as far as the store knows: how a new index begins."""
    known = {seal.slot: seal.least for seal in seals if seal.slot is not None}
    return known | {PLATFORM_SLOT: boot.least}
