"""Opens an installation: the lock, the hardware TPM, the seals, the store, the rollback rule, the groups. Synchronous.

The order is the argument: nothing of the store is used before the TPM gave its key, and nothing is served before the
anchors agree.
"""

import contextlib
import errno
import fcntl
import hmac
import logging
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from manager import hierarchies
from manager.anchor import Standing, judge
from manager.anchoring import position_of
from manager.approval_errors import RevocationDenied, RevocationMissing
from manager.config import Config, Layout
from manager.embedded import EmbeddedTpm
from manager.errors import BusyError, ConfigurationError, IntegrityError, NotFoundError
from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import PolicyMismatch, RecoveryRefused, SealDamaged
from manager.hwtpm_records import SealedBlob
from manager.hwtpm_setting import TctiKind, TctiSetting
from manager.keys import BootArea, GroupSeal, PlatformSecret, store_check
from manager.named_path import is_device
from storage.errors import BadCatalogueUrl, CatalogueBusy, CatalogueUnreachable, DeviceError, StorageError
from storage.secrets import GroupKey
from storage.store import Store

_log = logging.getLogger("vtpm.open")
Unsealer = Callable[[SealedBlob], bytes]


@dataclass(slots=True)
class Opened:
    """An open installation. `closed` tells for each closed group why its key could not be had."""

    store: Store
    boot: BootArea
    secret: PlatformSecret
    standing: Standing
    closed: dict[UUID, str] = field(default_factory=dict)


@contextlib.contextmanager
def locked_store(layout: Layout) -> Iterator[int]:
    """Open the store image for this process alone; yields its descriptor.

    Raises:
        NotFoundError: there is none. BusyError: another manager has it.

    """
    try:
        descriptor = os.open(layout.store, os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if is_device(layout.store) else 0))
    except FileNotFoundError as error:
        raise NotFoundError(
            f"there is no store at {layout.store}: run 'vtpm-manager init', or name the right --state-dir. If there "
            f"was one, put it back: a new one would not know the vTPMs of the old"
        ) from error
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BusyError(f"{layout.store} is a device in use or mounted; nothing was done") from error
        raise IntegrityError(f"cannot open the store {layout.store}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BusyError(f"another vtpm-manager has {layout.store} open; nothing was done") from error
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_tpm(layout: Layout, config: Config) -> Iterator[HardwareTpm]:
    """Open the configured hardware TPM, starting the embedded one where that is configured; its locality is proved.

    Raises:
        TpmError: it is missing, busy, or at another locality.

    """
    with contextlib.ExitStack() as stack:
        setting = TctiSetting.parse(config.tpm.tcti)
        if setting.kind is TctiKind.EMBEDDED:
            setting = stack.enter_context(EmbeddedTpm(str(layout.embedded_tpm))).setting
        tpm = stack.enter_context(
            HardwareTpm.open(setting, locality=config.tpm.locality, deadline=config.tpm.busy_seconds)
        )
        if tpm.check_locality().weaker:
            _log.warning("the hardware TPM is used at locality 0: the host's own software could unseal our keys too")
        yield tpm


def pin_srk(tpm: HardwareTpm, config: Config) -> None:
    """Open the storage root key whose Name the configuration pins.

    Raises:
        ConfigurationError: no Name is pinned. TpmCleared, SrkChanged: another TPM, or a cleared one.

    """
    try:
        name = bytes.fromhex(config.tpm.srk_name)
    except ValueError:
        name = b""
    if not name:
        raise ConfigurationError("[tpm] srk_name is missing: without the pinned Name the TPM's key cannot be trusted")
    tpm.open_srk(name)


def read_boot_area(descriptor: int) -> tuple[UUID, BootArea]:
    """Return the store's UUID and what stands in clear in it; raises IntegrityError."""
    with integrity():
        store, boot = Store.read_boot_area(descriptor)
    return store, BootArea.unpack(boot)


def open_store(descriptor: int, tpm: HardwareTpm, config: Config, unseal: Unsealer | None = None) -> Opened:
    """Unseal, open, apply the rollback rule, unlock the groups.

    `unseal` is how sealed objects are opened (default: by the present PCRs).

    Raises:
        DeniedError: the TPM's policy does not hold. RolledBackError: an older store. IntegrityError: a damaged one.
        TpmError: the hardware TPM.

    """
    unseal = unseal or tpm.unseal
    pin_srk(tpm, config)
    uuid, boot = read_boot_area(descriptor)
    secret = PlatformSecret(unseal(boot.platform))
    hierarchies.use(tpm, secret)
    if not hmac.compare_digest(store_check(secret.store_key, uuid), config.tpm.store_check):
        raise IntegrityError(
            "this store was not made by this installation: its key is not the one that the configuration pins "
            "([tpm] store_check). Nothing was changed. Put the right store image and configuration together"
        )
    with integrity():
        store = Store.open(descriptor, secret.store_key)
    try:
        boot = BootArea.unpack(store.boot_area)  # what stood in clear has served to get here; this one is authentic
        durable = tpm.anchor_read(boot.anchor, secret.anchor_auth)
        pcr22 = tpm.pcr22_read() if tpm.locality == 2 else None
        standing = judge(position_of(store), durable, pcr22)
        store.note_anchored(durable)
        opened = Opened(store, boot, secret, standing)
        unlock_groups(opened, unseal)
    except BaseException:
        store.close()
        raise
    return opened


def unlock_groups(opened: Opened, unseal: Unsealer) -> None:
    """Unlock every group whose key the TPM gives; note why for the others: what one tenant lost is not the others'."""
    for group, record in opened.store.groups().items():
        seal = GroupSeal.unpack(record.blob)
        try:
            key = group_key(unseal, seal)
        except (PolicyMismatch, RecoveryRefused, RevocationDenied, RevocationMissing, SealDamaged) as error:
            _log.error("group %s stays closed: %s", seal.name, error)
            opened.closed[group] = str(error)
            continue
        with integrity():
            opened.store.unlock_group(group, key)


def group_key(unseal: Unsealer, seal: GroupSeal) -> GroupKey:
    """Return a group's master key as the hardware TPM gives it. Raises PolicyMismatch, SealDamaged, TpmError."""
    return GroupKey(unseal(seal.sealed))


@contextlib.contextmanager
def integrity() -> Iterator[None]:
    """Turn what the storage package says of damaged images into the manager's error."""
    try:
        yield
    except (DeviceError, CatalogueUnreachable, BadCatalogueUrl):
        raise
    except CatalogueBusy as error:
        raise BusyError(str(error)) from error
    except StorageError as error:
        raise IntegrityError(f"this installation cannot be opened: {error}") from error


def permissions_problem(path: Path) -> str | None:
    """Return what is wrong with who may read `path`, None when only its owner may."""
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to user {status.st_uid}"
    # a device belongs to a group that may read all disks anyway (disk, 0660)
    if status.st_mode & (0o007 if stat.S_ISBLK(status.st_mode) else 0o077):
        return f"{path} may be used by others (mode {status.st_mode & 0o777:o}); chmod go= it"
    return None
