"""State images as files: where they lie, how they are opened and locked. What is in them: storage.state_image."""

import logging
import os
import stat
from pathlib import Path
from typing import Final
from uuid import UUID

from manager import locked_image
from manager.errors import ConflictError, ManagerError
from manager.named_path import clear_device, open_named
from storage.errors import ImageExists, StorageError
from storage.state_format import Family, image_bytes
from storage.state_image import StateImage

_log = logging.getLogger("vtpm.files")
_SMALLEST_IMAGE: Final = image_bytes(1)


def image_path(directory: Path, vtpm: UUID, named: str) -> Path:
    """Return where a vTPM's state image lies: where it was named, or in the state directory."""
    return Path(named) if named else directory / f"{vtpm}.img"


def open_locked(path: Path, *, create: bool) -> int:
    """Open a state image, in a folder made if need be; see `locked_image.open_locked`, also for what is raised."""
    if create:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ManagerError(f"cannot open the state image {path}: {error.strerror}; nothing was started") from error
    return locked_image.open_locked(
        path, create=create, missing="Put it back and attach again; or give the vTPM up with 'vtpm-reset --yes'"
    )


def make_image(descriptor: int, path: Path, vtpm: UUID, store: UUID, family: str) -> None:
    """Make an empty state image in an empty file.

    An image that a start which never came to its first commit left behind is taken as it is.

    Raises:
        ConflictError: something else is in the file. ManagerError: no room.

    """
    try:
        StateImage.create(descriptor, vtpm, store, Family.TPM12 if family == "1.2" else Family.TPM20)
    except ImageExists as error:
        try:
            StateImage.open(descriptor, vtpm, store)
        except StorageError:
            raise ConflictError(f"{path}: {error}") from error
    except StorageError as error:
        raise ManagerError(f"{path}: {error}") from error


def discard(path: Path, vtpm: UUID, *, ours: bool) -> None:
    """Throw a state image away whose key is gone: remove our own file, empty one the administrator named.

    A named file that is not this vTPM's state image (the wrong name was given) is left as it is.

    Raises:
        ManagerError: the operating system refused; without its key the content is unreadable all the same.

    """
    try:
        if ours:
            path.unlink(missing_ok=True)
        else:
            _empty(path, vtpm)
    except FileNotFoundError:
        _log.info("the state image %s is gone already", path)
    except OSError as error:
        raise ManagerError(f"the state image {path} could not be removed: {error.strerror}; its key is gone") from error


def _empty(path: Path, vtpm: UUID) -> None:
    """Cut a state image in a file that the administrator named to nothing; make room for a new one on a device."""
    descriptor = open_named(path, os.O_RDWR, claim=True)
    try:
        try:
            StateImage.open(descriptor, vtpm)
        except StorageError as error:
            _log.warning("%s is left as it is: it holds no state image of vTPM %s (%s)", path, vtpm, error)
            return
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            clear_device(descriptor)
            return
        os.pwrite(descriptor, bytes(_SMALLEST_IMAGE), 0)
        os.ftruncate(descriptor, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
