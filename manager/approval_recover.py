"""The revocation index on another TPM, or after somebody took it away: for `vtpm-manager recover`."""

import logging
from dataclasses import replace

from manager.approval_records import approvals_in, leasts, reference_of
from manager.errors import UsageError
from manager.hwtpm import HardwareTpm
from manager.hwtpm_revocation import FIRST_INDEX
from manager.keys import BootArea, GroupSeal, PlatformSecret
from manager.policy_references import platform_reference
from manager.revocation_writer import RevocationWriter
from storage.store import Store

_log = logging.getLogger("vtpm.approval")


def with_index(tpm: HardwareTpm, store: Store, boot: BootArea, secret: PlatformSecret) -> BootArea:
    """Return the boot area with a revocation index that this TPM has; it begins at what the store knows as revoked.

    Where it got the same number its Name is the same as before, too, and approvals go on being good; else they are
    taken away, and new ones have to be signed.

    Raises:
        TpmError: the hardware TPM did not define or write it.

    """
    if boot.revocation is None:
        return boot
    writer = RevocationWriter.of(secret.store_key, store.uuid)
    seals = [GroupSeal.unpack(record.blob) for record in store.groups().values()]
    prefer = boot.revocation.index or FIRST_INDEX
    info = tpm.revocations.renew(writer, leasts(boot, seals), prefer)
    if info != boot.revocation:
        _log.warning("the revocation index is 0x%08x now: all approvals have to be signed anew", info.index)
    kept = tuple(one.to_bytes().hex() for one in approvals_in(boot) if one.nv_name == info.name)
    return replace(boot, revocation=info, approvals=kept)


def by_another_approver(boot: BootArea, saa: str) -> BootArea:
    """Return the boot area of an installation that is to be sealed for another approver (`saa`, PEM).

    What is revoked stays so; the former approver's word counts no longer.

    Raises:
        UsageError: it has none.

    """
    if not boot.saa:
        raise UsageError(
            "the store key has no approver, so none can take its place: one is chosen at 'vtpm-manager init --saa'. "
            "Nothing was changed. A group gets one by 'vtpm-group-update --saa'"
        )
    return boot if saa == boot.saa else replace(boot, saa=saa, approvals=())


def platform_policy_reference(store: Store, boot: BootArea) -> bytes:
    """Return the policyRef of the platform object as it is to be sealed."""
    if not boot.saa:
        return platform_reference(store.uuid)
    return reference_of(store.uuid, None, boot.slot, boot.revocation)


def of_this_index(seal: GroupSeal, boot: BootArea) -> GroupSeal:
    """Return a group's record without the approvals that name another index."""
    if boot.revocation is None:
        return seal
    name = boot.revocation.name
    kept = tuple(one.to_bytes().hex() for one in approvals_in(seal) if one.nv_name == name)
    return replace(seal, approvals=kept)
