"""Scrubbing: afterwards no sector of the image holds anything but what is live.

Sectors that were freed, and the log, keep what they held, ciphertext of removed keys included, until they are used
again. Whoever gets hold of a group's key later could read it. What overwrites them is random: layers below that do
without writing zeros (thin provisioning, compression, deduplication) have to write it, and afterwards used and unused
sectors look alike.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from storage import store_format as fmt
from storage.disk import Device
from storage.store_checkpoint import checkpoint
from storage.store_head import BootCopy, write_boot_copy
from storage.store_room import Extent
from storage.store_state import State

_AT_ONCE: Final = 256  # sectors between which others may commit: 1 MiB, a few milliseconds


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """How far a scrub is: sectors overwritten, and of how many. What it could not touch, because it is not readable.

    `closed`: groups whose key is not there: their leaves and carried parts still have what was removed since
    they were written. `damaged`: leaves that failed their check, which are kept as they are.
    """

    done: int
    sectors: int
    closed: Sequence[UUID]
    damaged: int


def scrub(state: State, boot: BootCopy) -> Iterator[Scrubbed]:
    """Overwrite everything that is not live, a part with each step; commits may come between the steps.

    The first step makes two checkpoints, so that both roots lead to the same sectors, and neither needs the log. A
    power cut between or within steps leaves a store of which everything live is untouched. What commits free
    while a scrub is under way is left to the next one.

    Raises: StorageFull in the first step, before anything was overwritten; DeviceError.
    """
    checkpoint(state)
    checkpoint(state)
    # the other copy may hold seals that were replaced; if the power fails now, the live one is whole
    write_boot_copy(state.device, state.store, BootCopy(1 - boot.place, max(boot.sequence - 1, 0), boot.content))
    todo = state.tree.room.locations()
    total = len(todo) + state.log.sectors
    done = _overwrite(state.device, Extent(state.log.first, state.log.sectors))
    closed = [uuid for uuid, group in state.groups.items() if group.table is None]
    damaged = sum(len(group.damaged) for group in state.groups.values())
    state.flush()
    yield Scrubbed(done, total, closed, damaged)
    for start in range(0, len(todo), _AT_ONCE):
        batch = todo[start : start + _AT_ONCE]
        still_free = set(state.tree.room.locations())
        for extent in runs([location for location in batch if location in still_free]):
            _overwrite(state.device, extent)
        state.flush()
        done += len(batch)
        yield Scrubbed(done, total, closed, damaged)


def overwrite_tail(state: State) -> None:
    """Overwrite what the file has behind the image, not yet durable. Raises DeviceError."""
    first = state.tree.total
    last = state.device.size() // fmt.SECTOR
    for start in range(first, last, _AT_ONCE):
        _overwrite(state.device, Extent(start, min(_AT_ONCE, last - start)))


def runs(locations: Sequence[int]) -> Iterator[Extent]:
    """Join neighbours; `locations` are in order."""
    start = 0
    for index in range(1, len(locations) + 1):
        if index == len(locations) or locations[index] != locations[index - 1] + 1:
            yield Extent(locations[start], index - start)
            start = index


def _overwrite(device: Device, extent: Extent) -> int:
    device.write(os.urandom(extent.sectors * fmt.SECTOR), extent.first * fmt.SECTOR)
    return extent.sectors
