"""`vtpm-manager recover`: the hardware TPM was cleared, replaced or lost; the recovery key opens the off-line escrow.

It cannot apply the rollback rule: the anchors went with the TPM. Hence it refuses while the old anchor still stands,
unless the operator says that he goes back on purpose; the catalogue's events keep that he did.
"""

import hmac
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

from manager import escrow
from manager.anchor import clean_stop
from manager.catalogue_place import place_of
from manager.config import Config, Layout
from manager.errors import ConflictError, IntegrityError, UsageError
from manager.escrow import EscrowPlace, EscrowPurpose
from manager.group_rows import follow_seals
from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import AnchorDenied, AnchorMissing, SrkChanged, TpmCleared
from manager.keys import BootArea, GroupSeal, PlatformSecret, catalogue_key, store_check
from manager.opening import integrity, locked_store, open_tpm, pin_srk, read_boot_area
from manager.provision import group_reference, platform_reference, policy_for
from manager.recovery_key import RecoveryPrivate
from storage.catalogue import Catalogue
from storage.secrets import GroupKey
from storage.store import Store
from storage.store_records import GroupRecord, PutGroup

_STILL_THERE: Final = (
    "the hardware TPM is the one that this store is sealed to, and its anchor stands: recovery would only take the "
    "rollback protection away. If its PCRs have changed, run 'vtpm-manager reseal --recovery-key FILE'. If the newest "
    "store is lost and you must go back to this one, say --accept-older-store. Nothing was changed"
)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a recovery did; `sequence` is the store's, so that an operator can compare it with what he knows."""

    store: UUID
    groups: int
    vtpms: int
    sequence: int


def recover(
    layout: Layout, config: Config, key: RecoveryPrivate, *, accept_older_store: bool = False
) -> tuple[Recovered, Config]:
    """Provision a new (or cleared) TPM for the store at hand.

    Returns what was done, and the configuration with the new pins, to keep from now on. What was interrupted can be
    done again. With `accept_older_store` also where the TPM is the old one: the operator goes back, on purpose.

    Raises:
        ConflictError: this TPM is the one that the store is sealed to: reseal instead. UsageError: no escrow.
        EscrowWrongKey, IntegrityError, TpmError: see their messages.

    """
    with locked_store(layout) as descriptor, open_tpm(layout, config) as tpm:
        uuid, boot = read_boot_area(descriptor)
        if not boot.escrow:
            raise UsageError("this installation was made without a recovery key: there is no escrow to open")
        secret = PlatformSecret(escrow.unwrap(boot.escrow, key, EscrowPlace(uuid, EscrowPurpose.STORE_KEY)))
        if not hmac.compare_digest(store_check(secret.store_key, uuid), config.tpm.store_check):
            raise IntegrityError("the escrow in this store holds the key of another store. Nothing was changed")
        old_anchor = _old_anchor(tpm, config, boot, secret)
        if old_anchor and not accept_older_store:
            raise ConflictError(_STILL_THERE)
        with integrity():
            store = Store.open(descriptor, secret.store_key)
        try:
            keys = _unlock(store, key)
            srk_name = tpm.provision_srk()
            _provision(tpm, config, store, boot, secret, keys, key)
            done = Recovered(uuid, len(keys), len(store), store.sequence)
            if old_anchor:
                tpm.anchor_undefine(boot.anchor)
            place = place_of(layout, config)
            with integrity(), Catalogue.open(place, catalogue_key(secret.store_key, uuid), uuid) as catalogue:
                follow_seals(catalogue, store)
                how = "the operator accepted an older store" if old_anchor else "new hardware TPM"
                catalogue.log("recovered", None, f"{how}; store sequence {done.sequence}, rollback not checked")
        finally:
            store.close()
        secret.wipe()
    return done, replace(config, tpm=replace(config.tpm, srk_name=srk_name.hex()))


def _old_anchor(tpm: HardwareTpm, config: Config, boot: BootArea, secret: PlatformSecret) -> bool:
    """Tell whether this TPM still has the store's anchor: then the rollback rule could be applied, and must be."""
    try:
        pin_srk(tpm, config)
        tpm.anchor_read(boot.anchor, secret.anchor_auth)
    except (TpmCleared, SrkChanged, AnchorMissing, AnchorDenied):
        return False
    return True


def _unlock(store: Store, recovery: RecoveryPrivate) -> dict[UUID, GroupKey]:
    """Open every group by its escrow."""
    keys = {}
    for group, record in store.groups().items():
        sealed = GroupSeal.unpack(record.blob).escrow
        key = GroupKey(escrow.unwrap(sealed, recovery, EscrowPlace(store.uuid, EscrowPurpose.GROUP_KEY, group)))
        with integrity():
            store.unlock_group(group, key)
        keys[group] = key
    return keys


def _provision(
    tpm: HardwareTpm,
    config: Config,
    store: Store,
    boot: BootArea,
    secret: PlatformSecret,
    keys: dict[UUID, GroupKey],
    recovery: RecoveryPrivate,
) -> None:
    """Seal every key to the new TPM, define its anchor, and let it stand for the store as it is then."""
    public = recovery.public
    for group, key in keys.items():
        record = store.groups()[group]
        policy = policy_for(tpm, config.tpm.pcrs, public, group_reference(group))
        seal = replace(GroupSeal.unpack(record.blob), sealed=tpm.seal(key.reveal(), policy))
        store.commit([PutGroup(GroupRecord(group, record.flags, seal.pack()), key)])
    platform = tpm.seal(secret.reveal(), policy_for(tpm, config.tpm.pcrs, public, platform_reference(store.uuid)))
    anchor = tpm.anchor_define(tpm.anchor_free_index(), secret.anchor_auth)
    store.write_boot_area(replace(boot, platform=platform, anchor=anchor).pack())
    tpm.anchor_write(anchor, secret.anchor_auth, clean_stop(store.digest()), first=True)
