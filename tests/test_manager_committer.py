"""Where a flush of the store is waited for: in place on a quick disk, in a worker thread on a slow one."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
import trio
import trio.testing
from storage_disks import FileDisk
from storage_histories import new_store, uuid_of

from manager.committer import Committer
from storage.errors import GenerationError
from storage.secrets import StateKey
from storage.store import PutVtpm, Store, VtpmRecord

GROUP = UUID(int=7)


class SleepyDisk(FileDisk):
    """Flushes that take `seconds` longer; `in_place` tells of each whether it was in the thread that made the disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.seconds = 0.0
        self.in_place: list[bool] = []
        self._home = threading.get_ident()

    def fdatasync(self) -> None:
        super().fdatasync()
        time.sleep(self.seconds)
        self.in_place.append(threading.get_ident() == self._home)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SleepyDisk]:
    with SleepyDisk(tmp_path / "store.img") as made:
        yield made


@pytest.fixture
def store(disk: SleepyDisk) -> Iterator[Store]:
    with new_store(disk, [GROUP]) as made:
        yield made


async def saves(committer: Committer, count: int) -> None:
    """Save one after the other, as an instance does; each is acknowledged before the next."""
    for _ in range(count):
        generation = committer.statistics().entries + 1
        record = VtpmRecord(uuid_of(1), GROUP, StateKey(bytes(32)), bytes(32), generation)
        done = trio.Event()
        outcome: list[Exception | None] = []

        def acknowledge(error: Exception | None, done: trio.Event = done, to: list[Exception | None] = outcome) -> None:
            to.append(error)
            done.set()

        committer.enqueue((PutVtpm(record),), acknowledge)
        committer.proceed()
        await done.wait()
        assert outcome == [None]


async def test_one_long_flush_of_a_quick_disk_is_no_reason_for_a_thread(
    store: Store, disk: SleepyDisk, nursery: trio.Nursery
) -> None:
    """As when the CPU was given to others meanwhile."""
    committer = Committer(store, lambda: None)
    committer._latency = 0.00015  # a quick disk's, whatever this machine's is
    nursery.start_soon(committer.run)
    await saves(committer, 1)
    disk.seconds = 0.05
    committer._latency = 0.00015
    await saves(committer, 1)
    disk.seconds = 0.0
    disk.in_place.clear()
    await saves(committer, 1)
    assert disk.in_place == [True]


async def test_a_slow_disk_has_its_flushes_in_a_thread_soon(
    store: Store, disk: SleepyDisk, nursery: trio.Nursery
) -> None:
    committer = Committer(store, lambda: None)
    nursery.start_soon(committer.run)
    disk.seconds = 0.01
    await saves(committer, 8)
    assert not any(disk.in_place[-4:])


async def test_a_change_sees_what_was_committed_before_its_turn_and_who_waits_for_it_goes_on(
    store: Store, nursery: trio.Nursery
) -> None:
    """Also where it fails, and where whoever asked for it is gone."""
    committer, seen, went_on = Committer(store, lambda: None), list[int](), list[int]()
    vtpm = uuid_of(1)

    def record(generation: int) -> PutVtpm:
        return PutVtpm(VtpmRecord(vtpm, GROUP, StateKey(bytes(32)), bytes(32), generation))

    def following(now: Store) -> list[PutVtpm]:
        seen.append(now.get(vtpm).generation)
        return [record(seen[-1] + 1)]

    def older(_now: Store) -> list[PutVtpm]:
        return [record(0)]

    async def fail() -> None:
        with pytest.raises(GenerationError):
            await committer.change([vtpm], older)

    with trio.CancelScope() as gone:
        gone.cancel()
        await committer.change([vtpm], following)
    async with trio.open_nursery() as asking:
        asking.start_soon(committer.commit, record(7))
        await trio.testing.wait_all_tasks_blocked()
        asking.start_soon(committer.change, [vtpm], following)
        await trio.testing.wait_all_tasks_blocked()
        asking.start_soon(fail)
        await trio.testing.wait_all_tasks_blocked()
        assert committer.defer(vtpm, lambda: went_on.append(store.get(vtpm).generation))
        assert not committer.defer(uuid_of(2), lambda: went_on.append(-1))
        assert not went_on
        nursery.start_soon(committer.run)
    assert (seen, went_on) == ([7], [8]), "the first one met no record, and it cost only itself"
    assert not committer.is_changing(vtpm)
