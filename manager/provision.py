"""`vtpm-manager init`: keys, seals, anchor, store, catalogue and configuration of a new installation.

The last step puts the store in place; whatever interrupts before that leaves nothing that `run` would take for a store.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

from manager import escrow, hierarchies
from manager.anchor import clean_stop
from manager.approval_files import write_targets
from manager.approval_key import ApproverPublic
from manager.approval_records import PLATFORM_SLOT, reference_of
from manager.catalogue_place import catalogue_place
from manager.config import CatalogueConfig, Config, Layout, StoreConfig, TpmConfig
from manager.durable import sync_directory
from manager.errors import ConflictError, ManagerError, UsageError
from manager.escrow import EscrowPlace, EscrowPurpose
from manager.group_rows import group_row
from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import TpmError
from manager.hwtpm_hierarchies import Hierarchy
from manager.hwtpm_records import AnchorInfo
from manager.init_leftovers import clean_up_interrupted
from manager.keys import BootArea, GroupSeal, PlatformSecret, catalogue_key, store_check
from manager.policy import SealPolicy, parse_pcrs
from manager.policy_references import group_reference, platform_reference
from manager.recovery_key import RecoveryPublic
from manager.restoring import refuse_unfinished
from manager.revocation_writer import RevocationWriter
from manager.store_place import begin_store, finish_store, unfinished_store
from storage.catalogue import Catalogue, Happened, Place, now
from storage.errors import CatalogueError, CommitRefused, NameTaken, StorageFull
from storage.secrets import GroupKey
from storage.store import Store
from storage.store_records import GroupFlags, GroupRecord, PutGroup

_log = logging.getLogger("vtpm.init")
DEFAULT_GROUP: Final = "default"
PCRS_NONE: Final = "none"


@dataclass(frozen=True, slots=True)
class InitOptions:
    """What `init` was asked for; the fields are its options."""

    tcti: str
    locality: int
    pcrs: str
    recovery: Path | None
    store_size: int
    store: Path | None = None  # a file or block device for it; in the state directory otherwise
    catalogue: str = ""  # URL of its database; empty: a file in the state directory
    set_hierarchy_auth: bool = False  # set the TPM's hierarchy passwords that are empty
    hierarchy_auths: Mapping[Hierarchy, bytes] = field(default_factory=dict, repr=False)  # those that are set
    saa: Path | None = None  # public key of the approver of the platform object and the default group


def wrap_platform(recovery: RecoveryPublic, store: UUID, secret: PlatformSecret) -> bytes:
    """Return the off-line escrow of the platform secret."""
    return escrow.wrap(secret.reveal(), recovery, EscrowPlace(store, EscrowPurpose.STORE_KEY))


def wrap_group(recovery: RecoveryPublic, store: UUID, group: UUID, key: GroupKey) -> bytes:
    """Return the off-line escrow of a group's master key."""
    return escrow.wrap(key.reveal(), recovery, EscrowPlace(store, EscrowPurpose.GROUP_KEY, group))


def check_options(options: InitOptions) -> RecoveryPublic | None:
    """Return the recovery key; refuse a PCR binding that nobody could ever undo.

    Raises:
        UsageError: PCRs are bound without a recovery key. ManagerError: the key cannot be read.

    """
    if options.recovery is None and options.pcrs != PCRS_NONE:
        raise UsageError(
            "without a recovery key a firmware update would lock every vTPM out for good: give --recovery PUB.pem "
            "(made by 'vtpm-recovery-key new FILE'), or bind no PCRs: --no-recovery --pcrs none"
        )
    if options.pcrs != PCRS_NONE:
        parse_pcrs(options.pcrs)
    elif options.saa is not None:
        raise UsageError("an approver says what PCRs must be: name those that he is asked for, --pcrs sha256:...")
    if options.saa is not None:
        ApproverPublic.load(str(options.saa))
    return RecoveryPublic.load(str(options.recovery)) if options.recovery else None


def policy_for(
    tpm: HardwareTpm,
    pcrs: str,
    recovery: RecoveryPublic | None,
    reference: bytes,
    predicted: tuple[dict[int, bytes], ...] = (),
    saa: str = "",
) -> SealPolicy:
    """Return the seal policy for the PCR values of now (and predicted ones), with the recovery branch.

    With an approver (`saa`: its public key, PEM) its approvals say what the PCRs must be, and none are bound.
    """
    approver = ApproverPublic.parse(saa.encode()).point if saa else None
    values = () if approver or pcrs == PCRS_NONE else (tpm.pcr_values_to_seal(parse_pcrs(pcrs)), *predicted)
    return SealPolicy.build(
        pcrs=values,
        approver_point=approver,
        recovery_point=recovery.signing_point if recovery else None,
        reference=reference,
        locality=tpm.locality or None,
    )


def initialise(layout: Layout, options: InitOptions, tpm: HardwareTpm) -> UUID:
    """Make a new installation in the state directory; returns the store's UUID.

    Raises:
        ConflictError: there is one already. UsageError, TpmError, ManagerError: see their messages.

    """
    recovery = check_options(options)
    refuse_existing(layout)
    tpm.check_locality()
    auths = options.hierarchy_auths
    tpm.use_hierarchy_auths(auths.get(Hierarchy.OWNER, b""), auths.get(Hierarchy.ENDORSEMENT, b""))
    srk_name = tpm.provision_srk()
    place = catalogue_place(layout, options.catalogue)
    clean_up_interrupted(layout, tpm, place)
    tpm.use_hierarchy_auths(auths.get(Hierarchy.OWNER, b""), auths.get(Hierarchy.ENDORSEMENT, b""))
    passwords = hierarchies.plan(
        tpm.properties(),
        options.hierarchy_auths,
        set_empty=options.set_hierarchy_auth,
        recovery=recovery is not None,
    )
    hierarchies.prove(tpm, passwords.given)
    made = _Made(uuid4(), uuid4(), passwords.with_auths(PlatformSecret.new()), _approver(options))
    # The index is defined last: from then on the unfinished store tells the next init which one it is.
    anchor = tpm.anchor_plan(tpm.anchor_free_index())
    revocation = tpm.revocations.place(made.writer.point) if made.saa else None
    try:
        policy = policy_for(tpm, options.pcrs, recovery, made.reference(revocation), saa=made.saa)
        boot = BootArea(
            platform=tpm.seal(made.secret.reveal(), policy),
            anchor=anchor,
            escrow=wrap_platform(recovery, made.store, made.secret) if recovery else b"",
            recovery=recovery.to_pem().decode("ascii") if recovery else "",
            hierarchies=passwords.kept(recovery, made.store) if recovery else b"",
            saa=made.saa,
            slot=PLATFORM_SLOT if made.saa else None,
            revocation=revocation,
        )
        group = _default_group(tpm, options, recovery, made, revocation)
        digest = _make_store(begin_store(layout, options.store, made.store), made, boot, group, options.store_size)
        sync_directory(layout.state_dir)
        if revocation is not None:
            tpm.revocations.ensure(revocation, made.writer, {})
            write_targets(layout, tpm, made.store, boot, {made.group: group.record}, options.pcrs)
        tpm.anchor_define(anchor.index, made.secret.anchor_auth)
        tpm.anchor_write(anchor, made.secret.anchor_auth, clean_stop(digest), first=True)
        _make_catalogue(place, made, group)
        write_config(layout.config, _config(options, srk_name, made))
        hierarchies.set_made(tpm, passwords.before_finish)
        finish_store(layout)
    except BaseException:
        try:
            clean_up_interrupted(layout, tpm, place, made.secret)
        except (TpmError, CatalogueError, ConflictError) as error:
            _log.warning("what init has made so far is left to the next init to take away: %s", error)
        raise
    made.secret.wipe()
    _set_lockout(tpm, passwords)
    return made.store


def _set_lockout(tpm: HardwareTpm, passwords: hierarchies.Plan) -> None:
    """Set it when the store is in place: nothing that a cut `init` leaves could take it away again."""
    try:
        hierarchies.set_made(tpm, passwords.made)
    except TpmError as error:
        raise ManagerError(
            f"the installation is made, but the lockout password is not set: {error} 'vtpm-manager show-hierarchy-auth "
            f"--complete --key FILE' sets it from the escrow"
        ) from error


@dataclass(frozen=True, slots=True)
class _Made:
    """A new installation that is not in place yet."""

    store: UUID
    group: UUID
    secret: PlatformSecret
    saa: str  # the approver's public key (PEM), "": none

    @property
    def writer(self) -> RevocationWriter:
        return RevocationWriter.of(self.secret.store_key, self.store)

    def reference(self, revocation: AnchorInfo | None) -> bytes:
        if not self.saa:
            return platform_reference(self.store)
        return reference_of(self.store, None, PLATFORM_SLOT, revocation)


def _config(options: InitOptions, srk_name: bytes, made: _Made) -> Config:
    return Config(
        tpm=TpmConfig(
            tcti=options.tcti,
            locality=options.locality,
            pcrs=options.pcrs,
            srk_name=srk_name.hex(),
            store_check=store_check(made.secret.store_key, made.store),
        ),
        store=StoreConfig(size=options.store_size),
        catalogue=CatalogueConfig(url=options.catalogue),
    )


def refuse_existing(layout: Layout) -> None:
    """Refuse to initialise over anything that may be, or have been, an installation.

    Raises:
        ConflictError: the state directory has a store, or a catalogue that no interrupted init left behind.

    """
    refuse_unfinished(layout.state_dir)
    unfinished = os.path.lexists(unfinished_store(layout))
    for path in (layout.store, layout.catalogue):
        if os.path.lexists(path) and not (path == layout.catalogue and unfinished):
            raise ConflictError(
                f"{path} is there already: this state directory holds an installation. Nothing was changed. "
                f"'vtpm-manager run' starts it; to make another, name another --state-dir"
            )


def _approver(options: InitOptions) -> str:
    return "" if options.saa is None else ApproverPublic.load(str(options.saa)).to_pem().decode("ascii")


def _default_group(
    tpm: HardwareTpm,
    options: InitOptions,
    recovery: RecoveryPublic | None,
    made: "_Made",
    revocation: AnchorInfo | None,
) -> PutGroup:
    key = GroupKey.new()
    slot = PLATFORM_SLOT + 1 if made.saa else None
    reference = reference_of(made.store, made.group, slot, revocation) if made.saa else group_reference(made.group)
    policy = policy_for(tpm, options.pcrs, recovery, reference, saa=made.saa)
    seal = GroupSeal(
        name=DEFAULT_GROUP,
        sealed=tpm.seal(key.reveal(), policy),
        escrow=wrap_group(recovery, made.store, made.group, key) if recovery else b"",
        saa=made.saa,
        slot=slot,
    )
    return PutGroup(GroupRecord(made.group, GroupFlags.EPOCHS, seal.pack()), key)


def _make_store(descriptor: int, made: _Made, boot: BootArea, group: PutGroup, size: int) -> bytes:
    """Make the store image and return its digest, which becomes the first durable anchor."""
    try:
        with Store.create(descriptor, made.store, made.secret.store_key, boot.pack(), size) as image:
            image.commit([group])
            image.checkpoint()
            return image.digest()
    except CommitRefused as error:
        raise UsageError(f"--store-size {size} cannot be used: {error}") from error
    except StorageFull as error:
        raise ManagerError(f"there is no room for a store of {size} bytes: {error}") from error
    finally:
        os.close(descriptor)


def _make_catalogue(place: Place, made: _Made, group: PutGroup) -> None:
    try:
        catalogue = Catalogue.create(place, catalogue_key(made.secret.store_key, made.store), made.store)
    except NameTaken as error:
        raise ConflictError(f"{error}. Nothing was changed: name an empty database, or none") from error
    with catalogue:
        row = group_row(made.group, GroupSeal.unpack(group.record.blob), now())
        catalogue.add_group(row, Happened("initialised", f"store {made.store}"))


def write_config(path: Path, config: Config) -> None:
    """Write a configuration so that a power cut leaves the old or the new one, whole."""
    temporary = path.with_suffix(".new")
    with open(temporary, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(config.to_toml())
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_directory(path.parent)
