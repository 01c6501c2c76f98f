import random
from uuid import UUID

import pytest
from storage_disks import MemoryDisk
from storage_histories import (
    KEY,
    Model,
    content,
    graves_in,
    group_key,
    new_store,
    record_of,
    reopen,
    row_of,
    uuid_of,
)

from storage.errors import CommitRefused, GroupClosed, GroupNotEmpty, NoSuchVtpm, StorageError, VtpmRemoved
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
    Tombstone,
    VtpmRecord,
)

A, B = uuid_of(1), uuid_of(2)
V1, V2, V3 = uuid_of(11), uuid_of(12), uuid_of(13)
TIME = 1_795_000_000


def put(vtpm: UUID, group: UUID = A, generation: int = 0) -> PutVtpm:
    return PutVtpm(record_of(vtpm, group, generation))


@pytest.fixture
def disk() -> MemoryDisk:
    return MemoryDisk()


@pytest.fixture
def store(disk: MemoryDisk) -> Store:
    made = new_store(disk, [A, B])
    made.commit([put(V1, A, 3), put(V2, B), put(V3)])
    return made


@pytest.mark.parametrize("in_leaf", [False, True])
def test_a_buried_vtpm_leaves_uuid_time_and_generation_and_nothing_else(
    disk: MemoryDisk, store: Store, in_leaf: bool
) -> None:
    store.commit(
        [PutVtpm(VtpmRecord(V1, A, record_of(V1, A).key, bytes(32), 3, RecordFlags.TPM12 | RecordFlags.FRESH))]
    )
    store.commit([BuryVtpm(V1, TIME)])
    if in_leaf:
        store.checkpoint()
    for opened in (store, reopen(disk)):
        assert opened.tombstones() == [Tombstone(V1, A, TIME, 3, RecordFlags.TOMBSTONE | RecordFlags.TPM12)]
        assert opened.tombstone(V1) == opened.tombstones()[0]
        assert (opened.first_removal(), opened.removed_by(TIME - 1), opened.removed_by(TIME)) == (TIME, [], [V1])
        assert opened.tombstone(V3) is None
        assert {record.uuid for record in opened.vtpms()} == {V2, V3}
        figures = opened.statistics()
        assert (len(opened), figures.vtpms, figures.tombstones) == (2, 2, 1)
        with pytest.raises(VtpmRemoved) as caught:
            opened.get(V1)
        assert caught.value.removed == TIME
        with pytest.raises(NoSuchVtpm):
            opened.get(V1)


def test_the_key_of_a_buried_vtpm_leaves_memory_at_once(store: Store) -> None:
    key = record_of(V1, A, 3).key.reveal()
    tables = [group.table for group in store._state.groups.values()]

    def held() -> bool:
        return any(key in table.leaf(entry) for table in tables if table is not None for entry in table.entries())

    assert held()
    store.commit([BuryVtpm(V1, TIME)])
    assert not held()


def test_the_uuid_is_not_given_again_before_the_tombstone_is_forgotten(disk: MemoryDisk, store: Store) -> None:
    store.commit([BuryVtpm(V1, TIME)])
    before, digest = bytes(disk.content), store.digest()
    refused: list[tuple[list[Change], type[StorageError]]] = [
        ([put(V1)], VtpmRemoved),
        ([put(V1, B)], VtpmRemoved),
        ([PutVtpm(record_of(V1, A, 9), force=True)], VtpmRemoved),
        ([RemoveVtpm(V1)], VtpmRemoved),
        ([BuryVtpm(V1, TIME + 1)], VtpmRemoved),
        ([ForgetVtpm(V3)], NoSuchVtpm),
        ([ForgetVtpm(uuid_of(99))], NoSuchVtpm),
        ([ForgetVtpm(V1), ForgetVtpm(V1)], CommitRefused),
        ([ForgetVtpm(V1), put(V1)], CommitRefused),
        ([BuryVtpm(V3, TIME), put(V3)], CommitRefused),
        ([BuryVtpm(V3, TIME), RemoveVtpm(V3)], CommitRefused),
        ([put(V3), BuryVtpm(V3, TIME)], CommitRefused),
        ([BuryVtpm(uuid_of(99), TIME)], NoSuchVtpm),
    ]
    for changes, error in refused:
        with pytest.raises(error):
            store.commit(changes)
        assert (bytes(disk.content), store.digest()) == (before, digest)
    store.commit([ForgetVtpm(V1)])
    store.commit([put(V1, B)])
    assert row_of(reopen(disk).get(V1)) == row_of(record_of(V1, B))
    assert not reopen(disk).tombstones()


def test_no_record_can_say_that_it_is_a_tombstone() -> None:
    with pytest.raises(CommitRefused, match="both there and removed"):
        VtpmRecord(V1, A, record_of(V1, A).key, flags=RecordFlags.TOMBSTONE)
    for time in (-1, 2**64):
        with pytest.raises(CommitRefused):
            BuryVtpm(V1, time)


def test_a_group_with_tombstones_only_can_be_removed_and_takes_them_along(disk: MemoryDisk, store: Store) -> None:
    with pytest.raises(GroupNotEmpty):
        store.commit([BuryVtpm(V1, TIME), RemoveGroup(A)])
    store.commit([BuryVtpm(V1, TIME), BuryVtpm(V3, TIME)])
    store.commit([RemoveGroup(A)])
    store.checkpoint()
    assert graves_in(reopen(disk)) == {}
    store.commit([put(V1, B)])
    assert reopen(disk).get(V1).group == B


def test_tombstones_of_a_closed_group_are_kept_and_come_back_with_its_key(disk: MemoryDisk, store: Store) -> None:
    store.checkpoint()
    store.commit([BuryVtpm(V1, TIME)])
    expected = content(store)
    again = reopen(disk, unlock=False)
    again.unlock_group(B, group_key(B))
    again.checkpoint()  # the part with the tombstone is carried
    assert (again.tombstones(), again.statistics().tombstones) == ([], 0)
    with pytest.raises(GroupClosed):
        again.tombstones(A)
    with pytest.raises(GroupClosed):
        again.get(V1)
    assert content(reopen(disk)) == expected


def test_a_tombstone_gives_way_to_a_vtpm_made_while_nobody_could_see_it(disk: MemoryDisk, store: Store) -> None:
    store.commit([BuryVtpm(V1, TIME)])
    again = reopen(disk, unlock=False)
    again.unlock_group(B, group_key(B))
    again.commit([put(V1, B, 7)])
    for unlocked in ([A, B], [B, A]):
        store = reopen(disk, unlock=False)
        for group in unlocked:
            store.unlock_group(group, group_key(group))
        assert (store.get(V1).group, store.tombstones()) == (B, [])
    store.checkpoint()
    assert (reopen(disk).get(V1).group, reopen(disk).tombstones()) == (B, [])


def test_a_store_follows_its_model_with_tombstones_through_reopens_and_checkpoints() -> None:
    disk, rng = MemoryDisk(), random.Random(4)
    store, model = new_store(disk, [A, B]), Model()
    model.apply([PutGroup(GroupRecord(group, 1, b"blob"), group_key(group)) for group in (A, B)])
    buried = 0
    for turn in range(300):
        changes = model.some_changes(rng, rng.choice([1, 3, 20]))
        store.commit(changes)
        model.apply(changes)
        buried += sum(isinstance(change, BuryVtpm) for change in changes)
        if turn % 10 == 0:
            store.checkpoint()
        if turn % 7 == 0:
            store = reopen(disk)
        if turn % 25 == 0:
            store.compact(0)
        assert content(store) == model.content()
    assert buried > 100
    assert Store.open(disk, KEY).digest() == store.digest()
