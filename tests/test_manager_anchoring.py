"""The rollback rule against an adversary who keeps every image ever written, with controls that must fail."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from fixtures_tpm import SwtpmProcess, running_swtpm
from manager_rig import ModelTpm, SnapshotDisk, hardware, lost_answer
from rollback_world import AUTH, VTPM, Findings, World
from storage_histories import KEY, reopen

from manager import anchor
from manager.anchor import Notes, Standing, StorePosition, clean_stop, extended, judge
from manager.anchoring import Anchoring, position_of
from manager.committer import Committer
from manager.errors import IntegrityError, RolledBackError
from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import TpmError, TpmTransport
from manager.hwtpm_records import AnchorInfo
from storage.secrets import StateKey
from storage.store import PutVtpm, Store

RUNS = 7  # opens in a history


async def histories(seeds: int, **options: Any) -> Findings:
    total = Findings()
    for seed in range(seeds):
        found = await World(seed, **options).history(RUNS)
        for name, value in vars(found).items():
            setattr(total, name, getattr(total, name) + value)
    return total


# --- the adversary --------------------------------------------------------------------------------


async def test_no_old_or_forked_store_is_accepted_and_the_newest_never_refused() -> None:
    found = await histories(40)
    assert (found.accepted_old, found.locked_out) == ([], [])
    assert found.opens == 40 * RUNS
    assert found.refused > 3000
    assert found.older_opened > 10, "the adversary also booted old states that are still allowed"
    assert min(found.clean_stops, found.durable, found.extends, found.resets) > 80


async def test_strict_mode_accepts_nothing_older_than_an_acknowledged_save() -> None:
    found = await histories(20, strict=True)
    assert (found.accepted_old, found.lost_saves, found.locked_out) == ([], [], [])
    assert found.refused > 1500


def without_pending(position: StorePosition, durable: bytes, pcr22: bytes | None) -> Standing:
    return judge(replace(position, notes=replace(position.notes, pending=bytes(32))), durable, pcr22)


def without_held(position: StorePosition, durable: bytes, pcr22: bytes | None) -> Standing:
    return judge(replace(position, held=bytes(32)), durable, pcr22)


def without_pcr22(position: StorePosition, durable: bytes, _pcr22: bytes | None) -> Standing:
    return judge(position, durable, None)


async def test_control_without_the_pending_note_the_newest_is_locked_out() -> None:
    assert (await histories(25, judge=without_pending)).locked_out


async def test_control_without_the_held_digest_the_newest_is_locked_out() -> None:
    assert (await histories(10, judge=without_held)).locked_out


def without_a_reset_in_between(position: StorePosition, durable: bytes, pcr22: bytes | None) -> Standing:
    """The rule before a reset between the note and the extend was thought of."""
    notes = position.notes
    known = notes.pcr_before, extended(notes.pcr_before, notes.extending), *anchor.PCR22_AFTER_RESET
    standing = judge(position, durable, None)
    if standing is not Standing.CLEAN and pcr22 not in known:
        raise RolledBackError("another value")
    return standing


async def test_control_a_tpm_reset_between_note_and_extend_locks_the_newest_out() -> None:
    assert (await histories(25, judge=without_a_reset_in_between)).locked_out


async def test_control_without_pcr_22_old_states_are_accepted() -> None:
    assert (await histories(10, judge=without_pcr22)).accepted_old


async def test_control_an_open_that_anchors_the_digest_it_found_can_be_forked() -> None:
    for seed in range(60):
        if (await World(seed, opening=Anchoring.write_durable).history(20)).accepted_old:
            return
    pytest.fail("the adversary found no fork")


async def test_control_a_counter_can_be_forked() -> None:
    # scheme C of the prototype: the sequence number where the digest stands; two branches count alike
    world = World(3)

    def counting(position: StorePosition, _durable: bytes, _pcr22: bytes | None) -> None:
        node = next(node for node in world.nodes if node.position is position)
        if node.depth < world.floor.depth:
            raise RolledBackError("an older number")

    world.judge = counting
    assert (await world.history(20)).accepted_old


class ChipTpm(ModelTpm):
    """The same faults around a real swtpm."""

    def __init__(self, swtpm: SwtpmProcess) -> None:
        super().__init__()
        self.swtpm = swtpm
        self.chip = HardwareTpm.open(swtpm.setting)
        self.chip.provision_srk()

    def reset(self) -> None:
        self.chip.close()
        self.swtpm.kill()
        self.swtpm.start()
        self.chip = HardwareTpm.open(self.swtpm.setting)
        self.chip.provision_srk()

    def anchor_define(self, index: int, auth: bytes) -> AnchorInfo:
        return self.chip.anchor_define(index, auth)

    def anchor_read(self, info: AnchorInfo, auth: bytes) -> bytes:
        with self._call("anchor_read"):
            return self.chip.anchor_read(info, auth)

    def anchor_write(self, info: AnchorInfo, auth: bytes, digest: bytes, *, first: bool = False) -> None:
        with self._call("anchor_write"):
            self.chip.anchor_write(info, auth, digest, first=first)
            self.after_write()

    def pcr22_read(self) -> bytes:
        with self._call("pcr22_read"):
            return self.chip.pcr22_read()

    def pcr22_extend(self, digest: bytes) -> None:
        with self._call("pcr22_extend"):
            self.chip.pcr22_extend(digest)
            self.after_extend()


@contextmanager
def a_chip() -> Iterator[ChipTpm]:
    with running_swtpm() as swtpm:
        chip = ChipTpm(swtpm)
        try:
            yield chip
        finally:
            chip.chip.close()


async def test_the_same_holds_on_a_real_tpm() -> None:
    with a_chip() as chip:
        found = await World(5, tpm=chip).history(4)
    assert (found.accepted_old, found.locked_out, found.opens) == ([], [], 4)
    assert found.durable > 4
    assert found.resets > 0


# --- the rule, pure -------------------------------------------------------------------------------

D, OTHER, PCR = b"d" * 32, b"o" * 32, b"p" * 32


def position(held: bytes = OTHER, pending: bytes = bytes(32), before: bytes = PCR) -> StorePosition:
    return StorePosition(D, held, Notes(pending, before))


@pytest.mark.parametrize(
    ("durable", "standing"),
    [(clean_stop(D), Standing.CLEAN), (D, Standing.EQUAL), (OTHER, Standing.DESCENDS)],
)
def test_each_standing(durable: bytes, standing: Standing) -> None:
    assert judge(position(), durable, PCR) is standing


def test_zeros_in_the_index_stand_for_no_store() -> None:
    # a store that never noted anything pending has zeros there, and so may an index that somebody defined anew
    with pytest.raises(RolledBackError, match="older copy"):
        judge(position(), bytes(32), None)


@pytest.mark.parametrize("pcr22", [PCR, *anchor.PCR22_AFTER_RESET, None])
def test_a_descendant_needs_a_pcr_22_that_it_knows(pcr22: bytes | None) -> None:
    assert judge(position(), OTHER, pcr22) is Standing.DESCENDS


@pytest.mark.parametrize("durable", [D, OTHER])
def test_another_pcr_22_refuses_all_but_a_clean_stop(durable: bytes) -> None:
    with pytest.raises(RolledBackError, match="newer saves"):
        judge(position(), durable, b"x" * 32)
    assert judge(position(), clean_stop(D), b"x" * 32) is Standing.CLEAN


def test_notes_keep_what_they_are_told_and_refuse_another_length() -> None:
    notes = Notes(D, OTHER, PCR)
    assert Notes.unpack(notes.pack()) == notes
    assert Notes.unpack(b"") == Notes()
    for length in (1, 32, 95, 97, 128):
        with pytest.raises(IntegrityError):
            Notes.unpack(bytes(length))


# --- what the manager does with it ----------------------------------------------------------------


@contextmanager
def anchored(tmp: ModelTpm | None = None, **options: Any) -> Iterator[tuple[ModelTpm, Store, Committer, Anchoring]]:
    tpm = tmp or ModelTpm()
    world = World(1, tpm=tpm)
    store = reopen(SnapshotDisk(world.current.image))
    committer = Committer(store, lambda: None)
    settings = {"volatile": True, "strict": False} | options
    tpm.after_write = tpm.after_extend = lambda: None
    yield tpm, store, committer, Anchoring(committer, hardware(tpm), world.info, AUTH, **settings)
    store.close()


def save(store: Store, number: int) -> PutVtpm:
    record = store.get(VTPM)
    return PutVtpm(replace(record, key=StateKey(bytes(31) + bytes([number])), generation=record.generation + 1))


async def test_an_open_anchors_a_digest_that_no_image_had_before() -> None:
    with anchored() as (tpm, store, _, anchoring):
        before = store.digest()
        await anchoring.write_opening()
        (content,) = [content for _, content in tpm.indices.values()]
        assert content == store.digest() != before
        assert tpm.pcr22 == extended(b"\xff" * 32, before)
        assert judge(position_of(store), store.digest(), tpm.pcr22) is Standing.EQUAL


async def test_without_locality_two_the_open_is_still_a_state_of_its_own() -> None:
    with anchored(volatile=False) as (tpm, store, _, anchoring):
        before = store.digest()
        await anchoring.write_opening()
        assert store.digest() != before
        assert "pcr22_read" not in tpm.calls
        with trio.fail_after(1):
            await anchoring.run_volatile()


async def test_a_write_whose_answer_was_lost_is_looked_up_before_the_next_one() -> None:
    for executed in ("before", "after"):
        with anchored() as (tpm, store, _, anchoring):
            await anchoring.write_opening()
            store.commit([save(store, 1)])
            tpm.fail["anchor_write"] = executed, lost_answer()
            with pytest.raises(TpmTransport):
                await anchoring.write_durable()
            held = next(iter(tpm.indices.values()))[1]
            assert held is not None
            store.commit([save(store, 2)])
            tpm.fail["anchor_write"] = "before", lost_answer()
            with pytest.raises(TpmTransport):
                await anchoring.write_durable()
            store.commit([save(store, 3)])
            assert judge(position_of(store), held, tpm.pcr22) is Standing.DESCENDS


async def test_an_index_that_somebody_else_wrote_is_told() -> None:
    with anchored() as (tpm, _, _, anchoring):
        await anchoring.write_opening()
        tpm.fail["anchor_write"] = "before", lost_answer()
        with pytest.raises(TpmTransport):
            await anchoring.write_durable()
        ((index, (auth, _)),) = tpm.indices.items()
        tpm.indices[index] = auth, b"\x66" * 32
        with pytest.raises(RolledBackError, match="another manager"):
            await anchoring.write_durable()


async def test_after_a_suspend_the_note_starts_from_what_the_pcr_holds() -> None:
    with anchored() as (tpm, store, _, anchoring):
        await anchoring.write_opening()
        tpm.reset()
        store.commit([save(store, 1)])
        await anchoring.extend_volatile()
        assert judge(position_of(store), anchoring_digest(tpm), tpm.pcr22) is Standing.EQUAL


def anchoring_digest(tpm: ModelTpm) -> bytes:
    content = next(iter(tpm.indices.values()))[1]
    assert content is not None
    return content


async def test_a_tpm_that_was_reset_between_note_and_extend_locks_nothing_out() -> None:
    with anchored() as (tpm, store, _, anchoring):
        await anchoring.write_opening()
        store.commit([save(store, 1)])
        tpm.before_call["pcr22_extend"] = tpm.reset
        await anchoring.extend_volatile()
        assert judge(position_of(store), anchoring_digest(tpm), tpm.pcr22)


async def test_after_a_reset_of_the_tpm_the_durable_anchor_is_written_as_well() -> None:
    for before in ("pcr22_read", "pcr22_extend"):
        with anchored() as (tpm, store, _, anchoring):
            await anchoring.write_opening()
            stood_for = anchoring_digest(tpm)
            store.commit([save(store, 1)])
            old = position_of(store)
            tpm.before_call[before] = tpm.reset
            await anchoring.extend_volatile()
            store.commit([save(store, 2)])
            tpm.fail["anchor_write"] = "before", lost_answer()
            if before == "pcr22_extend":  # then it shows when the PCR is read the next time
                assert anchoring_digest(tpm) == stood_for
                with pytest.raises(TpmTransport):
                    await anchoring.extend_volatile()
            tpm.fail.clear()
            await anchoring.extend_volatile()
            assert anchoring_digest(tpm) != stood_for
            tpm.reset()
            with pytest.raises(RolledBackError):
                judge(old, anchoring_digest(tpm), tpm.pcr22)
            assert anchoring.statistics().resets == 1
            writes = tpm.nv_writes
            anchoring._pcr22 = (tpm.pcr22,)
            await anchoring.extend_volatile()
            assert tpm.nv_writes == writes


@pytest.mark.parametrize("executed", ["before", "after"])
@pytest.mark.parametrize("reset", [True, False])
async def test_a_reset_that_broke_an_extend_off_is_noticed_at_the_next(executed: str, reset: bool) -> None:
    with anchored() as (tpm, store, _, anchoring):
        await anchoring.write_opening()
        writes = tpm.nv_writes
        store.commit([save(store, 1)])
        if reset:
            tpm.before_call["pcr22_extend"] = tpm.reset
        tpm.fail["pcr22_extend"] = executed, lost_answer()
        with pytest.raises(TpmTransport):
            await anchoring.extend_volatile()
        await anchoring.extend_volatile()
        assert (anchoring.statistics().resets, tpm.nv_writes - writes) == (int(reset), int(reset))


async def test_whoever_else_extends_pcr_22_does_not_wear_the_index_out() -> None:
    with anchored() as (tpm, store, _, anchoring):
        await anchoring.write_opening()
        writes = tpm.nv_writes
        for number in range(20):
            tpm.pcr22 = bytes([number]) * 32
            store.commit([save(store, number)])
            await anchoring.extend_volatile()
        assert tpm.nv_writes == writes + 1
        assert anchoring.statistics().resets == 20


async def test_a_reset_shows_without_any_save(autojump_clock: trio.testing.MockClock) -> None:
    autojump_clock.autojump_threshold = 0.02
    with anchored() as (tpm, store, _, anchoring):
        await anchoring.write_opening()
        stood_for = anchoring_digest(tpm)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(anchoring.run_volatile)
            await trio.sleep(200)
            assert anchoring_digest(tpm) == stood_for, "nothing is written where nothing happened"
            tpm.reset()
            await trio.sleep(200)
            nursery.cancel_scope.cancel()
        assert anchoring_digest(tpm) != stood_for
        assert judge(position_of(store), anchoring_digest(tpm), tpm.pcr22)
        assert anchoring.statistics().resets == 1


def test_a_note_of_an_earlier_manager_still_counts() -> None:
    notes = Notes(bytes(32), PCR, extended(PCR, D))  # it named the value after the extend, not what it extends by
    for pcr22 in (PCR, extended(PCR, D)):
        assert judge(StorePosition(D, OTHER, notes), OTHER, pcr22) is Standing.DESCENDS


async def test_background_tasks_survive_a_tpm_that_fails(autojump_clock: trio.testing.MockClock) -> None:
    autojump_clock.autojump_threshold = 0.02  # time stands still while a thread of the lane works
    with anchored() as (tpm, store, _, anchoring):
        await anchoring.write_opening()
        writes = tpm.nv_writes
        async with trio.open_nursery() as nursery:
            nursery.start_soon(anchoring.run_interval, 60)
            nursery.start_soon(anchoring.run_volatile)
            await trio.sleep(1)
            tpm.fail = {"anchor_write": ("before", lost_answer()), "pcr22_extend": ("before", lost_answer())}
            store.commit([save(store, 1)])
            anchoring.group_committed()
            await trio.sleep(200)
            nursery.cancel_scope.cancel()
        assert not tpm.fail
        assert tpm.nv_writes == writes + 1, "written at the next interval; then the store had not changed"
        assert judge(position_of(store), anchoring_digest(tpm), tpm.pcr22)
        assert anchoring.statistics().volatile_extends >= 2


async def test_nothing_is_committed_after_the_final_anchor_and_a_stop_does_not_wait() -> None:
    with anchored() as (tpm, store, committer, anchoring):
        await anchoring.write_opening()
        acknowledged: list[Exception | None] = []
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(committer.run)
                await anchoring.write_final()
                sequence = store.sequence
                committer.enqueue([save(store, 1)], acknowledged.append)
                committer.proceed()
                nursery.start_soon(anchoring.extend_volatile)
                nursery.start_soon(anchoring.write_durable)
                await trio.testing.wait_all_tasks_blocked(0.01)
                nursery.cancel_scope.cancel()
        assert (store.sequence, acknowledged) == (sequence, [])
        assert judge(position_of(store), anchoring_digest(tpm), tpm.pcr22) is Standing.CLEAN


async def test_strict_mode_acknowledges_after_the_index_is_written() -> None:
    with anchored(strict=True) as (tpm, store, committer, anchoring):
        await anchoring.write_opening()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(committer.run)
            await committer.commit(save(store, 1))
            assert anchoring_digest(tpm) == store.digest()
            tpm.fail["anchor_write"] = "before", lost_answer()
            with pytest.raises(TpmError):
                await committer.commit(save(store, 2))
            await committer.commit(save(store, 3))
            assert anchoring_digest(tpm) == store.digest()
            nursery.cancel_scope.cancel()


def test_a_store_opens_with_its_key_alone(tmp_path: Path) -> None:
    # the images of the adversary are real ones: opening one asks for the key, and no more is known of it
    world = World(1)
    with Store.open(SnapshotDisk(world.current.image), KEY) as store:
        assert position_of(store) == world.current.position
