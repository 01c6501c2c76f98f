"""Compaction: records of half-empty leaves together, entries and sectors to the front, the image cut to what it needs.

Every step is a checkpoint, or a root that leads to the same content: a power cut leaves the store before or after it.
What cannot be sealed anew stays where it is and limits how far the image can be cut: leaves and carried parts of
closed groups, damaged leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from storage import store_format as fmt
from storage.store_checkpoint import checkpoint, commit_root
from storage.store_log import Log
from storage.store_room import Extent
from storage.store_scrub import overwrite_tail
from storage.store_state import State

_TRIES: Final = 8  # to find a size that holds everything; each try is larger


@dataclass(frozen=True, slots=True)
class Compacted:
    """What became of the image. `closed`: groups whose key is not there, `kept` sectors that had to stay in place."""

    bytes_before: int
    bytes_after: int
    leaves_before: int
    leaves_after: int
    closed: Sequence[UUID]
    kept: int


@dataclass(frozen=True, slots=True)
class _Plan:
    total: int
    log: Extent

    def outside(self, location: int) -> bool:
        return location >= self.total or location in self.log


def gather(state: State) -> None:
    """Move records into as few leaves as hold them, leaves to the first entries of the map, in memory only.

    The log must be empty, and a checkpoint has to follow each of the two. The caller keeps readers away meanwhile.
    """
    for group in state.groups.values():
        if group.table is not None:
            group.table.gather()


def renumber(state: State) -> None:
    """Give what is in the map its first entries, and let go of the map sectors behind them; as `gather`.

    All map sectors that stay are written by one root; nothing is done where there is no room for them.
    """
    if state.tree.needed() - len(state.tree.maps) > state.tree.free * fmt.REFS_PER_MAP:
        return
    moves = state.tree.renumberings()
    state.tree.renumber(moves)
    for group in state.groups.values():
        group.renumber(moves)


def leaves(state: State) -> int:
    """Count the leaves of all groups."""
    kinds = (kind for _, kind, _ in state.tree.by_owner())
    return sum(1 for kind in kinds if kind is fmt.Kind.LEAF)


def cut(state: State, floor: int) -> int:
    """Move everything to the front and cut the image to what it needs, `floor` bytes at least.

    Of the file system's blocks that are given back, the content is overwritten first. Returns how many sectors could
    not be moved. A block device keeps its size. The log must be empty.

    Raises: DeviceError; StorageFull, with everything kept.
    """
    if not state.device.growable():
        return 0
    fixed = _fixed(state)
    plan = _plan(state, floor // fmt.SECTOR, fixed)
    if plan is None:
        _cut_file(state)
        return len(fixed)
    room = state.tree.room
    room.bar([Extent(plan.total, state.tree.total), plan.log])
    try:
        while movable := _outside(state, plan, fixed):
            if not _mark(state, movable):
                return len(fixed)
            checkpoint(state)
        _take_plan(state, plan)
    finally:
        room.unbar()
    checkpoint(state)  # both roots are of the new layout: the one before would lead behind the end
    _cut_file(state)
    return len(fixed)


def _fixed(state: State) -> set[int]:
    """Find the places of sectors that nobody can seal anew."""
    fixed: set[int] = set()
    for group in state.groups.values():
        entries = group.damaged if group.table is not None else [*group.leaves, *group.carry]
        fixed.update(state.tree.place(entry) for entry in entries)
    return fixed


def _plan(state: State, floor: int, fixed: set[int]) -> _Plan | None:
    """Choose size and place of the log; None if nothing is gained."""
    tree = state.tree
    total = max(floor, max(fixed, default=0) + 1)
    for _ in range(_TRIES):
        log_sectors = min(state.log.sectors, fmt.log_sectors(total))
        total = max(total, fmt.POOL_FIRST + log_sectors + tree.needed() + fmt.MIN_SPARE)
        if total >= tree.total:
            return None
        plan = _Plan(total, _place_log(state, total, log_sectors, fixed))
        short = _shortage(state, plan)
        if not short:
            return plan
        total += short
    return None


def _place_log(state: State, total: int, sectors: int, fixed: set[int]) -> Extent:
    """Keep the log where it is, shorter if need be; else find a run for it with little in it and nothing fixed."""
    log = state.log
    if log.first + sectors <= total:
        return Extent(log.first, sectors)
    used = [1] * total
    for location in state.tree.room.locations():
        if location < total:
            used[location] = 0
    for location in [*range(fmt.POOL_FIRST), *fixed, *range(log.first, total)]:
        if location < total:
            used[location] = total  # never
    weight = sum(used[:sectors])
    best, lightest = 0, weight
    for first in range(1, total - sectors + 1):
        weight += used[first + sectors - 1] - used[first - 1]
        if weight < lightest:
            best, lightest = first, weight
    if lightest >= total:  # what is fixed leaves no run that is long enough
        return Extent(log.first, sectors)
    return Extent(best, sectors)


def _shortage(state: State, plan: _Plan) -> int:
    """Count the sectors that a plan lacks to move everything at once."""
    if plan.log.first + plan.log.sectors > plan.total:
        return plan.log.first + plan.log.sectors - plan.total
    free = sum(1 for location in state.tree.room.locations() if not plan.outside(location))
    moved = _outside(state, plan, set())
    return max(0, len(moved) + fmt.MIN_SPARE - free)


def _outside(state: State, plan: _Plan, fixed: set[int]) -> list[tuple[int, int]]:
    """List what a plan has no place for where it is now: (entry, map sector); the entry is -1 for a map sector."""
    tree = state.tree
    entries = [(entry, entry // fmt.REFS_PER_MAP) for entry, _, _ in tree.by_owner()]
    found = [(entry, number) for entry, number in entries if plan.outside(tree.place(entry))]
    found = [(entry, number) for entry, number in found if tree.place(entry) not in fixed]
    return found + [(-1, number) for number, ref in enumerate(tree.maps) if plan.outside(ref.location)]


def _mark(state: State, movable: list[tuple[int, int]]) -> int:
    """Have the next checkpoint write as many of these as one round has room for; return how many."""
    tree = state.tree
    by_entry = {group.entry: group for group in state.groups.values()}
    tables = {entry: group.table for group in state.groups.values() if group.table for entry in group.table.entries()}
    maps: set[int] = set()
    for count, (entry, number) in enumerate(movable):
        maps.add(number)
        if count + 1 + len(maps) > tree.free:
            return count
        if entry < 0:
            tree.touch_map(number)
        elif entry in by_entry:
            by_entry[entry].dirty = True
        else:
            table = tables[entry]
            assert table is not None, "only leaves of open groups are movable"
            table.dirty.add(entry)
    return len(movable)


def _take_plan(state: State, plan: _Plan) -> None:
    """Make the plan's size and log those of the store, with a root."""
    old, tree = state.log, state.tree
    tree.room.release(location for location in range(old.first, old.first + old.sectors) if not plan.outside(location))
    tree.room.unbar()
    tree.room.forget(plan.log)
    tree.room.forget(Extent(plan.total, tree.total))
    tree.total = plan.total
    state.log = Log(state.device, plan.log.first, plan.log.sectors, 0, old.head)
    commit_root(state, 0, old.head)


def _cut_file(state: State) -> None:
    size = state.tree.total * fmt.SECTOR
    if state.device.size() > size and state.device.growable():
        overwrite_tail(state)
        state.flush()
        state.device.shrink(size)
        state.flush()
