"""A store beside a plain dictionary, for the tests that cut the power or compare with the model."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

from storage_disks import MemoryDisk

from storage.disk import Disk
from storage.secrets import GroupKey, StateKey, StoreKey
from storage.store import (
    Change,
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

Row = tuple[UUID, bytes, bytes, int, int]  # group, key, digest, generation, flags
Content = tuple[dict[UUID, GroupRecord], dict[UUID, Row]]


def group_key(group: UUID) -> GroupKey:
    return GroupKey(hashlib.sha256(b"group key" + group.bytes).digest())


def uuid_of(number: int) -> UUID:
    return UUID(bytes=hashlib.sha256(str(number).encode()).digest()[:16])


def record_of(vtpm: UUID, group: UUID, generation: int = 0) -> VtpmRecord:
    seed = vtpm.bytes + generation.to_bytes(8, "big")
    key = StateKey(hashlib.sha256(b"key" + seed).digest())
    digest = hashlib.sha256(b"digest" + seed).digest()
    return VtpmRecord(vtpm, group, key, digest, generation, RecordFlags(generation & 0x3F))


def row_of(record: VtpmRecord) -> Row:
    return record.group, record.key.reveal(), record.digest, record.generation, int(record.flags)


def new_store(disk: int | Disk, groups: Sequence[UUID] = (), size: int = SMALL) -> Store:
    store = Store.create(disk, STORE, KEY, b"boot area", size)
    store.commit([PutGroup(GroupRecord(group, 1, b"blob"), group_key(group)) for group in groups])
    return store


def reopen(disk: int | Disk, *, unlock: bool = True) -> Store:
    store = Store.open(disk, KEY)
    if unlock:
        for group in store.groups():
            store.unlock_group(group, group_key(group))
    return store


def content(store: Store) -> Content:
    return dict(store.groups()), {record.uuid: row_of(record) for record in store.vtpms()}


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

    def apply(self, changes: Sequence[Change]) -> None:
        for change in changes:
            match change:
                case PutVtpm(record, _):
                    self.rows[record.uuid] = row_of(record)
                case RemoveVtpm(uuid):
                    del self.rows[uuid]
                case PutGroup(group, _):
                    self.groups[group.uuid] = group
                case RemoveGroup(uuid):
                    del self.groups[uuid]

    def content(self) -> Content:
        return dict(self.groups), dict(self.rows)

    def some_changes(self, rng: random.Random, count: int) -> list[Change]:
        """Make valid changes: new, newer and removed vTPMs, now and then a group."""
        changes: list[Change] = []
        draft = Model(dict(self.groups), dict(self.rows))
        named: set[UUID] = set()
        for _ in range(count):
            change = draft._one(rng, named)
            draft.apply([change])
            changes.append(change)
        return changes

    def _one(self, rng: random.Random, named: set[UUID]) -> Change:
        groups, vtpms = sorted(self.groups), sorted(self.rows)
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
            return RemoveVtpm(rng.choice(vtpms))
        if vtpms and choice < 0.75:
            uuid = rng.choice(vtpms)
            group, _, _, generation, _ = self.rows[uuid]
            return PutVtpm(record_of(uuid, group, generation + 1))
        return PutVtpm(record_of(UUID(int=rng.getrandbits(128) | 1), rng.choice(groups)))

    def _put_group(self, rng: random.Random, named: set[UUID]) -> Change:
        uuid = UUID(int=rng.getrandbits(128) | 1)
        known = [group for group in sorted(self.groups) if group not in named]
        if known and rng.random() < 0.5:
            uuid = rng.choice(known)
        named.add(uuid)
        return PutGroup(GroupRecord(uuid, rng.getrandbits(8), rng.randbytes(rng.randrange(50))), group_key(uuid))
