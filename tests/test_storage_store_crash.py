import random
from collections.abc import Iterator
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from storage_cuts import RecordingDisk, Write, apply
from storage_disks import MemoryDisk
from storage_histories import (
    KEY,
    SECTOR,
    Content,
    Model,
    content,
    content_of_image,
    group_key,
    new_store,
    record_of,
    reopen,
    uuid_of,
)

from storage import store_format as fmt
from storage.errors import NotAStore, StoreDamaged
from storage.store import Change, GroupRecord, PutGroup, PutVtpm, RemoveGroup, RemoveVtpm, Store

GROUPS = [uuid_of(1), uuid_of(2), uuid_of(3)]


class History:
    """A recorded store, the content after each acknowledged commit, and how many steps had been issued by then."""

    def __init__(self, start: bytes) -> None:
        self.disk = RecordingDisk(start=start)
        self.store = reopen(self.disk)
        self.model = Model(*content(self.store))
        self.states: list[tuple[int, Content]] = [(0, self.model.content())]
        self.disk.steps.clear()

    def commit(self, *changes: Change) -> None:
        self.store.commit(changes)
        self.model.apply(changes)
        self.states.append((len(self.disk.steps), self.model.content()))

    def allowed(self, steps: int) -> list[Content]:
        """Give what may be found after a cut: the last acknowledged content, or the one that was in flight."""
        last = max(index for index, (count, _) in enumerate(self.states) if count <= steps)
        return [state for _, state in self.states[last : last + 2]]

    def check_cuts(self, seed: int, subsets: int = 3, window: int = 3, *, share: float = 1.0) -> int:
        """Check all cuts, or a share of them by chance where an image takes long to open."""
        count, chosen = 0, random.Random(seed + 1)
        for cut in self.disk.all_cuts(random.Random(seed), subsets, window):
            if chosen.random() < share:
                count += 1
                assert content_of_image(cut.image()) in self.allowed(cut.steps), f"cut after step {cut.steps}"
        return count


def image_of(vtpms: int, sectors: int, groups: int = 3) -> bytes:
    disk = MemoryDisk()
    with new_store(disk, GROUPS[:groups], sectors * SECTOR) as store:
        for batch in batches(vtpms):
            store.commit([PutVtpm(record_of(uuid_of(100 + number), GROUPS[number % groups])) for number in batch])
        store.checkpoint()
    return bytes(disk.content)


def batches(count: int) -> Iterator[range]:
    return (range(start, min(count, start + 400)) for start in range(0, count, 400))


@pytest.fixture(scope="module")
def small_image() -> bytes:
    return image_of(100, 64)


@pytest.fixture(scope="module")
def full_image() -> bytes:
    """An image with many leaves and few spare sectors: checkpoints take several rounds."""
    image = image_of(1320, 77)
    with reopen(MemoryDisk(image)) as store:
        assert store.statistics().sectors_spare == fmt.MIN_SPARE
    return image


def test_every_cut_of_single_commits_leaves_whole_acknowledged_commits(small_image: bytes) -> None:
    history = History(small_image)
    rng = random.Random(1)
    for _ in range(12):
        history.commit(*history.model.some_changes(rng, 1))
    assert history.check_cuts(1) > 12


def test_every_cut_of_group_commits_and_checkpoints_leaves_whole_acknowledged_commits(small_image: bytes) -> None:
    history = History(small_image)
    rng = random.Random(2)
    for round_ in range(6):
        history.commit(*history.model.some_changes(rng, 40))
        if round_ % 2:
            history.store.checkpoint()
    history.commit(*history.model.some_changes(rng, 5))
    assert history.check_cuts(2, subsets=8) > 80


def test_every_cut_of_a_checkpoint_of_several_rounds_leaves_everything(full_image: bytes) -> None:
    history = History(full_image)
    vtpms = sorted(history.model.rows)
    for start in range(0, len(vtpms), 400):
        batch = vtpms[start : start + 400]
        history.commit(*(PutVtpm(record_of(uuid, history.model.rows[uuid][0], 1)) for uuid in batch))
    removed = vtpms[::7]
    history.commit(*(RemoveVtpm(uuid) for uuid in removed))
    history.commit(*(PutVtpm(record_of(uuid, GROUPS[index % 3], 2)) for index, uuid in enumerate(removed[::-1])))
    before = history.store.statistics().checkpoints
    history.store.checkpoint()
    assert history.store.statistics().checkpoints >= before + 2
    history.commit(*history.model.some_changes(random.Random(3), 30))
    assert history.check_cuts(3, share=0.25) > 150


def test_every_cut_of_groups_made_emptied_and_removed_leaves_whole_commits(small_image: bytes) -> None:
    history = History(small_image)
    new, old = uuid_of(7), GROUPS[0]
    history.commit(PutGroup(GroupRecord(new, 2, b"new"), group_key(new)), PutVtpm(record_of(uuid_of(700), new)))
    mine = [uuid for uuid, row in history.model.rows.items() if row[0] == old]
    history.commit(*(RemoveVtpm(uuid) for uuid in mine))
    history.commit(RemoveGroup(old))
    history.commit(PutGroup(GroupRecord(old, 3, b"again"), group_key(old)), PutVtpm(record_of(mine[0], new)))
    history.store.checkpoint()
    history.commit(PutVtpm(record_of(uuid_of(701), old)), RemoveVtpm(uuid_of(700)))
    history.store.checkpoint()
    assert history.check_cuts(4, subsets=12) > 50


def test_every_cut_of_growth_leaves_whole_commits_and_a_store_that_goes_on(full_image: bytes) -> None:
    history = History(full_image)
    for start in range(0, 1200, 300):
        numbers = range(5000 + start, 5300 + start)
        history.commit(*(PutVtpm(record_of(uuid_of(number), GROUPS[0])) for number in numbers))
    assert history.store.statistics().sectors > 80
    assert history.check_cuts(5, share=0.4) > 60


def test_a_root_of_an_unfinished_checkpoint_without_any_one_of_its_sectors_is_taken_back(full_image: bytes) -> None:
    history = all_leaves_dirty(full_image)
    expected = history.model.content()
    history.disk.steps.clear()
    history.disk.start = bytes(history.disk.content)
    history.store.checkpoint()
    durable = bytearray(history.disk.start)
    window: list[Write] = []
    taken_back = 0
    for step in history.disk.steps:
        if isinstance(step, Write):
            window.append(step)
            continue
        assert step is None
        *sectors, root = (piece for write in window for piece in in_sectors(write))
        whole = image_with(durable, window)
        if sectors and is_root(root):
            taken_back += 1
            newest = sequence_of(whole)
            for missing in [sectors, *([sector] for sector in sectors)]:
                image = image_with(durable, [piece for piece in [*sectors, root] if piece not in missing])
                assert content_of_image(image) == expected
                assert sequence_of(image) < newest
        durable = bytearray(whole)
        window.clear()
    assert taken_back >= 2


def test_a_store_that_went_back_to_the_root_before_goes_on_and_can_be_cut_again(full_image: bytes) -> None:
    image = full_image
    rng = random.Random(10)
    for _ in range(5):
        history = all_leaves_dirty(image)
        history.store.checkpoint()
        history.commit(*history.model.some_changes(rng, 20))
        cuts = list(history.disk.cuts(rng, 2))
        for steps, cut in rng.sample(cuts, 12):
            assert content_of_image(cut) in history.allowed(steps)
            image = cut


def test_a_damaged_sector_of_an_unfinished_checkpoint_loses_nothing_while_its_predecessor_is_whole(
    full_image: bytes,
) -> None:
    history = all_leaves_dirty(full_image)
    expected = history.model.content()
    before = len(history.disk.steps)
    history.store.checkpoint()
    flushes = [count for count, step in enumerate(history.disk.steps, 1) if step is None and count > before]
    image = image_with(
        bytearray(full_image), [step for step in history.disk.steps[: flushes[0]] if isinstance(step, Write)]
    )
    state = reopen(MemoryDisk(image))._state
    assert state.root.needs_log
    leaves = [
        ref for ref in state.tree.entries if ref is not None and fmt.kind_and_group(ref.owner)[0] is fmt.Kind.LEAF
    ]
    of_this_round = [ref.location for ref in leaves if ref.sequence == state.root.sequence]
    of_both = [ref.location for ref in leaves if ref.sequence < state.root.sequence]
    assert of_this_round
    assert of_both
    for location in of_this_round:
        assert content_of_image(damaged(image, location)) == expected
    for location in of_both:
        with reopen(MemoryDisk(damaged(image, location))) as store:
            assert [damage.where.split()[0] for damage in store.damage] == ["leaf"]
            assert store.sequence == state.sequence


def test_what_was_noted_after_the_last_frame_stands_in_the_roots_of_a_cut_checkpoint(full_image: bytes) -> None:
    history = all_leaves_dirty(full_image)
    before = len(history.disk.steps)
    anchored = history.store.digest()
    history.store.note_anchored(anchored)
    history.store.checkpoint()
    for cut in history.disk.all_cuts(random.Random(11), subsets=1, window=0):
        if cut.steps > before and cut.whole:
            with reopen(MemoryDisk(cut.image())) as store:
                assert anchored in (store.digest(), store.anchored), f"cut after step {cut.steps}"


def test_a_root_of_another_time_is_not_taken_for_the_one_before(full_image: bytes) -> None:
    history = all_leaves_dirty(full_image)
    before = len(history.disk.steps)
    history.store.checkpoint()
    flush = next(count for count, step in enumerate(history.disk.steps, 1) if step is None and count > before)
    image = bytearray(image_with(full_image, [step for step in history.disk.steps[:flush] if isinstance(step, Write)]))
    state = reopen(MemoryDisk(image))._state
    assert state.root.needs_log
    other = fmt.ROOT_SECTORS[1 - state.root.slot] * SECTOR
    image[other : other + fmt.ROOT_BYTES] = full_image[other : other + fmt.ROOT_BYTES]
    with reopen(MemoryDisk(image)) as store:
        assert store.sequence == state.sequence
    entries = [ref for ref in state.tree.entries if ref is not None and ref.sequence == state.root.sequence]
    leaf = next(ref for ref in entries if fmt.kind_and_group(ref.owner)[0] is fmt.Kind.LEAF)
    with reopen(MemoryDisk(damaged(bytes(image), leaf.location))) as store:
        assert [damage.where.split()[0] for damage in store.damage] == ["leaf"]
        assert store.sequence == state.sequence


def test_a_root_that_is_taken_back_still_tells_that_a_frame_is_missing(full_image: bytes) -> None:
    history = all_leaves_dirty(full_image)
    before = len(history.disk.steps)
    frame = next(step for step in history.disk.steps[before - 2 :: -1] if isinstance(step, Write))
    history.store.checkpoint()
    flush = next(count for count, step in enumerate(history.disk.steps) if step is None and count >= before)
    *sectors, root = (step for step in history.disk.steps[:flush] if isinstance(step, Write))
    assert is_root(root)
    lost = next(write for write in sectors[::-1] if write.offset != frame.offset)
    image = image_with(full_image, [write for write in [*sectors, root] if write is not lost])
    assert content_of_image(image) == history.model.content()
    assert history.disk.steps.index(lost) > history.disk.steps.index(frame)
    with pytest.raises(StoreDamaged, match="a frame that the root needs"):
        Store.open(MemoryDisk(damaged(image, frame.offset // SECTOR)), KEY)


def all_leaves_dirty(image: bytes) -> History:
    """A history whose next checkpoint has to rewrite every leaf, in several rounds."""
    history = History(image)
    history.store.checkpoint()
    rows = history.model.rows
    history.commit(*(PutVtpm(record_of(uuid, rows[uuid][0], rows[uuid][3] + 1)) for uuid in sorted(rows)[::2]))
    return history


def in_sectors(write: Write) -> list[Write]:
    if write.offset < fmt.POOL_FIRST * SECTOR:
        return [write]
    places = range(0, len(write.data), SECTOR)
    return [Write(write.offset + place, write.data[place : place + SECTOR]) for place in places]


def is_root(write: Write) -> bool:
    return write.offset in [place * SECTOR for place in fmt.ROOT_SECTORS]


def image_with(start: bytes | bytearray, writes: list[Write]) -> bytes:
    image = bytearray(start)
    for write in writes:
        apply(image, write)
    return bytes(image)


def damaged(image: bytes, location: int) -> bytes:
    changed = bytearray(image)
    changed[location * SECTOR + 1000] ^= 1
    return bytes(changed)


def sequence_of(image: bytes) -> int:
    with Store.open(MemoryDisk(image), KEY) as store:
        return store._state.root.sequence


def test_every_cut_of_a_wrapping_log_leaves_whole_commits(small_image: bytes) -> None:
    disk = MemoryDisk(small_image)
    with reopen(disk) as store:
        while store._state.log.next < store._state.log.units - 5:
            store.commit([PutVtpm(record_of(uuid_of(100), GROUPS[0], store.sequence))])
        store.checkpoint()
    history = History(bytes(disk.content))
    for generation in range(1000, 1012):
        history.commit(PutVtpm(record_of(uuid_of(100), GROUPS[0], generation)))
    wrapped = [step.offset for step in history.disk.steps if isinstance(step, Write)]
    assert min(wrapped) < wrapped[0]
    assert history.check_cuts(6) > 12


def test_every_cut_of_a_boot_area_write_leaves_the_old_or_the_new_one(small_image: bytes) -> None:
    disk = RecordingDisk(start=small_image)
    store = Store.open(disk, KEY)
    disk.steps.clear()
    contents = [b"boot area", b"first" * 700, b"second", b""]
    marks = [0]
    for boot in contents[1:]:
        store.write_boot_area(boot)
        marks.append(len(disk.steps))
    for steps, image in disk.cuts(random.Random(7), 10):
        last = max(index for index, mark in enumerate(marks) if mark <= steps)
        assert Store.read_boot_area(MemoryDisk(image))[1] in contents[last : last + 2]


def test_every_cut_of_a_creation_leaves_no_store_or_the_whole_one() -> None:
    disk = RecordingDisk()
    new_store(disk).close()
    header = next(count for count, step in enumerate(disk.steps, 1) if isinstance(step, Write) and not step.offset)
    for steps, image in disk.cuts(random.Random(8), 5):
        if steps < header:
            with pytest.raises(NotAStore):
                Store.open(MemoryDisk(image), KEY)
        elif steps > header:
            with Store.open(MemoryDisk(image), KEY) as store:
                assert not store.groups()


def test_a_store_that_was_cut_and_goes_on_can_be_cut_again(small_image: bytes) -> None:
    image = small_image
    rng = random.Random(9)
    for _ in range(15):
        history = History(image)
        for _ in range(3):
            history.commit(*history.model.some_changes(rng, rng.choice([1, 5, 60])))
        if rng.random() < 0.5:
            history.store.checkpoint()
        cuts = list(history.disk.cuts(rng, 2))
        for steps, cut in rng.sample(cuts, min(8, len(cuts))):
            assert content_of_image(cut) in history.allowed(steps)
            image = cut


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), plan=st.lists(st.sampled_from(["one", "many", "checkpoint"]), max_size=8))
def test_generated_histories_survive_every_cut(small_image: bytes, seed: int, plan: list[str]) -> None:
    history = History(small_image)
    rng = random.Random(seed)
    for step in plan:
        if step == "checkpoint":
            history.store.checkpoint()
        else:
            history.commit(*history.model.some_changes(rng, 1 if step == "one" else rng.randrange(2, 60)))
    history.check_cuts(seed, subsets=1)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    plan=st.lists(st.sampled_from(["one", "many", "checkpoint", "reopen", "partly", "lock"]), min_size=3, max_size=15),
)
def test_a_store_equals_its_model_through_checkpoints_reopens_and_closed_groups(
    small_image: bytes, seed: int, plan: list[str]
) -> None:
    rng = random.Random(seed)
    disk = MemoryDisk(small_image)
    store = reopen(disk)
    model = Model(*content(store))
    for step in plan:
        match step:
            case "checkpoint":
                store.checkpoint()
            case "reopen":
                digest = store.digest()
                store = reopen(disk)
                assert store.digest() == digest
            case "partly" | "lock":
                store = Store.open(disk, KEY)
                for group in sorted(store.groups()):
                    if step == "partly" and rng.random() < 0.5:
                        store.unlock_group(group, group_key(group))
                store.checkpoint()
                change_what_is_open(store, model, rng)
                for group in store.groups():
                    store.unlock_group(group, group_key(group))
            case _:
                changes = model.some_changes(rng, 1 if step == "one" else rng.randrange(2, 80))
                store.commit(changes)
                model.apply(changes)
        assert content(store) == model.content()
    assert content(reopen(disk)) == model.content()


def change_what_is_open(store: Store, model: Model, rng: random.Random) -> None:
    open_groups = [group for group in sorted(store.groups()) if store.is_open(group)]
    if open_groups:
        new = PutVtpm(record_of(UUID(int=rng.getrandbits(128) | 1), rng.choice(open_groups)))
        store.commit([new])
        model.apply([new])
        store.checkpoint()
