"""`vtpm-manager recover`: the hardware TPM was cleared, replaced or lost; the recovery key opens the off-line escrow.

It cannot apply the rollback rule: the anchors went with the TPM. Hence it refuses while the old anchor still stands:
going back to an older store on purpose is `rollback`'s. The catalogue's events keep what was done.
"""

import hmac
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

from manager import escrow, hierarchies
from manager.anchor import clean_stop
from manager.anchoring import note_present
from manager.approval_recover import of_this_index, platform_policy_reference, with_index
from manager.attestation import without_a_strangers
from manager.catalogue_place import place_of
from manager.config import Config, Layout
from manager.errors import ConflictError, IntegrityError, NotFoundError, UsageError
from manager.escrow import EscrowPlace, EscrowPurpose
from manager.group_rows import follow_seals
from manager.group_terms import Terms, Wanted, seal_key
from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import AnchorDenied, AnchorMissing, SrkChanged, TpmCleared
from manager.hwtpm_hierarchies import Hierarchy
from manager.keys import BootArea, GroupSeal, PlatformSecret, catalogue_key, store_check
from manager.migration_rollback import begin_anew
from manager.opening import integrity, locked_store, open_store, open_tpm, pin_srk, read_boot_area
from manager.provision import policy_for
from manager.recovery_errors import EscrowWrongKey
from manager.recovery_key import RecoveryPrivate
from storage.catalogue import Catalogue
from storage.secrets import GroupKey
from storage.store import Store
from storage.store_records import PutGroup

_STILL_THERE: Final = (
    "the hardware TPM is the one that this store is sealed to, and its anchor stands: recovery would only take the "
    "rollback protection away. If its PCRs have changed, run 'vtpm-manager reseal --recovery-key FILE'. If the newest "
    "store is lost and you must go back to this one, run 'vtpm-manager accept-rollback'. Nothing was changed"
)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a recovery did; `sequence` is the store's, so that an operator can compare it with what he knows.

    `groups` are the names of those that are open again, `left` leads from the others to why they stay closed.
    """

    store: UUID
    groups: list[str]
    vtpms: int
    sequence: int
    left: dict[str, str]


def recover(layout: Layout, config: Config, key: RecoveryPrivate) -> tuple[Recovered, Config]:
    """Provision a new (or cleared) TPM for the store at hand.

    Returns what was done, and the configuration with the new pins, to keep from now on. What was interrupted can be
    done again.

    Raises:
        ConflictError: this TPM is the one that the store is sealed to: reseal instead. UsageError: no escrow.
        EscrowWrongKey, IntegrityError, TpmError: see their messages.

    """
    with locked_store(layout) as descriptor, open_tpm(layout, config) as tpm:
        uuid, boot, secret = _by_escrow(descriptor, config, key)
        hierarchies.use(tpm, secret)
        if _old_anchor(tpm, config, boot, secret):
            raise ConflictError(_STILL_THERE)
        with integrity():
            store = Store.open(descriptor, secret.store_key)
        try:
            boot = BootArea.unpack(store.boot_area)  # authentic, other than what served to get here
            keys, left = _unlock(store, key)
            srk_name = tpm.provision_srk()
            with integrity():
                boot = begin_anew(layout.state_dir, secret.store_key, store, boot)
            _provision(tpm, config, store, boot, secret, keys, key)
            hierarchies.set_again(tpm, boot.hierarchies, key, uuid)
            names = sorted(GroupSeal.unpack(store.groups()[group].blob).name for group in keys)
            done = Recovered(uuid, names, len(store), store.sequence, left)
            place = place_of(layout, config)
            with integrity(), Catalogue.open(place, catalogue_key(secret.store_key, uuid), uuid) as catalogue:
                follow_seals(catalogue, store)
                catalogue.log("recovered", None, _event(done))
        finally:
            store.close()
        secret.wipe()
    return done, replace(config, tpm=replace(config.tpm, srk_name=srk_name.hex()))


def _by_escrow(descriptor: int, config: Config, key: RecoveryPrivate) -> tuple[UUID, BootArea, PlatformSecret]:
    """Return the store's UUID, what stands in clear in it, and the secret that its escrow holds."""
    uuid, boot = read_boot_area(descriptor)
    if not boot.escrow:
        raise UsageError("this installation was made without a recovery key: there is no escrow to open")
    secret = PlatformSecret(escrow.unwrap(boot.escrow, key, EscrowPlace(uuid, EscrowPurpose.STORE_KEY)))
    if not hmac.compare_digest(store_check(secret.store_key, uuid), config.tpm.store_check):
        raise IntegrityError("the escrow in this store holds the key of another store. Nothing was changed")
    return uuid, boot, secret


def complete_hierarchies(layout: Layout, config: Config, key: RecoveryPrivate) -> tuple[bytes, list[Hierarchy]]:
    """Set those hierarchy passwords that `init` made and the TPM has not; returns what the store keeps, and which.

    Not by what stands in clear in the store: anybody can make an escrow for a recovery public key, with passwords of
    his choice in it.

    Raises:
        UsageError: there are none. TpmCleared, SrkChanged: another TPM. EscrowError, IntegrityError, BusyError, others.

    """
    with locked_store(layout) as descriptor, open_tpm(layout, config) as tpm:
        pin_srk(tpm, config)
        uuid, _, secret = _by_escrow(descriptor, config, key)
        with secret, integrity(), Store.open(descriptor, secret.store_key) as store:
            kept = BootArea.unpack(store.boot_area).hierarchies
        auths = hierarchies.open_escrow(kept, key, uuid)
        return kept, hierarchies.set_made(tpm, {name: auths[name] for name in hierarchies.made_of(kept)})


def _old_anchor(tpm: HardwareTpm, config: Config, boot: BootArea, secret: PlatformSecret) -> bool:
    """Tell whether this TPM still has the store's anchor: then the rollback rule could be applied, and must be."""
    try:
        pin_srk(tpm, config)
        tpm.anchor_read(boot.anchor, secret.anchor_auth)
    except (TpmCleared, SrkChanged, AnchorMissing, AnchorDenied):
        return False
    return True


def _event(done: Recovered) -> str:
    closed = f", still closed: {', '.join(sorted(done.left))}" if done.left else ""
    return (
        f"new hardware TPM; groups: {', '.join(done.groups) or 'none'}{closed}; store sequence {done.sequence}, "
        f"rollback not checked"
    )


def recover_group(layout: Layout, config: Config, name: str, key: RecoveryPrivate, saa: str | None = None) -> int:
    """Open one group by its escrow, and seal its key to the hardware TPM as it is now; returns how many vTPMs it has.

    For a group with a recovery key of its own, after `recover` on another TPM, or when its PCRs have changed for good.
    The installation itself must open by its policy, and its anchors agree. `saa` (PEM) takes its approver's place.

    Raises:
        NotFoundError: no such group. EscrowWrongKey: another key. UsageError: no escrow, or no approver whose place
        another could take. Others: see `open_store`.

    """
    with locked_store(layout) as descriptor, open_tpm(layout, config) as tpm:
        opened = open_store(descriptor, tpm, config)
        store, boot = opened.store, opened.boot
        try:
            group = _named(store, name)
            record = store.groups()[group]
            seal = _approved_by(saa, of_this_index(GroupSeal.unpack(record.blob), boot))
            terms = Terms.of(seal, config.tpm.pcrs, boot.recovery)
            with _escrowed(store, group, seal, key) as master:
                with integrity():
                    store.unlock_group(group, master)
                note_present(store, tpm.pcr22_read() if tpm.locality == 2 else None)
                made = seal_key(tpm, store.uuid, group, master, seal, terms, (), boot.revocation)
                made = without_a_strangers(tpm, made)
                store.commit([PutGroup(replace(record, blob=made.pack()))])
            tpm.anchor_write(boot.anchor, opened.secret.anchor_auth, clean_stop(store.digest()))
            place, catalogue_of = place_of(layout, config), catalogue_key(opened.secret.store_key, store.uuid)
            with integrity(), Catalogue.open(place, catalogue_of, store.uuid) as catalogue:
                follow_seals(catalogue, store)
                catalogue.log("group-recovered", None, f"{seal.name}: {store.count(group)} vTPMs, by its recovery key")
            return store.count(group)
        finally:
            store.close()
            opened.secret.wipe()


def _approved_by(saa: str | None, seal: GroupSeal) -> GroupSeal:
    """Return the record with another approver, if one is given. Raises UsageError: it has none."""
    if saa is not None and not seal.saa:
        raise UsageError(f"group {seal.name} has no approver, so none can take its place: recover it without --saa")
    return seal if saa is None else Wanted(saa=saa).applied(seal)


def _named(store: Store, name: str) -> UUID:
    for group, record in store.groups().items():
        if name in (str(group), GroupSeal.unpack(record.blob).name):
            return group
    raise NotFoundError(f"there is no group '{name[:80]}' in this store; nothing was changed")


def _escrowed(store: Store, group: UUID, seal: GroupSeal, recovery: RecoveryPrivate) -> GroupKey:
    """Return a group's master key out of its escrow. Raises UsageError: it has none. EscrowError: not by this key."""
    if not seal.escrow:
        raise UsageError(f"group {seal.name} was made without a recovery key: there is no escrow to open")
    return GroupKey(escrow.unwrap(seal.escrow, recovery, EscrowPlace(store.uuid, EscrowPurpose.GROUP_KEY, group)))


def _unlock(store: Store, recovery: RecoveryPrivate) -> tuple[dict[UUID, GroupKey], dict[str, str]]:
    """Open by their escrow the groups whose recovery key this is; say why of the others."""
    keys, left = {}, {}
    for group, record in store.groups().items():
        seal = GroupSeal.unpack(record.blob)
        try:
            key = _escrowed(store, group, seal, recovery)
        except (EscrowWrongKey, UsageError) as error:
            left[seal.name] = f"{error} 'vtpm-manager recover --group {seal.name} --key FILE' opens it with its own key"
            continue
        with integrity():
            store.unlock_group(group, key)
        keys[group] = key
    return keys, left


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
    boot = with_index(tpm, store, boot, secret)
    for group, key in keys.items():
        record = store.groups()[group]
        seal = of_this_index(GroupSeal.unpack(record.blob), boot)
        terms = Terms.of(seal, config.tpm.pcrs, public.to_pem().decode())
        made = seal_key(tpm, store.uuid, group, key, seal, terms, (), boot.revocation)
        made = without_a_strangers(tpm, made)
        store.commit([PutGroup(replace(record, blob=made.pack()), key)])
        key.wipe()
    policy = policy_for(tpm, config.tpm.pcrs, public, platform_policy_reference(store, boot), saa=boot.saa)
    platform = tpm.seal(secret.reveal(), policy)
    anchor = tpm.anchor_define(tpm.anchor_free_index(), secret.anchor_auth)
    store.write_boot_area(replace(boot, platform=platform, anchor=anchor).pack())
    tpm.anchor_write(anchor, secret.anchor_auth, clean_stop(store.digest()), first=True)
