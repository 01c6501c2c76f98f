"""A store beside a plain dictionary, for the tests that cut the power or compare with the model."""

import hashlib
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

from storage_disks import MemoryDisk

from storage.disk import Disk
from storage.secrets import GroupKey, StateKey, StoreKey
from storage.store import (
    BuryVtpm,
    Change,
    ForgetVtpm,
    GroupRecord,
    PutGroup,
    PutVtpm,
    RecordFlags,
    RemoveGroup,
    RemoveVtpm,
    Store,
    VtpmRecord,
)

STORE = UUID("99999999-8888-4777-a666-555555555555")
KEY = StoreKey(hashlib.sha256(b"store key of the tests").digest())
SECTOR = 4096
SMALL = 64 * SECTOR
_ROTATIONS = 8  # bits of a group's flags below the count of its rotations

Row = tuple[UUID, bytes, bytes, int, int]  # group, key, digest, generation, flags
Grave = tuple[UUID, int, int]  # group, time of the removal, generation
Content = tuple[dict[UUID, GroupRecord], dict[UUID, Row], dict[UUID, Grave]]


def group_key(group: UUID, number: int = 0) -> GroupKey:
    """Return a group's key: its first one, or that after so many rotations."""
    return GroupKey(hashlib.sha256(b"group key" + group.bytes + number.to_bytes(4, "big").lstrip(b"\0")).digest())


def key_number(record: GroupRecord) -> int:
    """Return how often a group's key was rotated: upper bits of the flags, as the manager has the key in the blob."""
    return record.flags >> _ROTATIONS


def key_of(record: GroupRecord) -> GroupKey:
    return group_key(record.uuid, key_number(record))


def rotated(record: GroupRecord) -> GroupRecord:
    """Return what is stored of a group after its next rotation."""
    return replace(record, flags=record.flags + (1 << _ROTATIONS))


def uuid_of(number: int) -> UUID:
    return UUID(bytes=hashlib.sha256(str(number).encode()).digest()[:16])


def record_of(vtpm: UUID, group: UUID, generation: int = 0) -> VtpmRecord:
    seed = vtpm.bytes + generation.to_bytes(8, "big")
    key = StateKey(hashlib.sha256(b"key" + seed).digest())
    digest = hashlib.sha256(b"digest" + seed).digest()
    return VtpmRecord(vtpm, group, key, digest, generation, RecordFlags(generation & 0x2F))


def new_uuid(rng: random.Random, known: Collection[UUID]) -> UUID:
    """Draw a UUID that is not known yet: the same seed may be drawn from twice."""
    while (uuid := UUID(int=rng.getrandbits(128) | 1)) in known:
        pass
    return uuid


def row_of(record: VtpmRecord) -> Row:
    return record.group, record.key.reveal(), record.digest, record.generation, int(record.flags)


def new_store(disk: int | Disk, groups: Sequence[UUID] = (), size: int = SMALL) -> Store:
    store = Store.create(disk, STORE, KEY, b"boot area", size)
    store.commit([PutGroup(GroupRecord(group, 1, b"blob"), group_key(group)) for group in groups])
    return store


def reopen(disk: int | Disk, *, unlock: bool = True) -> Store:
    store = Store.open(disk, KEY)
    if unlock:
        for group, record in store.groups().items():
            store.unlock_group(group, key_of(record))
    return store


def content(store: Store) -> Content:
    return dict(store.groups()), {record.uuid: row_of(record) for record in store.vtpms()}, graves_in(store)


def graves_in(store: Store) -> dict[UUID, Grave]:
    return {grave.uuid: (grave.group, grave.removed, grave.generation) for grave in store.tombstones()}


def content_of_image(image: bytes) -> Content:
    """Open an image that a power cut left: nothing in it may pass for damage."""
    with reopen(MemoryDisk(image)) as store:
        assert not store.damage
        return content(store)


@dataclass
class Model:
    """What a store must hold; `apply` takes what `Store.commit` took."""

    groups: dict[UUID, GroupRecord] = field(default_factory=dict)
    rows: dict[UUID, Row] = field(default_factory=dict)
    graves: dict[UUID, Grave] = field(default_factory=dict)

    def apply(self, changes: Sequence[Change]) -> None:
        for change in changes:
            match change:
                case PutVtpm(record, _):
                    self.rows[record.uuid] = row_of(record)
                case RemoveVtpm(uuid):
                    del self.rows[uuid]
                case BuryVtpm(uuid, removed):
                    group, _, _, generation, _ = self.rows.pop(uuid)
                    self.graves[uuid] = group, removed, generation
                case ForgetVtpm(uuid):
                    del self.graves[uuid]
                case PutGroup(record, _):
                    self.groups[record.uuid] = record
                case RemoveGroup(uuid):
                    del self.groups[uuid]
                    self.graves = {vtpm: grave for vtpm, grave in self.graves.items() if grave[0] != uuid}

    def content(self) -> Content:
        return dict(self.groups), dict(self.rows), dict(self.graves)

    def some_changes(self, rng: random.Random, count: int, closed: Collection[UUID] = ()) -> list[Change]:
        """Make valid changes: new, newer and removed vTPMs, now and then a group; none in `closed` groups."""
        changes: list[Change] = []
        rows = {uuid: row for uuid, row in self.rows.items() if row[0] not in closed}
        graves = {uuid: grave for uuid, grave in self.graves.items() if grave[0] not in closed}
        draft = Model(dict(self.groups), rows, graves)
        named: set[UUID] = set(closed)
        known = self.rows.keys() | self.graves.keys()
        for _ in range(count):
            change = draft._one(rng, named, closed, known)
            known |= {change.record.uuid} if isinstance(change, PutVtpm) else set()
            draft.apply([change])
            changes.append(change)
        return changes

    def _one(self, rng: random.Random, named: set[UUID], closed: Collection[UUID], known: set[UUID]) -> Change:
        groups, vtpms = sorted(self.groups.keys() - closed), list(self.rows)
        choice = rng.random()
        if not groups or choice < 0.04:
            return self._put_group(rng, named)
        if choice < 0.08:
            full = {row[0] for row in self.rows.values()}
            empty = [group for group in groups if group not in full and group not in named]
            if empty and len(groups) > 1:
                named.add(empty[0])
                return RemoveGroup(empty[0])
        if vtpms and choice < 0.3:
            return self._remove(rng, named)
        graves = sorted(self.graves.keys() - named)
        if graves and choice < 0.36:
            named.add(graves[0])
            return ForgetVtpm(graves[0])
        if vtpms and choice < 0.75:
            uuid = rng.choice(vtpms)
            named.add(uuid)
            group, _, _, generation, _ = self.rows[uuid]
            return PutVtpm(record_of(uuid, group, generation + 1))
        uuid = new_uuid(rng, known)
        named.add(uuid)
        return PutVtpm(record_of(uuid, rng.choice(groups)))

    def _remove(self, rng: random.Random, named: set[UUID]) -> Change:
        """Remove a vTPM, or bury it if nothing else in this commit is about it."""
        uuid = rng.choice(sorted(self.rows))
        if uuid in named or rng.random() < 0.5:
            return RemoveVtpm(uuid)
        named.add(uuid)
        return BuryVtpm(uuid, rng.getrandbits(32))

    def _put_group(self, rng: random.Random, named: set[UUID]) -> Change:
        uuid = UUID(int=rng.getrandbits(128) | 1)
        known = [group for group in sorted(self.groups) if group not in named]
        if known and rng.random() < 0.5:
            uuid = rng.choice(known)
        named.add(uuid)
        rotations = key_number(self.groups[uuid]) if uuid in self.groups else 0
        record = GroupRecord(uuid, rotations << _ROTATIONS | rng.getrandbits(8), rng.randbytes(rng.randrange(50)))
        return PutGroup(record, key_of(record))
