"""Where swtpm keeps a TPM's state: what both of its backends can do, and the choice between them.

Names and images only: what an image holds is `swtpm_blob`. Synchronous, from one thread. POSIX record locks belong to
the process and end with the first close of the locked file, so each backend opens its lock file exactly once.
"""

import fcntl
import os
import time
from dataclasses import dataclass
from typing import Final, Protocol

from storage.swtpm_errors import SwtpmDiskError, SwtpmLocked

NAMES: Final = ("permall", "volatilestate", "savestate")  # libtpms' names; the order of --print-states
PERMANENT: Final = NAMES[0]
DEFAULT_MODE: Final = 0o640
_RETRY_SECONDS: Final = 0.01  # between two attempts to lock, as swtpm
MAX_IMAGE: Final = 1024 * 1024  # bytes; a state has at most 173 KiB (reference 4.4), and SET_STATEBLOB takes 512 KiB


@dataclass(frozen=True, slots=True)
class Where:
    """The state of one TPM: `path` is a directory, or a file or block device. `mode` None: 0640 under the umask.

    `lock` None is what swtpm does: directories are locked, files are not.
    """

    path: str
    is_directory: bool
    tpm2: bool
    mode: int | None = None
    lock: bool | None = None
    backup: bool = False
    fsync: bool = True


class SwtpmFiles(Protocol):
    """One TPM's state files. Every method may raise SwtpmStateError."""

    where: Where

    def lock(self, retries: int = 0) -> None:
        """Take the lock, trying again up to `retries` times, 10 ms apart. May be repeated. Raises SwtpmLocked."""

    def unlock(self) -> None:
        """Let the lock go. May be repeated."""

    @property
    def locked(self) -> bool:
        """Whether the lock is ours, or none was wanted."""

    def load(self, name: str) -> bytes | None:
        """Return the image of that name, None if there is none: only a missing file is none."""

    def store(self, name: str, image: bytes) -> None:
        """Replace the image of that name, whole; durable on return."""

    def delete(self, name: str) -> bool:
        """Take the image of that name away, durably; returns whether there was one."""

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each image there is, without a lock."""

    def backup(self) -> bytes | None:
        """Return the image of the permanent state before the last one, None if none is kept."""

    def recover(self) -> bool:
        """Put a kept backup in place of a permanent state that was refused; returns whether there was one.

        What was refused stays, under another name.
        """

    def close(self) -> None:
        """Let everything go."""


def record_lock(descriptor: int, place: str, retries: int) -> None:
    """Lock the whole of an open file by a POSIX record lock. Raises SwtpmLocked, SwtpmDiskError."""
    for attempt in range(retries + 1):
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if attempt < retries:
                time.sleep(_RETRY_SECONDS)
        except OSError as error:
            raise SwtpmDiskError(f"lock {place}", error) from error
        else:
            return
    raise SwtpmLocked(place)


def write_all(descriptor: int, content: bytes, offset: int = 0) -> None:
    """Write all of `content` at `offset`. Raises OSError."""
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], offset + done)


def open_files(where: Where) -> SwtpmFiles:
    """Open the state at `where`; nothing is locked, and a new state is not made yet. Raises SwtpmStateError."""
    if where.is_directory:
        from storage.swtpm_directory import SwtpmDirectory  # noqa: PLC0415 - one of the two is used in a process

        return SwtpmDirectory(where)
    from storage.swtpm_linear import SwtpmLinear  # noqa: PLC0415 - see above

    return SwtpmLinear(where)
