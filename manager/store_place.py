"""Where a new store is made: in the state directory, or in a file or block device that `init --store` named.

A store elsewhere is reached through a link, `store.img`. While `init` works it is called `store.new`, so that whatever
interrupts, the next `init` knows what was begun and where; `run` only ever looks for `store.img`. Beside a link lies
the UUID of the store that was begun: what it leads to may have become something else since, and is then left alone.
"""

import errno
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Final
from uuid import UUID

from manager.config import Layout
from manager.durable import sync_directory
from manager.errors import ConflictError, ManagerError
from manager.named_path import UNUSED_BYTES, clear_device, is_device, is_unused, open_named
from storage.errors import NotAStore, StorageError
from storage.store import Store
from storage.store_format import POOL_FIRST, SECTOR

_log = logging.getLogger("vtpm.init")
_UNFINISHED: Final = ".new"
_OWNER: Final = ".begun"  # beside a link: the UUID of the store that it was made for
_HEAD_BYTES: Final = POOL_FIRST * SECTOR  # header, boot area, roots: all that is written before there is a header


def unfinished_store(layout: Layout) -> Path:
    """Return the name of a store that is not in place yet."""
    return layout.store.with_suffix(_UNFINISHED)


def begin_store(layout: Layout, named: Path | None, store: UUID) -> int:
    """Return the open, empty file or device that `store` is to be made in; `unfinished_store` leads there.

    Raises:
        ConflictError: there is something in it. ManagerError: the operating system refused.

    """
    place = unfinished_store(layout)
    try:
        if named is None:
            return os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        descriptor = _open_empty(named)
        try:
            _write_owner(layout, store)
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
    if not is_unused(descriptor):
        os.close(descriptor)
        raise ConflictError(
            f"{named} holds something already. Nothing was changed: a store needs an empty file, or a device whose "
            f"first {UNUSED_BYTES} bytes are zero ('blkdiscard -z', or dd, clears one that may be lost)"
        )
    sync_directory(named.absolute().parent)
    return descriptor


def finish_store(layout: Layout) -> None:
    """Put the store in place, durably."""
    unfinished_store(layout).rename(layout.store)
    sync_directory(layout.state_dir)
    _owner(layout).unlink(missing_ok=True)


def is_ours(layout: Layout) -> bool:
    """Tell whether what the unfinished store leads to is what `begin_store` began, or was not written yet.

    Raises:
        ConflictError: that cannot be seen.

    """
    place = unfinished_store(layout)
    if not place.is_symlink():
        return True  # in our own directory
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise ConflictError(f"{place}, which an interrupted init left, cannot be read: {error.strerror}") from error
    try:
        found, _ = Store.read_boot_area(descriptor)
    except NotAStore:
        beginning = os.pread(descriptor, UNUSED_BYTES, 0)
        return not any(beginning[:SECTOR]) and not any(beginning[_HEAD_BYTES:])  # the header is written last
    except StorageError:
        return False
    finally:
        os.close(descriptor)
    with suppress(OSError, ValueError):
        return found == UUID(_owner(layout).read_text(encoding="ascii"))
    return False


def remove_unfinished(layout: Layout) -> None:
    """Take away what `begin_store` has made and what was written there, unless it has become something else."""
    place = unfinished_store(layout)
    if place.is_symlink():
        target = place.readlink()
        if not is_ours(layout):
            _log.warning("an interrupted init had begun a store at %s; what is there now is left as it is", target)
        elif is_device(target):
            _clear_device(target)
        else:
            target.unlink(missing_ok=True)
    place.unlink(missing_ok=True)
    _owner(layout).unlink(missing_ok=True)


def _clear_device(device: Path) -> None:
    descriptor = open_named(device, os.O_RDWR, claim=True)
    try:
        if any(os.pread(descriptor, SECTOR, 0)):
            clear_device(descriptor)
            return
        os.pwrite(descriptor, bytes(_HEAD_BYTES), 0)  # without a header nothing of ours is behind it
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _owner(layout: Layout) -> Path:
    return layout.store.with_suffix(_OWNER)


def _write_owner(layout: Layout, store: UUID) -> None:
    with open(_owner(layout), "w", encoding="ascii") as file:
        file.write(str(store))
        file.flush()
        os.fsync(file.fileno())
