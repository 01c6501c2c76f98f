"""Opening a state image for one instance. What is in it, and where it lies, is not known here."""

import errno
import fcntl
import os
from pathlib import Path

from manager.errors import ConflictError, IntegrityError, ManagerError
from manager.named_path import open_named


def open_locked(path: Path, *, create: bool, missing: str) -> int:
    """Open a state image for one instance: the lock is held until every copy of the descriptor is closed.

    Raises:
        IntegrityError: it is not there (and `create` is not set): an unreadable state is never a new one. `missing`
            says what to do about it.
        ConflictError: another instance holds it. ManagerError: the operating system refused.

    """
    flags = os.O_RDWR | (os.O_CREAT if create else 0)
    try:
        descriptor = open_named(path, flags, claim=True)
    except FileNotFoundError as error:
        raise IntegrityError(
            f"the state image {path} is missing. Nothing was started or changed. {missing}, which loses what was in it"
        ) from error
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ConflictError(f"the state image {path} is a device in use or mounted; nothing was started") from error
        raise ManagerError(f"cannot open the state image {path}: {error.strerror}; nothing was started") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno == errno.EWOULDBLOCK:
            raise ConflictError(f"the state image {path} is in use by another process; nothing was started") from error
        raise ManagerError(f"cannot lock the state image {path}: {error.strerror}") from error
    return descriptor
