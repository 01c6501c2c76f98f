"""The state image of an instance domain's one vTPM: opened, locked, and made where the manager says it is fresh."""

import errno
import fcntl
import os
from pathlib import Path
from uuid import UUID

from frontend_backend.messages_instance import LoadReply
from manager.errors import ConflictError, IntegrityError, ManagerError
from manager.named_path import is_device, open_named
from storage.errors import ImageExists, StorageError


def open_image(path: Path, reply: LoadReply) -> int:
    """Return a descriptor of the locked state image, for the instance that `reply` is about.

    A file is made only for a vTPM that the manager says never had a state; a device must be there in any case.

    Raises:
        IntegrityError: it is not there, and the vTPM is not fresh: an unreadable state is never a new one.
        ConflictError: it is in use, or something else is in it. ManagerError: the operating system refused.

    """
    create = reply.fresh and not is_device(path)
    try:
        descriptor = open_named(path, os.O_RDWR | (os.O_CREAT if create else 0), claim=True)
    except FileNotFoundError as error:
        raise IntegrityError(
            f"the state image {path} is missing, and vTPM {UUID(bytes=reply.vtpm)} has a state. Nothing was started or "
            "changed. Give this domain the disk with it; or give the vTPM up with 'vtpm-reset --yes' in the manager's "
            "domain, which loses what was in it"
        ) from error
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ConflictError(f"the state image {path} is a device in use or mounted; nothing was started") from error
        raise ManagerError(f"cannot open the state image {path}: {error.strerror}; nothing was started") from error
    try:
        _lock(descriptor, path)
        if reply.fresh:
            _make(descriptor, path, reply)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConflictError(f"the state image {path} is in use by another process; nothing was started") from error


def _make(descriptor: int, path: Path, reply: LoadReply) -> None:
    """Make an empty image; one of this vTPM that never came to its first commit is taken as it is."""
    from storage.state_image import Family, StateImage  # noqa: PLC0415 - 9 MB that only a fresh vTPM needs

    vtpm, store = UUID(bytes=reply.vtpm), UUID(bytes=reply.store or bytes(16))
    try:
        StateImage.create(descriptor, vtpm, store, Family.TPM12 if reply.family == "1.2" else Family.TPM20)
    except ImageExists as error:
        try:
            StateImage.open(descriptor, vtpm)
        except StorageError:
            raise ConflictError(
                f"{path}: {error}. Nothing was changed; give this domain an empty file or disk for vTPM {vtpm}"
            ) from error
    except StorageError as error:
        raise ManagerError(f"{path}: {error}; nothing was started") from error
