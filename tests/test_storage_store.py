import errno
import hmac
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from storage_disks import FaultyDisk, FileDisk, MemoryDisk, ShortDisk
from storage_histories import (
    KEY,
    SECTOR,
    SMALL,
    STORE,
    content,
    group_key,
    new_store,
    record_of,
    reopen,
    row_of,
    uuid_of,
)

from storage import store_format as fmt
from storage.errors import (
    BootAreaTooLarge,
    CommitRefused,
    CommitTooLarge,
    DeviceError,
    GenerationError,
    GroupClosed,
    GroupNotEmpty,
    NoSuchGroup,
    NoSuchVtpm,
    NotAStore,
    StorageFull,
    StoreClosed,
    StoreExists,
    StoreFailed,
    WrongGroupKey,
)
from storage.secrets import GroupKey, StateKey
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
from storage.store_records import EPOCHS

A, B, C = uuid_of(1), uuid_of(2), uuid_of(3)
V1, V2, V3 = uuid_of(11), uuid_of(12), uuid_of(13)


@pytest.fixture
def disk() -> MemoryDisk:
    return MemoryDisk()


@pytest.fixture
def store(disk: MemoryDisk) -> Iterator[Store]:
    with new_store(disk, [A, B]) as made:
        yield made


def put(vtpm: UUID, group: UUID = A, generation: int = 0) -> PutVtpm:
    return PutVtpm(record_of(vtpm, group, generation))


def test_what_was_committed_is_there_at_once_and_after_a_reopen(disk: MemoryDisk, store: Store) -> None:
    store.commit([put(V1), put(V2, B, 5)])
    for opened in (store, reopen(disk)):
        assert row_of(opened.get(V1)) == row_of(record_of(V1, A))
        assert row_of(opened.get(V2)) == row_of(record_of(V2, B, 5))
        assert len(opened) == 2


def test_a_store_works_on_a_plain_descriptor(tmp_path: Path) -> None:
    with FileDisk(tmp_path / "store.img") as file:
        new_store(file.fd, [A]).commit([put(V1)])
        assert Store.read_boot_area(file.fd) == (STORE, b"boot area")
        assert content(reopen(file.fd))[1].keys() == {V1}
        assert file.path.stat().st_size == SMALL


def test_short_transfers_are_completed(tmp_path: Path) -> None:
    with ShortDisk(tmp_path / "store.img", 777) as file:
        new_store(file, [A]).commit([put(uuid_of(number)) for number in range(100, 200)])
        assert len(reopen(file)) == 100


def test_records_can_be_replaced_removed_and_added_again(disk: MemoryDisk, store: Store) -> None:
    store.commit([put(V1), put(V2)])
    store.commit([put(V1, A, 1), RemoveVtpm(V2)])
    store.commit([put(V2, B, 0)])
    assert {record.uuid: (record.group, record.generation) for record in reopen(disk).vtpms()} == {
        V1: (A, 1),
        V2: (B, 0),
    }


def test_vtpms_are_listed_by_group(store: Store) -> None:
    store.commit([put(V1), put(V2, B), put(V3)])
    assert {record.uuid for record in store.vtpms(A)} == {V1, V3}
    assert {record.uuid for record in store.vtpms()} == {V1, V2, V3}
    with pytest.raises(NoSuchGroup):
        list(store.vtpms(C))


def test_all_flags_are_kept_unknown_ones_too(disk: MemoryDisk, store: Store) -> None:
    flags = RecordFlags.TPM12 | RecordFlags.HIBERNATED | RecordFlags(1 << 7)
    store.commit([PutVtpm(replace(record_of(V1, A), flags=flags, epoch=EPOCHS - 1))])
    again = reopen(disk).get(V1)
    assert (again.flags, again.epoch) == (flags, EPOCHS - 1)
    store.commit([PutVtpm(replace(again, flags=flags & ~RecordFlags.HIBERNATED, generation=again.generation + 1))])
    assert reopen(disk).get(V1).epoch == EPOCHS - 1


def test_group_records_can_be_read_while_closed_and_replaced_without_the_key(disk: MemoryDisk, store: Store) -> None:
    store.commit([PutGroup(GroupRecord(A, 7, b"sealed" * 300))])
    again = reopen(disk, unlock=False)
    assert again.groups()[A] == GroupRecord(A, 7, b"sealed" * 300)
    again.commit([PutGroup(GroupRecord(A, 8, b"resealed"))])
    assert reopen(disk).groups()[A] == GroupRecord(A, 8, b"resealed")


def test_digest_is_the_same_after_a_reopen_and_moves_with_every_commit_and_checkpoint(
    disk: MemoryDisk, store: Store
) -> None:
    seen = [store.digest()]
    for changes in ([put(V1)], [put(V1, A, 1)], []):
        sequence = store.sequence
        store.commit(changes) if changes else store.checkpoint()
        seen.append(store.digest())
        assert store.sequence > sequence
        assert (reopen(disk).digest(), reopen(disk).sequence) == (store.digest(), store.sequence)
    assert len(set(seen)) == 4


def test_an_empty_commit_writes_nothing_unless_notes_are_to_be_kept(disk: MemoryDisk, store: Store) -> None:
    before = bytes(disk.content)
    store.note_anchored(b"a" * 32)
    store.note_volatile(b"v" * 96)
    store.commit([])
    assert bytes(disk.content) == before
    store.commit([], notes=True)
    assert (reopen(disk).anchored, reopen(disk).volatile_expected) == (b"a" * 32, b"v" * 96)


def test_anchor_notes_travel_with_the_next_commit_and_survive_checkpoints(disk: MemoryDisk, store: Store) -> None:
    store.note_anchored(b"a" * 32)
    store.note_volatile(b"volatile")
    assert (reopen(disk).anchored, reopen(disk).volatile_expected) == (bytes(32), b"")
    store.commit([put(V1)])
    assert (reopen(disk).anchored, reopen(disk).volatile_expected) == (b"a" * 32, b"volatile")
    store.note_anchored(b"b" * 32)
    store.checkpoint()
    assert (reopen(disk).anchored, reopen(disk).volatile_expected) == (b"b" * 32, b"volatile")


def test_notes_of_a_wrong_size_are_refused(store: Store) -> None:
    with pytest.raises(CommitRefused):
        store.note_anchored(b"short")
    with pytest.raises(CommitRefused):
        store.note_volatile(bytes(fmt.MAX_VOLATILE_BYTES + 1))


def test_a_commit_is_one_flush(store: Store) -> None:
    before = store.statistics().flushes
    store.commit([put(uuid_of(number), (A, B)[number % 2]) for number in range(100, 150)])
    assert store.statistics().flushes == before + 1


def test_statistics_add_up(store: Store) -> None:
    store.commit([put(V1)])
    found = store.statistics()
    assert found.bytes == found.sectors * SECTOR == SMALL
    assert found.sectors_used + found.sectors_spare + fmt.POOL_FIRST + fmt.MIN_LOG_SECTORS == found.sectors
    assert (found.vtpms, found.groups, found.groups_closed, found.commits) == (1, 2, 0, 2)
    assert 0 < found.log_units_used < found.log_units


# --- refusals: nothing is changed ------------------------------------------------------------------


def refused(store: Store, disk: MemoryDisk, changes: list[Change], error: type[Exception]) -> str:
    before, held = bytes(disk.content), content(store)
    with pytest.raises(error) as caught:
        store.commit(changes)
    assert bytes(disk.content) == before
    assert content(store) == held
    return str(caught.value)


def test_a_refused_change_takes_the_whole_commit_with_it(disk: MemoryDisk, store: Store) -> None:
    store.commit([put(V1, A, 5), put(V3, B)])
    for bad, error in (
        (put(V1, A, 4), GenerationError),
        (put(V1, B, 6), CommitRefused),
        (put(V2, C), NoSuchGroup),
        (RemoveVtpm(V2), NoSuchVtpm),
        (RemoveGroup(C), NoSuchGroup),
        (RemoveGroup(A), GroupNotEmpty),
        (PutGroup(GroupRecord(C)), CommitRefused),
        (PutGroup(GroupRecord(A), GroupKey.new()), WrongGroupKey),
    ):
        refused(store, disk, [put(uuid4()), bad], error)


def test_changes_are_checked_against_those_before_them(disk: MemoryDisk, store: Store) -> None:
    refused(store, disk, [put(V1, A, 5), put(V1, A, 4)], GenerationError)
    refused(store, disk, [put(V1), RemoveVtpm(V1), RemoveVtpm(V1)], NoSuchVtpm)
    refused(store, disk, [PutGroup(GroupRecord(A)), RemoveGroup(A)], CommitRefused)
    store.commit([put(V1, A, 5), RemoveVtpm(V1), put(V1, B, 0), put(V1, B, 1)])
    assert store.get(V1).group == B


def test_an_older_generation_needs_force(store: Store) -> None:
    store.commit([put(V1, A, 5)])
    store.commit([put(V1, A, 5)])
    store.commit([PutVtpm(record_of(V1, A, 2), force=True)])
    assert store.get(V1).generation == 2


def test_a_group_can_be_made_filled_emptied_and_removed(disk: MemoryDisk, store: Store) -> None:
    store.commit([PutGroup(GroupRecord(C, 1, b"c"), group_key(C)), put(V1, C)])
    assert reopen(disk).get(V1).group == C
    store.commit([RemoveVtpm(V1), RemoveGroup(C)])
    assert C not in reopen(disk).groups()
    store.commit([PutGroup(GroupRecord(C), group_key(C))])
    store.checkpoint()
    assert reopen(disk).groups().keys() == {A, B, C}


def test_values_that_have_no_place_in_the_format_are_refused() -> None:
    good = record_of(V1, A)
    wrong_flags = ({"flags": 256}, {"epoch": -1}, {"epoch": EPOCHS})
    for changes in (
        *wrong_flags,
        {"uuid": UUID(int=0)},
        {"digest": b"short"},
        {"generation": -1},
        {"generation": 2**64},
    ):
        with pytest.raises(CommitRefused):
            replace(good, **changes)
    for group in ({"uuid": UUID(int=0)}, {"flags": 2**32}, {"blob": bytes(fmt.MAX_GROUP_BLOB + 1)}):
        with pytest.raises(CommitRefused):
            replace(GroupRecord(A), **group)


def test_a_commit_larger_than_the_log_is_refused_and_can_be_split(disk: MemoryDisk, store: Store) -> None:
    changes: list[Change] = [put(uuid_of(number)) for number in range(5000, 6100)]
    refused(store, disk, changes, CommitTooLarge)
    store.commit(changes[:550])
    store.commit(changes[550:])
    assert len(reopen(disk)) == 1100


# --- groups that stay closed -----------------------------------------------------------------------


def test_a_closed_groups_vtpms_can_be_neither_read_nor_changed(disk: MemoryDisk, store: Store) -> None:
    store.commit([put(V1), put(V2, B)])
    again = reopen(disk, unlock=False)
    again.unlock_group(B, group_key(B))
    assert again.get(V2).group == B
    for use in (
        lambda: again.get(V1),
        lambda: list(again.vtpms(A)),
        lambda: again.commit([put(V3)]),
        lambda: again.commit([RemoveVtpm(V1)]),
        lambda: again.commit([RemoveGroup(A)]),
    ):
        with pytest.raises(GroupClosed) as caught:
            use()
        assert caught.value.groups == (A,)
    assert [record.uuid for record in again.vtpms()] == [V2]
    assert (again.is_open(A), again.is_open(B)) == (False, True)


def test_a_wrong_group_key_is_told_from_damage(disk: MemoryDisk, store: Store) -> None:
    store.commit([put(V1)])
    again = reopen(disk, unlock=False)
    with pytest.raises(WrongGroupKey):
        again.unlock_group(A, GroupKey.new())
    with pytest.raises(NoSuchGroup):
        again.unlock_group(C, group_key(C))
    again.unlock_group(A, group_key(A))
    again.unlock_group(A, group_key(A))
    with pytest.raises(WrongGroupKey):
        again.unlock_group(A, GroupKey.new())
    assert again.get(V1).group == A


@pytest.mark.parametrize("checkpoints", [0, 1, 3])
def test_what_the_log_held_of_a_closed_group_is_carried_until_its_key_comes(
    disk: MemoryDisk, store: Store, checkpoints: int
) -> None:
    store.commit([put(uuid_of(number), A) for number in range(100, 160)])
    store.checkpoint()
    store.commit([put(uuid_of(number), A, 3) for number in range(100, 150)])
    store.commit([RemoveVtpm(uuid_of(159)), put(V1, B)])
    expected = content(store)
    again = reopen(disk, unlock=False)
    again.unlock_group(B, group_key(B))
    for number in range(checkpoints):
        again.commit([put(V1, B, number + 1)])
        again.checkpoint()
    last = reopen(disk)
    last.commit([put(V1, B, 0)]) if not checkpoints else last.commit([put(V1, B, checkpoints)])
    rows = content(last)[1]
    assert {uuid: row for uuid, row in rows.items() if uuid != V1} == {
        uuid: row for uuid, row in expected[1].items() if uuid != V1
    }
    last.checkpoint()
    assert content(reopen(disk)) == content(last)


def test_a_closed_group_does_not_stop_others_from_filling_the_log_many_times(disk: MemoryDisk, store: Store) -> None:
    store.commit([put(V1)])
    again = reopen(disk, unlock=False)
    again.unlock_group(B, group_key(B))
    for generation in range(3 * again.statistics().log_units):
        again.commit([put(V2, B, generation)])
    assert again.statistics().checkpoints > 2
    assert reopen(disk).get(V1) == record_of(V1, A)


def store_with_much_in_the_log(disk: MemoryDisk) -> Store:
    """Fill a store to its last leaf, then the log with parts of group A; return it with A closed and B open."""
    store = new_store(disk, [A, B], 77 * SECTOR)
    for start in range(0, 1300, 325):
        store.commit([put(uuid_of(10_000 + number), (A, B)[number % 2]) for number in range(start, start + 325)])
    store.checkpoint()
    store.commit([put(uuid_of(10_000 + number), A, 2) for number in range(0, 1300, 2)])
    again = reopen(disk, unlock=False)
    again.unlock_group(B, group_key(B))
    return again


def test_the_image_grows_when_carried_parts_need_it(disk: MemoryDisk) -> None:
    store = store_with_much_in_the_log(disk)
    before = store.statistics()
    store.checkpoint()
    assert store.statistics().sectors > before.sectors == 77
    again = reopen(disk)
    assert {again.get(uuid_of(10_000 + number)).generation for number in range(0, 1300, 2)} == {2}
    assert len(again) == 1300


def test_where_carried_parts_have_no_room_everything_is_kept_until_their_key_comes(disk: MemoryDisk) -> None:
    store = store_with_much_in_the_log(disk)
    fixed = MemoryDisk(bytes(disk.content), growable=False)
    store = reopen(fixed, unlock=False)
    store.unlock_group(B, group_key(B))
    with pytest.raises(StorageFull):
        store.checkpoint()
    store.commit([put(uuid_of(10_001), B, 8)])
    again = reopen(fixed)
    assert {again.get(uuid_of(10_000 + number)).generation for number in range(0, 1300, 2)} == {2}
    store.unlock_group(A, group_key(A))
    store.checkpoint()
    assert content(reopen(fixed)) == content(store) == content(again)


def test_saves_go_on_where_carried_parts_took_the_last_spare_sectors() -> None:
    disk = MemoryDisk()
    store = new_store(disk, [A, B], 77 * SECTOR)
    for start in range(0, 1300, 325):
        store.commit([put(uuid_of(10_000 + number), (A, B)[number % 2]) for number in range(start, start + 325)])
    store.checkpoint()
    store.commit([put(uuid_of(10_000 + number), A, 2) for number in range(0, 500, 2)])
    fixed = MemoryDisk(bytes(disk.content), growable=False)
    store = reopen(fixed, unlock=False)
    store.unlock_group(B, group_key(B))
    store.checkpoint()
    assert store.statistics().sectors_spare < fmt.MIN_SPARE
    for generation in range(1, 4):
        store.commit([put(uuid_of(10_000 + number), B, generation) for number in range(1, 1300, 2)])
        store.checkpoint()
    with pytest.raises(StorageFull):
        store.commit([put(uuid_of(20_000 + number), B) for number in range(50)])
    assert {record.generation for record in reopen(fixed).vtpms(B)} == {3}


# --- room ------------------------------------------------------------------------------------------


def test_the_image_grows_while_running_and_keeps_everything(disk: MemoryDisk, store: Store) -> None:
    for start in range(0, 4000, 500):
        store.commit([put(uuid_of(10_000 + number), (A, B)[number % 2]) for number in range(start, start + 500)])
    assert disk.size() == store.statistics().bytes > SMALL
    assert len(reopen(disk)) == 4000


def add_until_full(store: Store, step: int) -> int:
    """Add vTPMs until there is no room, return how many were acknowledged."""
    added = 0
    while added < 5000:
        try:
            store.commit([put(uuid_of(10_000 + number)) for number in range(added, added + step)])
        except StorageFull:
            return added
        added += step
    raise AssertionError("it never was full")


def test_a_store_that_cannot_grow_refuses_early_and_keeps_what_was_acknowledged() -> None:
    disk = MemoryDisk(bytes(SMALL), growable=False)
    store = new_store(disk, [A])
    added = add_until_full(store, 44)
    assert added > 300
    for generation in range(300):
        store.commit([put(uuid_of(10_000 + generation % added), A, 1 + generation // added)])
    store.commit([RemoveVtpm(uuid_of(10_000 + number)) for number in range(88)])
    store.checkpoint()
    store.commit([put(uuid_of(20_000 + number)) for number in range(44)])
    assert len(reopen(disk)) == added - 44


def test_a_full_file_system_is_met_early(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(mount)], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip("mounting a tmpfs needs privileges")
    try:
        with FileDisk(mount / "store.img") as file:
            store = new_store(file, [A])
            added = add_until_full(store, 100)
            store.commit([put(uuid_of(10_000), A, 1)])
            store.checkpoint()
            assert len(reopen(file)) == added
            with FileDisk(mount / "other.img") as other, pytest.raises(StorageFull):
                new_store(other)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_twenty_thousand_vtpms_in_three_groups_fit_two_mebibytes(tmp_path: Path) -> None:
    groups = [A, B, C]
    with FileDisk(tmp_path / "store.img") as file:
        store = Store.create(file, STORE, KEY, b"boot" * 900)
        store.commit([PutGroup(GroupRecord(group, 0, bytes(fmt.MAX_GROUP_BLOB)), group_key(group)) for group in groups])
        keys = random.Random(1).randbytes(32 * 20_000)
        for start in range(0, 20_000, 1000):
            store.commit(
                [
                    PutVtpm(VtpmRecord(uuid_of(n), groups[n % 3], StateKey(keys[32 * n : 32 * n + 32]), bytes(32), 1))
                    for n in range(start, start + 1000)
                ]
            )
        rng = random.Random(2)
        for _ in range(3):
            chosen = rng.sample(range(20_000), 1000)
            store.commit([PutVtpm(record_of(uuid_of(n), groups[n % 3], 2)) for n in chosen])
        assert os.fstat(file.fd).st_size == store.statistics().bytes == 2_097_152
        again = reopen(file)
        assert len(again) == 20_000
        assert again.digest() == store.digest()
        assert again.statistics().sectors_spare >= fmt.MIN_SPARE
        for n in rng.sample(range(20_000), 500):
            assert row_of(again.get(uuid_of(n))) == row_of(store.get(uuid_of(n)))


# --- the boot area ---------------------------------------------------------------------------------


def test_the_boot_area_can_be_replaced_and_read_without_a_key(disk: MemoryDisk, store: Store) -> None:
    for boot in (b"", b"x" * fmt.MAX_BOOT_BYTES, b"third"):
        store.write_boot_area(boot)
        assert store.boot_area == boot
        assert Store.read_boot_area(disk) == (STORE, boot)
    assert reopen(disk).boot_area == b"third"
    with pytest.raises(BootAreaTooLarge):
        store.write_boot_area(bytes(fmt.MAX_BOOT_BYTES + 1))
    assert Store.read_boot_area(disk) == (STORE, b"third")


def test_the_boot_area_holds_what_the_design_asks_for() -> None:
    assert fmt.MAX_BOOT_BYTES >= 3900


# --- creation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 4096, 7 * SECTOR - 1])
def test_creation_refuses_a_place_that_is_not_empty(disk: MemoryDisk, offset: int) -> None:
    disk.content = bytearray(SMALL)
    disk.content[offset] = 1
    before = bytes(disk.content)
    with pytest.raises(StoreExists, match=f"in use at {offset}"):
        Store.create(disk, STORE, KEY, b"")
    assert bytes(disk.content) == before


def test_creation_over_a_store_is_refused(disk: MemoryDisk, store: Store) -> None:
    with pytest.raises(StoreExists):
        Store.create(disk, STORE, KEY, b"")
    assert len(reopen(disk).groups()) == 2


def test_a_store_too_small_to_work_is_refused(disk: MemoryDisk) -> None:
    with pytest.raises(CommitRefused, match="at least"):
        Store.create(disk, STORE, KEY, b"", 40 * SECTOR)
    assert disk.size() == 0


# --- faults and the end ----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("kind", ["pwrite", "fdatasync"])
@pytest.mark.parametrize("step", range(4))
def test_after_a_failed_write_or_flush_the_store_stops_and_reopening_decides(
    tmp_path: Path, error: int, kind: str, step: int
) -> None:
    with FaultyDisk(tmp_path / "store.img", 10_000, error, partial=100, only=kind) as file:
        store = new_store(file, [A])
        store.commit([put(V1, A, 1)])
        file.fail_at = file.calls + step
        acknowledged: list[int] = [1]
        with pytest.raises(DeviceError) as caught:
            commit_and_checkpoint_forever(store, acknowledged)
        assert caught.value.cause.errno == error
        for use in (lambda: store.get(V1), store.digest, lambda: store.commit([]), store.checkpoint, store.groups):
            with pytest.raises(StoreFailed, match="Open it again"):
                use()
        assert reopen(file).get(V1).generation in {acknowledged[-1], acknowledged[-1] + 1}


def commit_and_checkpoint_forever(store: Store, acknowledged: list[int]) -> None:
    while acknowledged[-1] < 20:
        store.commit([put(V1, A, acknowledged[-1] + 1)])
        acknowledged.append(acknowledged[-1] + 1)
        store.checkpoint()


@pytest.mark.parametrize("step", range(6))  # reserve, flush, boot copy, root, flush, header
def test_a_failed_creation_is_no_store(tmp_path: Path, step: int) -> None:
    with FaultyDisk(tmp_path / "store.img", step, errno.EIO) as file:
        with pytest.raises(DeviceError):
            new_store(file)
        with pytest.raises(NotAStore):
            Store.open(file, KEY)


def test_a_closed_store_refuses_everything_and_forgets_its_keys(disk: MemoryDisk) -> None:
    store = new_store(disk, [A])
    store.commit([put(V1)])
    state = store._state
    store.close()
    store.close()
    assert "wiped" in repr(state.key)
    assert "wiped" in repr(state.groups[A].key)
    for use in (lambda: store.get(V1), store.digest, lambda: store.commit([put(V2)]), store.checkpoint):
        with pytest.raises(StoreClosed):
            use()


def test_a_removed_key_leaves_memory_at_once(store: Store) -> None:
    record = record_of(V1, A)
    store.commit([PutVtpm(record)])
    table = store._state.groups[A].table
    assert table is not None
    assert any(record.key.reveal() in table.leaf(entry) for entry in table.entries())
    store.commit([RemoveVtpm(V1)])
    assert not any(record.key.reveal() in table.leaf(entry) for entry in table.entries())


def test_no_key_and_no_record_is_in_clear_in_the_image(disk: MemoryDisk, store: Store) -> None:
    record = record_of(V1, A)
    store.commit([PutVtpm(record)])
    store.checkpoint()
    store.commit([PutVtpm(record)])
    image = bytes(disk.content)
    for secret in (KEY.reveal(), group_key(A).reveal(), record.key.reveal(), record.digest, V1.bytes):
        assert secret not in image
    assert STORE.bytes in image  # the search can see what is in clear
    assert b"boot area" in image


def test_secrets_do_not_print(store: Store) -> None:
    store.commit([put(V1)])
    texts = repr(store.get(V1)) + repr(put(V1)) + repr(PutGroup(GroupRecord(A), group_key(A))) + repr(store)
    assert "<StateKey 32 bytes>" in texts
    assert "<GroupKey 32 bytes>" in texts
    for secret in (record_of(V1, A).key, group_key(A), KEY):
        assert secret.reveal().hex() not in texts
        assert repr(secret.reveal()) not in texts


def test_two_writes_of_the_same_content_share_no_bytes(disk: MemoryDisk, store: Store) -> None:
    store.commit([put(V1)])
    first = bytes(disk.content)
    store.commit([put(V1)])
    changed = [i for i, (a, b) in enumerate(zip(first, bytes(disk.content), strict=True)) if a != b]
    frame = bytes(disk.content)[min(changed) : max(changed)]
    assert not any(hmac.compare_digest(frame[96 + i : 112 + i], first[i : i + 16]) for i in range(0, len(frame), 64))
