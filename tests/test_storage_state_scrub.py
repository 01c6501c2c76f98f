import os
import random
from uuid import UUID

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from storage_cuts import RecordingDisk
from storage_disks import MemoryDisk

from storage import state_format as fmt
from storage.errors import ImageForeign
from storage.state_image import Family, Saved, SlotState, StateImage
from storage.state_scrub import scrub_image

VTPM, STORE = UUID(int=7), UUID(int=8)


def blobs(size: int) -> dict[str, bytes]:
    return {"permall": random.Random(size).randbytes(size)}


def image_of(disk: MemoryDisk, *sizes: int) -> tuple[StateImage, list[Saved]]:
    """An image in which states of these sizes were saved, one after the other."""
    image = StateImage.create(disk, VTPM, STORE, Family.TPM20)
    image.assume_fresh()
    saved = []
    for generation, size in enumerate(sizes, 1):
        image.ensure_room(size + 100)
        saved.append(image.save(blobs(size), generation))
        image.switch()
    return image, saved


def slot_bytes(content: bytes, slot: int) -> bytes:
    chunks = (len(content) - fmt.HEADER_BYTES) // (2 * fmt.CHUNK)
    starts = [fmt.chunk_offset(slot, chunk) for chunk in range(chunks)]
    return b"".join(content[start : start + fmt.CHUNK] for start in starts)


def opens(raw: bytes, key: bytes, length: int) -> bool:
    start = fmt.SlotHeader.size()
    try:
        AESGCM(key).decrypt(bytes(12), raw[start : start + length + fmt.TAG_BYTES], raw[:start])
    except InvalidTag:
        return False
    return True


@pytest.mark.parametrize("sizes", [(3000, 4000), (3000, 40_000, 2000), (60_000, 61_000, 1000, 1200)])
def test_the_state_before_can_be_read_before_a_scrub_and_not_after_it(sizes: tuple[int, ...]) -> None:
    disk = MemoryDisk()
    image, saved = image_of(disk, *sizes)
    live, before, size = image.live_slot, saved[-2], len(fmt.pack_blobs(fmt.Blobs(blobs(sizes[-2]))))
    assert live is not None
    assert opens(slot_bytes(bytes(disk.content), 1 - live), before.key.reveal(), size)
    old = bytes(disk.content)
    assert scrub_image(disk, VTPM, STORE, saved[-1].digest)
    new = bytes(disk.content)
    assert not opens(slot_bytes(new, 1 - live), before.key.reveal(), size)
    gone = zip(slot_bytes(old, 1 - live), slot_bytes(new, 1 - live), strict=True)
    same = [one == two for one, two in gone if one]
    assert sum(same) < len(same) / 50
    used = fmt.SlotHeader.size() + len(fmt.pack_blobs(fmt.Blobs(blobs(sizes[-1])))) + fmt.TAG_BYTES
    kept = -(-used // 512) * 512
    assert slot_bytes(new, live)[:kept] == slot_bytes(old, live)[:kept]
    assert slot_bytes(new, live)[kept:] != slot_bytes(old, live)[kept:]
    again = StateImage.open(disk, VTPM, STORE)
    assert again.load(saved[-1].key, saved[-1].digest, len(sizes)) == blobs(sizes[-1])
    assert again.describe()[1 - live].state is SlotState.BLANK
    more = again.save(blobs(900), len(sizes) + 1)
    assert again.load(more.key, more.digest, len(sizes) + 1) == blobs(900)


def test_an_image_whose_state_is_not_the_one_asked_for_is_kept_byte_for_byte() -> None:
    disk = MemoryDisk()
    image_of(disk, 3000, 4000)
    before = bytes(disk.content)
    assert not scrub_image(disk, VTPM, STORE, os.urandom(32))
    with pytest.raises(ImageForeign):
        scrub_image(disk, UUID(int=9), STORE, os.urandom(32))
    assert bytes(disk.content) == before


def test_every_cut_of_a_scrub_leaves_the_state_that_counts() -> None:
    made = MemoryDisk()
    _, saved = image_of(made, 3000, 30_000, 20_000)
    disk = RecordingDisk(start=bytes(made.content))
    assert scrub_image(disk, VTPM, STORE, saved[-1].digest)
    count = 0
    for _, content in disk.cuts(random.Random(1), 6):
        image = StateImage.open(MemoryDisk(content), VTPM, STORE)
        assert image.load(saved[-1].key, saved[-1].digest, 3) == blobs(20_000)
        count += 1
    assert count > 30
