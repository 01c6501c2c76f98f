"""Files and block devices that an administrator names: which path is kept, and how it is opened.

A file is kept under its real path and never opened through a link: whoever may write to a directory could lead us
elsewhere. A block device is kept under the name it was given: `/dev/mapper/x` and `/dev/disk/by-id/x` are links, and
what they lead to (`/dev/dm-3`) is another device after the next boot.
"""

import os
import stat
from pathlib import Path
from typing import Final

# bytes at the beginning of a place that say whether something is in it: partition tables, LVM, LUKS and file systems
# have their marks there, btrfs 64 KiB behind the beginning and ISO 9660 32 KiB (libblkid/src/superblocks)
UNUSED_BYTES: Final = 1024 * 1024


def is_device(path: str | Path) -> bool:
    """Tell whether `path` leads to a block device, through links too; False where there is nothing."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def place_of(path: str) -> str:
    """Return the absolute path to keep for what the administrator named."""
    return os.path.abspath(path) if is_device(path) else os.path.realpath(path)


def open_named(path: Path, flags: int, *, claim: bool = False) -> int:
    """Open a file (mode 0600 if made), or a block device; close-on-exec. With `claim` a device is ours alone (O_EXCL).

    Raises:
        OSError: the operating system refused; EBUSY for a claimed device that is mounted or claimed by another.

    """
    if not is_device(path):
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    # Without O_CREAT: O_EXCL has its other meaning then, and a device that went away must not become a file.
    exclusive = os.O_EXCL if claim else 0  # open(2): the kernel keeps mkfs, mount and other claims away
    descriptor = os.open(path, flags & ~os.O_CREAT | os.O_CLOEXEC | exclusive)
    if stat.S_ISBLK(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise FileNotFoundError(f"{path} is not the block device any more that it was a moment ago")


def is_unused(descriptor: int) -> bool:
    """Tell whether a file or device may be written to: its beginning is zero, or it is empty. Raises OSError."""
    return not any(os.pread(descriptor, UNUSED_BYTES, 0))


def clear_device(descriptor: int) -> None:
    """Have a device count as unused again, durably. Raises OSError."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    os.pwrite(descriptor, bytes(min(size, UNUSED_BYTES)), 0)
    os.fsync(descriptor)
