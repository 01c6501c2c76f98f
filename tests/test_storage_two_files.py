"""The commit protocol of design section 6 over both files: whatever is cut, the record has its slot."""

import random
from collections import defaultdict

from storage_disks import MemoryDisk, RecordingDisk
from storage_histories import group_key, new_store, reopen, uuid_of

from storage.disk import Bytes
from storage.state_image import Family, StateImage
from storage.store import PutVtpm, RecordFlags, VtpmRecord

GROUP, VTPM, STORE = uuid_of(1), uuid_of(2), uuid_of(3)


class OrderedDisk(RecordingDisk):
    """Notes in a list that it shares with another disk when each of its steps was taken."""

    def __init__(self, start: bytes, order: list["OrderedDisk"]) -> None:
        super().__init__(start=start)
        self.order = order

    def pwrite(self, data: Bytes, offset: int) -> int:
        self.order.append(self)
        return super().pwrite(data, offset)

    def fdatasync(self) -> None:
        self.order.append(self)
        super().fdatasync()

    def fallocate(self, offset: int, length: int) -> None:
        self.order.append(self)
        super().fallocate(offset, length)


def images_by_step(disk: RecordingDisk, seed: int) -> dict[int, list[bytes]]:
    found: dict[int, list[bytes]] = defaultdict(list)
    for steps, image in disk.cuts(random.Random(seed), 2):
        found[steps].append(image)
    return found


def test_after_any_cut_the_recorded_slot_is_there_and_no_acknowledged_save_is_lost() -> None:
    made, state = MemoryDisk(), MemoryDisk()
    with new_store(made, [GROUP]) as first:
        StateImage.create(state, VTPM, STORE, Family.TPM20)
        first.checkpoint()
    order: list[OrderedDisk] = []
    store_disk, image_disk = OrderedDisk(bytes(made.content), order), OrderedDisk(bytes(state.content), order)
    store, image = reopen(store_disk), StateImage.open(image_disk, VTPM)
    order.clear()
    store_disk.steps.clear()
    acknowledged = [(0, 0)]
    contents = {0: b""}
    for generation in range(1, 9):
        contents[generation] = random.Random(generation).randbytes(generation * 5000)
        image.ensure_room(len(contents[generation]))
        saved = image.save({"permall": contents[generation]}, generation)
        record = VtpmRecord(VTPM, GROUP, saved.key, saved.digest, generation, RecordFlags.NONE)
        store.commit([PutVtpm(record)])
        acknowledged.append((len(order), generation))
        image.switch()
        if generation % 3 == 0:
            store.checkpoint()
    stores, images = images_by_step(store_disk, 1), images_by_step(image_disk, 2)
    for cut in range(len(order) + 1):
        least = max(generation for steps, generation in acknowledged if steps <= cut)
        of_store = stores[sum(1 for disk in order[:cut] if disk is store_disk)]
        of_image = images[sum(1 for disk in order[:cut] if disk is image_disk)]
        for one in of_store:
            for other in of_image:
                check(one, other, least, contents)


def check(store_image: bytes, state_image: bytes, least: int, contents: dict[int, bytes]) -> None:
    with reopen(MemoryDisk(store_image), unlock=False) as store:
        store.unlock_group(GROUP, group_key(GROUP))
        records = list(store.vtpms())
    if not records:
        assert least == 0
        return
    [record] = records
    assert record.generation in {least, least + 1}
    image = StateImage.open(MemoryDisk(state_image), VTPM)
    blobs = image.load(record.key, record.digest, record.generation)
    assert blobs == {"permall": contents[record.generation]}
