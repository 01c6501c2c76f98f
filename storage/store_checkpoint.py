"""Checkpoints: from the log and memory into leaves, map and a new root, in as many rounds as there is room for.

A round: write sectors and maps to free places and the other root, flush. The durable root never leads
to anything that a round overwrites, so a power cut leaves the state before or after it. Only the last round moves
the start of the log; replaying the log over newer leaves gives the same records again, as the last change wins.
The last round flushes before its root, too: there is no log left that would do in place of its sectors.
"""

import errno
from collections.abc import Callable
from typing import Final

from storage import store_format as fmt
from storage.errors import StorageFull
from storage.store_crypto import Purpose
from storage.store_group import Group
from storage.store_head import Root, write_root
from storage.store_log import Log
from storage.store_room import Extent
from storage.store_state import State

_SPARE_BESIDE_CARRY: Final = 4
_GROWTH: Final = (8, 64)  # an image grows by an eighth of it; where there is no room for that by less

_Item = tuple[int, Group]  # an entry whose sector is to be written, and the group that it is the record or a leaf of


def checkpoint(state: State, frame_bytes: int = 0, new_log: Extent | None = None) -> None:
    """Empty the log, leaving a place for a frame of `frame_bytes`; optionally move it to `new_log`.

    Raises: StorageFull before the last round when closed groups' parts have no room, with everything kept;
    DeviceError for a failed write or flush, after which the store must be opened again.
    """
    items = _items(state)
    while items:
        room = _fitting(state, items)
        if not room:
            grow(state, fmt.MIN_SPARE)
            continue
        if room == len(items) and _final_fits(state, items):
            break
        _write(state, items[:room])
        commit_root(state, state.root.body.log_unit, state.root.body.log_previous)
        del items[:room]
    if not _final_fits(state, items):
        grow(state, _final_cost(state, items))
    _last_round(state, items, frame_bytes, new_log)


def seal_anew(state: State, group: Group, change: Callable[[], None]) -> None:
    """Write an open group's record and all its leaves with one root; `change` is called when nothing can refuse it.

    Other checkpoints may take several rounds. Here a root with only a part of the leaves would be a loss, as one key
    opens all of them. The image grows if it must: it needs room for all leaves a second time.
    Raises: StorageFull, with nothing changed but that the log was emptied; DeviceError.
    """
    assert group.table is not None, "only the leaves of open groups can be written"
    checkpoint(state)
    items = [(group.entry, group), *((entry, group) for entry in group.table.entries())]
    while not _final_fits(state, items):
        grow(state, _final_cost(state, items) - state.tree.free)
    change()
    _last_round(state, items)


def _last_round(state: State, items: list[_Item], frame_bytes: int = 0, new_log: Extent | None = None) -> None:
    """Write what is left and a root that needs no log."""
    _write(state, items)
    _give_up_lost_leaves(state)
    _drop(state)
    _carry(state)
    log = state.log
    if new_log is not None:
        state.tree.give_back(Extent(log.first, log.sectors))
        state.log = Log(state.device, new_log.first, new_log.sectors, 0, log.head)
        commit_root(state, 0, log.head)
        return
    start = log.restart(frame_bytes)
    commit_root(state, start, log.head)
    log.emptied(start)


def ensure_room(state: State, new_entries: int) -> None:
    """Make sure that checkpoints will have room for so many further sectors; grow the image if not.

    Saves and removals need none and are never refused for want of it. Raises StorageFull with nothing changed,
    or DeviceError.
    """
    if not new_entries:
        return
    if state.tree.map_count(new_entries) > fmt.MAX_MAPS:
        raise StorageFull("add to the store", OSError(errno.ENOSPC, "the format holds no more"))
    pool = state.tree.total - fmt.POOL_FIRST - state.log.sectors
    missing = state.tree.needed(new_entries) + fmt.MIN_SPARE - pool
    if missing > 0:
        grow(state, missing)


def grow(state: State, sectors: int) -> None:
    """Extend the image by at least so many sectors, and the log in proportion. Raises StorageFull or DeviceError.

    By a share of what there is, so that a store that grows does so seldom, unless there is no room for that.
    """
    before = state.tree.total
    steps = sorted({sectors, *(max(sectors, before // share) for share in _GROWTH)}, reverse=True)
    for step in steps:
        try:
            _grow(state, before + step, with_log=step == steps[0])
        except StorageFull:
            if step == steps[-1] or state.tree.total != before:
                raise
        else:
            return


def _grow(state: State, total: int, *, with_log: bool) -> None:
    log_sectors = fmt.log_sectors(total)
    new_log = Extent(total, log_sectors) if with_log and log_sectors >= 2 * state.log.sectors else None
    if new_log is not None:
        total += log_sectors
    state.device.reserve(total * fmt.SECTOR)
    state.flush()
    state.tree.extend(total, new_log or Extent(0, 0))
    if new_log is not None:
        checkpoint(state, new_log=new_log)


# --- rounds ----------------------------------------------------------------------------------------


def _items(state: State) -> list[_Item]:
    """List what is dirty: group records before leaves, so that no root has leaves without their group."""
    records = [(group.entry, group) for group in state.groups.values() if group.dirty]
    leaves = [
        (entry, group)
        for group in state.groups.values()
        if group.table is not None
        for entry in group.table.dirty.difference(group.table.empty_leaves())
    ]
    # One map sector after the other, so that a round writes few of them; within each by place, so that what a round
    # frees are neighbours, which the next round then writes at once. In order of place alone the flushes are shorter
    # by a quarter (fewer runs), and there are a quarter more of them.
    return records + sorted(leaves, key=lambda item: (item[0] // fmt.REFS_PER_MAP, state.tree.place(item[0])))


def _fitting(state: State, items: list[_Item]) -> int:
    """Count how many items a round can write with their map sectors."""
    maps: set[int] = set()
    fixed = state.tree.cost(())
    for count, (entry, _) in enumerate(items):
        if not state.tree.is_touched(entry):
            maps.add(entry // fmt.REFS_PER_MAP)
        if count + 1 + len(maps) + fixed > state.tree.free:
            return count
    return len(items)


def _final_fits(state: State, items: list[_Item]) -> bool:
    return len(items) <= state.tree.free and _final_cost(state, items) <= state.tree.free


def _final_cost(state: State, items: list[_Item]) -> int:
    """Count the sectors for items, drops and carried parts in one round, map sectors that carrying may add included."""
    pieces = sum(len(group.carry_pieces()) for group in state.groups.values())
    entries = [entry for entry, _ in items] + [*_to_drop(state), *_lost(state)]
    # carried parts stay, so they must leave later rounds a few spare sectors
    extra = pieces // fmt.REFS_PER_MAP + 2 + _SPARE_BESIDE_CARRY if pieces else 0
    return len(items) + pieces + extra + state.tree.cost(entries)


def _lost(state: State) -> list[int]:
    """List damaged leaves that must never count again: whole once more, they would undo a removal."""
    groups = [group for group in state.groups.values() if group.table is not None and group.table.removed]
    return [entry for group in groups for entry in group.damaged if not state.tree.is_lost(entry)]


def _to_drop(state: State) -> set[int]:
    drops = set(state.drops)
    for group in state.groups.values():
        if group.table is not None:
            drops.update(group.table.empty_leaves(), group.carry)
    return drops


def _write(state: State, items: list[_Item]) -> None:
    tree, sequence = state.tree, state.sequence + 1
    for entry, group in items:
        table, key = group.table, group.key
        if entry == group.entry:
            tree.write(entry, group.pack(), state.key, Purpose.GROUP, sequence)
            group.dirty = False
        else:
            assert table is not None, "only open groups have leaves to write"
            assert key is not None, "an open group has its key"
            tree.write(entry, table.leaf(entry), key, Purpose.LEAF, sequence)
            table.dirty.discard(entry)


def _give_up_lost_leaves(state: State) -> None:
    for entry in _lost(state):
        state.tree.mark_lost(entry)


def _drop(state: State) -> None:
    for entry in _to_drop(state):
        state.tree.drop(entry)
    for group in state.groups.values():
        if group.table is not None:
            group.table.drop(set(group.table.empty_leaves()))
            group.carry.clear()
    state.drops.clear()


def _carry(state: State) -> None:
    for group in state.groups.values():
        for piece in group.carry_pieces():
            entry = state.tree.allocate(fmt.owner(fmt.Kind.CARRY, group.number))
            state.tree.write(entry, piece, state.key, Purpose.CARRY, state.sequence + 1)
            group.carry.append(entry)
        group.pending.clear()


def commit_root(state: State, log_unit: int, log_previous: bytes) -> None:
    """Write the map and a root that leads to it, and flush.

    A root with an empty log is all there is, so everything it leads to must be durable before it. One that still needs
    the log need not wait: while its sectors are not there, its predecessor and the same log give the same records.
    """
    state.tree.write_maps(state.sequence + 1)
    state.tree.write_out()
    if log_previous == state.log.head:
        state.flush()
    body = fmt.RootBody(
        total_sectors=state.tree.total,
        log_first=state.log.first,
        log_sectors=state.log.sectors,
        log_unit=log_unit,
        log_previous=log_previous,
        log_head=state.log.head,
        checkpoints=state.root.body.checkpoints + 1,
        map_sectors=len(state.tree.maps),
        volatile_length=len(state.carried.volatile),
        volatile=state.carried.volatile,
        anchored=state.carried.anchored,
        boot=state.carried.boot,
    )
    root = Root(state.sequence + 1, body, tuple(state.tree.maps), 1 - state.root.slot)
    root = write_root(state.device, state.store, state.key, root)
    state.flush()
    state.root = root
    state.sequence += 1
    state.tree.room.settle()
