import errno
import random
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

import pytest
from storage_cuts import RecordingDisk, Write
from storage_disks import FaultyDisk, FileDisk, MemoryDisk
from storage_histories import (
    KEY,
    SECTOR,
    SMALL,
    Content,
    content,
    content_of_image,
    group_key,
    new_store,
    record_of,
    reopen,
    uuid_of,
)
from storage_leftovers import keys_left

from storage import store_format as fmt
from storage.errors import DeviceError, StoreFailed
from storage.store import BuryVtpm, GroupRecord, PutGroup, PutVtpm, RemoveVtpm, Store

A, B, C = GROUPS = [uuid_of(1), uuid_of(2), uuid_of(3)]


def add(store: Store, numbers: Sequence[int], groups: Sequence[UUID] = GROUPS) -> None:
    for start in range(0, len(numbers), 500):
        batch = numbers[start : start + 500]
        store.commit([PutVtpm(record_of(uuid_of(number), groups[number % len(groups)])) for number in batch])


def remove(store: Store, numbers: Sequence[int]) -> None:
    for start in range(0, len(numbers), 1000):
        store.commit([RemoveVtpm(uuid_of(number)) for number in numbers[start : start + 1000]])


def grown_and_emptied(disk: MemoryDisk, count: int, left: int, size: int = SMALL) -> Store:
    """Add vTPMs to a small image, which grows, and remove most of them again, spread over all leaves."""
    store = new_store(disk, GROUPS, size)
    add(store, range(10_000, 10_000 + count))
    gone = set(random.Random(3).sample(range(10_000, 10_000 + count), count - left))
    remove(store, sorted(gone))
    return store


def check_whole(disk: MemoryDisk, store: Store, expected: Content) -> None:
    assert content(store) == expected
    with reopen(disk) as again:
        assert (content(again), again.digest()) == (expected, store.digest())
        assert not again.damage


def test_after_many_were_removed_the_image_is_as_small_as_a_new_one_of_those_left() -> None:
    disk, fresh = MemoryDisk(), MemoryDisk()
    store = grown_and_emptied(disk, 4000, 200)
    expected, before = content(store), store.statistics()
    done = store.compact(0)
    figures = store.statistics()
    assert (done.bytes_before, done.bytes_after) == (before.bytes, figures.bytes)
    assert disk.size() == figures.bytes == figures.sectors * SECTOR
    assert (done.leaves_after, done.kept, done.closed) == (6, 0, [])  # 67, 67 and 66 records
    assert done.leaves_before > 80
    check_whole(disk, store, expected)
    with new_store(fresh, GROUPS, (7 + fmt.MIN_LOG_SECTORS + 24) * SECTOR) as small:
        small.commit([PutVtpm(record) for record in store.vtpms()])
        assert figures.bytes <= small.statistics().bytes
    again = store.compact(0)
    assert (again.bytes_before, again.bytes_after, again.leaves_before) == (figures.bytes, figures.bytes, 6)
    check_whole(disk, store, expected)


def test_both_roots_lead_to_the_same_records_after_a_compaction() -> None:
    disk = MemoryDisk()
    store = grown_and_emptied(disk, 1300, 120)
    store.compact(0)
    expected = content(store)
    for place in fmt.ROOT_SECTORS:
        changed = bytearray(disk.content)
        changed[place * SECTOR + 100] ^= 1
        assert content_of_image(bytes(changed)) == expected


def test_a_compacted_store_works_and_grows_on() -> None:
    disk = MemoryDisk()
    store = grown_and_emptied(disk, 3000, 100)
    store.compact(0)
    add(store, range(50_000, 52_500))
    for generation in range(1, 4):
        store.commit(
            [PutVtpm(record_of(uuid_of(number), GROUPS[number % 3], generation)) for number in range(50_000, 50_500)]
        )
        store.checkpoint()
    expected = content(store)
    assert len(expected[1]) == 2600
    check_whole(disk, store, expected)
    store = reopen(disk)
    remove(store, range(50_000, 52_000))
    store.compact(0)
    assert len(reopen(disk)) == 600


def test_the_size_asked_for_is_kept_and_an_image_is_never_made_larger() -> None:
    disk = MemoryDisk()
    store = grown_and_emptied(disk, 4000, 200)
    size = store.statistics().bytes
    expected = content(store)
    assert store.compact(size + SECTOR).bytes_after == size
    assert store.compact(80 * SECTOR).bytes_after == disk.size() == 80 * SECTOR
    check_whole(disk, store, expected)


def test_a_device_that_cannot_shrink_keeps_its_size_and_its_records_are_gathered() -> None:
    grown = MemoryDisk()
    grown_and_emptied(grown, 4000, 200)
    disk = MemoryDisk(bytes(grown.content), growable=False)
    store = reopen(disk)
    expected = content(store)
    done = store.compact(0)
    assert done.bytes_after == done.bytes_before == disk.size()
    assert done.leaves_after == 6
    check_whole(disk, store, expected)


def test_map_sectors_are_let_go_of() -> None:
    disk = MemoryDisk()
    store = grown_and_emptied(disk, 8000, 100)
    assert len(store._state.tree.maps) == 2
    store.compact(0)
    assert len(store._state.tree.maps) == 1
    store = reopen(disk)
    assert len(store._state.tree.maps) == 1
    add(store, range(50_000, 58_000))
    assert len(reopen(disk)) == 8100


def test_nothing_of_removed_vtpms_is_left_where_the_file_ended_before() -> None:
    disk = MemoryDisk()
    store = new_store(disk, GROUPS)
    add(store, range(10_000, 11_000))
    store.checkpoint()
    recorded = RecordingDisk(start=bytes(disk.content))
    store = reopen(recorded)
    remove(store, range(10_000, 10_990))
    size = recorded.size()
    store.compact(0)
    cut = next(count for count, step in enumerate(recorded.steps) if isinstance(step, int))
    freed = bytearray(recorded.start.ljust(size, b"\0"))
    for step in recorded.steps[:cut]:
        if isinstance(step, Write):
            freed[step.offset : step.offset + len(step.data)] = step.data
    behind = bytes(store.statistics().bytes) + bytes(freed[store.statistics().bytes :])
    assert keys_left(recorded.start, GROUPS, store.sequence)
    assert keys_left(behind, GROUPS, store.sequence) == {}


def test_every_cut_of_a_compaction_leaves_every_record() -> None:
    disk = MemoryDisk()
    grown_and_emptied(disk, 1300, 120)
    recorded = RecordingDisk(start=bytes(disk.content))
    store = reopen(recorded)
    store.commit([PutVtpm(record_of(uuid, store.get(uuid).group, 9)) for uuid in sorted(content(store)[1])[::3]])
    store.commit([BuryVtpm(uuid, 77) for uuid in sorted(content(store)[1])[::7]])
    recorded.start = bytes(recorded.content)
    recorded.steps.clear()
    expected = content(store)
    done = store.compact(0)
    assert done.bytes_after < done.bytes_before
    assert any(isinstance(step, int) for step in recorded.steps)
    cuts: dict[bytes, None] = {}
    for _, image in recorded.cuts(random.Random(5), 2, 2):
        if image not in cuts:
            cuts[image] = None
            assert content_of_image(image) == expected
    assert len(cuts) > 200
    for image in random.Random(6).sample(list(cuts), 15):  # and it can be done again, and gone on with
        again = MemoryDisk(image)
        store = reopen(again)
        store.compact(0)
        assert store.statistics().bytes == done.bytes_after
        add(store, range(90_000, 90_100))
        remove(store, range(90_000, 90_100))
        assert content_of_image(bytes(again.content)) == expected


def test_cuts_of_a_compaction_in_many_rounds_leave_every_record() -> None:
    """Few spare sectors: records are moved in one round, what they left is dropped in another."""
    disk = MemoryDisk()
    store = new_store(disk, [A], 77 * SECTOR)
    add(store, range(10_000, 11_400), [A])
    store.checkpoint()
    assert store.statistics().sectors == 77
    remove(store, [number for number in range(10_000, 11_400) if number % 5 == 0])
    store.checkpoint()
    recorded = RecordingDisk(start=bytes(disk.content), growable_disk=False)
    store = reopen(recorded)
    expected = content(store)
    roots = store.statistics().checkpoints
    store.compact(0)
    assert store.statistics().checkpoints > roots + 3
    for _, image in recorded.cuts(random.Random(7), 2, 2):
        assert content_of_image(image) == expected


def test_a_closed_group_is_carried_through_a_compaction_unread() -> None:
    disk = MemoryDisk()
    store = grown_and_emptied(disk, 2500, 300)
    store.commit([PutVtpm(record_of(uuid, B, 4)) for uuid, row in content(store)[1].items() if row[0] == B])
    expected = content(store)
    again = reopen(disk, unlock=False)
    for group in (A, C):
        again.unlock_group(group, group_key(group))
    done = again.compact(0)
    assert list(done.closed) == [B]
    assert done.kept > 0
    assert done.leaves_after < done.leaves_before
    assert done.bytes_after <= done.bytes_before
    check_closed(disk, again, expected)
    store = reopen(disk)
    assert content(store) == expected
    done = store.compact(0)
    assert (done.kept, done.leaves_after) == (0, 9)
    check_whole(disk, store, expected)


def check_closed(disk: MemoryDisk, store: Store, expected: Content) -> None:
    assert {uuid: row for uuid, row in expected[1].items() if row[0] != B} == content(store)[1]
    with reopen(disk) as whole:
        assert content(whole) == expected


def test_every_cut_of_a_compaction_with_a_closed_group_keeps_its_records() -> None:
    disk = MemoryDisk()
    store = grown_and_emptied(disk, 1300, 100)
    store.commit([PutVtpm(record_of(uuid, B, 4)) for uuid, row in content(store)[1].items() if row[0] == B])
    expected = content(store)
    recorded = RecordingDisk(start=bytes(disk.content))
    store = reopen(recorded, unlock=False)
    for group in (A, C):
        store.unlock_group(group, group_key(group))
    store.compact(0)
    for _, image in recorded.cuts(random.Random(8), 1, 2):
        assert content_of_image(image) == expected


def test_a_closed_group_is_carried_through_growth_unread() -> None:
    disk = MemoryDisk()
    store = new_store(disk, GROUPS)
    add(store, range(10_000, 10_300))
    store.checkpoint()
    store.commit([PutVtpm(record_of(uuid, B, 4)) for uuid, row in content(store)[1].items() if row[0] == B])
    expected = content(store)
    again = reopen(disk, unlock=False)
    for group in (A, C):
        again.unlock_group(group, group_key(group))
    add(again, range(20_000, 28_000), [A, C])
    assert again.statistics().sectors > 4 * SMALL // SECTOR
    check = content(reopen(disk))
    assert {uuid: row for uuid, row in check[1].items() if row[0] == B} == {
        uuid: row for uuid, row in expected[1].items() if row[0] == B
    }
    assert len(check[1]) == 8300


def test_a_damaged_leaf_stays_where_it_is_and_the_rest_is_compacted() -> None:
    disk = MemoryDisk()
    store = grown_and_emptied(disk, 2500, 300)
    store.checkpoint()
    expected = content(store)[1]
    table = store._state.groups[A].table
    assert table is not None
    places = {store._state.tree.place(entry): entry for entry in table.entries()}
    location = max(places)
    disk.content[location * SECTOR + 77] ^= 1
    store = reopen(disk)
    there = content(store)[1]
    done = store.compact(0)
    assert done.kept == 1
    assert done.leaves_after < done.leaves_before
    assert content(store)[1] == there == content(reopen(disk))[1]
    disk.content[location * SECTOR + 77] ^= 1
    assert content(reopen(disk))[1] == expected


def test_many_groups_keep_their_records_and_numbers() -> None:
    disk = MemoryDisk()
    groups = [uuid_of(1000 + number) for number in range(200)]
    store = new_store(disk, groups)
    add(store, range(10_000, 11_000), groups)
    remove(store, [number for number in range(10_000, 11_000) if number % 200 > 20])
    for group in groups[30::2]:
        store.commit([RemoveVtpm(record.uuid) for record in store.vtpms(group)])
    expected = content(store)
    store.compact(0)
    check_whole(disk, store, expected)
    store = reopen(disk)
    store.commit([PutGroup(GroupRecord(group, 9, b"changed")) for group in groups[::3]])
    store.commit([PutGroup(GroupRecord(A, 1, b"new"), group_key(A)), PutVtpm(record_of(uuid_of(7), A))])
    store.checkpoint()
    with reopen(disk) as again:
        assert content(again) == content(store)
        assert len(again.groups()) == 201


@pytest.mark.parametrize("step", range(0, 40, 5))
def test_a_compaction_that_meets_a_bad_disk_stops_the_store_and_loses_nothing(tmp_path: Path, step: int) -> None:
    with FaultyDisk(tmp_path / "store.img", 10_000, errno.EIO, partial=700) as file:
        store = new_store(file, GROUPS)
        add(store, range(10_000, 11_200))
        remove(store, range(10_000, 11_100))
        expected = content(store)
        file.fail_at = file.calls + step
        try:
            store.compact(0)
        except DeviceError:
            with pytest.raises(StoreFailed):
                store.digest()
        else:
            assert not file.failed
        assert content(reopen(file)) == expected


def test_a_real_file_becomes_smaller(tmp_path: Path) -> None:
    with FileDisk(tmp_path / "store.img") as file:
        store = Store.create(file.fd, uuid_of(9), KEY, b"boot")
        store.commit([PutGroup(GroupRecord(group), group_key(group)) for group in GROUPS])
        add(store, range(10_000, 30_000))
        assert file.path.stat().st_size == fmt.DEFAULT_SIZE
        remove(store, range(11_000, 30_000))
        expected = content(store)
        store.compact(0)
        assert file.path.stat().st_size < 80 * SECTOR  # a thousand records are 23 leaves
        assert content(reopen(file.fd)) == expected
