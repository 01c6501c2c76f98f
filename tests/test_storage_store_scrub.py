import errno
import random
from pathlib import Path

import pytest
from storage_cuts import RecordingDisk
from storage_disks import FaultyDisk, MemoryDisk
from storage_histories import (
    SECTOR,
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
from storage.errors import DeviceError, StoreClosed, StoreFailed
from storage.store import BuryVtpm, ForgetVtpm, PutVtpm, RemoveVtpm, Store

A, B = uuid_of(1), uuid_of(2)
VICTIM = uuid_of(100)


def key_of(number: int, generation: int = 0) -> bytes:
    return record_of(uuid_of(number), A, generation).key.reveal()


def used_store(disk: MemoryDisk) -> Store:
    """A store with a past: leaves replaced, frames consumed, vTPMs removed and saved again."""
    store = new_store(disk, [A, B])
    store.commit([PutVtpm(record_of(uuid_of(number), (A, B)[number % 2])) for number in range(100, 220)])
    store.checkpoint()
    for generation in (1, 2):
        store.commit([PutVtpm(record_of(uuid_of(number), A, generation)) for number in range(100, 140, 2)])
        store.checkpoint()
    store.commit([PutVtpm(record_of(VICTIM, A, 3)), PutVtpm(record_of(uuid_of(101), B, 3))])
    store.write_boot_area(b"boot area with an old seal")
    store.write_boot_area(b"boot area with a new seal")
    store.commit([BuryVtpm(VICTIM, 1), RemoveVtpm(uuid_of(101)), BuryVtpm(uuid_of(102), 1)])
    store.commit([ForgetVtpm(uuid_of(102))])
    store.checkpoint()
    return store


def left(disk: MemoryDisk, store: Store) -> set[bytes]:
    return set(keys_left(bytes(disk.content), [A, B], store.sequence))


def live(store: Store) -> set[bytes]:
    return {record.key.reveal() for record in store.vtpms()}


def test_removed_and_replaced_keys_can_be_read_before_a_scrub_and_none_after_it() -> None:
    disk = MemoryDisk()
    store = used_store(disk)
    before, expected = keys_left(bytes(disk.content), [A, B], store.sequence), content(store)
    wheres = [where.split()[0] for where in before[key_of(100, 3)] + before[key_of(100, 2)]]
    assert {"leaf", "frame"} <= set(wheres)
    assert key_of(102) in before
    assert b"boot area with an old seal" in bytes(disk.content)
    *_, last = store.scrub()
    assert left(disk, store) == live(store)
    assert b"boot area with an old seal" not in bytes(disk.content)
    assert Store.read_boot_area(disk)[1] == b"boot area with a new seal"
    assert (last.done, last.closed, last.damaged) == (last.sectors, [], 0)
    assert content(store) == content(reopen(disk)) == expected
    assert reopen(disk).digest() == store.digest()


def test_after_a_scrub_not_a_byte_of_what_was_not_live_is_as_it_was() -> None:
    disk = MemoryDisk()
    store = used_store(disk)
    store.checkpoint()
    before = bytes(disk.content)
    *_, _ = store.scrub()
    state = store._state
    kept = {state.tree.place(entry) for entry in range(len(state.tree.entries))} | {
        ref.location for ref in state.tree.maps
    }
    for location in range(fmt.POOL_FIRST, state.tree.total):
        old, new = (image[location * SECTOR : (location + 1) * SECTOR] for image in (before, bytes(disk.content)))
        same = sum(one == two for one, two in zip(old, new, strict=True))
        assert same == SECTOR if location in kept else same < 200, location


def test_both_roots_lead_to_the_same_records_after_a_scrub() -> None:
    disk = MemoryDisk()
    store = used_store(disk)
    store.commit([PutVtpm(record_of(uuid_of(number), A, 5)) for number in range(104, 150, 2)])
    *_, _ = store.scrub()
    expected = content(store)
    for place in fmt.ROOT_SECTORS:
        changed = bytearray(disk.content)
        changed[place * SECTOR + 100] ^= 1
        assert content_of_image(bytes(changed)) == expected


def test_every_cut_of_a_scrub_leaves_everything_live_and_a_store_that_goes_on() -> None:
    disk = MemoryDisk()
    used_store(disk)
    recorded = RecordingDisk(start=bytes(disk.content))
    store = reopen(recorded)
    store.commit([PutVtpm(record_of(uuid_of(number), A, 5)) for number in range(104, 150, 2)])
    recorded.start = bytes(recorded.content)
    recorded.steps.clear()
    *_, _ = store.scrub()
    expected = content(store)
    seen: set[bytes] = set()
    for _, image in recorded.cuts(random.Random(1), 3, 2):
        if image in seen:
            continue
        seen.add(image)
        assert content_of_image(image) == expected
    assert len(seen) > 100
    for image in random.Random(2).sample(sorted(seen), 20):
        again = MemoryDisk(image)
        store = reopen(again)
        store.commit([RemoveVtpm(uuid_of(104))])
        *_, _ = store.scrub()
        assert left(again, store) == live(store)


def test_vtpms_save_between_the_steps_and_what_was_gone_before_is_gone() -> None:
    disk = MemoryDisk()
    store = new_store(disk, [A, B], 600 * SECTOR)
    store.commit([PutVtpm(record_of(uuid_of(number), A)) for number in range(100, 200)])
    store.checkpoint()
    store.commit([RemoveVtpm(VICTIM)])
    steps = 0
    for steps, progress in enumerate(store.scrub(), 1):
        assert progress.done <= progress.sectors
        assert content_of_image(bytes(disk.content)) == content(store)
        store.commit([PutVtpm(record_of(uuid_of(number), A, steps)) for number in range(101 + steps, 190, 60)])
        store.commit([PutVtpm(record_of(uuid_of(1000 + 50 * steps + number), A)) for number in range(50)])
        store.checkpoint()
    assert steps >= 3
    assert key_of(100) not in left(disk, store)
    assert live(store) <= left(disk, store)
    assert content(reopen(disk)) == content(store)
    *_, _ = store.scrub()
    assert left(disk, store) == live(store)


def test_of_a_closed_group_everything_is_kept_and_said_so_until_it_is_scrubbed_with_its_key() -> None:
    disk = MemoryDisk()
    store = used_store(disk)
    store.commit([PutVtpm(record_of(uuid_of(103), B, 4)), PutVtpm(record_of(uuid_of(106), A, 6))])
    store.commit([RemoveVtpm(uuid_of(103)), RemoveVtpm(uuid_of(106))])
    expected = content(store)
    again = reopen(disk, unlock=False)
    again.unlock_group(A, group_key(A))
    *_, last = again.scrub()
    assert list(last.closed) == [B]
    found = left(disk, again)
    assert {key_of(106, 6), key_of(106, 2), key_of(100, 3)}.isdisjoint(found)
    assert key_of(103, 4) in found  # in a carried part
    assert content(reopen(disk)) == expected
    store = reopen(disk)
    *_, last = store.scrub()
    assert list(last.closed) == []
    assert left(disk, store) == live(store)


def test_every_cut_of_a_scrub_with_a_closed_group_keeps_its_records() -> None:
    disk = MemoryDisk()
    store = used_store(disk)
    store.commit([PutVtpm(record_of(uuid_of(103), B, 4)), PutVtpm(record_of(uuid_of(106), A, 6))])
    expected = content(store)
    recorded = RecordingDisk(start=bytes(disk.content))
    store = reopen(recorded, unlock=False)
    store.unlock_group(A, group_key(A))
    *_, _ = store.scrub()
    assert {bytes(image) for _, image in recorded.cuts(random.Random(3), 2, 2)} != {recorded.start}
    for _, image in recorded.cuts(random.Random(3), 2, 2):
        assert content_of_image(image) == expected


def test_a_damaged_leaf_is_kept_and_said_so() -> None:
    disk = MemoryDisk()
    store = used_store(disk)
    table = store._state.groups[B].table
    assert table is not None
    location = store._state.tree.place(table.entries()[0])
    disk.content[location * SECTOR + 9] ^= 1
    sector = bytes(disk.content[location * SECTOR : (location + 1) * SECTOR])
    store = reopen(disk)
    *_, last = store.scrub()
    assert last.damaged == 1
    assert bytes(disk.content[location * SECTOR : (location + 1) * SECTOR]) == sector


@pytest.mark.parametrize("step", range(0, 12, 3))
def test_a_scrub_that_meets_a_bad_disk_stops_the_store_and_loses_nothing(tmp_path: Path, step: int) -> None:
    with FaultyDisk(tmp_path / "store.img", 10_000, errno.EIO, partial=700) as file:
        store = new_store(file, [A])
        store.commit([PutVtpm(record_of(uuid_of(number), A)) for number in range(100, 150)])
        expected = content(store)
        file.fail_at = file.calls + step
        with pytest.raises(DeviceError):
            scrub_often(store)
        with pytest.raises(StoreFailed):
            store.digest()
        assert content(reopen(file)) == expected


def scrub_often(store: Store) -> None:
    for _ in range(4):
        list(store.scrub())


def test_a_scrub_of_a_store_that_was_closed_on_the_way_ends() -> None:
    disk = MemoryDisk()
    store = used_store(disk)
    steps = store.scrub()
    next(steps)
    store.close()
    before = bytes(disk.content)
    with pytest.raises(StoreClosed):
        next(steps)
    assert bytes(disk.content) == before
