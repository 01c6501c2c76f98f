"""What instances may do to the manager, and what they may not, on real rings with a real store."""

import logging
import os
import random
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from uuid import UUID

import pytest
import trio
import trio.testing
from manager_rig import ModelTpm, SnapshotDisk, hardware, lost_answer
from storage_histories import new_store, uuid_of

from frontend_backend import messages_instance as m
from frontend_backend.channel_trio import wait_doorbell
from frontend_backend.errors import RingCancelledError
from frontend_backend.local import LocalRing
from frontend_backend.ring import FrontRing
from frontend_backend.tpmif import PAGE_SIZE
from manager.committer import Committer
from manager.quote_task import QuoteTask
from manager.ring_server import RingServer
from manager.running import IDLE_RINGS_AT_ONCE, Running, Stage
from storage.errors import CatalogueError, DeviceError, GenerationError, StorageError
from storage.secrets import StateKey
from storage.store import PutVtpm, RecordFlags, Store, VtpmRecord
from storage.store_table import GroupTable

GROUP = UUID(int=7)
LEASE = 1000


class Front:
    """The instance's end of a ring."""

    def __init__(self, ring: LocalRing, running: Running) -> None:
        self.ring, self.running = ring, running
        self.page = FrontRing(ring.page)

    def submit(self, request: m.Request) -> None:
        self.page.submit(m.encode_request(request))
        self.ring.ring()

    async def answer(self) -> tuple[m.Reply, m.Orders]:
        with trio.fail_after(5):
            while (packet := self.page.poll()) is None:
                await wait_doorbell(self.ring)
        return m.decode_reply(packet)

    async def ask(self, request: m.Request) -> m.Reply:
        self.submit(request)
        return (await self.answer())[0]

    def commit(self, generation: int, seed: int = 1, **more: object) -> m.Commit:
        triple = m.Commit(generation, bytes([seed]) * 32, bytes([seed + 1]) * 32, self.running.lease)
        return replace(triple, **more)  # type: ignore[arg-type]


@dataclass
class Manager:
    store: Store
    committer: Committer
    rings: RingServer
    tpm: ModelTpm
    disk: SnapshotDisk
    fronts: list[Front]
    committing: trio.CancelScope  # around the committer's own task

    def start(self, number: int = 1, lease: int = LEASE, startup: str = "clear") -> Front:
        front, back = LocalRing.pair()
        running = Running(uuid_of(number), lease, os.getpid(), back, startup, "clear")
        made = Front(front, running)
        self.fronts.append(made)
        self.rings.add(running)
        return made

    def record(self, number: int = 1) -> VtpmRecord:
        return self.store.get(uuid_of(number))

    def put(self, number: int = 1, **changes: object) -> None:
        self.store.commit([PutVtpm(replace(self.record(number), **changes))])  # type: ignore[arg-type]


@asynccontextmanager
async def manager() -> AsyncIterator[Manager]:
    disk = SnapshotDisk()
    store = new_store(disk, [GROUP])
    store.commit([PutVtpm(VtpmRecord(uuid_of(number), GROUP, StateKey(bytes(32)))) for number in range(5)])
    committer = Committer(store, lambda: None)
    tpm = ModelTpm()
    async with trio.open_nursery() as nursery:
        rings = RingServer(committer, hardware(tpm), nursery, 90.0)
        made = Manager(store, committer, rings, tpm, disk, [], trio.CancelScope())

        async def commit() -> None:
            with made.committing:
                await committer.run()

        nursery.start_soon(commit)
        nursery.start_soon(rings.run)
        yield made
        nursery.cancel_scope.cancel()
    rings.close()
    for front in made.fronts:
        front.ring.close()
        front.running.ring.close()
    store.close()


# --- taking over ----------------------------------------------------------------------------------


async def test_while_rings_are_held_nobody_is_served_and_then_everybody_is_in_one_group() -> None:
    """Else the first of many that are taken over saves again and again while the last one waits."""
    async with manager() as made:
        early = made.start(1)
        with made.rings.held():
            early.submit(early.commit(1))
            late = [made.start(number) for number in (2, 3)]
            late[0].submit(late[0].commit(1))
            late[1].page.submit(m.encode_request(late[1].commit(1)))  # its doorbell went to the manager before us
            await trio.sleep(0.1)
            assert [front.page.poll() for front in (early, *late)] == [None] * 3
            assert {made.record(number).generation for number in (1, 2, 3)} == {0}
            groups = made.committer.statistics().groups
        for front in (early, *late):
            assert (await front.answer())[0] == m.CommitReply(1)
        assert made.committer.statistics().groups == groups + 1
        assert await early.ask(early.commit(2)) == m.CommitReply(2)


async def test_rings_are_served_again_when_taking_over_failed() -> None:
    async with manager() as made:
        front = made.start()
        with suppress(DeviceError), made.rings.held():
            front.submit(front.commit(1))
            raise DeviceError("take over", OSError(5, "as a test has it"))
        assert (await front.answer())[0] == m.CommitReply(1)


# --- commits --------------------------------------------------------------------------------------


async def test_a_commit_is_answered_when_it_is_on_the_disk() -> None:
    async with manager() as made:
        front = made.start()
        assert await front.ask(front.commit(1)) == m.CommitReply(1)
        record = made.record()
        assert (record.generation, record.digest, record.flags) == (1, b"\x02" * 32, RecordFlags.NONE)
        made.store.close()


async def test_the_same_triple_again_is_acknowledged_and_writes_nothing() -> None:
    async with manager() as made:
        front = made.start()
        await front.ask(front.commit(1))
        sequence = made.store.sequence
        assert await front.ask(front.commit(1)) == m.CommitReply(1)
        assert made.store.sequence == sequence


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"generation": 1, "seed": 9}, m.RefusalCode.STALE_GENERATION),
        ({"generation": 0}, m.RefusalCode.STALE_GENERATION),
        ({"generation": 3}, m.RefusalCode.STALE_GENERATION),
        ({"generation": -1}, m.RefusalCode.STALE_GENERATION),
        ({"generation": 2**64 - 1}, m.RefusalCode.STALE_GENERATION),
        ({"generation": 2, "lease": LEASE - 1}, m.RefusalCode.STALE_LEASE),
        ({"generation": 2, "lease": LEASE + 1}, m.RefusalCode.STALE_LEASE),
        ({"generation": 2, "key": b""}, m.RefusalCode.MALFORMED),
        ({"generation": 2, "key": bytes(33)}, m.RefusalCode.MALFORMED),
        ({"generation": 2, "digest": bytes(31)}, m.RefusalCode.MALFORMED),
        ({"generation": 2, "digest": bytes(64)}, m.RefusalCode.MALFORMED),
    ],
)
async def test_a_commit_that_cannot_be_is_refused_and_changes_nothing(
    change: dict[str, object], code: m.RefusalCode
) -> None:
    async with manager() as made:
        front = made.start()
        await front.ask(front.commit(1))
        before = made.record()
        reply = await front.ask(front.commit(**change))  # type: ignore[arg-type]
        assert isinstance(reply, m.Refusal)
        assert reply.code is code
        assert made.record() == before
        assert await front.ask(front.commit(2)) == m.CommitReply(2), "it goes on"


async def test_a_vtpm_that_is_not_in_the_store_commits_nothing() -> None:
    async with manager() as made:
        front = made.start(99)
        for request in (front.commit(1), m.Load()):
            reply = await front.ask(request)
            assert isinstance(reply, m.Refusal)
            assert reply.code is m.RefusalCode.UNKNOWN_VTPM


async def test_commits_of_many_instances_share_a_flush() -> None:
    async with manager() as made:
        fronts = [made.start(number) for number in range(5)]
        await fronts[0].ask(fronts[0].commit(1))
        commits, groups = made.store.statistics().commits, made.committer.statistics().groups
        async with made.committer.lock:  # what arrives meanwhile is the next group
            for number, front in enumerate(fronts):
                front.submit(front.commit(2 if not number else 1))
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert [await front.answer() for front in fronts]
        assert made.store.statistics().commits - commits <= 2
        assert made.committer.statistics().groups - groups <= 2


async def test_flags_of_a_later_version_survive_a_save() -> None:
    unknown = 1 << 7  # the one of the eight that has no meaning yet
    async with manager() as made:
        made.put(flags=RecordFlags(unknown) | RecordFlags.TPM12 | RecordFlags.FRESH)
        front = made.start()
        await front.ask(front.commit(1))
        assert int(made.record().flags) == unknown | int(RecordFlags.TPM12)


async def test_on_a_quick_disk_a_group_is_committed_without_the_committers_turn() -> None:
    async with manager() as made:
        fronts = [made.start(number) for number in range(5)]
        await fronts[0].ask(fronts[0].commit(1))  # how quick the disk is, is known now
        for number, front in enumerate(fronts):
            front.submit(front.commit(1 if number else 2))
        groups = made.committer.statistics().groups
        made.committing.cancel()
        assert [(await front.answer())[0] for front in fronts] == [m.CommitReply(2), *[m.CommitReply(1)] * 4]
        assert made.committer.statistics().groups - groups == 1, "what is ready together is one group"


async def test_a_failing_disk_is_no_success() -> None:
    async with manager() as made:
        front = made.start()

        def fail(_image: bytes) -> None:
            raise OSError(5, "Input/output error")

        made.disk.on_flush = fail
        reply = await front.ask(front.commit(1))
        assert isinstance(reply, m.Refusal)
        assert reply.code is m.RefusalCode.STORE_FAILED
        made.disk.on_flush = lambda _image: None
        later = await front.ask(front.commit(1))
        assert isinstance(later, m.Refusal), "nothing is known of this store until it is opened again"


async def test_a_successor_loads_what_its_predecessor_had_in_flight() -> None:
    gate = threading.Event()
    async with manager() as made:
        front = made.start()
        made.disk.on_flush = lambda _image: assert_opened(gate)
        front.submit(front.commit(1))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert front.running.busy

        async def succeed() -> None:
            await made.rings.quiesce(front.running)
            successor = made.start(lease=LEASE + 1)
            reply = await successor.ask(m.Load())
            assert isinstance(reply, m.LoadReply)
            assert reply.generation == made.record().generation == 1
            refused = await successor.ask(replace(successor.commit(2), lease=LEASE))
            assert isinstance(refused, m.Refusal)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(succeed)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert len(made.fronts) == 1, "it waits for the commit in flight"
            gate.set()


def assert_opened(gate: threading.Event) -> None:
    assert gate.wait(10)


async def test_what_a_dead_instance_left_on_its_page_is_not_committed() -> None:
    async with manager() as made:
        front = made.start()
        made.rings.remove(front.running)
        front.submit(front.commit(1))
        await trio.testing.wait_all_tasks_blocked(0.01)
        await made.rings.quiesce(front.running)
        assert made.record().generation == 0


async def test_a_request_that_waits_for_the_next_manager_is_answered() -> None:
    async with manager() as made:
        front, back = LocalRing.pair()
        running = Running(uuid_of(1), LEASE, os.getpid(), back, "failed", "clear")
        waiting = Front(front, running)
        waiting.submit(waiting.commit(1))
        back.drain()  # the ring was heard by the manager that died
        made.fronts.append(waiting)
        made.rings.add(running)
        assert (await waiting.answer())[0] == m.CommitReply(1)


# --- loading, once --------------------------------------------------------------------------------


async def test_a_fresh_vtpm_gets_no_key_and_its_first_commit_ends_that() -> None:
    async with manager() as made:
        front = made.start()
        reply = await front.ask(m.Load())
        assert isinstance(reply, m.LoadReply)
        assert (reply.fresh, reply.key, reply.digest, reply.startup) == (True, b"", b"", "clear")
        await front.ask(front.commit(1))
        again = await front.ask(m.Load())
        assert isinstance(again, m.LoadReply)
        assert (again.fresh, again.key) == (False, b"\x01" * 32)


async def test_only_the_final_commit_makes_a_state_resumable() -> None:
    async with manager() as made:
        front = made.start()
        await front.ask(front.commit(1))
        assert not made.record().flags & RecordFlags.RESUMABLE
        await front.ask(front.commit(2, final=True))
        assert made.record().flags & RecordFlags.RESUMABLE
        await front.ask(front.commit(3))
        assert not made.record().flags & RecordFlags.RESUMABLE


async def test_a_resumable_state_is_consumed_durably_before_load_is_answered() -> None:
    async with manager() as made:
        first = made.start()
        await first.ask(first.commit(1, final=True))
        second = made.start(lease=LEASE + 1, startup="state")
        on_disk: list[RecordFlags] = []
        made.disk.on_flush = lambda _image: on_disk.append(second.page.head().state)  # type: ignore[arg-type]
        reply = await second.ask(m.Load())
        assert isinstance(reply, m.LoadReply)
        assert reply.startup == "state"
        assert on_disk, "there was a flush"
        assert all(state.name == "SUBMIT" for state in on_disk), "and no answer before it"  # type: ignore[attr-defined]
        assert not made.record().flags & RecordFlags.RESUMABLE


def hibernate(front: Front, generation: int, seed: int = 1) -> m.Hibernate:
    commit = front.commit(generation, seed)
    return m.Hibernate(commit.generation, commit.key, commit.digest, commit.lease)


ASLEEP = RecordFlags.RESUMABLE | RecordFlags.HIBERNATED


async def told_to_sleep(front: Front) -> None:
    """Let an instance be up, and have the order to hibernate."""
    front.running.order(m.Orders.HIBERNATE)
    await front.ask(m.Report(m.InstanceState.READY))
    assert front.running.stage is Stage.RUNNING


async def test_one_that_was_not_told_to_does_not_hibernate() -> None:
    """Or one that was taken over could go to sleep and be woken, a process and two commits each time, without end."""
    async with manager() as made:
        front = made.start()
        await front.ask(m.Report(m.InstanceState.READY))
        for _ in range(4):
            await front.ask(m.Report(m.InstanceState.READY, m.IDLE))
        assert front.running.idle_reports == 0, "nobody asked it how idle it is"
        reply = await front.ask(hibernate(front, 1))
        assert isinstance(reply, m.Refusal)
        assert made.record().generation == 0, "nothing was committed"


async def test_one_that_hibernates_is_marked_and_its_ring_read_no_more() -> None:
    async with manager() as made:
        front = made.start()
        slept: list[Running] = []
        gone: list[Running] = []
        made.rings.on_sleep, made.rings.on_hang_up = slept.append, gone.append
        await told_to_sleep(front)
        assert await front.ask(hibernate(front, 1)) == m.CommitReply(1)
        assert made.record().flags & ASLEEP == ASLEEP
        assert (front.running.stage, slept) == (Stage.HIBERNATED, [front.running])
        while True:  # what it rang so far was for the manager
            try:
                front.running.ring.doorbell._sock.recv(1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
        for _ in range(3):
            front.ring.ring()
        await trio.sleep(0.1)
        assert len([front.running.ring.doorbell._sock.recv(1) for _ in range(3)]) == 3, "left for the keeper"
        assert not gone
        front.ring.doorbell.close()
        with trio.fail_after(5):
            while not gone:  # noqa: ASYNC110 - told by another task
                await trio.sleep(0.01)
        assert gone == [front.running]


@pytest.mark.parametrize("wanted", [m.Orders.STOP, m.Orders.RESET])
async def test_one_that_is_wanted_does_not_hibernate(wanted: m.Orders) -> None:
    async with manager() as made:
        front = made.start()
        await told_to_sleep(front)
        front.running.order(wanted)
        reply = await front.ask(hibernate(front, 1))
        assert isinstance(reply, m.Refusal)
        assert reply.code is m.RefusalCode.WANTED
        assert made.record().generation == 0, "nothing was committed"


async def test_hibernating_twice_with_one_state_is_one_sleep_whatever_is_wanted() -> None:
    """The answer of a manager that died was lost: its instance cannot go on, and asks the next one again."""
    async with manager() as made:
        front = made.start()
        await told_to_sleep(front)
        await front.ask(hibernate(front, 1))
        record = made.record()
        again = made.start()  # as one that was taken over
        assert await again.ask(hibernate(again, 1)) == m.CommitReply(1)
        assert again.running.stage is Stage.HIBERNATED
        assert made.record() == record
        third = made.start()
        other = await third.ask(hibernate(third, 1, seed=9))
        assert isinstance(other, m.Refusal), "another state is not that one"


async def test_a_hibernated_state_is_consumed_durably_before_load_is_answered() -> None:
    async with manager() as made:
        first = made.start()
        await told_to_sleep(first)
        await first.ask(hibernate(first, 1))
        second = made.start(startup="state")
        marks: list[RecordFlags] = []
        made.disk.on_flush = lambda _image: marks.append(second.page.head().state)  # type: ignore[arg-type]
        reply = await second.ask(m.Load())
        assert isinstance(reply, m.LoadReply)
        assert reply.startup == "state"
        assert marks
        assert all(state.name == "SUBMIT" for state in marks), "no key before the mark was gone"  # type: ignore[attr-defined]
        assert not made.record().flags & ASLEEP
        third = made.start(startup="state")
        again = await third.ask(m.Load())
        assert isinstance(again, m.LoadReply)
        assert again.startup == "failed"


async def test_a_save_takes_the_marks_of_a_sleep_away() -> None:
    async with manager() as made:
        front = made.start()
        front.running.stage = Stage.RUNNING
        await front.ask(hibernate(front, 1))
        other = made.start(lease=LEASE + 1)
        await other.ask(other.commit(2))
        assert not made.record().flags & ASLEEP


@pytest.mark.parametrize("flags", [RecordFlags.NONE, RecordFlags.FRESH])
async def test_a_state_that_was_consumed_is_never_resumed_again(flags: RecordFlags) -> None:
    async with manager() as made:
        made.put(flags=flags)
        front = made.start(startup="state")
        reply = await front.ask(m.Load())
        assert isinstance(reply, m.LoadReply)
        assert reply.startup == "failed"


async def test_a_second_load_is_told_what_a_reset_is_told() -> None:
    async with manager() as made:
        first = made.start()
        await first.ask(first.commit(1, final=True))
        front = made.start(lease=LEASE + 1, startup="state")
        replies = [await front.ask(m.Load()) for _ in range(3)]
        assert [reply.startup for reply in replies if isinstance(reply, m.LoadReply)] == ["state", "clear", "clear"]


async def test_a_load_whose_mark_cannot_be_written_is_refused() -> None:
    async with manager() as made:
        first = made.start()
        await first.ask(first.commit(1, final=True))
        front = made.start(lease=LEASE + 1, startup="state")

        def fail(_image: bytes) -> None:
            raise OSError(28, "No space left on device")

        made.disk.on_flush = fail
        reply = await front.ask(m.Load())
        assert isinstance(reply, m.Refusal)
        assert reply.code is m.RefusalCode.STORE_FAILED
        assert front.running.startup == "state", "nothing was told: who asks again is not told to begin anew"


async def test_who_commits_is_not_quarantined_any_more() -> None:
    async with manager() as made:
        made.put(flags=RecordFlags.QUARANTINED)
        front = made.start()
        await front.ask(front.commit(1))
        assert not made.record().flags & RecordFlags.QUARANTINED


# --- the other verbs ------------------------------------------------------------------------------


async def test_random_bytes_are_mixed_and_bounded() -> None:
    async with manager() as made:
        front = made.start()
        reply = await front.ask(m.Random(64))
        assert isinstance(reply, m.RandomReply)
        assert len(set(reply.data)) > 8
        for count in (0, -1, 65, 2**63):
            refused = await front.ask(m.Random(count))
            assert isinstance(refused, m.Refusal)
            assert refused.code is m.RefusalCode.LIMIT
        made.tpm.fail["random"] = "before", lost_answer()
        refused = await front.ask(m.Random(8))
        assert isinstance(refused, m.Refusal)
        assert refused.code is m.RefusalCode.UNAVAILABLE


async def test_what_this_manager_does_not_offer_is_refused() -> None:
    async with manager() as made:
        front = made.start()
        for request, code in (
            (m.PcrRead("sha256", (0,)), m.RefusalCode.DENIED),
            (m.Quote(b"n", b""), m.RefusalCode.DENIED),
        ):
            reply = await front.ask(request)
            assert isinstance(reply, m.Refusal)
            assert reply.code is code


async def test_an_instance_is_told_the_hardware_pcrs_of_its_attachment_and_no_others() -> None:
    async with manager() as made:
        front = made.start()
        front.running.hw_pcrs = 0b1000_0101
        made.tpm.pcrs[7] = b"\x77" * 32
        reply = await front.ask(m.Load())
        assert isinstance(reply, m.LoadReply)
        assert reply.hw_pcrs == 0b1000_0101
        assert await front.ask(m.PcrRead("sha256", (7, 0))) == m.PcrReadReply((b"\x77" * 32, bytes(32)))
        for pcrs in ((1,), (0, 1), (), (-1,), (24,), (2**31,), (0, -(2**63)), (0,) * 25):
            refused = await front.ask(m.PcrRead("sha256", pcrs))
            assert isinstance(refused, m.Refusal), pcrs
            assert refused.code is m.RefusalCode.DENIED
        refused = await front.ask(m.PcrRead("sha1", (0,)))
        assert isinstance(refused, m.Refusal)
        made.tpm.fail["pcr_read_together"] = "before", lost_answer()
        refused = await front.ask(m.PcrRead("sha256", (0,)))
        assert isinstance(refused, m.Refusal)
        assert refused.code is m.RefusalCode.UNAVAILABLE
        asked = 0
        while isinstance(reply := await front.ask(m.PcrRead("sha256", (0,))), m.PcrReadReply):
            asked += 1
            assert asked < 10
        assert isinstance(reply, m.Refusal)
        assert reply.text == "too often just now"


async def test_a_quote_is_asked_of_an_instance_once_and_only_its_own_ticket_counts() -> None:
    async with manager() as made:
        front = made.start()
        await front.ask(m.Report(m.InstanceState.READY, quotes=True))
        assert await front.ask(m.QuoteTask()) == m.QuoteTaskReply(0)
        task = QuoteTask(b"nonce", 3)
        front.running.order_quote(task)
        front.submit(m.Report(m.InstanceState.READY, quotes=True))
        assert (await front.answer())[1] is m.Orders.QUOTE
        front.submit(m.QuoteTask())
        assert await front.answer() == (m.QuoteTaskReply(task.ticket, b"nonce", 3), m.Orders.NONE)
        assert isinstance(await front.ask(m.QuoteMade(task.ticket + 1, b"another's")), m.ReportReply)
        assert not task.done.is_set()
        assert isinstance(await front.ask(m.QuoteMade(task.ticket, b"evidence")), m.ReportReply)
        assert (task.done.is_set(), task.evidence, task.problem) == (True, b"evidence", "")
        await front.ask(m.QuoteMade(task.ticket, b"second thoughts"))
        assert task.evidence == b"evidence"


async def test_orders_travel_in_the_next_answer_and_a_reset_only_once() -> None:
    async with manager() as made:
        front = made.start()
        await front.ask(m.Report(m.InstanceState.READY))
        front.running.order(m.Orders.RESET)
        front.submit(m.Report(m.InstanceState.READY))
        assert (await front.answer())[1] is m.Orders.RESET
        front.submit(m.Report(m.InstanceState.READY))
        assert (await front.answer())[1] is m.Orders.NONE
        front.running.order(m.Orders.STOP)
        for _ in range(2):
            front.submit(m.Report(m.InstanceState.READY))
            assert (await front.answer())[1] is m.Orders.STOP


# --- hostile instances ----------------------------------------------------------------------------


def scribble(front: Front, rng: random.Random) -> None:
    """Anything an instance can do to its own ring."""
    page = front.ring.page
    match rng.randrange(9):
        case 0:
            page[:] = rng.randbytes(PAGE_SIZE)
        case 1:
            page[:8] = rng.randbytes(8)
        case 2:
            page[4] = rng.randrange(256)
        case 3:
            page[:4] = rng.choice([0, 1, 9, 10, 4088, 4089, 2**31, 2**32 - 1]).to_bytes(4, "little")
            page[4] = 1
        case 4:
            packet = bytearray(m.encode_request(m.Random(5)))
            packet[rng.randrange(len(packet))] ^= 1 << rng.randrange(8)
            with suppress(Exception):
                front.page.submit(bytes(packet))
        case 5:
            packet = m.encode_request(front.commit(1))
            with suppress(Exception):
                front.page.submit(packet[: rng.randrange(1, len(packet))])
        case 6:
            with suppress(Exception):
                front.page.submit(m.encode_request(m.Report(m.InstanceState.FAILED, "x" * 500, "\x1b[2J\n" * 300)))
        case 7:
            with suppress(Exception):
                front.page.cancel()
        case 8:
            with suppress(Exception):
                front.page.poll()
    for _ in range(rng.choice([0, 1, 1, 3])):
        front.ring.ring()


async def test_a_hostile_instance_costs_only_itself(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with manager() as made:
        good, bad = made.start(1), made.start(2)
        for seed in range(400):
            scribble(bad, random.Random(seed))
            if not seed % 4:
                await trio.lowlevel.checkpoint()
            if not seed % 40:
                assert await good.ask(good.commit(seed // 40 + 1)) == m.CommitReply(seed // 40 + 1)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert made.record(1).generation == 10
        assert made.record(3).generation == 0
        bad.ring.page[:] = bytes(PAGE_SIZE)  # and when it comes to reason it is served again
        bad.page = FrontRing(bad.ring.page)
        for _ in range(3):
            with suppress(RingCancelledError):
                assert isinstance(await bad.ask(m.Load()), m.LoadReply)
                break
    assert len(caplog.records) < 40, "nor does it fill the log"


async def test_a_flood_of_rings_starves_nobody() -> None:
    async with manager() as made:
        good, bad = made.start(1), made.start(2)
        flooding = True

        async def flood() -> None:
            while flooding:
                for _ in range(300):
                    bad.ring.ring()
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            for generation in range(1, 6):
                assert await good.ask(good.commit(generation)) == m.CommitReply(generation)
            flooding = False


async def test_who_rings_for_nothing_without_pause_is_heard_no_more_often_than_that_is_worth(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with manager() as made:
        front, looks, look_at = made.start(), 0, made.rings._look_at

        def counted(running: Running, *, alive: bool = True) -> None:
            nonlocal looks
            looks += 1
            look_at(running, alive=alive)

        made.rings._look_at = counted  # type: ignore[method-assign]
        for _ in range(3 * int(IDLE_RINGS_AT_ONCE)):  # no time passes meanwhile: somebody always has something to do
            front.ring.ring()
            for _ in range(3):
                await trio.lowlevel.checkpoint()
        assert 0 < looks <= IDLE_RINGS_AT_ONCE + 2
        assert await front.ask(m.Report(m.InstanceState.READY, "", "")) == m.ReportReply(), "and is answered after that"
        for _ in range(3 * int(IDLE_RINGS_AT_ONCE)):
            front.ring.ring()
            for _ in range(3):
                await trio.lowlevel.checkpoint()
        ended = trio.Event()
        made.rings.on_hang_up = lambda _running: ended.set()
        front.ring.close()
        await ended.wait()


@pytest.mark.parametrize(
    "end",
    [
        lambda ring: ring.doorbell._sock.shutdown(socket.SHUT_RDWR),
        lambda ring: ring.doorbell._sock.send(b""),
        lambda ring: ring.doorbell._sock.sendmsg([b"x" * 70000]),
        lambda ring: socket.send_fds(ring.doorbell._sock, [b"x"], [0, 1, 2]),
    ],
)
async def test_whatever_is_sent_through_the_doorbell_the_others_are_served(end: Callable[[LocalRing], None]) -> None:
    async with manager() as made:
        good, bad = made.start(1), made.start(2)
        descriptors = len(os.listdir("/proc/self/fd"))
        end(bad.ring)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert await good.ask(good.commit(1)) == m.CommitReply(1)
        assert len(os.listdir("/proc/self/fd")) == descriptors
        bad.running.order(m.Orders.STOP)  # does not raise


async def test_words_of_an_instance_cannot_command_a_terminal_or_a_log() -> None:
    async with manager() as made:
        front = made.start()
        await front.ask(
            m.Report(m.InstanceState.FAILED, "no\nsuch", "\x1b]0;owned\x07 line\r\nERROR forged" + "x" * 3000)
        )
        report = front.running.report
        assert report is not None
        assert (report.reason + report.text).isprintable()
        assert len(report.text) <= 1000


async def test_reports_carry_no_authority() -> None:
    async with manager() as made:
        front = made.start()
        for stage in set(Stage) - {Stage.HIBERNATED}:  # the ring of one that sleeps is not heard any more
            for state in m.InstanceState:
                front.running.stage = stage
                await front.ask(m.Report(state))
                assert front.running.stage in Stage
                if stage in (Stage.STOPPED, Stage.FAILED, Stage.ENDED):
                    assert front.running.stage is stage, "nobody comes back by saying so"


async def test_a_report_from_before_a_reset_does_not_settle_it() -> None:
    async with manager() as made:
        front = made.start()
        await front.ask(m.Report(m.InstanceState.NEEDS_RESET))
        front.running.order(m.Orders.RESET)
        await front.ask(m.Report(m.InstanceState.NEEDS_RESET))  # fetches the order
        assert not front.running.settled.is_set()
        await front.ask(m.Report(m.InstanceState.READY))
        assert front.running.settled.is_set()
        assert front.running.stage is Stage.RUNNING


async def test_an_instance_that_rings_without_pause_or_takes_no_answer_keeps_nobody_waiting() -> None:
    async with manager() as made:
        good, flood, deaf = made.start(1), made.start(2), made.start(3)
        stop = threading.Event()

        def ring_on() -> None:
            while not stop.is_set():
                flood.ring.ring()

        flooder = threading.Thread(target=ring_on)
        flooder.start()
        try:
            for generation in range(1, 40):
                deaf.running.order(m.Orders.STOP)  # fills the doorbell of one who never listens
                assert await good.ask(good.commit(generation)) == m.CommitReply(generation)
            for _ in range(5000):
                deaf.running.ring.ring()
            assert await good.ask(good.commit(40)) == m.CommitReply(40)
        finally:
            stop.set()
            flooder.join()
        assert await flood.ask(flood.commit(1)) == m.CommitReply(1), "and what it asks for is done all the same"
        assert await deaf.ask(deaf.commit(1)) == m.CommitReply(1)


async def test_the_end_of_an_instance_is_noticed_on_its_ring() -> None:
    async with manager() as made:
        gone: list[Running] = []
        noticed = trio.Event()

        def on_hang_up(running: Running) -> None:
            gone.append(running)
            noticed.set()

        made.rings.on_hang_up = on_hang_up
        good, bad = made.start(1), made.start(2)
        bad.submit(bad.commit(1))
        bad.ring.close()
        assert await good.ask(good.commit(1)) == m.CommitReply(1)
        with trio.fail_after(5):
            await noticed.wait()
        assert gone == [bad.running]
        assert made.record(2).generation == 1, "what it asked for last was done"


# --- the committer --------------------------------------------------------------------------------


async def test_a_bad_entry_costs_only_itself() -> None:
    async with manager() as made:
        made.put(generation=5)
        stale = PutVtpm(replace(made.record(), generation=2))
        fine = PutVtpm(replace(made.record(2), generation=3))
        outcomes: list[Exception | None] = []
        made.committer.enqueue([stale], outcomes.append)
        with trio.fail_after(5):
            await made.committer.commit(fine)
        assert [type(outcome) for outcome in outcomes] == [GenerationError]
        assert made.record(2).generation == 3


async def test_a_failing_device_fails_every_entry() -> None:
    async with manager() as made:

        def fail(_image: bytes) -> None:
            raise OSError(5, "Input/output error")

        made.disk.on_flush = fail
        with pytest.raises(DeviceError):
            await made.committer.commit(PutVtpm(replace(made.record(), generation=1)))


def test_readers_never_see_a_store_between_two_states(monkeypatch: pytest.MonkeyPatch) -> None:
    apply, seen = GroupTable.apply, list[object]()
    with new_store(SnapshotDisk(), [GROUP]) as store:
        record = VtpmRecord(uuid_of(1), GROUP, StateKey(bytes(32)))
        store.commit([PutVtpm(record)])

        def read() -> None:
            try:
                seen.append(store.get(uuid_of(1)).generation)
            except StorageError as error:
                seen.append(error)

        reader = threading.Thread(target=read)

        def slow(table: GroupTable, part: bytes) -> None:
            reader.start()
            reader.join(0.05)
            apply(table, part)

        monkeypatch.setattr(GroupTable, "apply", slow)
        committer = threading.Thread(target=store.commit, args=([PutVtpm(replace(record, generation=1))],))
        committer.start()
        committer.join(10)
        reader.join(10)
    assert seen == [1]


async def test_a_boot_that_cannot_be_kept_does_not_begin() -> None:
    async with manager() as made:
        front = made.start()
        told: list[str] = []

        def begin(running: Running) -> tuple[bytes, ...]:
            told.append(str(running.vtpm))
            if len(told) > 2:
                raise CatalogueError("the disk is full")
            return (b"kernel",)

        made.rings.on_boot = begin
        reply = await front.ask(m.Load())
        assert isinstance(reply, m.LoadReply)
        assert reply.measured == ((b"kernel",) if reply.startup == "clear" else ())
        while len(told) < 2:
            assert await front.ask(m.Measurements()) == m.MeasurementsReply((b"kernel",))
        refused = await front.ask(m.Measurements())
        assert isinstance(refused, m.Refusal)
        assert (refused.code, "disk is full" in refused.text) == (m.RefusalCode.UNAVAILABLE, True)


async def test_a_boot_elsewhere_begins_with_its_first_load_and_not_with_what_its_instance_loads_after_that() -> None:
    """There a program loads first, and hands the word that it was told to its instance's own Load."""
    async with manager() as made:
        told: list[str] = []

        def begin(running: Running) -> tuple[bytes, ...]:
            told.append(running.startup)
            return (b"kernel",)

        made.rings.on_boot = begin
        for first, boots in (("state", 0), ("clear", 2)):
            made.put(flags=RecordFlags.RESUMABLE)
            front = made.start(startup=first)
            front.running.elsewhere = True
            told.clear()
            replies = [await front.ask(m.Load()) for _ in range(2)]
            assert [reply.measured for reply in replies if isinstance(reply, m.LoadReply)] == [
                ((b"kernel",) if boots else ())
            ] * 2
            assert len(told) == boots


async def test_who_does_not_come_up_deactivated_is_told_to_be_so_after_a_reset() -> None:
    async with manager() as made:
        made.put(flags=RecordFlags.RESUMABLE)
        front = made.start(startup="state")
        front.running.after_reset = "deactivated"
        replies = [await front.ask(m.Load()) for _ in range(2)]
        said = [(reply.startup, reply.after_reset) for reply in replies if isinstance(reply, m.LoadReply)]
        assert said == [("state", "deactivated"), ("deactivated", "")]
