"""The save path on a real image, with a manager in a thread and no TPM."""

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from vtpm_instance_manager import Record, SmallManager

from frontend_backend.local import LocalRing
from frontend_backend.messages_instance import RefusalCode
from storage.errors import NoMatchingSlot
from storage.state_image import Emulator, Family, StateImage
from vtpm_instance.errors import (
    CommitRefusedError,
    CommitUnansweredError,
    StateNotWrittenError,
    WrongLeaseError,
    WrongVtpmError,
)
from vtpm_instance.managerlink import ManagerLink
from vtpm_instance.statekeeper import StateKeeper
from vtpm_instance.tpm_commands import MARGIN

EMULATOR = Emulator("libtpms", "0.9.2")


@dataclass
class Parts:
    keeper: StateKeeper
    manager: SmallManager
    record: Record
    path: Path
    descriptor: int
    link: ManagerLink

    def again(self) -> StateKeeper:
        """A keeper as the next instance has it."""
        return StateKeeper(self.record.vtpm, self.record.lease, self.descriptor, self.link, EMULATOR)


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    record = Record(uuid4(), commit_timeout=0.2)
    path = tmp_path / "state.img"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    StateImage.create(descriptor, record.vtpm, uuid4(), Family.TPM20)
    front, back = LocalRing.pair()
    link, manager = ManagerLink(front), SmallManager(back, record)
    keeper = StateKeeper(record.vtpm, record.lease, descriptor, link, EMULATOR)
    yield Parts(keeper, manager, record, path, descriptor, link)
    manager.close()
    link.close()
    os.close(descriptor)


def store(keeper: StateKeeper, content: bytes) -> None:
    """Do what libtpms does."""
    keeper.blobs["permall"] = content
    keeper.changed("permall", content)


def test_a_fresh_vtpm_has_no_blobs_and_its_first_state_is_generation_1(parts: Parts) -> None:
    assert parts.keeper.load().fresh
    assert parts.keeper.blobs == {}
    store(parts.keeper, b"one")
    assert (parts.keeper.generation, parts.record.generation) == (1, 1)
    again = parts.again()
    again.load()
    assert again.blobs == {"permall": b"one"}


def test_the_reply_that_is_handed_on_has_no_key(parts: Parts) -> None:
    parts.keeper.load()
    store(parts.keeper, b"one")
    assert parts.record.key != b""
    assert parts.again().load().key == b""


def test_gathered_changes_are_one_commit(parts: Parts) -> None:
    parts.keeper.load()
    with parts.keeper.gather():
        for content in (b"one", b"two", b"three"):
            store(parts.keeper, content)
        assert parts.record.commits == 0
    parts.keeper.commit_gathered()
    parts.keeper.commit_gathered()
    assert parts.record.commits == 1


def test_a_deleted_blob_is_a_change_too(parts: Parts) -> None:
    parts.keeper.load()
    parts.keeper.blobs["savestate"] = b"saved"
    store(parts.keeper, b"one")
    del parts.keeper.blobs["savestate"]
    parts.keeper.changed("savestate", None)
    again = parts.again()
    again.load()
    assert again.blobs == {"permall": b"one"}


def test_only_the_final_commit_is_final(parts: Parts) -> None:
    parts.keeper.load()
    store(parts.keeper, b"one")
    assert not parts.record.resumable
    parts.keeper.commit(final=True)
    assert parts.record.resumable
    store(parts.keeper, b"two")
    assert not parts.record.resumable


def test_a_refused_commit_leaves_the_old_state(parts: Parts) -> None:
    parts.keeper.load()
    store(parts.keeper, b"old")
    parts.manager.refuse = RefusalCode.STORE_FAILED
    with pytest.raises(CommitRefusedError):
        store(parts.keeper, b"new")
    parts.keeper.load()
    assert parts.keeper.blobs == {"permall": b"old"}


@pytest.mark.parametrize(("recorded", "expected"), [(False, b"old"), (True, b"new")])
def test_after_an_unanswered_commit_a_load_tells_which_state_counts(
    parts: Parts,
    recorded: bool,
    expected: bytes,
) -> None:
    parts.keeper.load()
    store(parts.keeper, b"old")
    if recorded:
        parts.manager.set_mute(mute=True)
    else:
        parts.manager.set_silent(True)
    with pytest.raises(CommitUnansweredError):
        store(parts.keeper, b"new")
    parts.manager.set_mute(mute=False)
    parts.manager.set_silent(False)
    parts.keeper.load()
    assert parts.keeper.blobs == {"permall": expected}
    store(parts.keeper, b"next")
    parts.keeper.load()
    assert parts.keeper.blobs == {"permall": b"next"}


def test_a_write_that_fails_is_no_commit_and_the_old_state_stays(parts: Parts) -> None:
    parts.keeper.load()
    store(parts.keeper, b"old")
    before = parts.record.generation
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StateNotWrittenError):
            store(parts.keeper, b"new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert parts.record.generation == before
    parts.keeper.load()
    assert parts.keeper.blobs == {"permall": b"old"}
    store(parts.keeper, b"new")


def test_room_is_made_between_commands_and_its_lack_is_told(parts: Parts) -> None:
    parts.keeper.load()
    content = bytes(16384 - MARGIN)
    store(parts.keeper, content)
    size = parts.path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        assert not parts.keeper.roomy
        assert not parts.keeper.make_room()
        room = StateImage.open(parts.descriptor, parts.record.vtpm).room - len(content)
        assert parts.keeper.fits(room)
        assert not parts.keeper.fits(room + 1)
        store(parts.keeper, content[::-1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert parts.keeper.make_room()
    assert parts.keeper.roomy
    assert parts.path.stat().st_size > size
    store(parts.keeper, content + bytes(MARGIN))


def test_a_record_of_another_vtpm_or_lease_is_refused(parts: Parts) -> None:
    parts.record.lease += 1
    with pytest.raises(WrongLeaseError):
        parts.keeper.load()
    parts.record.vtpm = uuid4()
    with pytest.raises(WrongVtpmError):
        parts.keeper.load()


def test_no_matching_slot_changes_nothing(parts: Parts) -> None:
    parts.keeper.load()
    store(parts.keeper, b"one")
    before = parts.path.read_bytes()
    parts.record.digest = bytes(32)
    with pytest.raises(NoMatchingSlot):
        parts.keeper.load()
    assert parts.path.read_bytes() == before
