import errno
import random
from pathlib import Path
from uuid import UUID

import pytest
from storage_cuts import RecordingDisk
from storage_disks import FaultyDisk, MemoryDisk
from storage_histories import (
    KEY,
    SECTOR,
    content,
    content_of_image,
    group_key,
    key_of,
    new_store,
    record_of,
    reopen,
    rotated,
    uuid_of,
)
from storage_leftovers import keys_left

from storage import store_format as fmt
from storage.errors import (
    CommitRefused,
    DeviceError,
    GroupClosed,
    NoSuchGroup,
    StorageFull,
    StoreDamaged,
    StoreFailed,
    WrongGroupKey,
)
from storage.store import BuryVtpm, GroupRecord, PutVtpm, RemoveVtpm, Store

A, B = GROUPS = [uuid_of(1), uuid_of(2)]


def add(store: Store, numbers: range) -> None:
    for start in range(numbers.start, numbers.stop, 200):
        batch = range(start, min(start + 200, numbers.stop))
        store.commit([PutVtpm(record_of(uuid_of(number), GROUPS[number % 2])) for number in batch])


def rotate(store: Store, group: UUID = A) -> None:
    record = rotated(store.groups()[group])
    store.rotate_group(record, key_of(record))


def used(disk: MemoryDisk, vtpms: int = 200, size: int = 64 * SECTOR) -> Store:
    """A store with a past: removed vTPMs, tombstones, a log that is not empty."""
    store = new_store(disk, GROUPS, size)
    add(store, range(100, 100 + vtpms))
    store.checkpoint()
    store.commit([RemoveVtpm(uuid_of(100)), BuryVtpm(uuid_of(102), 7), PutVtpm(record_of(uuid_of(104), A, 3))])
    return store


def test_after_a_rotation_everything_is_there_under_the_new_key_alone() -> None:
    disk = MemoryDisk()
    store = used(disk)
    groups, rows, graves = content(store)
    rotate(store)
    assert content(store) == (groups | {A: rotated(groups[A])}, rows, graves)
    store.commit([PutVtpm(record_of(uuid_of(104), A, 4))])
    with Store.open(disk.copy(), KEY) as old, pytest.raises(WrongGroupKey):
        old.unlock_group(A, group_key(A))
    with reopen(disk) as again:
        assert (content(again), again.digest()) == (content(store), store.digest())
        assert not again.damage


def test_a_group_that_was_rotated_can_be_rotated_again_and_the_other_one_keeps_its_key() -> None:
    disk = MemoryDisk()
    store = used(disk)
    for _ in range(3):
        rotate(store)
        add(store, range(900, 910))
    rotate(store, B)
    with reopen(disk) as again:
        assert content(again) == content(store)
        assert (key_of(again.groups()[A]), key_of(again.groups()[B])) == (group_key(A, 3), group_key(B, 1))


def test_the_old_key_reads_nothing_of_what_was_saved_since_and_after_a_scrub_nothing_at_all() -> None:
    disk = MemoryDisk()
    store = used(disk)
    rotate(store)
    new = record_of(uuid_of(104), A, 9).key.reveal()
    store.commit([PutVtpm(record_of(uuid_of(104), A, 9))])
    store.checkpoint()
    # storage_leftovers tries every sector and frame with the first key of each group
    before = keys_left(bytes(disk.content), [A], store.sequence)
    assert before, "the image still holds sectors of before"
    assert new not in before
    for _ in store.scrub():
        pass
    assert not keys_left(bytes(disk.content), [A], store.sequence)


@pytest.mark.parametrize(("vtpms", "sectors"), [(60, 64), (1200, 66)])
def test_every_power_cut_leaves_the_old_key_or_the_new_one_with_every_record(vtpms: int, sectors: int) -> None:
    """With 1200 vTPMs the image must grow, as it has no room for all leaves of a group a second time."""
    start = MemoryDisk()
    used(start, vtpms, sectors * SECTOR)
    disk = RecordingDisk(start=bytes(start.content))
    store = reopen(disk)
    disk.steps.clear()
    states = [content(store)]
    rotate(store)
    states.append(content(store))
    done = len(disk.steps)
    store.commit([PutVtpm(record_of(uuid_of(104), A, 9))])
    states.append(content(store))
    assert (len(disk.content) > len(start.content)) == (vtpms == 1200)
    seen = set()
    for cut in disk.all_cuts(random.Random(vtpms)):
        found = content_of_image(cut.image())
        assert found in (states if cut.steps < done else states[1:]), f"cut after step {cut.steps}"
        seen.add(states.index(found))
    assert seen == {0, 1, 2}, "all states were met"


def test_every_write_and_flush_that_fails_leaves_one_key_with_every_record(tmp_path: Path) -> None:
    image = MemoryDisk()
    used(image, 1200, 66 * SECTOR)
    expected = [content_of_image(bytes(image.content))]
    with reopen(image.copy()) as store:
        rotate(store)
        expected.append(content(store))
    at, both = 1, set()  # the first call is the flush of an open
    while True:
        path = tmp_path / f"{at}.img"
        path.write_bytes(image.content)
        with FaultyDisk(path, at, errno.EIO, partial=700) as disk:
            store = reopen(disk)
            try:
                rotate(store)
            except DeviceError as error:
                if "could not flush" in str(error) or "could not write" in str(error):
                    with pytest.raises(StoreFailed):
                        store.commit([PutVtpm(record_of(uuid_of(104), A, 9))])
                else:  # the image could not grow: nothing has begun, so it can be tried again
                    assert content(store) == expected[0]
                    rotate(store)
            else:
                assert not disk.failed
                break
        both.add(expected.index(content_of_image(path.read_bytes())))
        at += 1
    assert both == {0, 1}


def test_a_device_without_room_refuses_and_keeps_the_old_key() -> None:
    disk = MemoryDisk()
    used(disk, 1200, 66 * SECTOR)
    full = MemoryDisk(bytes(disk.content), growable=False)
    store = reopen(full)
    before = content(store)
    with pytest.raises(StorageFull):
        rotate(store)
    assert content(store) == before
    store.commit([PutVtpm(record_of(uuid_of(104), A, 9))])
    with reopen(full) as again:
        assert content(again) == content(store)
        assert key_of(again.groups()[A]) == group_key(A)


def test_what_cannot_be_sealed_anew_is_refused_with_nothing_changed() -> None:
    disk = MemoryDisk()
    store = used(disk)
    before = store.digest()
    with pytest.raises(CommitRefused, match="this key already"):
        store.rotate_group(rotated(store.groups()[A]), group_key(A))
    with pytest.raises(NoSuchGroup):
        store.rotate_group(GroupRecord(uuid_of(9)), group_key(A, 1))
    assert store.digest() == before
    with Store.open(disk.copy(), KEY) as closed, pytest.raises(GroupClosed):
        rotate(closed)


def test_a_group_with_damaged_leaves_keeps_its_key() -> None:
    disk = MemoryDisk()
    store = used(disk)
    entry = next(index for index, kind, number in store._state.tree.by_owner() if kind is fmt.Kind.LEAF and number == 0)
    disk.content[store._state.tree.place(entry) * SECTOR + 100] ^= 1
    with reopen(disk) as damaged:
        assert damaged.damage
        with pytest.raises(StoreDamaged, match="damaged leaves"):
            rotate(damaged)
        assert key_of(damaged.groups()[A]) == group_key(A)
