"""Everything an open store knows, and how a frame changes it. What is written when is in `store_checkpoint`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import UUID

from storage import store_format as fmt
from storage.disk import Device
from storage.errors import StoreDamaged
from storage.secrets import GroupKey, StoreKey
from storage.store_crypto import Purpose
from storage.store_frame import Carried, Frame, GroupDrop, GroupPut
from storage.store_group import Group
from storage.store_head import Root, read_roots
from storage.store_log import Log
from storage.store_records import Damage, GroupRecord
from storage.store_room import Extent
from storage.store_tree import Tree


@dataclass(slots=True)
class State:
    """An open store. `drops`: entries that no longer mean anything, to be forgotten by the next checkpoint."""

    device: Device
    store: UUID
    key: StoreKey
    tree: Tree
    log: Log
    root: Root
    sequence: int
    carried: Carried
    groups: dict[UUID, Group] = field(default_factory=dict)
    drops: set[int] = field(default_factory=set)
    damage: list[Damage] = field(default_factory=list)
    flushes: int = 0
    commits: int = 0

    def flush(self) -> None:
        """Flush and count. Raises DeviceError."""
        self.device.flush()
        self.flushes += 1

    def numbers(self) -> set[int]:
        """Group numbers that are taken, those of removed groups included while the map still names them."""
        return {number for _, kind, number in self.tree.by_owner() if kind is not fmt.Kind.MAP}


def load(device: Device, store: UUID, key: StoreKey) -> State:
    """Read root, map, group records and log; check every sector against the map. Writes nothing.

    Raises: StoreDamaged (roots, map, group records, log; leaves are collected in `damage`), StoreTooNew, DeviceError.
    """
    roots = read_roots(device, store, key)
    root, tree, bad = _choose(device, store, key, roots)
    body = root.body
    log = Log(device, body.log_first, body.log_sectors, body.log_unit, body.log_previous)
    carried = Carried(body.anchored, body.volatile[: body.volatile_length], body.boot)
    state = State(device, store, key, tree, log, root, root.sequence, carried)
    _load_groups(state, bad)
    for frame in log.replay(key, store, root.sequence, roots[0].body.log_head):
        replay(state, frame)
    return state


def _choose(device: Device, store: UUID, key: StoreKey, roots: list[Root]) -> tuple[Root, Tree, dict[int, str]]:
    """Take the newest root, or its predecessor if a power cut kept from the disk what the newest one leads to.

    That happens only to a root that needs the log. The same log then gives the same records from the predecessor,
    none of whose sectors was overwritten. Where both lack sectors there is damage: the one that lacks fewer is taken.
    """
    newest = roots[0]
    if len(roots) == 1 or not newest.needs_log or not newest.continues(roots[1]):
        return newest, *_load_tree(device, store, key, newest)
    try:
        tree, bad = _load_tree(device, store, key, newest)
    except StoreDamaged as damage:
        try:
            return roots[1], *_load_tree(device, store, key, roots[1])
        except StoreDamaged:
            raise damage from None
    if bad:
        try:
            older_tree, older_bad = _load_tree(device, store, key, roots[1])
        except StoreDamaged:
            return newest, tree, bad
        if len(older_bad) < len(bad):
            return roots[1], older_tree, older_bad
    return newest, tree, bad


def _load_tree(device: Device, store: UUID, key: StoreKey, root: Root) -> tuple[Tree, dict[int, str]]:
    """Read what a root leads to: the map, and the problem of every entry whose sector is not what the map names."""
    body = root.body
    if device.size() < body.total_sectors * fmt.SECTOR:
        raise StoreDamaged("image", f"cut short: {device.size()} bytes of {body.total_sectors * fmt.SECTOR}")
    if not fmt.POOL_FIRST <= body.log_first <= body.total_sectors - body.log_sectors or not body.log_sectors:
        raise StoreDamaged("root", "authentic, but its log is outside the image")
    tree = Tree(device, store, key, body.total_sectors, Extent(body.log_first, body.log_sectors))
    tree.load(root.maps)
    return tree, dict(tree.check())


def _load_groups(state: State, bad: dict[int, str]) -> None:
    by_number: dict[int, Group] = {}
    for entry, kind, number in state.tree.by_owner():
        if kind is fmt.Kind.GROUP:
            if entry in bad:
                raise StoreDamaged(f"group record (entry {entry})", bad[entry])
            group = Group.unpack(state.tree.read(entry, state.key, Purpose.GROUP), entry)
            if group.number != number or number in by_number or group.record.uuid in state.groups:
                raise StoreDamaged(f"group record (entry {entry})", "it contradicts the map")
            by_number[number] = state.groups[group.record.uuid] = group
    for entry, kind, number in state.tree.by_owner():
        if kind is fmt.Kind.GROUP:
            continue
        owner = by_number.get(number)
        if owner is None or kind is fmt.Kind.MAP:
            raise StoreDamaged(f"entry {entry} of the map", "it belongs to no group")
        if kind is not fmt.Kind.LOST:
            (owner.leaves if kind is fmt.Kind.LEAF else owner.carry).append(entry)
        if entry in bad or kind is fmt.Kind.LOST:
            owner.damaged.append(entry)
            what = f"{kind.name.lower()} (entry {entry}) of group {owner.record.uuid}"
            state.damage.append(Damage(what, bad.get(entry, "it was damaged at an earlier checkpoint")))


def replay(state: State, frame: Frame) -> None:
    """Take in a frame of the log while all groups are closed. Raises StoreDamaged."""
    put_groups(state, [change for change in frame.groups if isinstance(change, GroupPut)], {})
    for uuid, sealed in frame.parts:
        group = state.groups.get(uuid)
        if group is None:
            raise StoreDamaged(f"log frame {frame.sequence}", f"it changes group {uuid}, which is not there")
        group.pending[frame.sequence] = sealed
    drop_groups(state, [change for change in frame.groups if isinstance(change, GroupDrop)])
    state.sequence = max(state.sequence, frame.sequence)
    if frame.sequence > state.root.sequence:  # a root of a checkpoint that had not ended is newer than its log
        state.carried = frame.carried


def put_groups(state: State, puts: list[GroupPut], keys: dict[UUID, GroupKey]) -> None:
    """Add or replace group records; a new group is open if its key is in `keys`."""
    for put in puts:
        record = GroupRecord(put.head.group, put.head.flags, put.blob)
        group = state.groups.get(record.uuid)
        if group is None:
            entry = state.tree.allocate(fmt.owner(fmt.Kind.GROUP, put.head.number))
            group = state.groups[record.uuid] = Group(record, put.head.number, put.head.key_check, entry)
            if record.uuid in keys:
                group.open_empty(keys[record.uuid], state.tree)
        group.record, group.dirty = record, True


def drop_doubtful_tombstones(opened: Group, groups: Mapping[UUID, Group]) -> UUID | None:
    """Compare a group that was just opened with the others: a UUID may be that of one vTPM only.

    While the group was closed, nobody could see its tombstones, and one's UUID may have been given to a new vTPM of
    another group: then the tombstone goes. Returns a UUID that two groups have a vTPM of, None for none.
    """
    table = opened.table
    if table is None:
        return None
    for group in groups.values():
        other = group.table
        if other is None or other is table:
            continue
        for uuid in table.in_both(other):
            if uuid in table.tombstones:
                table.remove(uuid)
            elif uuid in other.tombstones:
                other.remove(uuid)
            else:
                return UUID(bytes=uuid)
    return None


def drop_groups(state: State, drops: list[GroupDrop]) -> None:
    """Forget groups; their entries go with the next checkpoint. Raises StoreDamaged for an unknown one."""
    for drop in drops:
        group = state.groups.pop(drop.group, None)
        if group is None:
            raise StoreDamaged("log", f"it removes group {drop.group}, which is not there")
        entries = group.table.entries() if group.table is not None else group.leaves
        state.drops.update([group.entry, *entries, *group.carry])
        group.close()
