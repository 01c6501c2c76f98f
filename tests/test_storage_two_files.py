"""The commit protocol of design section 6 over both files: whatever is cut, the record has its slot."""

import random
from dataclasses import dataclass, field
from uuid import UUID

import pytest
from storage_cuts import RecordingDisk
from storage_disks import MemoryDisk
from storage_histories import new_store, reopen, uuid_of

from storage.disk import Bytes
from storage.errors import NoMatchingSlot, StorageError
from storage.state_image import Family, StateImage
from storage.store import PutVtpm, RecordFlags, Store, VtpmRecord

GROUP, OTHER, STORE = uuid_of(1), uuid_of(2), uuid_of(3)
SEEDS = range(40)


class OrderedDisk(RecordingDisk):
    """Notes in a list that it shares with other disks when each of its steps was taken."""

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


@dataclass
class Guest:
    """One vTPM: its image, what it has saved by generation, and how many steps there were when each was answered."""

    vtpm: UUID
    disk: OrderedDisk
    image: StateImage
    answered: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    contents: dict[int, bytes] = field(default_factory=lambda: {0: b""})

    def save(self, rng: random.Random) -> VtpmRecord:
        """Step 1 of the protocol: the new state into the slot that is not live, durable."""
        generation = self.answered[-1][1] + 1
        self.contents[generation] = rng.randbytes(rng.choice((300, 5_000, 17_000, 40_000)))
        self.image.ensure_room(len(self.contents[generation]))
        saved = self.image.save({"permall": self.contents[generation]}, generation)
        return VtpmRecord(self.vtpm, GROUP, saved.key, saved.digest, generation, RecordFlags.NONE)

    def answer(self, generation: int) -> None:
        """Step 3: the record is durable."""
        self.answered.append((len(self.disk.order), generation))
        self.image.switch()

    def least(self, steps: int) -> int:
        return max(generation for since, generation in self.answered if since <= steps)


def world(disks: list[OrderedDisk], count: int = 2) -> tuple[OrderedDisk, Store, list[Guest]]:
    """A store and the images of some vTPMs that never saved; their disks share `disks` as their order."""
    made = MemoryDisk()
    with new_store(made, [GROUP]) as first:
        first.checkpoint()
    guests = []
    for number in range(count):
        state = MemoryDisk()
        StateImage.create(state, uuid_of(10 + number), STORE, Family.TPM20)
        disk = OrderedDisk(bytes(state.content), disks)
        guests.append(Guest(uuid_of(10 + number), disk, StateImage.open(disk, uuid_of(10 + number))))
    store_disk = OrderedDisk(bytes(made.content), disks)
    store = reopen(store_disk)
    for disk in (store_disk, *(guest.disk for guest in guests)):
        disk.steps.clear()
    disks.clear()
    return store_disk, store, guests


def live(seed: int) -> tuple[OrderedDisk, list[Guest], list[OrderedDisk]]:
    """Some saves: of one vTPM, or of both in one group commit; one repeated; checkpoints; an instance that crashed."""
    rng, order = random.Random(seed), list[OrderedDisk]()
    store_disk, store, guests = world(order)
    for _ in range(rng.randint(3, 6)):
        saving = rng.sample(guests, rng.randint(1, 2))
        records = [guest.save(rng) for guest in saving]
        if rng.random() < 0.2:  # the instance dies before its commit; the next one saves the same generation again
            records[0] = saving[0].save(rng)
        store.commit([PutVtpm(record) for record in records])
        for guest, record in zip(saving, records, strict=True):
            guest.answer(record.generation)
        if rng.random() < 0.3:
            store.commit([PutVtpm(records[0])])  # the answer was lost: the same triple again
        if rng.random() < 0.3:
            store.checkpoint()
    return store_disk, guests, order


@pytest.mark.parametrize("share", range(2))
def test_after_any_cut_the_recorded_slot_is_there_and_no_answered_save_is_lost(share: int) -> None:
    looked = 0
    for seed in SEEDS[share::2]:
        store_disk, guests, order = live(seed)
        looked += check_all_cuts(store_disk, guests, order, random.Random(seed))
    assert looked > 1000


def check_all_cuts(
    store_disk: OrderedDisk, guests: list[Guest], order: list[OrderedDisk], rng: random.Random, most: int = 3
) -> int:
    """Cut the power after every step of any disk: what each of the disks may hold then, in several combinations."""
    images = {id(disk): images_by_step(disk, rng) for disk in (store_disk, *(guest.disk for guest in guests))}
    looked = 0
    for cut in range(len(order) + 1):
        possible = {key: found[sum(1 for disk in order[:cut] if id(disk) == key)] for key, found in images.items()}
        for store_image in rng.sample(possible[id(store_disk)], min(most, len(possible[id(store_disk)]))):
            with reopen(MemoryDisk(store_image)) as store:
                records = {record.uuid: record for record in store.vtpms()}
            for guest in guests:
                for state in rng.sample(possible[id(guest.disk)], min(most, len(possible[id(guest.disk)]))):
                    check(records.get(guest.vtpm), state, guest, cut)
                    looked += 1
    return looked


def images_by_step(disk: RecordingDisk, rng: random.Random) -> dict[int, list[bytes]]:
    found: dict[int, list[bytes]] = {}
    for steps, image in disk.cuts(rng, subsets=2, window=1):
        found.setdefault(steps, []).append(image)
    return found


def check(record: VtpmRecord | None, state: bytes, guest: Guest, cut: int) -> None:
    """The record is the last answered one or the one that was under way, and its slot is whole."""
    least = guest.least(cut)
    if record is None:
        assert least == 0
        return
    assert record.generation in {least, least + 1}
    image = StateImage.open(MemoryDisk(state), guest.vtpm)
    assert image.load(record.key, record.digest, record.generation) == {"permall": guest.contents[record.generation]}
    if cut % 9 == 0:
        goes_on(image, record)


def goes_on(image: StateImage, record: VtpmRecord) -> None:
    """The next save takes the other slot: the recorded state is readable until its successor is recorded."""
    saved = image.save({"permall": b"next"}, record.generation + 1)
    assert image.load(record.key, record.digest, record.generation)
    assert image.load(saved.key, saved.digest, record.generation + 1) == {"permall": b"next"}


def test_a_slot_of_a_save_that_was_never_recorded_is_never_taken_for_the_state() -> None:
    order: list[OrderedDisk] = []
    _, store, [guest] = world(order, count=1)
    rng = random.Random(1)
    record = guest.save(rng)
    store.commit([PutVtpm(record)])
    guest.answer(1)
    unrecorded = guest.save(rng)
    image = StateImage.open(MemoryDisk(bytes(guest.disk.content)), guest.vtpm)
    assert image.load(record.key, record.digest, 1) == {"permall": guest.contents[1]}
    with pytest.raises(StorageError):
        image.load(record.key, unrecorded.digest, 2)


def test_an_answer_before_the_record_is_durable_would_be_found() -> None:
    """The test of the tests: the order of the two files turned around."""
    order: list[OrderedDisk] = []
    store_disk, store, [guest] = world(order, count=1)
    rng = random.Random(2)
    for _ in range(3):
        generation = guest.answered[-1][1] + 1
        record = guest.save(rng)
        guest.answer(generation)
        store.commit([PutVtpm(record)])
    with pytest.raises((AssertionError, NoMatchingSlot)):
        check_all_cuts(store_disk, [guest], order, random.Random(3), most=20)
