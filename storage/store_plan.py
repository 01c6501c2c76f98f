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
    WrongGroupKey,
)
from storage.secrets import GroupKey
from storage.store_crypto import key_check
from storage.store_frame import GroupDrop, GroupPut
from storage.store_group import Group
from storage.store_records import Change, GroupRecord, PutGroup, PutVtpm, RemoveGroup, RemoveVtpm, VtpmRecord
from storage.store_table import GroupTable, pack_row

_PUT: Final = bytes([fmt.Operation.PUT])
_REMOVE: Final = bytes([fmt.Operation.REMOVE])


@dataclass(slots=True)
class Plan:
    """A checked commit: group changes, keys of new groups, plaintext of each group's part, rows to be found."""

    puts: list[GroupPut] = field(default_factory=list)
    drops: list[GroupDrop] = field(default_factory=list)
    keys: dict[UUID, GroupKey] = field(default_factory=dict)
    parts: dict[UUID, bytearray] = field(default_factory=dict)
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
        for part in self.parts.values():
            part[:] = bytes(len(part))


@dataclass(slots=True)
class _Target:
    """A group whose vTPMs change. Its UUID is a number here: hashing a UUID takes longer than everything else."""

    number: int
    part: bytearray
    table: GroupTable | None


class Planner:
    """Checks changes in order, each against the store and the changes before it."""

    def __init__(self, groups: Mapping[UUID, Group], numbers: Callable[[], set[int]]) -> None:
        self._groups = groups
        self._ask_numbers = numbers
        self._numbers: set[int] | None = None
        self._plan = Plan()
        self._named: set[UUID] = set()  # groups changed themselves
        self._vtpms: dict[bytes, tuple[int, int] | None] = {}  # (group's UUID, generation) as of now; None: removed
        self._targets: dict[int, _Target] = {}
        self._count: dict[UUID, int] = {}

    def plan(self, changes: Sequence[Change]) -> Plan:
        """Check all changes. Raises what `Store.commit` names for a refusal."""
        for change in changes:
            match change:
                case PutVtpm():
                    self._put_vtpm(change.record, change.force)
                case RemoveVtpm(uuid):
                    self._remove_vtpm(uuid)
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
        target = self._targets.get(record.group.int) or self._target(record.group)
        uuid = record.uuid.bytes
        known = self._find(uuid, target)
        if known is not None:
            owner, generation = known
            if owner != target.number:
                raise CommitRefused(f"vTPM {record.uuid} belongs to group {UUID(int=owner)}")
            if record.generation < generation and not force:
                raise GenerationError(f"vTPM {record.uuid}", generation, record.generation)
        else:
            self._plan.new_rows[record.group] = self._plan.new_rows.get(record.group, 0) + 1
            self._count[record.group] = self._count.get(record.group, 0) + 1
        self._vtpms[uuid] = target.number, record.generation
        target.part += _PUT + pack_row(record)

    def _remove_vtpm(self, uuid: UUID) -> None:
        known = self._find(uuid.bytes)
        if known is None:
            raise missing_vtpm(uuid, self._groups)
        group = UUID(int=known[0])
        self._vtpms[uuid.bytes] = None
        self._count[group] = self._count.get(group, 0) - 1
        self._target(group).part += _REMOVE + uuid.bytes

    def _find(self, uuid: bytes, first: _Target | None = None) -> tuple[int, int] | None:
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

    def _target(self, uuid: UUID) -> _Target:
        known = self._targets.get(uuid.int)
        if known is not None:
            return known
        table: GroupTable | None = None
        if uuid not in self._plan.keys:
            group = self._groups.get(uuid)
            if group is None:
                raise NoSuchGroup(uuid)
            if group.table is None:
                raise GroupClosed([uuid])
            table = group.table
        part = self._plan.parts[uuid] = bytearray()
        target = self._targets[uuid.int] = _Target(uuid.int, part, table)
        return target

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
