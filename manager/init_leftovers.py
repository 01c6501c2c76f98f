"""What an `init` that was cut short left behind, in the state directory, in the database and in the hardware TPM."""

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Final

from manager import hierarchies
from manager.approval_errors import RevocationMissing
from manager.approval_files import TARGETS
from manager.config import Layout
from manager.durable import sync_directory
from manager.errors import ConflictError, IntegrityError
from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import AnchorDenied, AnchorMissing, PolicyMismatch, SealDamaged
from manager.keys import BootArea, PlatformSecret
from manager.opening import read_boot_area
from manager.store_place import is_ours, remove_unfinished, unfinished_store
from storage.catalogue import Catalogue, Place

_log = logging.getLogger("vtpm.init")
_SQLITE_TAILS: Final = ("", "-wal", "-shm", "-journal")


def clean_up_interrupted(
    layout: Layout, tpm: HardwareTpm, place: Place | None = None, known: PlatformSecret | None = None
) -> None:
    """Take away what an `init` that was cut short left behind, its NV indices too; nothing where there is nothing.

    known: what the unfinished store seals, while the very `init` that made it knows it; wiped here. With an approver
    nobody else can unseal it: then the anchor's index may be left over, which is said.

    Raises:
        TpmError, CatalogueError: hardware TPM or database failed; what was left behind is kept for the next try.
        ConflictError: it had set hierarchy passwords, which only its escrow still tells.

    """
    unfinished = unfinished_store(layout)
    if not os.path.lexists(unfinished):
        return
    if is_ours(layout):  # a link may lead to what is another's by now
        _clean_up_tpm(unfinished, tpm, known)
        if isinstance(place, str):
            _drop_unfinished(unfinished, place)
    for tail in _SQLITE_TAILS:
        layout.catalogue.with_name(layout.catalogue.name + tail).unlink(missing_ok=True)
    shutil.rmtree(layout.state_dir / TARGETS, ignore_errors=True)
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


def _clean_up_tpm(path: Path, tpm: HardwareTpm, known: PlatformSecret | None) -> None:
    """Undefine the index of an unfinished store, if it is that store's, and take its hierarchy passwords away."""
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
        secret = PlatformSecret(tpm.unseal(boot.platform)) if known is None else known
    except (PolicyMismatch, SealDamaged) as error:
        if isinstance(error, SealDamaged) and hierarchies.made_of(boot.hierarchies):
            # not of this TPM as it is: whether the one that made it has our passwords cannot be asked here
            raise ConflictError(
                f"{path}, which an interrupted init left, is of another TPM, or a cleared one, and that TPM may have "
                f"passwords which only this file tells. Nothing was changed. Run init again on that TPM, or have "
                f"'vtpm-manager show-hierarchy-auth --key RECOVERY' tell them first; then, or if the TPM was cleared, "
                f"remove the file"
            ) from error
        if hierarchies.any_of_ours_set(tpm, boot.hierarchies):
            raise ConflictError(
                f"an interrupted init had set passwords of the hardware TPM, and its store {path} does not open any "
                f"more ({error}). Nothing was changed. 'vtpm-manager show-hierarchy-auth --key RECOVERY' tells them "
                f"from that file; take them away with 'tpm2_changeauth', then init can go on"
            ) from error
        _undefine_revocation(tpm, boot)
        _log.warning("NV index 0x%08x may be left over from an interrupted init: %s", boot.anchor.index, error)
        return
    with secret:
        hierarchies.use(tpm, secret)
        _undefine_revocation(tpm, boot)
        _undefine(tpm, boot, secret)
        hierarchies.take_back(tpm, boot.hierarchies, secret)


def _undefine_revocation(tpm: HardwareTpm, boot: BootArea) -> None:
    """Undefine the revocation index: its Name, which is this installation's alone, says that it is ours."""
    if boot.revocation is not None:
        with suppress(RevocationMissing):
            tpm.revocations.undefine(boot.revocation)


def _undefine(tpm: HardwareTpm, boot: BootArea, secret: PlatformSecret) -> None:
    """Undefine the index if our key opens it, or nobody has written it."""
    try:
        tpm.anchor_read(boot.anchor, secret.anchor_auth)
    except AnchorMissing:
        _log.debug("NV index 0x%08x was not defined, or never written", boot.anchor.index)
    except AnchorDenied as error:
        _log.warning("NV index 0x%08x may be left over from an interrupted init: %s", boot.anchor.index, error)
        return
    with suppress(AnchorMissing):
        tpm.anchor_undefine(boot.anchor)
