"""How long removed vTPMs are remembered, in this process, with a real store."""

import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from uuid import UUID

import pytest
import trio
import trio.testing
from manager_rig import ModelTpm, installation, lost_answer, running_daemon
from storage_disks import MemoryDisk
from storage_histories import group_key, new_store, record_of, reopen, uuid_of

from manager.client import RemoteError
from manager.committer import Committer
from manager.errors import ConfigurationError, ConflictError, DeniedError
from manager.tombstones import Tombstones
from manager.verb_table import BY_NAME, Role
from storage.store import BuryVtpm, PutVtpm, RemoveVtpm, Store

A, B = uuid_of(1), uuid_of(2)
V1, V2 = uuid_of(11), uuid_of(12)
DAY = 86400


@contextmanager
def store_with(*vtpms: UUID) -> Iterator[Store]:
    with new_store(MemoryDisk(), [A, B]) as store:
        store.commit([PutVtpm(record_of(vtpm, A)) for vtpm in vtpms])
        yield store


@asynccontextmanager
async def committing(store: Store, days: float, *, task: bool = False) -> AsyncIterator[Tombstones]:
    committer = Committer(store, lambda: None)
    tombstones = Tombstones(committer, days)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(committer.run)
        if task:
            nursery.start_soon(tombstones.run)
        yield tombstones
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("days", [-1.0, math.inf, math.nan, 1e9])
def test_a_time_that_is_none_is_refused(days: float) -> None:
    with store_with() as store, pytest.raises(ConfigurationError, match="tombstone_days"):
        Tombstones(Committer(store, lambda: None), days)


def test_no_time_means_no_tombstone() -> None:
    with store_with() as store:
        assert Tombstones(Committer(store, lambda: None), 0).burial(V1) == RemoveVtpm(V1)
        burial = Tombstones(Committer(store, lambda: None), 1).burial(V1)
        assert isinstance(burial, BuryVtpm)
        assert abs(burial.removed - time.time()) < 60


async def test_only_those_whose_time_is_over_go_and_many_go_in_few_commits() -> None:
    many = [uuid_of(number) for number in range(100, 600)]
    with store_with(V1, V2, *many) as store:
        now = int(time.time())
        store.commit([BuryVtpm(V1, now - 9 * DAY), BuryVtpm(V2, now - 11 * DAY)])
        store.commit([BuryVtpm(vtpm, now - 12 * DAY) for vtpm in many])
        async with committing(store, 10) as tombstones:
            commits = store.statistics().commits
            assert await tombstones.drop_expired() == 501
            assert store.statistics().commits - commits <= 3
            assert [found.uuid for found in store.tombstones()] == [V1]
            assert await tombstones.drop_expired() == 0


async def test_two_who_drop_at_once_do_not_disturb_each_other() -> None:
    with store_with(V1, V2) as store:
        store.commit([BuryVtpm(V1, 1), BuryVtpm(V2, 1)])
        async with committing(store, 10) as tombstones, trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(tombstones.drop_expired)
        assert store.tombstones() == []


async def test_the_task_takes_them_away_those_it_finds_and_those_that_come() -> None:
    with store_with(V1, V2) as store:
        store.commit([BuryVtpm(V1, 1)])
        async with committing(store, 0.1 / DAY, task=True) as tombstones:
            await gone(store)
            await tombstones._committer.commit(tombstones.burial(V2))
            assert len(store.tombstones()) == 1
            tombstones.buried()
            await gone(store)
            assert store.statistics().vtpms == 0


async def gone(store: Store) -> None:
    with trio.fail_after(20):
        while store.tombstones():  # noqa: ASYNC110 - nobody is told
            await trio.sleep(0.01)


async def test_an_anchor_that_cannot_be_written_ends_the_task_of_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Strict mode: a commit also fails when the hardware TPM does. The manager must not end for a tombstone's sake."""

    async def no_tpm() -> None:
        raise lost_answer()

    with store_with(V1) as store:
        store.commit([BuryVtpm(V1, 1)])
        committer = Committer(store, lambda: None)
        committer.before_acknowledge = no_tpm
        async with trio.open_nursery() as nursery:
            nursery.start_soon(committer.run)
            nursery.start_soon(Tombstones(committer, 0.1 / DAY).run)
            await gone(store)
            await trio.testing.wait_all_tasks_blocked()
            assert "still there" in caplog.text
            nursery.cancel_scope.cancel()


async def test_without_tombstones_the_task_sleeps_and_writes_nothing() -> None:
    with store_with(V1) as store:
        async with committing(store, 1, task=True) as tombstones:
            await trio.testing.wait_all_tasks_blocked()
            assert tombstones._until_next() == math.inf
        store.commit([BuryVtpm(V1, int(time.time()))])
        assert 3600 <= tombstones._until_next() <= DAY


async def test_a_uuid_of_a_removed_or_of_an_unseen_vtpm_is_refused() -> None:
    with store_with(V1) as store:
        store.commit([BuryVtpm(V1, 1_800_000_000)])
        async with committing(store, 30) as tombstones:
            with pytest.raises(ConflictError, match=r"removed on 2027-01-15.*free again after 2027-02-14"):
                tombstones.refuse_known(V1)
            tombstones.refuse_known(V2)
    disk = MemoryDisk()
    new_store(disk, [A, B])
    with reopen(disk, unlock=False) as store:
        store.unlock_group(A, group_key(A))
        async with committing(store, 30) as tombstones:
            with pytest.raises(DeniedError, match="is closed"):
                tombstones.refuse_known(V1)


@pytest.fixture
def place() -> Iterator[tuple[ModelTpm, Any]]:
    model = ModelTpm()
    with installation(model) as made:
        yield model, made


async def test_compact_drops_those_whose_time_is_over(place: tuple[ModelTpm, Any]) -> None:
    async with running_daemon(*place) as running:
        uuids = [UUID((await running.ask("add"))[0]["uuid"]) for _ in range(3)]
        old = int(time.time()) - 31 * DAY
        await running.registry.committer.commit(*(BuryVtpm(vtpm, old) for vtpm in uuids[:2]))
        (done,) = await running.ask("compact")
        assert (done["tombstones_dropped"], done["tombstones"]) == (2, 0)
        await running.ask("remove", vtpm=str(uuids[2]), yes=True)
        (done,) = await running.ask("compact", to_size=0)
        assert (done["tombstones_dropped"], done["tombstones"]) == (0, 1)
        (status,) = await running.ask("status")
        assert (status["store_tombstones"], status["store_bytes"]) == (1, done["bytes"])


def test_only_an_administrator_may() -> None:
    assert {BY_NAME[name].role for name in ("scrub", "compact", "remove")} == {Role.ADMINISTRATOR}


async def test_a_removal_that_the_anchor_did_not_follow_is_anchored_when_it_is_done_again(
    place: tuple[ModelTpm, Any],
) -> None:
    model, _ = place
    async with running_daemon(*place) as running:
        await running.ask("add", name="web")
        model.fail["anchor_write"] = "before", lost_answer()
        with pytest.raises(RemoteError, match="not available"):
            await running.ask("remove", vtpm="web", yes=True)
        before = model.nv_writes
        await running.ask("remove", vtpm="web", yes=True)
        assert model.nv_writes == before + 1


async def test_a_scrub_of_state_images_keeps_nothing_in_memory_of_each(place: tuple[ModelTpm, Any]) -> None:
    async with running_daemon(*place) as running:
        for _ in range(5):
            await running.ask("add")
        await running.ask("scrub", state_images=True)
        assert len(running.attachments._changing) == 0
