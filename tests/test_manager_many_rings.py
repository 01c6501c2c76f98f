"""Fifteen thousand instances' rings in one manager's ring server: one descriptor each, and all are answered."""

import os
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import pytest
import trio
from manager_rig import ModelTpm, hardware
from ring_crowd import LEASE, Crowd, crowd_of
from storage_histories import new_store, uuid_of

from manager.capacity import descriptors_in_use, raise_descriptor_limit
from manager.committer import Committer
from manager.ring_server import RingServer
from manager.running import Running
from storage.secrets import StateKey
from storage.store import PutVtpm, Store, VtpmRecord

GROUP = UUID(int=7)
MANY = 15_000
SPARE = 4_000  # descriptors of the test itself, and of the rings' other ends while they are handed over


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if raise_descriptor_limit() < MANY + SPARE:
        pytest.skip(f"a process may have {before[1]} descriptors here, and {MANY + SPARE} are needed")
    try:
        with crowd_of(MANY) as made:
            yield made
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@asynccontextmanager
async def serving(crowd: Crowd, store: Store) -> AsyncIterator[Committer]:
    committer = Committer(store, lambda: None)
    async with trio.open_nursery() as nursery:
        rings = RingServer(committer, hardware(ModelTpm()), nursery, 90.0)
        nursery.start_soon(committer.run)
        nursery.start_soon(rings.run)
        for number, ring in enumerate(crowd.rings):
            rings.add(Running(uuid_of(number), LEASE, os.getpid(), ring, "clear", "clear"))
        yield committer
        nursery.cancel_scope.cancel()
    rings.close()


async def test_fifteen_thousand_rings_in_one_manager(crowd: Crowd, tmp_path: Path) -> None:
    store_fd = os.open(tmp_path / "store.img", os.O_RDWR | os.O_CREAT, 0o600)
    with new_store(store_fd, [GROUP], 8 << 20) as store:
        records = [VtpmRecord(uuid_of(number), GROUP, StateKey(bytes(32))) for number in range(MANY)]
        for start in range(0, MANY, 1000):
            store.commit([PutVtpm(record) for record in records[start : start + 1000]])
        before = descriptors_in_use()
        async with serving(crowd, store) as committer:
            assert descriptors_in_use() - before < 20, "the rings' descriptors were counted before"
            assert MANY <= before < MANY + 200, "one for each ring"
            crowd.start(every=15, saves=3)
            few = await trio.to_thread.run_sync(crowd.results)
            crowd.start(saves=1)
            everybody = await trio.to_thread.run_sync(crowd.results)
            assert (few.saves, few.refused) == (3 * MANY // 15, 0)
            assert (everybody.saves, everybody.refused) == (MANY, 0)
            assert committer.statistics().groups < everybody.saves // 10, "they share flushes"
        generations = {number: store.get(uuid_of(number)).generation for number in range(MANY)}
        assert set(generations.values()) == {1, 4}
        assert sum(generations.values()) == few.saves + everybody.saves, "what was answered is in the store"
    os.close(store_fd)
