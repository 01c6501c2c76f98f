"""What verification says of a store with a damaged sector, while it is in use and when it is opened anew."""

import os
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from manager.findings import Subject, Verdict, stored_in
from manager.verify import verify_all, verify_store, verify_vtpm
from storage import store_format as fmt
from storage.catalogue_rows import Audit, GroupRow, VtpmRow
from storage.secrets import GroupKey, StateKey, StoreKey
from storage.store import Store
from storage.store_records import GroupRecord, PutGroup, PutVtpm, VtpmRecord

GROUP = UUID(int=7)
KEY, GROUP_KEY = StoreKey(b"s" * 32), GroupKey(b"g" * 32)
VTPMS = [uuid4() for _ in range(100)]


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "store.img", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def made(descriptor: int) -> Store:
    store = Store.create(descriptor, UUID(int=1), KEY, b"boot", 512 * 1024)
    records = [PutVtpm(VtpmRecord(vtpm, GROUP, StateKey.new())) for vtpm in VTPMS]
    store.commit([PutGroup(GroupRecord(GROUP), GROUP_KEY), *records])
    store.checkpoint()
    return store


def damage_a_leaf(store: Store, descriptor: int) -> None:
    for ref in store._state.tree.entries:
        if ref is not None and fmt.kind_and_group(ref.owner)[0] is fmt.Kind.LEAF:
            os.pwrite(descriptor, b"\xff\x00" * 8, ref.location * fmt.SECTOR + 1000)
            return


def subject(store: Store, tmp_path: Path) -> Subject:
    rows = [VtpmRow(vtpm, f"vtpm-{number}", GROUP, "2.0") for number, vtpm in enumerate(VTPMS)]
    groups = [GroupRow(GROUP, str(GROUP))]
    return Subject(store, *stored_in(store), Audit(rows, [], []), groups, tmp_path / "state")


def test_a_damaged_leaf_under_an_open_store_names_the_vtpms_in_it(image: int) -> None:
    with made(image) as store:
        with store.reopen(image) as again:
            assert {finding.verdict for finding in verify_store(store, again)} == {Verdict.OK}
        damage_a_leaf(store, image)
        with store.reopen(image) as again:
            findings = list(verify_store(store, again))
        assert next(finding.what for finding in findings if finding.verdict is Verdict.DAMAGED) == "store"
        lost = [finding.vtpm for finding in findings if finding.what == "record"]
        assert 0 < len(lost) <= fmt.ROWS_PER_LEAF
        assert set(lost) < set(VTPMS)


def test_a_damaged_leaf_costs_the_vtpms_in_it_and_no_other(image: int, tmp_path: Path) -> None:
    with made(image) as store:
        damage_a_leaf(store, image)
    with Store.open(image, KEY) as store:
        store.unlock_group(GROUP, GROUP_KEY)
        verdicts = [finding.verdict for finding in verify_all(subject(store, tmp_path)) if finding.vtpm]
        left = len(store)
        assert 0 < left < len(VTPMS)
        assert verdicts.count(Verdict.OK) == left
        assert verdicts.count(Verdict.DAMAGED) == len(VTPMS) - left
        assert any(finding.what == "store" and finding.code == 6 for finding in verify_store(store, store))


def test_a_closed_group_is_unchecked_and_says_so_by_its_code(image: int, tmp_path: Path) -> None:
    made(image).close()
    with Store.open(image, KEY) as store:
        (finding,) = verify_vtpm(subject(store, tmp_path), VtpmRow(VTPMS[0], "web", GROUP, "2.0"))
        assert (finding.verdict, finding.code) == (Verdict.UNCHECKED, 5)
        groups = [finding for finding in verify_store(store, store) if finding.what == "group"]
        assert [finding.verdict for finding in groups] == [Verdict.UNCHECKED]


def test_a_vtpm_that_was_removed_meanwhile_is_no_finding(image: int, tmp_path: Path) -> None:
    from dataclasses import replace

    with made(image) as store:
        gone = VtpmRow(uuid4(), "gone", GROUP, "2.0")
        there = subject(store, tmp_path)
        assert [finding.verdict for finding in verify_vtpm(there, gone)] == [Verdict.MISSING]
        assert not list(verify_vtpm(replace(there, still_named=lambda _vtpm: False), gone))
