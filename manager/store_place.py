"""Where a new store is made: in the state directory, or in a file or block device that `init --store` named.

A store elsewhere is reached through a link, `store.img`. While `init` works it is called `store.new`, so that whatever
interrupts, the next `init` knows what was begun and where; `run` only ever looks for `store.img`.
"""

import errno
import os
from pathlib import Path
from typing import Final

from manager.config import Layout
from manager.durable import sync_directory
from manager.errors import ConflictError, ManagerError
from manager.named_path import is_device, open_named
from storage.store_format import POOL_FIRST, SECTOR

_UNFINISHED: Final = ".new"
_HEAD_BYTES: Final = POOL_FIRST * SECTOR  # header, boot area, roots: zero where a store is made (Store.create)


def unfinished_store(layout: Layout) -> Path:
    """Return the name of a store that is not in place yet."""
    return layout.store.with_suffix(_UNFINISHED)


def begin_store(layout: Layout, named: Path | None) -> int:
    """Return the open, empty file or device that the store is to be made in; `unfinished_store` leads there.

    Raises:
        ConflictError: there is something in it. ManagerError: the operating system refused.

    """
    place = unfinished_store(layout)
    try:
        if named is None:
            return os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        descriptor = _open_empty(named)
        try:
            place.symlink_to(named.absolute())
            sync_directory(place.parent)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise ManagerError(
            f"the store cannot be made at {named or place}: {error.strerror}; nothing was made"
        ) from error
    return descriptor


def _open_empty(named: Path) -> int:
    """Open a device whose head is zero, or a file that is empty or not there."""
    try:
        descriptor = open_named(named, os.O_RDWR | os.O_CREAT, claim=True)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ConflictError(f"{named} is a device in use or mounted. Nothing was changed") from error
        raise
    if any(os.pread(descriptor, _HEAD_BYTES, 0)):
        os.close(descriptor)
        raise ConflictError(
            f"{named} holds something already. Nothing was changed: a store needs an empty file, or a device whose "
            f"first {_HEAD_BYTES} bytes are zero ('blkdiscard -z', or dd, clears one that may be lost)"
        )
    sync_directory(named.absolute().parent)
    return descriptor


def remove_unfinished(layout: Layout) -> None:
    """Take away what `begin_store` has made and what was written there."""
    place = unfinished_store(layout)
    if place.is_symlink():
        target = place.readlink()
        if is_device(target):
            _clear_head(target)
        else:
            target.unlink(missing_ok=True)
    place.unlink(missing_ok=True)


def _clear_head(device: Path) -> None:
    descriptor = open_named(device, os.O_RDWR, claim=True)
    try:
        os.pwrite(descriptor, bytes(_HEAD_BYTES), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
