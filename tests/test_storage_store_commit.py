"""A save that is committed alone takes a shorter way than one among others: both must judge alike."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from storage_disks import MemoryDisk
from storage_histories import content, group_key, new_store, record_of, reopen, uuid_of

from storage.errors import (
    CommitRefused,
    GenerationError,
    GroupClosed,
    NoSuchGroup,
    StoreError,
    VtpmRemoved,
)
from storage.store import BuryVtpm, Change, PutVtpm, Store, VtpmRecord

OPEN, CLOSED, OTHER = uuid_of(1), uuid_of(2), uuid_of(3)
VTPM, GONE, BESIDE, NEW = (uuid_of(number) for number in range(10, 14))
AT = 5  # generation of VTPM

Company = Callable[[Change], list[Change]]


def one_store(disk: MemoryDisk) -> Store:
    store = new_store(disk, [OPEN, CLOSED, OTHER])
    store.commit([PutVtpm(record_of(VTPM, OPEN, AT)), PutVtpm(record_of(GONE, OPEN)), PutVtpm(record_of(BESIDE, OPEN))])
    store.commit([BuryVtpm(GONE, 1)])
    store.close()
    store = reopen(disk, unlock=False)
    for group in (OPEN, OTHER):
        store.unlock_group(group, group_key(group))
    return store


def with_another(change: Change) -> list[Change]:
    return [PutVtpm(record_of(BESIDE, OPEN, 1)), change]


def alone(change: Change) -> list[Change]:
    return [change]


@pytest.mark.parametrize("company", [alone, with_another])
@pytest.mark.parametrize(
    ("record", "error"),
    [
        (record_of(VTPM, OPEN, AT - 1), GenerationError),
        (record_of(VTPM, OTHER, AT + 1), CommitRefused),
        (record_of(VTPM, CLOSED, AT + 1), GroupClosed),
        (record_of(VTPM, uuid_of(4), AT + 1), NoSuchGroup),
        (record_of(GONE, OPEN, 9), VtpmRemoved),
        (record_of(GONE, OTHER, 9), VtpmRemoved),
    ],
)
def test_a_save_that_must_not_be_is_refused_and_changes_nothing(
    company: Company, record: VtpmRecord, error: type[StoreError]
) -> None:
    disk = MemoryDisk()
    store = one_store(disk)
    before, image = content(store), bytes(disk.content)
    with pytest.raises(error):
        store.commit(company(PutVtpm(record)))
    assert content(store) == before
    assert bytes(disk.content) == image


@pytest.mark.parametrize("company", [alone, with_another])
@pytest.mark.parametrize(
    "change",
    [
        PutVtpm(record_of(VTPM, OPEN, AT)),
        PutVtpm(record_of(VTPM, OPEN, AT + 1)),
        PutVtpm(record_of(VTPM, OPEN, AT - 1), force=True),
        PutVtpm(replace(record_of(NEW, OTHER, 3), epoch=7)),
    ],
)
def test_a_save_that_may_be_is_there_at_once_and_after_opening_again(company: Company, change: PutVtpm) -> None:
    disk = MemoryDisk()
    store = one_store(disk)
    store.commit(company(change))
    assert store.get(change.record.uuid) == change.record
    store.close()
    assert reopen(disk).get(change.record.uuid) == change.record
