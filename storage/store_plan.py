"""From a list of changes to what a frame says, or a refusal before anything is touched. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from storage import store_format as fmt
from storage.errors import (
    CommitRefused,
    GenerationError,
    GroupClosed,
    GroupNotEmpty,
    NoSuchGroup,
    NoSuchVtpm,
    StoreDamaged,
    VtpmRemoved,
    WrongGroupKey,
)
from storage.secrets import GroupKey
from storage.store_crypto import key_check
from storage.store_frame import GroupDrop, GroupPut
from storage.store_group import Group
from storage.store_records import (
    BuryVtpm,
    Change,
    ForgetVtpm,
    GroupRecord,
    PutGroup,
    PutVtpm,
    RemoveGroup,
    RemoveVtpm,
    VtpmRecord,
)
from storage.store_table import GroupTable, pack_put, pack_tombstone, unpack_tombstone

_PUT: Final = bytes([fmt.Operation.PUT])
_REMOVE: Final = bytes([fmt.Operation.REMOVE])


@dataclass(slots=True)
class Part:
    """What a commit changes of one group's vTPMs, in plaintext. `table` is None while the group is to be made."""

    group: UUID
    number: int  # the UUID as a number: to hash a UUID takes longer than everything else here
    key: GroupKey
    table: GroupTable | None
    plaintext: bytearray


@dataclass(slots=True)
class Plan:
    """A checked commit: group changes, keys of new groups, each group's part, rows to be found."""

    puts: list[GroupPut] = field(default_factory=list)
    drops: list[GroupDrop] = field(default_factory=list)
    keys: dict[UUID, GroupKey] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    new_rows: dict[UUID, int] = field(default_factory=dict)

    def new_entries(self, groups: Mapping[UUID, Group]) -> int:
        """Count the leaves and group records that will be needed, at most."""
        if not self.puts and not self.new_rows:
            return 0
        count = sum(1 for put in self.puts if put.head.group not in groups)
        for uuid, rows in self.new_rows.items():
            group = groups.get(uuid)
            free = group.table.free_rows() if group is not None and group.table is not None else 0
            count += -(-max(0, rows - free) // fmt.ROWS_PER_LEAF)
        return count

    def wipe(self) -> None:
        """Overwrite the plaintext of the parts."""
        for part in self.parts:
            part.plaintext[:] = bytes(len(part.plaintext))


def plan_save(change: Change, groups: Mapping[UUID, Group]) -> Plan | None:
    """Plan the most frequent commit, one save of a vTPM that is there. None for all else, for `Planner` to judge."""
    if not isinstance(change, PutVtpm):
        return None
    record = change.record
    group = groups.get(record.group)
    if group is None or group.table is None or group.key is None:
        return None
    uuid = record.uuid.bytes
    generation = group.table.live_generation(uuid)
    if generation is None or (record.generation < generation and not change.force):
        return None
    part = Part(record.group, record.group.int, group.key, group.table, bytearray(pack_put(record, uuid)))
    return Plan(parts=[part])


class Planner:
    """Checks changes in order, each against the store and the changes before it."""

    __slots__ = ("_ask_numbers", "_closing", "_count", "_groups", "_named", "_numbers", "_parts", "_plan", "_vtpms")

    def __init__(self, groups: Mapping[UUID, Group], numbers: Callable[[], set[int]]) -> None:
        self._groups = groups
        self._ask_numbers = numbers
        self._numbers: set[int] | None = None
        self._plan = Plan()
        self._named: set[UUID] = set()  # groups changed themselves
        self._vtpms: dict[bytes, tuple[int, int] | None] = {}  # (group's UUID, generation) as of now; None: removed
        self._parts: dict[int, Part] = {}
        self._count: dict[UUID, int] = {}
        self._closing: set[bytes] = set()  # vTPMs that are buried, and tombstones that are removed

    def plan(self, changes: Sequence[Change]) -> Plan:
        """Check all changes. Raises what `Store.commit` names for a refusal."""
        for change in changes:
            match change:
                case PutVtpm():
                    self._put_vtpm(change.record, change.force)
                case RemoveVtpm(uuid):
                    self._remove_vtpm(uuid)
                case BuryVtpm(uuid, removed):
                    self._bury_vtpm(uuid, removed)
                case ForgetVtpm(uuid):
                    self._forget_vtpm(uuid)
                case PutGroup(group, key):
                    self._put_group(group, key)
                case RemoveGroup(uuid):
                    self._remove_group(uuid)
        for drop in self._plan.drops:
            if left := self._vtpms_of(drop.group):
                raise GroupNotEmpty(drop.group, left)
        return self._plan

    # --- vTPMs -------------------------------------------------------------------------------------

    def _put_vtpm(self, record: VtpmRecord, force: bool) -> None:
        part = self._parts.get(record.group.int) or self._part(record.group)
        uuid, table = record.uuid.bytes, part.table
        generation = None if table is None or uuid in self._vtpms else table.live_generation(uuid)
        if generation is None:
            generation = self._generation_elsewhere(record, part)
        if record.generation < generation and not force:
            raise GenerationError(f"vTPM {record.uuid}", generation, record.generation)
        self._vtpms[uuid] = part.number, record.generation
        part.plaintext += pack_put(record, uuid)

    def _generation_elsewhere(self, record: VtpmRecord, part: Part) -> int:
        """Return the generation that a change before this one gave; 0 for a new vTPM, for which a row is counted."""
        self._refuse_removed(record.uuid)
        known = self._find(record.uuid.bytes, part)
        if known is None:
            self._plan.new_rows[record.group] = self._plan.new_rows.get(record.group, 0) + 1
            self._count[record.group] = self._count.get(record.group, 0) + 1
            return 0
        owner, generation = known
        if owner != part.number:
            raise CommitRefused(f"vTPM {record.uuid} belongs to group {UUID(int=owner)}")
        return generation

    def _remove_vtpm(self, uuid: UUID) -> None:
        self._refuse_removed(uuid)
        known = self._find(uuid.bytes)
        if known is None:
            raise missing_vtpm(uuid, self._groups)
        group = UUID(int=known[0])
        self._vtpms[uuid.bytes] = None
        self._count[group] = self._count.get(group, 0) - 1
        self._part(group).plaintext += _REMOVE + uuid.bytes

    def _bury_vtpm(self, uuid: UUID, removed: int) -> None:
        self._refuse_removed(uuid)
        if uuid.bytes in self._vtpms:
            raise CommitRefused(f"vTPM {uuid} is changed and buried at once")
        group = find_group(uuid.bytes, self._groups)
        if group is None or group.table is None:
            raise missing_vtpm(uuid, self._groups)
        self._vtpms[uuid.bytes] = None
        self._closing.add(uuid.bytes)
        self._count[group.record.uuid] = self._count.get(group.record.uuid, 0) - 1
        self._part(group.record.uuid).plaintext += _PUT + pack_tombstone(group.table.row(uuid.bytes), removed)

    def _forget_vtpm(self, uuid: UUID) -> None:
        group = find_group(uuid.bytes, self._groups)
        if group is None or group.table is None or uuid.bytes not in group.table.tombstones:
            raise NoSuchVtpm(uuid, f"the store has no tombstone of vTPM {uuid}")
        if uuid.bytes in self._closing:
            raise CommitRefused(f"the tombstone of vTPM {uuid} is changed twice")
        self._closing.add(uuid.bytes)
        self._part(group.record.uuid).plaintext += _REMOVE + uuid.bytes

    def _refuse_removed(self, uuid: UUID) -> None:
        """Raise VtpmRemoved for a tombstone, CommitRefused for what becomes or was one within this commit."""
        if uuid.bytes in self._closing:
            raise CommitRefused(f"vTPM {uuid} is changed together with its tombstone")
        for group in self._groups.values():
            if group.table is not None and uuid.bytes in group.table.tombstones:
                raise VtpmRemoved(uuid, unpack_tombstone(group.table.row(uuid.bytes), group.record.uuid).removed)

    def _find(self, uuid: bytes, first: Part | None = None) -> tuple[int, int] | None:
        if uuid in self._vtpms:
            return self._vtpms[uuid]
        if first is not None and first.table is not None:
            generation = first.table.generation(uuid)
            if generation is not None:
                return first.number, generation
        for group in self._groups.values():
            if group.table is not None:
                generation = group.table.generation(uuid)
                if generation is not None:
                    return group.record.uuid.int, generation
        return None

    def _part(self, uuid: UUID) -> Part:
        known = self._parts.get(uuid.int)
        if known is not None:
            return known
        table: GroupTable | None = None
        key = self._plan.keys.get(uuid) if self._plan.keys else None
        if key is None:
            group = self._groups.get(uuid)
            if group is None:
                raise NoSuchGroup(uuid)
            table, key = group.table, group.key
            if table is None or key is None:
                raise GroupClosed([uuid])
        part = self._parts[uuid.int] = Part(uuid, uuid.int, key, table, bytearray())
        self._plan.parts.append(part)
        return part

    # --- groups ------------------------------------------------------------------------------------

    def _name(self, uuid: UUID) -> None:
        if uuid in self._named:
            raise CommitRefused(f"group {uuid} is changed twice")
        self._named.add(uuid)

    def _put_group(self, record: GroupRecord, key: GroupKey | None) -> None:
        self._name(record.uuid)
        group = self._groups.get(record.uuid)
        if group is not None:
            if key is not None and key_check(key, record.uuid) != group.check:
                raise WrongGroupKey(record.uuid)
            number, check = group.number, group.check
        else:
            if key is None:
                raise CommitRefused(f"new group {record.uuid} has no key")
            number, check = self._free_number(), key_check(key, record.uuid)
            self._plan.keys[record.uuid] = key
        head = fmt.GroupHead(record.uuid, number, len(record.blob), record.flags, check)
        self._plan.puts.append(GroupPut(head, record.blob))

    def _free_number(self) -> int:
        if self._numbers is None:
            self._numbers = self._ask_numbers()
        for number in range(fmt.MAX_GROUPS):
            if number not in self._numbers:
                self._numbers.add(number)
                return number
        raise CommitRefused(f"there are {fmt.MAX_GROUPS} groups, the most that the format knows")

    def _remove_group(self, uuid: UUID) -> None:
        self._name(uuid)
        group = self._groups.get(uuid)
        if group is None:
            raise NoSuchGroup(uuid)
        if group.damaged:
            raise StoreDamaged(f"group {uuid}", "it has damaged leaves, whose vTPMs are not known")
        if group.table is None and (group.leaves or group.pending or group.carry):
            raise GroupClosed([uuid])
        self._plan.drops.append(GroupDrop(uuid))

    def _vtpms_of(self, uuid: UUID) -> int:
        group = self._groups[uuid]
        return self._count.get(uuid, 0) + (len(group.table) if group.table is not None else 0)


def find_group(uuid: bytes, groups: Mapping[UUID, Group]) -> Group | None:
    """Find the open group that has the vTPM."""
    for group in groups.values():
        if group.table is not None and uuid in group.table:
            return group
    return None


def missing_vtpm(uuid: UUID, groups: Mapping[UUID, Group]) -> NoSuchVtpm | GroupClosed | StoreDamaged:
    """Build the error for a vTPM that no open group has: it may be in a closed one, or in a damaged leaf."""
    closed = [group.record.uuid for group in groups.values() if group.table is None]
    if closed:
        return GroupClosed(closed)
    damaged = [entry for group in groups.values() for entry in group.damaged]
    if damaged:
        return StoreDamaged(f"leaf (entry {damaged[0]})", f"vTPM {uuid} is not elsewhere and may have been there")
    return NoSuchVtpm(uuid)
