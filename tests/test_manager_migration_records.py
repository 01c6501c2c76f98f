from dataclasses import replace
from typing import Final
from uuid import UUID

import pytest

from frontend_backend import messages_instance as m
from frontend_backend.local import LocalRing
from manager import migration_records as records
from manager.errors import ConflictError
from manager.listing import state_of
from manager.ring_records import objection
from manager.running import Running
from storage.catalogue_rows import VtpmRow
from storage.secrets import StateKey
from storage.store_records import RecordFlags, VtpmRecord

F: Final = RecordFlags
ROW = VtpmRow(UUID(int=1), "web", UUID(int=2), "2.0")
RECORD = VtpmRecord(ROW.uuid, ROW.group, StateKey(bytes(32)), b"d" * 32, 5, F.ATTACHED | F.TPM12)
INCOMING = replace(RECORD, generation=0, flags=F.AWAY | F.FRESH)
ORDINARY = [
    F.NONE,
    F.FRESH,
    F.RESUMABLE,
    F.RESUMABLE | F.HIBERNATED,
    F.QUARANTINED,
    F.ATTACHED,
    F.FRESH | F.TPM12,
    F.ANY_AGE,
]


@pytest.mark.parametrize("flags", ORDINARY, ids=repr)
def test_no_ordinary_record_is_away_and_each_can_be_frozen_and_taken_back(flags: RecordFlags) -> None:
    assert not records.is_away(flags)
    records.refuse_start(ROW, flags, "socket")
    records.refuse_reset(ROW, flags)
    assert records.objection(flags, claimed=False) is None
    if flags & F.FRESH:
        return  # which has nothing to give
    record = replace(RECORD, flags=flags)
    frozen = records.frozen(record)
    assert records.is_frozen(frozen.flags)
    assert not records.is_incoming(frozen.flags)
    assert (frozen.key, frozen.digest, frozen.generation) == (record.key, record.digest, record.generation)
    assert records.frozen(frozen) == frozen
    back = records.thawed(frozen)
    assert not records.is_away(back.flags)
    assert back.flags == RecordFlags(int(flags) & ~int(F.RESUMABLE | F.HIBERNATED)), "PCRs do not come back"


def test_a_frozen_vtpm_starts_by_no_front_end_and_is_not_reset_or_removed() -> None:
    frozen = records.frozen(RECORD).flags
    for front_end in ("socket", "qemu", "ring", "proxy"):
        with pytest.raises(ConflictError, match="frozen"):
            records.refuse_start(ROW, frozen, front_end)
    for refuse in (records.refuse_reset, records.refuse_change):
        with pytest.raises(ConflictError, match="frozen"):
            refuse(ROW, frozen)


def test_an_incoming_vtpm_starts_by_qemu_alone() -> None:
    records.refuse_start(ROW, INCOMING.flags, "qemu")
    for front_end in ("socket", "ring", "proxy"):
        with pytest.raises(ConflictError, match="incoming"):
            records.refuse_start(ROW, INCOMING.flags, front_end)
    records.refuse_change(ROW, INCOMING.flags)
    with pytest.raises(ConflictError, match="incoming"):
        records.refuse_reset(ROW, INCOMING.flags)


@pytest.mark.parametrize("restored", [b"", b"header"])
def test_an_instance_that_lives_on_commits_nothing_to_a_frozen_vtpm(restored: bytes) -> None:
    frozen = records.frozen(RECORD)
    front, back = LocalRing.pair()
    with front, back:
        running = Running(ROW.uuid, 7, 1, back, "clear", "clear")
        commit = m.Commit(6, b"k" * 32, b"e" * 32, 7, restored=restored)
        refused = objection(running, frozen, commit)
        assert refused is not None
        assert refused.code is m.RefusalCode.DENIED
        assert objection(running, RECORD, commit) is None, "the same is taken where it is not frozen"


def test_nobody_makes_the_first_state_of_an_incoming_vtpm_but_who_claimed_it() -> None:
    front, back = LocalRing.pair()
    with front, back:
        running = Running(ROW.uuid, 7, 1, back, "clear", "clear")
        made = m.Commit(1, b"k" * 32, b"e" * 32, 7)
        refused = objection(running, INCOMING, made)
        assert refused is not None
        assert refused.code is m.RefusalCode.DENIED
        assert objection(running, INCOMING, replace(made, restored=b"header")) is None, "whose export, others judge"


def test_states_are_told_apart() -> None:
    frozen = records.frozen(RECORD).flags
    assert state_of(None, frozen, attached=False) == "frozen"
    assert state_of(None, frozen, attached=True) == "frozen"
    assert state_of(None, INCOMING.flags, attached=False) == "incoming"
    assert state_of(None, INCOMING.flags, attached=True) == "down"
    assert state_of(None, F.FRESH, attached=False) == "added"
    assert state_of(None, F.NONE, attached=False) == "detached"
    assert state_of(None, F.QUARANTINED, attached=True) == "quarantined"
