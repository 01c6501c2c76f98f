"""Every way in which catalogue and store can disagree is named, one test each; nothing of it is repaired."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from manager.findings import Finding, Subject, Verdict, stored_in
from manager.group_rows import group_row
from manager.hwtpm_records import SealedBlob
from manager.keys import GroupSeal
from manager.policy import SealPolicy
from manager.verify import verify_all, verify_vtpm
from storage.catalogue import AttachmentRow, Catalogue, GroupRow, VtpmRow
from storage.secrets import GroupKey, StateKey, StoreKey
from storage.store import Store
from storage.store_records import GroupFlags, GroupRecord, PutGroup, PutVtpm, RecordFlags, VtpmRecord

GROUP, OTHER, STORE = UUID(int=7), UUID(int=8), UUID(int=1)
WEB, IDLE = uuid4(), uuid4()
KEY = hashlib.sha256(b"catalogue").digest()
SEAL = GroupSeal(
    "default", SealedBlob(b"public", b"private", SealPolicy.build(pcrs=[{0: bytes(32), 7: bytes(32)}])), b""
)
ROW = AttachmentRow(WEB, "guest", "socket", "0:0", "0660", "clear", 1, epoch=5)
FRESH = RecordFlags.FRESH


class World:
    """A store and a catalogue that agree: `web` attached with epoch 5, `idle` not."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.descriptor = os.open(base / "store.img", os.O_RDWR | os.O_CREAT)
        self.store = Store.create(self.descriptor, STORE, StoreKey(b"s" * 32), b"boot", 512 * 1024)
        group = PutGroup(GroupRecord(GROUP, GroupFlags.EPOCHS, SEAL.pack()), GroupKey(b"g" * 32))
        self.store.commit([group, *map(PutVtpm, (self.record(WEB, 5, RecordFlags.ATTACHED), self.record(IDLE, 3)))])
        self.catalogue = Catalogue.create(base / "catalogue.sqlite", KEY, STORE)
        self.catalogue.add_group(group_row(GROUP, SEAL))
        for uuid, name in ((WEB, "web"), (IDLE, "idle")):
            self.catalogue.add_vtpm(VtpmRow(uuid, name, GROUP, "2.0"))
        self.catalogue.attach(ROW)

    def record(self, uuid: UUID, epoch: int, more: RecordFlags = RecordFlags.NONE) -> VtpmRecord:
        return VtpmRecord(uuid, GROUP, StateKey(bytes(32)), bytes(32), 0, FRESH | more, epoch)

    def subject(self) -> Subject:
        catalogue = self.catalogue
        audit, groups = catalogue.audit(), catalogue.groups()
        return Subject(self.store, *stored_in(self.store), audit, groups, self.base / "state", lambda _: True)

    def wrong(self) -> list[Finding]:
        before = (self.store.digest(), self.catalogue.audit(), self.catalogue.groups())
        found = [finding for finding in verify_all(self.subject()) if finding.verdict is not Verdict.OK]
        assert (self.store.digest(), self.catalogue.audit(), self.catalogue.groups()) == before, "nothing is repaired"
        assert all(finding.code == 6 for finding in found)
        return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.catalogue.close()
    made.store.close()
    os.close(made.descriptor)


def test_what_agrees_is_found_to_agree(world: World) -> None:
    assert world.wrong() == []


def put(**changes: object) -> Callable[[World], None]:
    def change(world: World) -> None:
        world.store.commit([PutVtpm(replace(world.store.get(WEB), **changes))])  # type: ignore[arg-type]

    return change


CASES: dict[str, tuple[Callable[[World], object], str, UUID | None, str]] = {
    "a record without a row": (lambda w: w.catalogue.remove_vtpm(IDLE), "record", IDLE, "no name in the catalogue"),
    "a row without a record": (
        lambda w: w.catalogue.add_vtpm(VtpmRow(UUID(int=99), "ghost", GROUP, "2.0")),
        "record",
        UUID(int=99),
        "no record of it",
    ),
    "another family": (put(flags=FRESH | RecordFlags.TPM12 | RecordFlags.ATTACHED), "record", WEB, "TPM family 2.0"),
    "an attachment without a vTPM": (
        lambda w: w.catalogue.attach(replace(ROW, vtpm=UUID(int=98))),
        "catalogue",
        UUID(int=98),
        "without a name",
    ),
    "a stale attachment": (put(epoch=6), "attachment", WEB, "put back"),
    "an attachment of a detached vTPM": (put(flags=FRESH), "attachment", WEB, "it is detached"),
    "an attachment without an epoch": (
        lambda w: w.catalogue.renew(replace(ROW, epoch=0)),
        "attachment",
        WEB,
        "the row is of epoch 0",
    ),
    "a mark without a row": (lambda w: w.catalogue.detach(WEB), "attachment", WEB, "cut short"),
    "a mark without row and name": (
        lambda w: w.store.commit([PutVtpm(w.record(UUID(int=97), 1, RecordFlags.ATTACHED))]),
        "record",
        UUID(int=97),
        "no name in the catalogue",
    ),
    "a group in the catalogue only": (
        lambda w: w.catalogue.add_group(GroupRow(OTHER, "tenant")),
        "catalogue",
        None,
        "in the catalogue only",
    ),
    "a group in the store only": (
        lambda w: w.store.commit([PutGroup(GroupRecord(OTHER, 0, SEAL.pack()), GroupKey(b"o" * 32))]),
        "catalogue",
        None,
        "in the store only",
    ),
    "a group of another name": (
        lambda w: w.catalogue.change_group(replace(group_row(GROUP, SEAL), name="evil")),
        "catalogue",
        None,
        "name: evil in the catalogue, default in the store",
    ),
    "a group with other PCRs": (
        lambda w: w.catalogue.change_group(replace(group_row(GROUP, SEAL), pcrs="none")),
        "catalogue",
        None,
        "PCRs: none in the catalogue, sha256:0,7 in the store",
    ),
    "a group at another locality": (
        lambda w: w.catalogue.change_group(replace(group_row(GROUP, SEAL), locality=0)),
        "catalogue",
        None,
        "locality: 0",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_disagreement_is_named(world: World, case: str) -> None:
    harm, what, vtpm, words = CASES[case]
    harm(world)
    (found,) = world.wrong()
    assert (found.what, found.vtpm) == (what, vtpm)
    assert words in found.text


def test_another_group_is_named(world: World) -> None:
    world.store.commit([PutGroup(GroupRecord(OTHER, GroupFlags.EPOCHS, SEAL.pack()), GroupKey(b"o" * 32))])
    world.catalogue.add_group(replace(group_row(OTHER, SEAL), name="default "))
    world.catalogue.remove_vtpm(IDLE)
    world.catalogue.add_vtpm(VtpmRow(IDLE, "idle", OTHER, "2.0"))
    texts = [found.text for found in world.wrong() if found.what == "record"]
    assert texts == [f"the catalogue says group {OTHER}, the record {GROUP}"]


def test_what_is_changing_is_looked_at_again(world: World) -> None:
    """Online: an attach or detach is at work, or was done since the audit."""
    world.catalogue.detach(WEB)
    subject, row = world.subject(), world.catalogue.find_vtpm(WEB)
    assert row is not None

    def judged(now: AttachmentRow | None, changing: bool) -> list[str]:
        looked = replace(subject, attachment_now=lambda _: now, changing=lambda _: changing)
        return [found.what for found in verify_vtpm(looked, row) if found.verdict is not Verdict.OK]

    assert judged(None, changing=False) == ["attachment"]
    assert judged(None, changing=True) == []
    assert judged(ROW, changing=False) == []
    assert judged(replace(ROW, epoch=4), changing=False) == ["attachment"]
