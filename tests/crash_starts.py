"""Images that lives begin with, each there for something that seldom happens by chance."""

from collections.abc import Callable
from functools import cache

from storage_disks import MemoryDisk
from storage_histories import KEY, SECTOR, group_key, new_store, record_of, uuid_of

from storage.store import PutVtpm, RemoveVtpm, Store

GROUPS = [uuid_of(1), uuid_of(2), uuid_of(3)]
MOST_AT_ONCE = 200  # changes in a commit: it has to fit an empty log of 24 sectors


def filled(sectors: int, vtpms: int, groups: int = 3) -> Store:
    """Make a store in memory with so many vTPMs; the caller reads its disk."""
    store = new_store(MemoryDisk(), GROUPS[:groups], sectors * SECTOR)
    for start in range(0, vtpms, MOST_AT_ONCE):
        numbers = range(start, min(vtpms, start + MOST_AT_ONCE))
        store.commit([PutVtpm(record_of(uuid_of(100 + number), GROUPS[number % groups])) for number in numbers])
    store.checkpoint()
    return store


def image_of(store: Store) -> bytes:
    disk = store._state.device._disk
    assert isinstance(disk, MemoryDisk)
    return bytes(disk.content)


def sparse() -> Store:
    """Many leaves with two records each: a checkpoint of all of them takes several rounds."""
    store = filled(65, 720)
    kept = {uuid_of(100 + number) for number in range(0, 720, 20)}
    gone = [record.uuid for record in store.vtpms() if record.uuid not in kept]
    for start in range(0, len(gone), MOST_AT_ONCE):
        store.commit([RemoveVtpm(uuid) for uuid in gone[start : start + MOST_AT_ONCE]])
    store.checkpoint()
    return store


def near_the_end_of_the_log() -> Store:
    store = filled(55, 40)
    while store._state.log.next < store._state.log.units - 4:
        store.commit([PutVtpm(record_of(uuid_of(100), GROUPS[0], store.sequence))])
    store.checkpoint()
    return store


def full_log() -> Store:
    """The log has wrapped and is full but for a few units: the next frames come close to the first that is needed."""
    store = filled(55, 60)
    number = 0
    while store._state.log.next < 60:
        store.commit([PutVtpm(record_of(uuid_of(100), GROUPS[0], store.sequence))])
    store.checkpoint()
    while (left := store._state.log.units - store._state.log.used) > 5:
        number += 1
        some = [
            PutVtpm(record_of(uuid_of(100 + n), GROUPS[n % 3], 900 + number)) for n in range(60 if left > 20 else 1)
        ]
        store.commit(some)
    return store


def with_carried_parts() -> Store:
    store = filled(60, 40)
    for group in GROUPS:
        store.commit([PutVtpm(record_of(uuid_of(900 + index), group)) for index in range(GROUPS.index(group), 90, 3)])
    closed = Store.open(MemoryDisk(image_of(store)), KEY)
    closed.unlock_group(GROUPS[0], group_key(GROUPS[0]))
    closed.checkpoint()
    return closed


STARTS: dict[str, Callable[[], Store]] = {
    "empty": lambda: filled(55, 0, 1),
    "small": lambda: filled(56, 30),
    "full": lambda: filled(55, 352, 2),
    "sparse": sparse,
    "wrapping": near_the_end_of_the_log,
    "full-log": full_log,
    "carried": with_carried_parts,
}


@cache
def start_image(name: str) -> bytes:
    return image_of(STARTS[name]())
