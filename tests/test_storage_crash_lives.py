"""Generated lives of a store, cut at every moment. `./dev bench crash` lives as many as there is time for."""

import random
from dataclasses import asdict

import pytest
from crash_lives import CrashError, Findings, Life
from crash_plans import WORDS, Plan, fails
from crash_starts import STARTS, start_image
from storage_cuts import RecordingDisk

from storage import store_format as fmt

SHARES = 4
LIVES = 500  # in each share
CUTS = 6  # of each part of a life, chosen by chance; the bench takes hundreds


@pytest.mark.parametrize("share", range(SHARES))
def test_generated_lives_survive_their_power_cuts(share: int) -> None:
    findings = Findings()
    for seed in range(share * LIVES, (share + 1) * LIVES):
        plan = Plan.by_chance(seed, longest=4)
        try:
            plan.live(findings, CUTS)
        except CrashError as error:
            pytest.fail(f"seed {seed}, './dev bench crash --replay \"{plan}\"': {error}")
    assert findings.cuts > 5 * LIVES
    missing = [name for name, number in asdict(findings).items() if not number]
    assert not missing, "the test looked at all of it"


@pytest.mark.parametrize("start", STARTS)
def test_every_beginning_survives_every_word(start: str) -> None:
    findings = Findings()
    for number, word in enumerate(WORDS):
        Plan.parse(f"{start} {word} {number} checkpoint 1 {word} {number + 50} one 2").live(findings, 12)
    assert findings.cuts > 10 * len(WORDS)


def test_plans_are_text_and_back() -> None:
    for seed in range(200):
        plan = Plan.by_chance(seed)
        assert Plan.parse(str(plan)) == plan
    for wrong in ("nowhere", "small jump 3", "small one", "small one x", ""):
        with pytest.raises(ValueError):
            Plan.parse(wrong)


def test_a_lost_commit_is_found_and_its_plan_made_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the tests: a store that forgets to flush."""
    monkeypatch.setattr(RecordingDisk, "fdatasync", lambda _: None)
    plan = Plan.parse("small kill 1 many 5 boot 3 one 4")
    assert fails(plan, 200) is not None
    short = plan.shortened(200)
    assert len(short.steps) == 1
    assert fails(short, 200) is not None


def test_a_life_knows_what_its_beginning_is_for() -> None:
    life = Life(start_image("sparse"), Findings(), most=1)
    assert life.store.statistics().sectors_spare == fmt.MIN_SPARE
    WORDS["saves"][1](life, random.Random(1))
    life.checkpoint()
    assert life.findings.rounds == 1
    life = Life(start_image("full"), Findings(), most=1)
    WORDS["bulk"][1](life, random.Random(1))
    assert len(life.disk.content) > len(life.disk.start)
    life = Life(start_image("carried"), Findings(), most=1)
    assert any(fmt.kind_and_group(ref.owner)[0] is fmt.Kind.CARRY for ref in life.store._state.tree.entries if ref)
