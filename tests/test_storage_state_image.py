import errno
import hashlib
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from storage_cuts import RecordingDisk
from storage_disks import FaultyDisk, FileDisk, MemoryDisk, ShortDisk

from storage import state_format as fmt
from storage.errors import (
    BlobsRefused,
    DeviceError,
    GenerationError,
    ImageDamaged,
    ImageError,
    ImageExists,
    ImageFailed,
    ImageForeign,
    ImageTooNew,
    KeyMismatch,
    NoMatchingSlot,
    NotAnImage,
    NothingSaved,
    SlotMismatch,
    SlotsInUse,
    StateTooLarge,
    StorageFull,
)
from storage.secrets import StateKey
from storage.state_image import Emulator, Family, Saved, SlotState, StateImage

VTPM = UUID("11111111-2222-4333-8444-555555555555")
STORE = UUID("99999999-8888-4777-a666-555555555555")
BLOBS = {"permall": b"permanent" * 100, "volatilestate": b"volatile" * 50}
SECRET = b"a secret of the guest, in clear"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FileDisk]:
    with FileDisk(tmp_path / "vtpm.img") as made:
        yield made


def fresh(disk: FileDisk | MemoryDisk) -> StateImage:
    return StateImage.create(disk, VTPM, STORE, Family.TPM20)


def saved(disk: FileDisk | MemoryDisk, generations: int = 1) -> tuple[StateImage, Saved]:
    image = fresh(disk)
    records = []
    for generation in range(1, generations + 1):
        records.append(image.save(BLOBS, generation))
        image.switch()
    return image, records[-1]


def reload(disk: FileDisk | MemoryDisk, record: Saved) -> dict[str, bytes]:
    return dict(StateImage.open(disk, VTPM).load(record.key, record.digest, record.generation))


def test_what_was_saved_is_loaded_again(disk: FileDisk) -> None:
    _, record = saved(disk)
    assert reload(disk, record) == BLOBS


def test_create_and_open_take_a_plain_descriptor(disk: FileDisk) -> None:
    StateImage.create(disk.fd, VTPM, STORE, Family.TPM12)
    image = StateImage.open(disk.fd, VTPM, expect_store=STORE)
    assert (image.vtpm, image.store, image.family) == (VTPM, STORE, Family.TPM12)


def test_a_new_image_has_room_reserved_for_both_slots(disk: FileDisk) -> None:
    fresh(disk)
    assert os.fstat(disk.fd).st_blocks * 512 >= fmt.image_bytes(1) == disk.size()


def test_saves_alternate_between_slots_only_after_a_switch(disk: FileDisk) -> None:
    image = fresh(disk)
    first = image.save(BLOBS, 1)
    slots = [image.live_slot]
    image.switch()
    slots.append(image.live_slot)
    image.save(BLOBS, 2)
    again = image.save(BLOBS, 2)
    assert reload(disk, first) == reload(disk, again) == BLOBS
    image.switch()
    assert [*slots, image.live_slot] == [None, 0, 1]


def test_load_takes_the_slot_that_the_record_names_not_the_newest(disk: FileDisk) -> None:
    image = fresh(disk)
    old = image.save({"permall": b"old"}, 1)
    image.switch()
    new = image.save({"permall": b"new"}, 2)
    assert reload(disk, old) == {"permall": b"old"}
    assert reload(disk, new) == {"permall": b"new"}


def test_what_was_read_ahead_serves_one_load(disk: FileDisk) -> None:
    _, record = saved(disk)
    image = StateImage.open(disk, VTPM)
    image.read_ahead()
    disk.pwrite(bytes(fmt.CHUNK), fmt.chunk_offset(0, 0))
    assert dict(image.load(record.key, record.digest, record.generation)) == BLOBS
    with pytest.raises(NoMatchingSlot):
        image.load(record.key, record.digest, record.generation)


def test_what_was_read_ahead_of_a_fresh_one_is_not_taken_for_what_it_saves(disk: FileDisk) -> None:
    image = StateImage.create(disk, VTPM, uuid4(), Family.TPM20)
    image.read_ahead()
    image.assume_fresh()
    record = image.save(BLOBS, 1)
    assert dict(image.load(record.key, record.digest, record.generation)) == BLOBS


def test_after_loading_the_old_slot_a_save_takes_the_other(disk: FileDisk) -> None:
    image = fresh(disk)
    old = image.save({"permall": b"old"}, 1)
    image.switch()
    image.save({"permall": b"unacknowledged"}, 2)
    again = StateImage.open(disk, VTPM)
    again.load(old.key, old.digest, old.generation)
    new = again.save({"permall": b"new"}, 2)
    assert reload(disk, old) == {"permall": b"old"}
    assert reload(disk, new) == {"permall": b"new"}


def test_every_save_has_its_own_key_and_digest_and_nothing_is_in_clear(disk: FileDisk) -> None:
    image = fresh(disk)
    one = image.save({"permall": SECRET}, 1)
    image.switch()
    two = image.save({"permall": SECRET}, 2)
    assert one.key != two.key
    assert one.digest != two.digest
    content = disk.path.read_bytes()
    assert SECRET not in content
    assert one.key.reveal() not in content
    assert VTPM.bytes in content  # the search can see what is in clear


def test_digest_is_the_sha256_of_the_whole_slot(disk: FileDisk) -> None:
    _, record = saved(disk)
    size = fmt.SlotHeader.size() + len(fmt.pack_blobs(fmt.Blobs(BLOBS))) + fmt.TAG_BYTES
    raw = disk.pread(size, fmt.chunk_offset(0, 0))
    assert hashlib.sha256(raw).digest() == record.digest


def test_secrets_do_not_print(disk: FileDisk) -> None:
    image, record = saved(disk)
    texts = repr(record) + repr(image) + repr(fmt.Blobs({"permall": SECRET}))
    assert record.key.reveal().hex() not in texts
    assert "secret" not in texts
    assert "<StateKey 32 bytes>" in texts


@pytest.mark.parametrize("size", [0, 1, 16_000, 20_000, 173 * 1024, fmt.MAX_BLOB_BYTES])
def test_state_of_any_size_up_to_the_limit_fits_after_growing(disk: FileDisk, size: int) -> None:
    image, first = saved(disk)
    content = random.Random(size).randbytes(size)
    image.ensure_room(size)
    assert image.room >= size
    record = image.save({"permall": content}, 2)
    assert reload(disk, record) == {"permall": content}
    assert reload(disk, first) == BLOBS
    assert disk.size() <= fmt.image_bytes(fmt.MAX_CHUNKS)


def test_room_is_exact(disk: FileDisk) -> None:
    image = fresh(disk)
    parts = {"permall": b"", "savestate": b"", "volatilestate": bytes(image.room)}
    image.save(parts, 1)
    with pytest.raises(StateTooLarge, match="nothing was changed"):
        image.save(parts | {"permall": b"x"}, 2)


def test_growth_keeps_both_slots_and_is_seen_by_the_next_open(disk: FileDisk) -> None:
    image, one = saved(disk)
    two = image.save({"permall": b"two"}, 2)
    image.ensure_room(100_000)
    assert StateImage.open(disk, VTPM).room == image.room >= 100_000
    assert reload(disk, one) == BLOBS
    assert reload(disk, two) == {"permall": b"two"}


def test_growth_beyond_the_format_is_refused(disk: FileDisk) -> None:
    image = fresh(disk)
    with pytest.raises(StateTooLarge):
        image.ensure_room(fmt.MAX_BLOB_BYTES + 1)


def test_short_transfers_are_completed(tmp_path: Path) -> None:
    with ShortDisk(tmp_path / "a.img", 1000) as disk:
        image, _ = saved(disk)
        image.ensure_room(40_000)
        record = image.save({"permall": bytes(range(256)) * 150}, 2)
        assert reload(disk, record) == {"permall": bytes(range(256)) * 150}


def test_generations_go_forward_only(disk: FileDisk) -> None:
    image, record = saved(disk, 3)
    for generation in (0, 2, 3, 2**64):
        with pytest.raises(GenerationError):
            image.save(BLOBS, generation)
    assert reload(disk, record) == BLOBS


def test_switch_without_a_save_is_refused(disk: FileDisk) -> None:
    image = fresh(disk)
    with pytest.raises(NothingSaved):
        image.switch()


# --- where a save could destroy state --------------------------------------------------------------


def test_a_save_before_load_is_refused_when_slots_hold_state(disk: FileDisk) -> None:
    saved(disk)
    before = disk.path.read_bytes()
    image = StateImage.open(disk, VTPM)
    with pytest.raises(SlotsInUse, match="slot 0 claims generation 1"):
        image.save(BLOBS, 9)
    assert disk.path.read_bytes() == before


def test_an_opened_image_with_blank_slots_takes_its_first_save(disk: FileDisk) -> None:
    fresh(disk)
    record = StateImage.open(disk, VTPM).save(BLOBS, 1)
    assert reload(disk, record) == BLOBS


def test_a_vtpm_declared_fresh_may_overwrite_slots_that_no_record_covers(disk: FileDisk) -> None:
    saved(disk)
    image = StateImage.open(disk, VTPM)
    image.assume_fresh()
    record = image.save({"permall": b"fresh"}, 1)
    assert reload(disk, record) == {"permall": b"fresh"}


@pytest.mark.parametrize("offset", [0, 511, 4096, 4096 + fmt.CHUNK, fmt.image_bytes(1) - 1])
def test_create_refuses_a_place_that_is_not_empty(disk: FileDisk, offset: int) -> None:
    os.ftruncate(disk.fd, fmt.image_bytes(1))
    disk.pwrite(b"x", offset)
    before = disk.path.read_bytes()
    with pytest.raises(ImageExists, match=f"in use at {offset}"):
        fresh(disk)
    assert disk.path.read_bytes() == before


def test_create_over_an_image_is_refused(disk: FileDisk) -> None:
    _, record = saved(disk)
    with pytest.raises(ImageExists):
        fresh(disk)
    assert reload(disk, record) == BLOBS


def test_a_creation_cut_short_can_be_repeated(disk: FileDisk) -> None:
    os.ftruncate(disk.fd, fmt.image_bytes(1))
    with pytest.raises(NotAnImage, match="all zero"):
        StateImage.open(disk, VTPM)
    fresh(disk)


def test_a_device_that_cannot_grow_is_used_as_far_as_it_goes() -> None:
    disk = MemoryDisk(bytes(fmt.image_bytes(3) + 100), growable=False)
    image = StateImage.create(disk, VTPM, STORE, Family.TPM20)
    assert image.room == 3 * fmt.CHUNK - fmt.SLOT_OVERHEAD
    with pytest.raises(StorageFull, match="device has only"):
        image.ensure_room(image.room + 1)
    with pytest.raises(StorageFull):
        StateImage.create(MemoryDisk(bytes(5000), growable=False), VTPM, STORE, Family.TPM20)


# --- bad input -------------------------------------------------------------------------------------


def refused(disk: FileDisk, record: Saved, *errors: type[Exception]) -> str:
    before = disk.path.read_bytes()
    with pytest.raises(errors) as caught:
        reload(disk, record)
    assert disk.path.read_bytes() == before
    assert isinstance(caught.value, ImageError)
    return str(caught.value)


def test_every_single_byte_change_of_header_and_live_slot_is_detected() -> None:
    disk = MemoryDisk()
    _, record = saved(disk)
    size = fmt.SlotHeader.size() + len(fmt.pack_blobs(fmt.Blobs(BLOBS))) + fmt.TAG_BYTES
    start = fmt.chunk_offset(0, 0)
    for offset in [*range(fmt.HEADER_BYTES), *range(start, start + size)]:
        for flip in (0x01, 0x80):
            disk.content[offset] ^= flip
            with pytest.raises((NotAnImage, ImageDamaged, ImageTooNew, NoMatchingSlot)):
                reload(disk, record)
            disk.content[offset] ^= flip
    assert reload(disk, record) == BLOBS


@pytest.mark.parametrize("size", [0, 1, 511, 4095, 4096, 20_000, fmt.image_bytes(1) - 1])
def test_a_truncated_image_is_refused(disk: FileDisk, size: int) -> None:
    _, record = saved(disk)
    os.ftruncate(disk.fd, size)
    refused(disk, record, NotAnImage, ImageDamaged)


def test_a_slot_cut_off_by_truncation_is_named(disk: FileDisk) -> None:
    image, _ = saved(disk)
    image.ensure_room(60_000)
    record = image.save({"permall": bytes(60_000)}, 2)
    os.ftruncate(disk.fd, fmt.image_bytes(2))
    assert "do not fit" in refused(disk, record, NoMatchingSlot)


def test_the_image_of_another_vtpm_or_store_is_foreign(disk: FileDisk) -> None:
    saved(disk)
    with pytest.raises(ImageForeign, match="belongs to vTPM"):
        StateImage.open(disk, uuid4())
    with pytest.raises(ImageForeign, match="belongs to store"):
        StateImage.open(disk, VTPM, expect_store=uuid4())


def test_another_file_is_not_an_image(disk: FileDisk) -> None:
    disk.pwrite(b"\x7fELF" + bytes(range(256)) * 200, 0)
    with pytest.raises(NotAnImage):
        StateImage.open(disk, VTPM)


def test_a_newer_image_is_refused_and_a_damaged_version_is_damage(disk: FileDisk) -> None:
    saved(disk)
    raw = bytearray(disk.pread(512, 0))
    raw[10:12] = (2).to_bytes(2, "big")
    disk.pwrite(raw, 0)
    with pytest.raises(ImageDamaged):
        StateImage.open(disk, VTPM)
    disk.pwrite(raw[:480] + hashlib.sha256(raw[:480]).digest(), 0)
    with pytest.raises(ImageTooNew, match="needs format version 2, this program reads up to 1"):
        StateImage.open(disk, VTPM)


def test_a_newer_slot_is_named_when_no_other_slot_matches(disk: FileDisk) -> None:
    _, record = saved(disk)
    disk.pwrite((7).to_bytes(2, "big"), fmt.chunk_offset(0, 0) + 10)
    assert "version 7" in refused(disk, record, ImageTooNew)


def test_a_record_of_another_time_matches_no_slot(disk: FileDisk) -> None:
    _, record = saved(disk, 4)
    text = refused(disk, Saved(record.key, bytes(32), 9), NoMatchingSlot)
    assert "generation 9" in text
    assert "slot 0 claims generation 3" in text
    assert "slot 1 claims generation 4" in text


def test_a_wrong_key_is_told_from_damage(disk: FileDisk) -> None:
    _, record = saved(disk)
    refused(disk, Saved(StateKey.new(), record.digest, 1), KeyMismatch)


def test_a_wrong_generation_in_the_record_is_a_mismatch(disk: FileDisk) -> None:
    _, record = saved(disk)
    assert "generation" in refused(disk, Saved(record.key, record.digest, 2), SlotMismatch)


def test_swapped_slots_are_still_matched_by_digest(disk: FileDisk) -> None:
    _, record = saved(disk, 2)
    one, two = (disk.pread(fmt.CHUNK, fmt.chunk_offset(slot, 0)) for slot in (0, 1))
    disk.pwrite(two, fmt.chunk_offset(0, 0))
    disk.pwrite(one, fmt.chunk_offset(1, 0))
    assert reload(disk, record) == BLOBS


def test_a_slot_of_another_vtpm_is_refused_even_with_its_own_record(disk: FileDisk, tmp_path: Path) -> None:
    saved(disk)
    with FileDisk(tmp_path / "other.img") as other:
        image = StateImage.create(other, uuid4(), STORE, Family.TPM20)
        record = image.save(BLOBS, 1)
        disk.pwrite(other.pread(fmt.CHUNK, fmt.chunk_offset(0, 0)), fmt.chunk_offset(0, 0))
    assert "vTPM" in refused(disk, record, SlotMismatch)


def test_a_slot_of_another_family_is_refused(disk: FileDisk) -> None:
    other = MemoryDisk()
    record = StateImage.create(other, VTPM, STORE, Family.TPM12).save(BLOBS, 1)
    saved(disk)
    disk.pwrite(other.pread(fmt.CHUNK, fmt.chunk_offset(0, 0)), fmt.chunk_offset(0, 0))
    assert "family" in refused(disk, record, SlotMismatch)


@pytest.mark.parametrize(
    "blobs", [{}, {"savestate": b"x"}, {"permall": b"x", "tpm2-00.permall": b"y"}, {"permall": b"", "": b""}]
)
def test_a_set_of_blobs_that_is_no_tpm_is_refused(disk: FileDisk, blobs: dict[str, bytes]) -> None:
    image = fresh(disk)
    with pytest.raises(BlobsRefused):
        image.save(blobs, 1)
    assert all(slot.state is SlotState.BLANK for slot in image.describe())


def test_an_emulator_name_that_does_not_fit_is_refused(disk: FileDisk) -> None:
    image = fresh(disk)
    for emulator in (Emulator("x" * 17, "1"), Emulator("libtpms", "\u00e9"), Emulator("a\0b", "1")):
        with pytest.raises(BlobsRefused):
            image.save(BLOBS, 1, emulator)


def test_describe_needs_no_key(disk: FileDisk) -> None:
    image = fresh(disk)
    record = image.save(BLOBS, 5, Emulator("libtpms", "0.9.2"))
    first, second = image.describe()
    assert (first.state, first.generation, first.vtpm) == (SlotState.WRITTEN, 5, VTPM)
    assert str(first.emulator) == "libtpms 0.9.2"
    assert first.digest == record.digest
    assert second.state is SlotState.BLANK


@given(st.binary(max_size=60))
def test_any_plaintext_parses_or_is_refused_and_what_parses_packs_to_itself(plaintext: bytes) -> None:
    try:
        blobs = fmt.unpack_blobs(plaintext)
    except BlobsRefused:
        return
    assert fmt.pack_blobs(blobs) == plaintext


def test_every_change_of_a_plaintexts_structure_is_refused() -> None:
    good = fmt.pack_blobs(fmt.Blobs({"permall": b"abc", "savestate": b"", "volatilestate": b"xy"}))
    assert dict(fmt.unpack_blobs(good)) == {"permall": b"abc", "savestate": b"", "volatilestate": b"xy"}
    for bad in (
        b"",
        good + b"x",
        *(good[:length] for length in range(1, len(good))),
        b"\0",
        b"\2" + good[1:],
        b"\4" + good[1:],
        good[:1] + b"\2" + good[2:],
        b"\2" + 2 * (b"\1\0\0\0\0"),
        b"\1\x09\0\0\0\0",
        b"\1\1\xff\xff\xff\xff",
    ):
        with pytest.raises(BlobsRefused):
            fmt.unpack_blobs(bad)


# --- faults of the disk ----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("step", range(4))  # reserve, flush, write, flush
def test_a_disk_that_fails_in_creation_leaves_nothing_or_the_whole_image(tmp_path: Path, error: int, step: int) -> None:
    with FaultyDisk(tmp_path / "a.img", step, error) as disk:
        with pytest.raises(DeviceError) as caught:
            fresh(disk)
        assert caught.value.cause.errno == error
        assert isinstance(caught.value, StorageFull) == (error != errno.EIO)
        if step < 3:
            assert not any(disk.path.read_bytes())
            fresh(disk)
        StateImage.open(disk, VTPM)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("partial", [0, 100, 4096])
@pytest.mark.parametrize("step", range(5))  # four chunks and a flush
def test_a_disk_that_fails_in_a_save_leaves_the_live_state(tmp_path: Path, error: int, partial: int, step: int) -> None:
    with FaultyDisk(tmp_path / "a.img", 1000, error, partial=partial) as disk:
        image, _ = saved(disk)
        image.ensure_room(50_000)
        live = image.save({"permall": b"live"}, 2)
        image.switch()
        disk.fail_at = disk.calls + step
        with pytest.raises(DeviceError) as caught:
            image.save({"permall": bytes(50_000)}, 3)
        assert isinstance(caught.value, StorageFull) == (error == errno.ENOSPC)
        with pytest.raises(NothingSaved):
            image.switch()
        assert reload(disk, live) == {"permall": b"live"}
        if step == 4:
            with pytest.raises(ImageFailed):
                image.save(BLOBS, 3)
        else:
            assert reload(disk, image.save(BLOBS, 3)) == BLOBS


@pytest.mark.parametrize("kind", ["fallocate", "fdatasync"])
def test_a_failed_growth_changes_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.img"
    with FileDisk(path) as disk:
        _, live = saved(disk)
    before = path.read_bytes()
    with FaultyDisk(path, 0, errno.ENOSPC, only=kind) as disk:
        image = StateImage.open(disk, VTPM)
        image.load(live.key, live.digest, live.generation)
        room = image.room
        with pytest.raises(StorageFull):
            image.ensure_room(100_000)
        assert image.room == room
    assert path.read_bytes()[: len(before)] == before
    assert kind == "fdatasync" or path.stat().st_size == len(before)


def test_a_file_size_limit_is_met_before_the_state_is_touched(tmp_path: Path) -> None:
    program = """
import os, resource, sys
from uuid import UUID
from storage.errors import StorageFull
from storage.state_image import Family, StateImage
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
image = StateImage.create(fd, UUID(int=1), UUID(int=2), Family.TPM20)
saved = image.save({"permall": b"kept"}, 1)
image.switch()
resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))
try:
    image.ensure_room(100000)
except StorageFull as error:
    print(error, os.fstat(fd).st_size)
print(StateImage.open(fd, UUID(int=1)).load(saved.key, saved.digest, 1)["permall"])
image.save({"permall": b"next"}, 2)
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    command = [sys.executable, "-c", program, str(tmp_path / "a.img")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"could not reserve 233472 bytes: File too large {fmt.image_bytes(1)}",
        "b'kept'",
    ]


def test_a_full_file_system_is_met_by_growth_and_the_state_stays(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "none", str(mount)], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip("mounting a tmpfs needs privileges")
    try:
        with FileDisk(mount / "a.img") as disk:
            image, live = saved(disk)
            with pytest.raises(StorageFull):
                image.ensure_room(200_000)
            assert disk.size() == fmt.image_bytes(1)
            assert reload(disk, live) == BLOBS
            image.ensure_room(20_000)
            image.save({"permall": bytes(20_000)}, 2)
            with FileDisk(mount / "b.img") as other, pytest.raises(StorageFull):
                fresh(other)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_power_cut_anywhere_leaves_every_acknowledged_state() -> None:
    disk = RecordingDisk()
    image = fresh(disk)
    acknowledged: list[tuple[int, Saved, dict[str, bytes]]] = []  # steps issued when the record became durable
    for generation in range(1, 7):
        blobs = {"permall": random.Random(generation).randbytes(generation * 7000)}
        image.ensure_room(generation * 7000)
        record = image.save(blobs, generation)
        acknowledged.append((len(disk.steps), record, blobs))
        image.switch()
    created = disk.steps.index(None, disk.steps.index(None) + 1) + 1
    for steps, content in disk.cuts(random.Random(1)):
        cut = MemoryDisk(content)
        covered = [item for item in acknowledged if item[0] <= steps]
        if covered:
            _, record, blobs = covered[-1]
            assert reload(cut, record) == blobs
        elif steps < created:
            reopen_or_create(cut)
        else:
            StateImage.open(cut, VTPM)


def reopen_or_create(cut: MemoryDisk) -> None:
    try:
        StateImage.open(cut, VTPM)
    except NotAnImage:
        fresh(cut)
