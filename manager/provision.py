"""`vtpm-manager init`: keys, seals, anchor, store, catalogue and configuration of a new installation.

The last step puts the store in place; whatever interrupts before that leaves nothing that `run` would take for a store.
"""

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

from manager import escrow
from manager.anchor import clean_stop
from manager.catalogue_place import catalogue_place
from manager.config import CatalogueConfig, Config, Layout, StoreConfig, TpmConfig
from manager.durable import sync_directory
from manager.errors import ConflictError, IntegrityError, ManagerError, UsageError
from manager.escrow import EscrowPlace, EscrowPurpose
from manager.group_rows import group_row
from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import AnchorDenied, AnchorMissing, PolicyMismatch, SealDamaged, TpmError
from manager.keys import BootArea, GroupSeal, PlatformSecret, catalogue_key, store_check
from manager.opening import read_boot_area
from manager.policy import SealPolicy, parse_pcrs
from manager.recovery_key import RecoveryPublic
from manager.restoring import refuse_unfinished
from manager.store_place import begin_store, finish_store, is_ours, remove_unfinished, unfinished_store
from storage.catalogue import Catalogue, Happened, Place, now
from storage.errors import CatalogueError, CommitRefused, NameTaken, StorageFull
from storage.secrets import GroupKey
from storage.store import Store
from storage.store_records import GroupFlags, GroupRecord, PutGroup

_log = logging.getLogger("vtpm.init")
DEFAULT_GROUP: Final = "default"
PCRS_NONE: Final = "none"
_SQLITE_TAILS: Final = ("", "-wal", "-shm", "-journal")
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
    store: Path | None = None  # a file or block device for it; in the state directory otherwise
    catalogue: str = ""  # URL of its database; empty: a file in the state directory


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
    place = catalogue_place(layout, options.catalogue)
    clean_up_interrupted(layout, tpm, place)
    made = _Made(uuid4(), uuid4(), PlatformSecret.new())
    # The index is defined last: from then on the unfinished store tells the next init which one it is.
    anchor = tpm.anchor_plan(tpm.anchor_free_index())
    try:
        boot = BootArea(
            platform=tpm.seal(made.secret.reveal(), policy_for(tpm, options.pcrs, recovery, made.reference)),
            anchor=anchor,
            escrow=wrap_platform(recovery, made.store, made.secret) if recovery else b"",
            recovery=recovery.to_pem().decode("ascii") if recovery else "",
        )
        group = _default_group(tpm, options, recovery, made.store, made.group)
        digest = _make_store(begin_store(layout, options.store, made.store), made, boot, group, options.store_size)
        sync_directory(layout.state_dir)
        tpm.anchor_define(anchor.index, made.secret.anchor_auth)
        tpm.anchor_write(anchor, made.secret.anchor_auth, clean_stop(digest), first=True)
        _make_catalogue(place, made, group)
        write_config(layout.config, _config(options, srk_name, made))
        finish_store(layout)
    except BaseException:
        try:
            clean_up_interrupted(layout, tpm, place)
        except (TpmError, CatalogueError) as error:
            _log.warning("what init has made so far is left to the next init to take away: %s", error)
        raise
    made.secret.wipe()
    return made.store


@dataclass(frozen=True, slots=True)
class _Made:
    """A new installation that is not in place yet."""

    store: UUID
    group: UUID
    secret: PlatformSecret

    @property
    def reference(self) -> bytes:
        return platform_reference(self.store)


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


def clean_up_interrupted(layout: Layout, tpm: HardwareTpm, place: Place | None = None) -> None:
    """Take away what an `init` that was cut short left behind, its NV index too; nothing where there is nothing.

    Raises:
        TpmError, CatalogueError: hardware TPM or database failed; what was left behind is kept for the next try.

    """
    unfinished = unfinished_store(layout)
    if not os.path.lexists(unfinished):
        return
    if is_ours(layout):  # a link may lead to what is another's by now
        _undefine_unfinished(unfinished, tpm)
        if isinstance(place, str):
            _drop_unfinished(unfinished, place)
    for tail in _SQLITE_TAILS:
        layout.catalogue.with_name(layout.catalogue.name + tail).unlink(missing_ok=True)
    remove_unfinished(layout)
    sync_directory(layout.state_dir)
    _log.warning("took away what an interrupted init had left in %s", layout.state_dir)


def _drop_unfinished(path: Path, place: str) -> None:
    """Take the catalogue of an unfinished store out of its database, and no other's."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(IntegrityError):  # not finished, so the catalogue was not begun
            store, _ = read_boot_area(descriptor)
            if Catalogue.whose(place) == store:
                Catalogue.drop(place)
    finally:
        os.close(descriptor)


def _undefine_unfinished(path: Path, tpm: HardwareTpm) -> None:
    """Undefine the index of an unfinished store if it is that store's: its key opens it, or nobody has written it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # a link leads to where init was to make the store
    except OSError as error:
        raise ConflictError(f"{path}, which an interrupted init left, cannot be read: {error.strerror}") from error
    try:
        boot = read_boot_area(descriptor)[1]
    except IntegrityError:
        return  # the store was not finished either, so its index was not defined yet
    finally:
        os.close(descriptor)
    try:
        secret = PlatformSecret(tpm.unseal(boot.platform))
        try:
            tpm.anchor_read(boot.anchor, secret.anchor_auth)
        finally:
            secret.wipe()
    except AnchorMissing:
        _log.debug("NV index 0x%08x was not defined, or never written", boot.anchor.index)
    except (AnchorDenied, PolicyMismatch, SealDamaged) as error:
        _log.warning("NV index 0x%08x may be left over from an interrupted init: %s", boot.anchor.index, error)
        return
    with suppress(AnchorMissing):
        tpm.anchor_undefine(boot.anchor)


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


def _default_group(
    tpm: HardwareTpm, options: InitOptions, recovery: RecoveryPublic | None, store: UUID, group: UUID
) -> PutGroup:
    key = GroupKey.new()
    seal = GroupSeal(
        name=DEFAULT_GROUP,
        sealed=tpm.seal(key.reveal(), policy_for(tpm, options.pcrs, recovery, group_reference(group))),
        escrow=wrap_group(recovery, store, group, key) if recovery else b"",
    )
    return PutGroup(GroupRecord(group, GroupFlags.EPOCHS, seal.pack()), key)


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
