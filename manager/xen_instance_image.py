"""The state image of an instance domain's one vTPM: opened, locked, and made where the manager says it is fresh."""

import os
from pathlib import Path
from uuid import UUID

from frontend_backend.messages_instance import LoadReply
from manager.errors import ConflictError, ManagerError
from manager.locked_image import open_locked
from manager.named_path import is_device
from storage.errors import ImageExists, StorageError


def open_image(path: Path, reply: LoadReply) -> int:
    """Return a descriptor of the locked state image, for the instance that `reply` is about.

    A file is made only for a vTPM that the manager says never had a state; a device must be there in any case.

    Raises:
        IntegrityError: it is not there, and the vTPM is not fresh: an unreadable state is never a new one.
        ConflictError: it is in use, or something else is in it. ManagerError: the operating system refused.

    """
    descriptor = open_locked(
        path,
        create=reply.fresh and not is_device(path),
        missing=f"Give this domain the disk with the state of vTPM {UUID(bytes=reply.vtpm)}; or give that up with "
        "'vtpm-reset --yes' in the manager's domain",
    )
    try:
        if reply.fresh:
            _make(descriptor, path, reply)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


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
