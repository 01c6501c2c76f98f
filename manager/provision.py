"""`vtpm-manager init`: keys, seals, anchor, store, catalogue and configuration of a new installation.

The last step puts the store in place; whatever interrupts before that leaves nothing that `run` would take for a store.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

from manager import escrow
from manager.anchor import clean_stop
from manager.config import Config, Layout, TpmConfig
from manager.errors import ConflictError, UsageError
from manager.escrow import EscrowPlace, EscrowPurpose
from manager.hwtpm import HardwareTpm
from manager.keys import BootArea, GroupSeal, PlatformSecret, catalogue_key, store_check
from manager.policy import SealPolicy, parse_pcrs
from manager.recovery_key import RecoveryPublic
from storage.catalogue import Catalogue, GroupRow
from storage.secrets import GroupKey
from storage.store import Store
from storage.store_records import GroupRecord, PutGroup

DEFAULT_GROUP: Final = "default"
PCRS_NONE: Final = "none"
_PLATFORM_REFERENCE: Final = b"vtpm-manager platform v1 "
_GROUP_REFERENCE: Final = b"vtpm-manager group v1 "


@dataclass(frozen=True, slots=True)
class InitOptions:
    """What `init` was asked for; the fields are its options."""

    tcti: str
    locality: int
    pcrs: str
    recovery: Path | None
    store_size: int


def wrap_platform(recovery: RecoveryPublic, store: UUID, secret: PlatformSecret) -> bytes:
    """Return the off-line escrow of the platform secret."""
    return escrow.wrap(secret.reveal(), recovery, EscrowPlace(store, EscrowPurpose.STORE_KEY))


def wrap_group(recovery: RecoveryPublic, store: UUID, group: UUID, key: GroupKey) -> bytes:
    """Return the off-line escrow of a group's master key."""
    return escrow.wrap(key.reveal(), recovery, EscrowPlace(store, EscrowPurpose.GROUP_KEY, group))


def platform_reference(store: UUID) -> bytes:
    """Return the policyRef that binds recovery statements to this store's platform object."""
    return _PLATFORM_REFERENCE + store.bytes


def group_reference(group: UUID) -> bytes:
    """Return the policyRef of a group's object."""
    return _GROUP_REFERENCE + group.bytes


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
    return RecoveryPublic.load(str(options.recovery)) if options.recovery else None


def policy_for(
    tpm: HardwareTpm,
    pcrs: str,
    recovery: RecoveryPublic | None,
    reference: bytes,
    predicted: tuple[dict[int, bytes], ...] = (),
) -> SealPolicy:
    """Return the seal policy for the PCR values of now (and predicted ones), with the recovery branch."""
    values = () if pcrs == PCRS_NONE else (tpm.pcr_values_to_seal(parse_pcrs(pcrs)), *predicted)
    return SealPolicy.build(
        pcrs=values,
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
    srk_name = tpm.provision_srk()
    store_uuid = uuid4()
    secret = PlatformSecret.new()
    index = tpm.anchor_free_index()
    anchor = tpm.anchor_define(index, secret.anchor_auth)
    try:
        boot = BootArea(
            platform=tpm.seal(secret.reveal(), policy_for(tpm, options.pcrs, recovery, platform_reference(store_uuid))),
            anchor=anchor,
            escrow=wrap_platform(recovery, store_uuid, secret) if recovery else b"",
            recovery=recovery.to_pem().decode("ascii") if recovery else "",
        )
        temporary = layout.store.with_suffix(".new")
        group_uuid = uuid4()
        group = _default_group(tpm, options, recovery, store_uuid, group_uuid)
        digest = _make_store(temporary, store_uuid, secret, boot, group, options.store_size)
        tpm.anchor_write(anchor, secret.anchor_auth, clean_stop(digest), first=True)
    except BaseException:
        tpm.anchor_undefine(anchor)
        raise
    _make_catalogue(layout, secret, store_uuid, group_uuid)
    config = Config(
        tpm=TpmConfig(
            tcti=options.tcti,
            locality=options.locality,
            pcrs=options.pcrs,
            srk_name=srk_name.hex(),
            store_check=store_check(secret.store_key, store_uuid),
        )
    )
    write_config(layout.config, config)
    temporary.rename(layout.store)
    sync_directory(layout.state_dir)
    secret.wipe()
    return store_uuid


def refuse_existing(layout: Layout) -> None:
    """Refuse to initialise over anything that may be, or have been, an installation.

    Raises:
        ConflictError: the state directory has a store or a catalogue.

    """
    for path in (layout.store, layout.catalogue):
        if os.path.lexists(path):
            raise ConflictError(
                f"{path} is there already: this state directory holds an installation. Nothing was changed. "
                f"'vtpm-manager run' starts it; to make another, name another --state-dir"
            )


def _default_group(
    tpm: HardwareTpm, options: InitOptions, recovery: RecoveryPublic | None, store: UUID, group: UUID
) -> PutGroup:
    key = GroupKey.new()
    seal = GroupSeal(
        name=DEFAULT_GROUP,
        sealed=tpm.seal(key.reveal(), policy_for(tpm, options.pcrs, recovery, group_reference(group))),
        escrow=wrap_group(recovery, store, group, key) if recovery else b"",
    )
    return PutGroup(GroupRecord(group, 0, seal.pack()), key)


def _make_store(path: Path, store: UUID, secret: PlatformSecret, boot: BootArea, group: PutGroup, size: int) -> bytes:
    """Make the store image at `path` and return its digest, which becomes the first durable anchor."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        image = Store.create(descriptor, store, secret.store_key, boot.pack(), size)
        try:
            image.commit([group])
            image.checkpoint()
            return image.digest()
        finally:
            image.close()
    finally:
        os.close(descriptor)


def _make_catalogue(layout: Layout, secret: PlatformSecret, store: UUID, group: UUID) -> None:
    layout.catalogue.unlink(missing_ok=True)
    catalogue = Catalogue.create(layout.catalogue, catalogue_key(secret.store_key, store))
    try:
        catalogue.add_group(GroupRow(uuid=group, name=DEFAULT_GROUP))
        catalogue.log("initialised", None, f"store {store}")
    finally:
        catalogue.close()


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


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
