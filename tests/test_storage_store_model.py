"""The store beside a dictionary, step by step, with crashes, reopening, closed groups and growth as steps."""

import random
from uuid import UUID

import pytest
from crash_lives import Findings, Life
from crash_plans import WORDS
from crash_rows import rows_in, rows_of
from crash_starts import STARTS, start_image
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from storage_histories import Model, reopen, row_of

from storage.errors import GroupClosed, NoSuchVtpm, VtpmRemoved

CUTS = 4  # images looked at for each power cut; tests/test_storage_crash_lives.py looks at more


class StoreMachine(RuleBasedStateMachine):
    """Does to a store what `crash_plans` knows, in any order, and compares after every step."""

    life: Life

    @initialize(start=st.sampled_from(sorted(STARTS)), fixed=st.booleans())
    def begin(self, start: str, fixed: bool) -> None:
        self.life = Life(start_image(start), Findings(), most=CUTS, growable=not fixed)
        self.gone: set[UUID] = set()

    @rule(word=st.sampled_from(sorted(WORDS)), seed=st.integers(0, 2**20))
    def do(self, word: str, seed: int) -> None:
        before = self.life.model.rows.keys() | self.life.model.graves.keys()
        WORDS[word][1](self.life, random.Random(seed))
        model = self.life.model
        self.gone = (self.gone | before) - model.rows.keys() - model.graves.keys() if word != "cut" else set()

    @rule()
    def stop_and_start(self) -> None:
        """A clean stop: what is opened again is the very same state."""
        if not self.life.closed():
            self.life.checkpoint()
            digest, sequence = self.life.store.digest(), self.life.store.sequence
            self.life.reopen(random.Random(0), 1.0)
            assert (self.life.store.digest(), self.life.store.sequence) == (digest, sequence)

    @invariant()
    def what_is_open_is_as_the_model_says(self) -> None:
        life, closed = self.life, self.life.closed()
        model = life.model
        groups = dict(model.groups)
        rows = {uuid: row for uuid, row in model.rows.items() if row[0] not in closed}
        graves = {uuid: grave for uuid, grave in model.graves.items() if grave[0] not in closed}
        assert rows_in(life.store) == rows_of(Model(groups, rows, graves))
        assert len(life.store) == life.store.statistics().vtpms == len(rows)
        assert life.store.statistics().tombstones == len(graves)
        assert not life.store.damage

    @invariant()
    def every_question_has_the_right_answer(self) -> None:
        life, closed = self.life, self.life.closed()
        for uuid in list(life.model.rows)[:3]:
            row = life.model.rows[uuid]
            if row[0] in closed:
                with pytest.raises(GroupClosed):
                    life.store.get(uuid)
            else:
                assert row_of(life.store.get(uuid)) == row
        for uuid in list(life.model.graves)[:3]:
            with pytest.raises((VtpmRemoved, GroupClosed)):
                life.store.get(uuid)
        for uuid in sorted(self.gone)[:3]:
            with pytest.raises(GroupClosed if closed else NoSuchVtpm):
                life.store.get(uuid)

    @invariant()
    def what_the_disk_holds_is_the_same(self) -> None:
        """Opened beside it, the image has the same records, and the same digest as the store in memory."""
        with reopen(self.life.disk.copy()) as again:
            assert again.digest() == self.life.store.digest()
            assert rows_in(again) == rows_of(self.life.model)


StoreMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=10, deadline=None)
TestStoreAgainstItsModel = StoreMachine.TestCase
