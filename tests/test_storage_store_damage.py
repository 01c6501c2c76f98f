import hashlib
import random
import zlib
from collections.abc import Iterator
from uuid import UUID, uuid4

import pytest
from storage_disks import MemoryDisk
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
    NotAStore,
    StoreDamaged,
    StoreError,
    StoreTooNew,
    WrongStoreKey,
)
from storage.secrets import StoreKey
from storage.store import GroupRecord, PutGroup, PutVtpm, RemoveGroup, RemoveVtpm, Store

A, B = uuid_of(1), uuid_of(2)


def live_image() -> bytes:
    """An image with leaves, group records, a map, both roots written, both boot copies, and three frames in the log."""
    disk = MemoryDisk()
    with new_store(disk, [A, B]) as store:
        store.write_boot_area(b"boot area, second" * 10)
        store.commit([PutVtpm(record_of(uuid_of(number), (A, B)[number % 2])) for number in range(100, 200)])
        store.checkpoint()
        for generation in range(1, 4):
            store.commit([PutVtpm(record_of(uuid_of(number), A, generation)) for number in range(100, 110, 2)])
    return bytes(disk.content)


@pytest.fixture(scope="module")
def image() -> bytes:
    return live_image()


def live_sectors(image: bytes) -> dict[int, str]:
    """Which sectors of the pool hold what, by the store's own map."""
    state = Store.open(MemoryDisk(image), KEY)._state
    found = {ref.location: "map" for ref in state.tree.maps}
    for ref in state.tree.entries:
        if ref is not None:
            found[ref.location] = fmt.kind_and_group(ref.owner)[0].name.lower()
    return found


def frames(image: bytes) -> Iterator[tuple[int, int]]:
    """Byte offset and length of each frame that a replay takes, oldest first."""
    state = Store.open(MemoryDisk(image), KEY)._state
    unit, end = state.root.body.log_unit, state.log.next
    while unit != end:
        offset = state.log.first * SECTOR + unit * fmt.UNIT
        head = fmt.FrameHeader.unpack(image, offset)
        length = head.size() + head.envelope_bytes + fmt.TAG_BYTES + head.parts_bytes
        yield offset, length
        unit += fmt.units(length)


def flipped(image: bytes, offset: int, bit: int = 1) -> bytes:
    changed = bytearray(image)
    changed[offset] ^= bit
    return bytes(changed)


def finding(image: bytes) -> str:
    """Open all of an image, return what is found wrong, and make sure that finding it changed nothing."""
    disk = MemoryDisk(image)
    try:
        with reopen(disk, unlock=False) as store:
            for group in store.groups():
                store.unlock_group(group, group_key(group))
            found = "; ".join(damage.where for damage in store.damage)
    except StoreError as error:
        found = f"{type(error).__name__}: {error}"
    assert bytes(disk.content) == image
    return found


def test_an_undamaged_image_has_no_findings(image: bytes) -> None:
    assert finding(image) == ""
    assert set(live_sectors(image).values()) == {"map", "leaf", "group"}
    assert len(list(frames(image))) == 3


@pytest.mark.parametrize("sector", [0])
def test_every_byte_of_the_header_counts(image: bytes, sector: int) -> None:
    for offset in range(sector * SECTOR, (sector + 1) * SECTOR):
        found = finding(flipped(image, offset))
        assert found.startswith(("StoreDamaged: store damaged: header", "NotAStore")), offset


def test_a_damaged_live_boot_copy_is_found_and_a_damaged_old_one_does_no_harm(image: bytes) -> None:
    for offset in range(0, SECTOR, 7):
        assert "boot area" in finding(flipped(image, 2 * SECTOR + offset))
        assert finding(flipped(image, 1 * SECTOR + offset)) == ""


def test_an_old_or_forged_boot_area_is_refused(image: bytes) -> None:
    old = image[: 2 * SECTOR] + bytes(SECTOR) + image[3 * SECTOR :]
    assert Store.read_boot_area(MemoryDisk(old)) == (STORE, b"boot area")
    assert "neither copy is the one that the store wrote last" in finding(old)
    head = fmt.BootHeader(fmt.BOOT_MAGIC, 1, 1, 6, 99, STORE).pack()
    forged = (head + b"forged").ljust(SECTOR - 32, b"\0")
    forged += hashlib.sha256(forged).digest()
    changed = image[: 2 * SECTOR] + forged + image[3 * SECTOR :]
    assert Store.read_boot_area(MemoryDisk(changed)) == (STORE, b"forged")
    assert "neither copy is the one" in finding(changed)


def test_a_damaged_root_is_either_made_good_without_loss_or_refused(image: bytes) -> None:
    whole = content(reopen(MemoryDisk(image)))
    digest = Store.open(MemoryDisk(image), KEY).digest()
    live = Store.open(MemoryDisk(image), KEY)._state.root.slot
    for offset in range(0, fmt.ROOT_BYTES, 31):
        changed = flipped(image, fmt.ROOT_SECTORS[live] * SECTOR + offset)
        assert finding(changed) == ""
        assert content(reopen(MemoryDisk(changed))) == whole
        assert Store.open(MemoryDisk(changed), KEY).digest() != digest


def test_a_damaged_root_whose_predecessor_lacks_frames_is_refused() -> None:
    disk = MemoryDisk()
    with new_store(disk, [A]) as store:
        log_units = store.statistics().log_units
        for generation in range(2 * log_units):
            store.commit([PutVtpm(record_of(uuid_of(100), A, generation))])
        live = store._state.root.slot
    assert "StoreDamaged" in finding(flipped(bytes(disk.content), fmt.ROOT_SECTORS[live] * SECTOR + 100))


def test_both_roots_damaged_is_refused(image: bytes) -> None:
    changed = flipped(flipped(image, fmt.ROOT_SECTORS[0] * SECTOR + 500), fmt.ROOT_SECTORS[1] * SECTOR + 500)
    assert "neither root A nor root B" in finding(changed)


def test_any_byte_of_any_live_sector_is_found_and_located(image: bytes) -> None:
    for location, kind in live_sectors(image).items():
        for offset in [0, 31, 32, SECTOR - 17, SECTOR - 1, *range(5, SECTOR, 97)]:
            found = finding(flipped(image, location * SECTOR + offset))
            assert kind in found, (kind, offset)


def test_damage_after_a_clean_stop_is_found_though_the_root_before_and_the_log_would_do(image: bytes) -> None:
    disk = MemoryDisk(image)
    with reopen(disk) as store:
        store.checkpoint()
        digest = store.digest()
        newest = [ref for ref in store._state.tree.entries if ref is not None and ref.sequence == store.sequence]
    assert newest
    for ref in newest:
        changed = flipped(bytes(disk.content), ref.location * SECTOR + 99)
        assert "leaf" in finding(changed)
        assert Store.open(MemoryDisk(changed), KEY).digest() == digest


def test_any_byte_of_a_frame_that_is_not_the_last_is_found(image: bytes) -> None:
    places = list(frames(image))
    for offset, length in places[:-1]:
        for byte in range(0, length, 3):
            assert "StoreDamaged: store damaged: log" in finding(flipped(image, offset + byte)), byte


def test_a_damaged_last_frame_is_taken_for_torn_and_shows_in_the_digest(image: bytes) -> None:
    offset, length = list(frames(image))[-1]
    digest = Store.open(MemoryDisk(image), KEY).digest()
    for byte in range(0, length, 5):
        changed = flipped(image, offset + byte)
        assert finding(changed) == ""
        assert Store.open(MemoryDisk(changed), KEY).digest() != digest


# --- damaged leaves: the rest goes on ---------------------------------------------------------------


def leaf_of(image: bytes, group: UUID) -> int:
    state = reopen(MemoryDisk(image))._state
    table = state.groups[group].table
    assert table is not None
    ref = state.tree.entries[table.entries()[0]]
    assert ref is not None
    return ref.location


def test_a_damaged_leaf_does_not_keep_other_groups_and_leaves_from_working(image: bytes) -> None:
    location = leaf_of(image, A)
    disk = MemoryDisk(flipped(image, location * SECTOR + 1000))
    store = reopen(disk)
    whole = content(reopen(MemoryDisk(image)))[1]
    there = content(store)[1]
    assert {uuid for uuid, row in whole.items() if row[0] == B} <= set(there)
    assert there.items() <= whole.items()
    lost = sorted(set(whole) - set(there))
    assert lost
    with pytest.raises(StoreDamaged, match="may have been there"):
        store.get(lost[0])
    with pytest.raises(StoreDamaged, match="damaged leaves"):
        store.commit([RemoveGroup(A)])


def test_a_damaged_leaf_is_kept_as_it_is_and_counts_again_when_it_is_whole_but_never_over_newer_records(
    image: bytes,
) -> None:
    location = leaf_of(image, A)
    disk = MemoryDisk(flipped(image, location * SECTOR + 1000))
    sector = bytes(disk.content[location * SECTOR : (location + 1) * SECTOR])
    store = reopen(disk)
    expected = content(reopen(MemoryDisk(image)))[1] | content(store)[1]
    for generation in range(3):
        changes = [record_of(uuid_of(number), A, 50 + generation) for number in range(100, 180, 2)]
        store.commit([PutVtpm(record) for record in changes])
        expected |= {record.uuid: row_of(record) for record in changes}
        store.checkpoint()
    assert bytes(disk.content[location * SECTOR : (location + 1) * SECTOR]) == sector
    assert len(reopen(disk).damage) == 1
    disk.content[location * SECTOR + 1000] ^= 1
    assert content(reopen(disk))[1] == expected


@pytest.mark.parametrize("in_log_only", [True, False])
def test_a_leaf_that_is_whole_again_never_brings_a_removed_vtpm_back(image: bytes, in_log_only: bool) -> None:
    location = leaf_of(image, A)
    table = reopen(MemoryDisk(image))._state.groups[A].table
    assert table is not None
    first = table.entries()[0]
    victim = next(UUID(bytes=uuid) for uuid in table.uuids() if table._index[uuid] // fmt.ROWS_PER_LEAF == first)
    disk = MemoryDisk(image)
    if in_log_only:
        reopen(disk).commit([RemoveVtpm(victim)])
    disk.content[location * SECTOR + 1000] ^= 1
    store = reopen(disk)
    if not in_log_only:
        store.commit([PutVtpm(record_of(victim, A, 70))])
        store.checkpoint()
        store.commit([RemoveVtpm(victim)])
    store.checkpoint()
    disk.content[location * SECTOR + 1000] ^= 1
    for _ in range(2):
        store = reopen(disk)
        assert victim not in content(store)[1]
        assert [damage.where.split()[0] for damage in store.damage] == ["lost"]
        store.checkpoint()


def test_a_group_whose_carried_parts_are_damaged_stays_closed_and_the_others_work() -> None:
    disk = MemoryDisk()
    with new_store(disk, [A, B]) as store:
        store.commit([PutVtpm(record_of(uuid_of(100), A)), PutVtpm(record_of(uuid_of(101), B))])
    with reopen(disk, unlock=False) as store:
        store.checkpoint()
    carry = next(place for place, kind in live_sectors(bytes(disk.content)).items() if kind == "carry")
    disk.content[carry * SECTOR + 50] ^= 1
    before = bytes(disk.content)
    store = reopen(disk, unlock=False)
    results = {}
    for group in (A, B):
        try:
            store.unlock_group(group, group_key(group))
        except StoreDamaged as error:
            results[group] = error.where
    assert len(results) == 1
    assert "carry" in next(iter(results.values()))
    assert bytes(disk.content) == before
    [good] = [group for group in (A, B) if group not in results]
    store.commit([PutVtpm(record_of(uuid_of(500), good))])
    store.checkpoint()
    disk.content[carry * SECTOR + 50] ^= 1
    assert set(content(reopen(disk))[1]) == {uuid_of(100), uuid_of(101), uuid_of(500)}


# --- foreign, cut short, swapped, newer -------------------------------------------------------------


def test_a_wrong_store_key_is_told_from_damage(image: bytes) -> None:
    with pytest.raises(WrongStoreKey):
        Store.open(MemoryDisk(image), StoreKey.new())


@pytest.mark.parametrize("size", [0, 1, 511, 4095, 4096, 3 * SECTOR, 7 * SECTOR, SMALL // 2, SMALL - 1])
def test_an_image_that_is_cut_short_is_refused(image: bytes, size: int) -> None:
    assert finding(image[:size]).startswith(("NotAStore", "StoreDamaged"))


@pytest.mark.parametrize("content", [b"\x7fELF" * 5000, bytes(SMALL), b"VTPMSIMG" + bytes(9000)])
def test_another_file_is_no_store(content: bytes) -> None:
    for use in (lambda disk: Store.open(disk, KEY), Store.read_boot_area):
        with pytest.raises(NotAStore):
            use(MemoryDisk(content))


def test_swapped_sectors_are_found(image: bytes) -> None:
    leaves = [location for location, kind in live_sectors(image).items() if kind == "leaf"]
    one, two = leaves[0] * SECTOR, leaves[1] * SECTOR
    changed = bytearray(image)
    changed[one : one + SECTOR], changed[two : two + SECTOR] = image[two : two + SECTOR], image[one : one + SECTOR]
    assert finding(bytes(changed)).count("leaf") == 2


def test_swapped_roots_are_refused(image: bytes) -> None:
    a, b = (slot * SECTOR for slot in fmt.ROOT_SECTORS)
    size = fmt.ROOT_BYTES
    assert "neither root" in finding(image[:a] + image[b : b + size] + image[a : a + size] + image[b + size :])


def test_an_old_leaf_put_back_is_found(image: bytes) -> None:
    disk = MemoryDisk(image)
    store = reopen(disk)
    for _ in range(6):
        store.commit([PutVtpm(record_of(uuid_of(number), A, 60)) for number in range(100, 200, 2)])
        store.checkpoint()
    new = bytes(disk.content)
    for location, kind in live_sectors(new).items():
        old = image[location * SECTOR : (location + 1) * SECTOR]
        if old != new[location * SECTOR : (location + 1) * SECTOR]:
            changed = new[: location * SECTOR] + old + new[(location + 1) * SECTOR :]
            assert kind in finding(changed)


def test_frames_of_the_log_cannot_be_dropped_swapped_or_repeated(image: bytes) -> None:
    (one, size), (two, _), (three, _) = [(offset, fmt.units(length) * fmt.UNIT) for offset, length in frames(image)]
    pieces = [image[offset : offset + size] for offset in (one, two, three)]
    for order in ((1, 0, 2), (1, 2, 1), (0, 2, 1), (2, 1, 0)):
        changed = image[:one] + b"".join(pieces[index] for index in order) + image[three + size :]
        found = finding(changed)
        digest = None if found else Store.open(MemoryDisk(changed), KEY).digest()
        assert digest != Store.open(MemoryDisk(image), KEY).digest()


def test_the_log_of_another_store_with_the_same_keys_is_not_taken(image: bytes) -> None:
    other = MemoryDisk()
    with Store.create(other, uuid4(), KEY, b"", SMALL) as store:
        store.commit([PutGroup(GroupRecord(A), group_key(A))])
    first = fmt.POOL_FIRST * SECTOR
    changed = bytes(other.content[:first]) + image[first:]
    with reopen(MemoryDisk(changed)) as opened:
        assert not opened.groups()


def test_a_newer_header_is_refused_and_says_which_version(image: bytes) -> None:
    changed = bytearray(image)
    changed[10:12] = (3).to_bytes(2, "big")
    assert "header: the checksum" in finding(bytes(changed))
    changed[480:512] = hashlib.sha256(changed[:480]).digest()
    for use in (lambda disk: Store.open(disk, KEY), Store.read_boot_area):
        with pytest.raises(StoreTooNew, match="needs format version 3, this program reads up to 2"):
            use(MemoryDisk(bytes(changed)))


def test_a_newer_root_is_refused_and_a_damaged_version_is_damage(image: bytes) -> None:
    live = Store.open(MemoryDisk(image), KEY)._state.root.slot
    start = fmt.ROOT_SECTORS[live] * SECTOR
    changed = bytearray(image)
    changed[start + 10 : start + 12] = (3).to_bytes(2, "big")
    assert "TooNew" not in finding(bytes(changed))
    changed[start + 12 : start + 16] = bytes(4)
    changed[start + 12 : start + 16] = zlib.crc32(changed[start : start + 24]).to_bytes(4, "big")
    assert finding(bytes(changed)).startswith("StoreTooNew")


def test_random_damage_never_ends_in_anything_but_a_storage_error(image: bytes) -> None:
    rng = random.Random(5)
    for _ in range(300):
        changed = bytearray(image)
        for _ in range(rng.choice([1, 3, 50])):
            start = rng.randrange(len(changed))
            piece = rng.randbytes(rng.choice([1, 16, 512, 4096]))
            changed[start : start + len(piece)] = piece[: len(changed) - start]
        finding(bytes(changed))
