"""Making an empty store: everything but the header first, the header last."""

import hashlib
import os
from typing import Final
from uuid import UUID

from storage import store_format as fmt
from storage.disk import Device
from storage.errors import BootAreaTooLarge, CommitRefused
from storage.secrets import StoreKey
from storage.store_head import BootCopy, Root, pack_header, write_boot_copy, write_root

_MIN_POOL: Final = fmt.MIN_LOG_SECTORS + 2 * fmt.MIN_SPARE


def write_new_store(device: Device, store: UUID, key: StoreKey, boot_area: bytes, size: int) -> None:
    """Lay out an empty store of `size` bytes, rounded down to sectors. The log takes a sixteenth, at least 24 sectors.

    Raises: BootAreaTooLarge, CommitRefused, StorageFull, DeviceError.
    """
    total = size // fmt.SECTOR
    if total < fmt.POOL_FIRST + _MIN_POOL:
        raise CommitRefused(f"a store takes at least {(fmt.POOL_FIRST + _MIN_POOL) * fmt.SECTOR} bytes")
    if len(boot_area) > fmt.MAX_BOOT_BYTES:
        raise BootAreaTooLarge(len(boot_area), fmt.MAX_BOOT_BYTES)
    device.reserve(total * fmt.SECTOR)
    device.flush()
    # Random, so that a log never continues one that an earlier store left on the device.
    head = os.urandom(fmt.DIGEST_BYTES)
    body = fmt.RootBody(
        total_sectors=total,
        log_first=fmt.POOL_FIRST,
        log_sectors=fmt.log_sectors(total),
        log_unit=0,
        log_previous=head,
        log_head=head,
        checkpoints=0,
        map_sectors=0,
        volatile_length=0,
        volatile=b"",
        anchored=bytes(32),
        boot=hashlib.sha256(boot_area).digest(),
    )
    write_boot_copy(device, store, BootCopy(0, 1, boot_area))
    write_root(device, store, key, Root(1, body, (), 0))
    device.flush()
    device.write(pack_header(store, key), 0)
    device.flush()
