"""A large store, in memory: the same work for each update as a small one. `./dev bench store` has the times."""

import random
from uuid import UUID

from storage_disks import MemoryDisk
from storage_histories import new_store, reopen, uuid_of

from storage import store_format as fmt
from storage.disk import Bytes
from storage.secrets import StateKey
from storage.store import PutVtpm, Store, VtpmRecord

SMALL, LARGE, BATCH = 20_000, 200_000, 900
GROUPS = [uuid_of(1), uuid_of(2), uuid_of(3)]


class CountingDisk(MemoryDisk):
    def __init__(self) -> None:
        super().__init__()
        self.written = self.flushes = self.growths = 0

    def pwrite(self, data: Bytes, offset: int) -> int:
        self.written += len(data)
        return super().pwrite(data, offset)

    def fallocate(self, offset: int, length: int) -> None:
        self.growths += 1
        super().fallocate(offset, length)

    def fdatasync(self) -> None:
        self.flushes += 1


def record(number: int, generation: int = 0) -> VtpmRecord:
    key = StateKey(generation.to_bytes(32, "big"))
    return VtpmRecord(UUID(int=number + 1), GROUPS[number % 3], key, number.to_bytes(32, "big"), generation)


def add(store: Store, numbers: range) -> None:
    for start in range(numbers.start, numbers.stop, BATCH):
        store.commit([PutVtpm(record(number)) for number in range(start, min(numbers.stop, start + BATCH))])
    store.checkpoint()


def cost_of_updates(store: Store, disk: CountingDisk, rng: random.Random) -> tuple[float, float]:
    """Update vTPMs by chance, one at a time, for two laps of the log; bytes and flushes for each."""
    written, flushes, count, total = disk.written, disk.flushes, 2 * store.statistics().log_units, len(store)
    for _ in range(count):
        number = rng.randrange(total)
        store.commit([PutVtpm(record(number, store.get(UUID(int=number + 1)).generation + 1))])
    store.checkpoint()
    return (disk.written - written) / count, (disk.flushes - flushes) / count


def test_a_store_grows_to_200000_vtpms_and_an_update_does_no_more_work() -> None:
    disk, rng = CountingDisk(), random.Random(1)
    store = new_store(disk, GROUPS, fmt.DEFAULT_SIZE)
    add(store, range(SMALL))
    assert disk.size() == fmt.DEFAULT_SIZE
    small = cost_of_updates(store, disk, rng)
    add(store, range(SMALL, LARGE))
    assert disk.size() < LARGE * 110
    assert disk.growths < 30
    large = cost_of_updates(store, disk, rng)
    assert large[0] < 2 * small[0]
    assert large[1] <= small[1] < 1.2
    sample = {number: store.get(UUID(int=number + 1)) for number in rng.sample(range(LARGE), 1000)}
    digest = store.digest()
    store.close()
    with reopen(disk) as again:
        assert not again.damage
        assert len(again) == LARGE
        assert again.digest() == digest
        assert {number: again.get(UUID(int=number + 1)) for number in sample} == sample
