"""Writing a private and a public key file, both or neither."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from manager.durable import sync_directory

PRIVATE_MODE: Final = 0o600
PUBLIC_MODE: Final = 0o644


def write_pair(path: str, private: bytes, public: bytes) -> str:
    """Write `path` (mode 0600) and `path`.pub (0644), durable; returns the second's name. Never overwrites.

    Raises:
        FileExistsError: one of them is there. OSError: the disk refuses. Nothing is left behind then.

    """
    public_path = path + ".pub"
    made: list[str] = []
    try:
        write_new(path, private, PRIVATE_MODE, made.append)
        write_new(public_path, public, PUBLIC_MODE, made.append)
        sync_directory(Path(path).parent)
    except OSError:
        for name in made:  # half a pair is of no use to anybody, and we just made it
            os.unlink(name)
        raise
    return public_path


def write_new(path: str, data: bytes, mode: int, made: Callable[[str], None] = lambda _path: None) -> None:
    """Write a new file, durable but for its directory entry; `made` is told as soon as there is one. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    made(path)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(data)
        file.flush()
        os.fsync(descriptor)
