"""Files that a command makes for its user: new ones only, durable, whole or not there."""

import os
from pathlib import Path
from typing import Final

from manager.durable import sync_directory
from manager.errors import ConflictError, ManagerError, UsageError

PRIVATE: Final = 0o600
PUBLIC: Final = 0o644


def check_new(path: str) -> None:
    """Tell in time that `write_new` would refuse. Raises UsageError: no name. ConflictError: it is there."""
    if not path:
        raise UsageError("the file to write has an empty name. Nothing was done")
    if os.path.lexists(path):
        raise ConflictError(f"{path} is there already; it was left as it is. Name another file")


def write_new(path: str, content: bytes, mode: int = PUBLIC) -> None:
    """Write a file that is not there yet.

    Raises:
        ConflictError: it is there; it was left as it is. ManagerError: the disk refuses; half a file is taken away.

    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    except FileExistsError as error:
        raise ConflictError(f"{path} is there already; it was left as it is. Name another file") from error
    except OSError as error:
        raise ManagerError(f"{path} cannot be written: {error.strerror}. It was not made") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(Path(path).resolve().parent)
    except OSError as error:
        os.unlink(path)
        raise ManagerError(f"{path} cannot be written: {error.strerror}. It was not made") from error
