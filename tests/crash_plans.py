"""Plans of lives: made by chance, lived, and made as short as they can be while they still fail.

A plan is text ("sparse saves 81 checkpoint 7 cut 3"): what the life begins with, then words for what is done, each
with a number that seeds its random choices, so that what failed can be lived again.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self
from uuid import UUID

from crash_lives import CrashError, Findings, Life
from crash_starts import MOST_AT_ONCE, STARTS, start_image
from storage_histories import SECTOR, group_key, new_uuid, record_of

from storage.store import BuryVtpm, Change, ForgetVtpm, GroupRecord, PutGroup, PutVtpm, RemoveGroup, RemoveVtpm


@dataclass(frozen=True)
class Step:
    word: str
    seed: int


@dataclass(frozen=True)
class Plan:
    """`fixed`: the disk cannot grow, as a block device."""

    start: str
    steps: tuple[Step, ...]
    fixed: bool = False

    def __str__(self) -> str:
        words = [f"{step.word} {step.seed}" for step in self.steps]
        return " ".join([f"{self.start}{'!' if self.fixed else ''}", *words])

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` wrote. Raises ValueError."""
        start, *words = text.split()
        steps = tuple(Step(word, int(seed)) for word, seed in zip(words[::2], words[1::2], strict=True))
        if start.rstrip("!") not in STARTS or any(step.word not in WORDS for step in steps):
            raise ValueError(f"no plan: {text}")
        return cls(start.rstrip("!"), steps, start.endswith("!"))

    @classmethod
    def by_chance(cls, seed: int, longest: int = 6) -> Self:
        rng = random.Random(seed)
        words = rng.choices(list(WORDS), weights=[weight for weight, _ in WORDS.values()], k=rng.randint(1, longest))
        start = rng.choice(list(STARTS))
        if rng.random() < 0.7:
            words = [*FIRST.get(start, ()), *words]
        return cls(start, tuple(Step(word, rng.getrandbits(20)) for word in words), rng.random() < 0.1)

    def live(self, findings: Findings, most: int) -> None:
        """Live it, cutting the power at up to `most` moments of each of its parts. Raises CrashError."""
        life = Life(start_image(self.start), findings, most=most, growable=not self.fixed)
        for step in self.steps:
            WORDS[step.word][1](life, random.Random(step.seed))
        life.check(len(self.steps))

    def shortened(self, most: int) -> "Plan":
        """Leave out steps while it still fails."""
        plan, position = self, 0
        while position < len(plan.steps):
            shorter = Plan(plan.start, plan.steps[:position] + plan.steps[position + 1 :], plan.fixed)
            if fails(shorter, most) is None:
                position += 1
            else:
                plan = shorter
        return plan


def fails(plan: Plan, most: int) -> CrashError | None:
    try:
        plan.live(Findings(), most)
    except CrashError as error:
        return error
    return None


# --- what can be done ------------------------------------------------------------------------------


def some(life: Life, rng: random.Random, low: int, high: int) -> None:
    if life.closed() != life.store.groups().keys():
        life.commit(life.model.some_changes(rng, rng.randint(low, high), life.closed()))


def one(life: Life, rng: random.Random) -> None:
    some(life, rng, 1, 1)


def many(life: Life, rng: random.Random) -> None:
    some(life, rng, 2, 40)


def saves(life: Life, rng: random.Random) -> None:
    """Save many of the vTPMs, so that most leaves have to be written anew."""
    rows = life.open_rows()
    chosen = rng.sample(rows, min(len(rows), rng.choice((rng.randint(1, MOST_AT_ONCE), MOST_AT_ONCE))))
    life.commit([PutVtpm(record_of(uuid, life.model.rows[uuid][0], life.model.rows[uuid][3] + 1)) for uuid in chosen])


def bulk(life: Life, rng: random.Random) -> None:
    """Add so many that a full image grows."""
    groups = open_groups(life)
    if groups:
        known = life.model.rows.keys() | life.model.graves.keys()
        new = {new_uuid(rng, known) for _ in range(rng.randint(60, MOST_AT_ONCE))}
        life.commit([PutVtpm(record_of(uuid, rng.choice(groups))) for uuid in sorted(new)])


def empty(life: Life, rng: random.Random) -> None:
    """Remove a group with all that is in it, or what a commit takes of that."""
    groups = open_groups(life)
    if not groups:
        return
    group = rng.choice(groups)
    rows = [uuid for uuid in life.open_rows() if life.model.rows[uuid][0] == group]
    changes: list[Change] = [RemoveVtpm(uuid) for uuid in rows[:MOST_AT_ONCE]]
    if len(rows) <= MOST_AT_ONCE and len(life.model.groups) > 1:
        changes.append(RemoveGroup(group))
    life.commit(changes)


def bury(life: Life, rng: random.Random) -> None:
    """Remove vTPMs and leave tombstones."""
    rows = life.open_rows()
    life.commit([BuryVtpm(uuid, rng.getrandbits(31)) for uuid in rng.sample(rows, min(len(rows), rng.randint(1, 60)))])


def forget(life: Life, rng: random.Random) -> None:
    """Drop tombstones."""
    closed = life.closed()
    graves = sorted(uuid for uuid, grave in life.model.graves.items() if grave[0] not in closed)
    life.commit([ForgetVtpm(uuid) for uuid in rng.sample(graves, min(len(graves), rng.randint(1, 60)))])


def found(life: Life, rng: random.Random) -> None:
    """Make a group with vTPMs: no root may lead to them without it."""
    group = new_uuid(rng, life.model.groups)
    known = life.model.rows.keys() | life.model.graves.keys()
    new = {new_uuid(rng, known) for _ in range(rng.randint(1, 60))}
    record = GroupRecord(group, 1, rng.randbytes(rng.randrange(50)))
    life.commit([PutGroup(record, group_key(group)), *(PutVtpm(record_of(uuid, group)) for uuid in sorted(new))])


def move(life: Life, rng: random.Random) -> None:
    """Give vTPMs to another group: removed and added again in one commit."""
    groups, rows = open_groups(life), life.open_rows()
    if not groups or not rows:
        return
    chosen = rng.sample(rows, min(len(rows), rng.randint(1, 20)))
    adds = [PutVtpm(record_of(uuid, rng.choice(groups), life.model.rows[uuid][3])) for uuid in chosen]
    life.commit([*(RemoveVtpm(uuid) for uuid in chosen), *adds])


def rotate(life: Life, rng: random.Random) -> None:
    """Give a group another key."""
    groups = open_groups(life)
    if groups:
        life.rotate(rng.choice(groups))


def open_groups(life: Life) -> list[UUID]:
    return sorted(life.store.groups().keys() - life.closed())


def checkpoint(life: Life, _: random.Random) -> None:
    life.checkpoint()


def compact(life: Life, rng: random.Random) -> None:
    life.compact(rng.choice((0, 56 * SECTOR, len(life.disk.content))))


def scrub(life: Life, rng: random.Random) -> None:
    """Overwrite what is not live, with commits in between."""
    for _ in life.scrub():
        if rng.random() < 0.3:
            one(life, rng)


def boot(life: Life, rng: random.Random) -> None:
    life.boot(rng.randbytes(rng.choice((0, 10, 600, 4000))))


def anchors(life: Life, _: random.Random) -> None:
    life.anchor()


def kill(life: Life, rng: random.Random) -> None:
    life.reopen(rng, 1.0)


def partly(life: Life, rng: random.Random) -> None:
    life.reopen(rng, 0.4)


def unlock(life: Life, _: random.Random) -> None:
    life.unlock()


def cut(life: Life, rng: random.Random) -> None:
    life.restart(rng.getrandbits(30))


Deed = Callable[[Life, random.Random], None]
WORDS: dict[str, tuple[int, Deed]] = {  # how often, what
    "one": (4, one),
    "many": (4, many),
    "saves": (4, saves),
    "bulk": (2, bulk),
    "empty": (2, empty),
    "found": (1, found),
    "move": (1, move),
    "bury": (2, bury),
    "forget": (1, forget),
    "checkpoint": (5, checkpoint),
    "compact": (2, compact),
    "rotate": (3, rotate),
    "scrub": (2, scrub),
    "boot": (2, boot),
    "anchors": (3, anchors),
    "kill": (2, kill),
    "partly": (3, partly),
    "unlock": (1, unlock),
    "cut": (4, cut),
}
# what makes the most of a beginning: rounds of a checkpoint, growth, the end of the log, parts that are carried on
FIRST: dict[str, tuple[str, ...]] = {
    "sparse": ("found", "saves", "checkpoint"),
    "full": ("bulk", "bulk"),
    "wrapping": ("one", "many", "one"),
    "full-log": ("one", "one", "one", "many"),
    "carried": ("partly", "many", "checkpoint"),
}
