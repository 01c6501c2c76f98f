"""One vTPM going to sleep and waking, with the real library in this process: what is kept, what is refused."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from test_vtpm_instance_vtpm import INDEX, Parts
from vtpm_instance_commands import (
    SHUTDOWN_CLEAR,
    STARTUP_CLEAR,
    authorised,
    extended,
    get_random,
    nv_content,
    nv_define,
    nv_read,
    nv_write,
    pcr_extend,
    pcr_read,
    rc,
    sized,
)

from frontend_backend.messages_instance import RefusalCode
from frontend_backend.tpmhdr import command
from storage.secrets import StateKey
from storage.state_image import StateImage
from vtpm_instance.condition import Condition
from vtpm_instance.errors import (
    CommitRefusedError,
    CommitUnansweredError,
    NotNowError,
    ResumeRefusedError,
)
from vtpm_instance.libtpms import the_tpm
from vtpm_instance.slumber import RESUMPTION, VOLATILE
from vtpm_instance.statekeeper import StateKeeper
from vtpm_instance.tpm_commands import Startup
from vtpm_instance.vtpm import Vtpm

READ_CLOCK = command(0x181)


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    made = Parts(tmp_path / "state.img")
    yield made
    made.close()


def running(parts: Parts) -> Vtpm:
    vtpm = parts.vtpm()
    vtpm.start()
    assert rc(vtpm.execute(nv_define(INDEX, 4), 0)) == 0
    assert rc(vtpm.execute(nv_write(INDEX, b"kept"), 0)) == 0
    assert rc(vtpm.execute(pcr_extend(7), 0)) == 0
    return vtpm


def woken(parts: Parts, startup: str = "state") -> Vtpm:
    parts.record.startup = startup
    vtpm = parts.vtpm()
    vtpm.start()
    return vtpm


def blobs_of(vtpm: Vtpm) -> dict[str, bytes]:
    return cast("StateKeeper", vtpm._keeper).blobs


def stored(parts: Parts) -> dict[str, bytes]:
    """What lies in the slot that the record names."""
    record = parts.record
    return dict(
        StateImage.open(parts.descriptor, record.vtpm).load(StateKey(record.key), record.digest, record.generation)
    )


def resets(vtpm: Vtpm) -> bytes:
    return vtpm.execute(READ_CLOCK, 0)[26:34]


def test_it_goes_on_where_it_was_and_no_reset_is_counted(parts: Parts) -> None:
    vtpm = running(parts)
    counted = resets(vtpm)
    vtpm.hibernate(0)
    assert (vtpm.condition, the_tpm().running) == (Condition.STOPPED, None)
    assert {VOLATILE, RESUMPTION} <= stored(parts).keys()
    again = woken(parts)
    assert again.condition is Condition.RUNNING
    assert again.execute(pcr_read(7), 0)[-32:] == extended(b"\x11" * 32)
    assert nv_content(again.execute(nv_read(INDEX, 4), 0)) == b"kept"
    assert resets(again) == counted


def test_the_volatile_part_is_in_no_later_save(parts: Parts) -> None:
    running(parts).hibernate(0)
    again = woken(parts)
    assert not blobs_of(again).keys() & {VOLATILE, RESUMPTION}
    assert rc(again.execute(nv_write(INDEX, b"more"), 0)) == 0
    assert not stored(parts).keys() & {VOLATILE, RESUMPTION}


def test_resumed_twice_from_one_state_it_draws_other_numbers(parts: Parts) -> None:
    """The manager does not let that happen; were it to, no two nonces or keys would be the same."""
    running(parts).hibernate(0)
    slept = replace(parts.record)
    drawn = set()
    for _ in range(5):
        parts.record.__dict__.update(slept.__dict__)
        drawn.add(woken(parts).execute(get_random(16), 0)[-16:])
        the_tpm().terminate()
    assert len(drawn) == 5


@pytest.mark.parametrize("startup", ["clear", "none", "failed"])
def test_any_other_start_drops_the_volatile_part(parts: Parts, startup: str) -> None:
    running(parts).hibernate(0)
    again = woken(parts, startup)
    if startup == "failed":
        assert again.condition is Condition.FAILED
        again.reset()
    elif startup == "none":
        assert rc(again.execute(STARTUP_CLEAR, 0)) == 0
    assert again.execute(pcr_read(7), 0)[-32:] == bytes(32)
    assert nv_content(again.execute(nv_read(INDEX, 4), 0)) == b"kept"
    assert not blobs_of(again).keys() & {VOLATILE, RESUMPTION}


@pytest.mark.parametrize("refuse", [RefusalCode.STORE_FAILED, RefusalCode.WANTED])
def test_when_the_commit_is_refused_it_goes_on_as_if_nothing_had_been_tried(parts: Parts, refuse: RefusalCode) -> None:
    vtpm = running(parts)
    parts.manager.refuse = refuse
    with pytest.raises(CommitRefusedError):
        vtpm.hibernate(0)
    parts.manager.refuse = None
    assert vtpm.condition is Condition.RUNNING
    assert vtpm.execute(pcr_read(7), 0)[-32:] == extended(b"\x11" * 32)
    assert rc(vtpm.execute(nv_write(INDEX, b"more"), 0)) == 0
    vtpm.hibernate(0)
    assert nv_content(woken(parts).execute(nv_read(INDEX, 4), 0)) == b"more"


def test_when_what_libtpms_stores_by_itself_is_refused_it_is_known_to_have_failed(parts: Parts) -> None:
    """It stores its clock, or that a failed try is forgotten, with any command, also one that only looks."""
    vtpm = running(parts)
    limits = b"".join(number.to_bytes(4) for number in (10, 1, 1))  # tries, seconds until one is forgotten
    assert rc(vtpm.execute(authorised(0x13A, (0x4000000A).to_bytes(4), limits), 0)) == 0
    index, own = INDEX + 1, sized(b"x")  # with a password, and subject to the limits
    public = index.to_bytes(4) + bytes.fromhex("000b 00040004 0000 0008")
    assert rc(vtpm.execute(authorised(0x12A, (0x40000001).to_bytes(4), own + sized(public)), 0)) == 0
    wrong = authorised(0x137, index.to_bytes(4) * 2, sized(b"\1" * 8) + bytes(2))
    assert 0x98E in {rc(vtpm.execute(wrong, 0)) for _ in range(2)}
    time.sleep(2.5)
    parts.manager.refuse = RefusalCode.STORE_FAILED
    with pytest.raises(CommitRefusedError):
        vtpm.hibernate(0)
    assert vtpm.condition is Condition.FAILED
    parts.manager.refuse = None
    vtpm.reset()
    assert nv_content(vtpm.execute(nv_read(INDEX, 4), 0)) == b"kept"


def test_when_nobody_answers_it_does_not_know_and_fails(parts: Parts) -> None:
    vtpm = running(parts)
    parts.manager.set_silent(True)
    with pytest.raises(CommitUnansweredError):
        vtpm.hibernate(0)
    assert vtpm.condition is Condition.FAILED
    parts.manager.set_silent(False)


def test_what_the_guest_did_last_and_the_locality_are_known_after_it(parts: Parts) -> None:
    vtpm = running(parts)
    assert rc(vtpm.execute(SHUTDOWN_CLEAR, 0)) == 0
    vtpm.hibernate(3)
    again = woken(parts)
    assert again.locality == 3
    before = dict(blobs_of(again))
    assert again.stop()
    assert the_tpm().blobs == before, "the guest's own Shutdown(CLEAR) counts: no other is sent over it"


def test_firmware_that_starts_the_tpm_does_so_after_a_reset_too(parts: Parts) -> None:
    parts.record.startup = "none"
    vtpm = parts.vtpm()
    vtpm.start()
    assert rc(vtpm.execute(STARTUP_CLEAR, 0)) == 0
    vtpm.hibernate(0)
    again = woken(parts)
    again.reset()
    assert rc(again.execute(pcr_read(7), 0)) == 0x100, "TPM_RC_INITIALIZE: it waits for the firmware"


def test_a_guest_that_sleeps_itself_has_its_pcrs_again_when_it_wakes(parts: Parts) -> None:
    """Its kernel sends Shutdown(STATE), nothing comes for hours; then its firmware resets the TPM: Startup(STATE)."""
    parts.record.startup = "none"
    vtpm = parts.vtpm()
    vtpm.start()
    assert rc(vtpm.execute(STARTUP_CLEAR, 0)) == 0
    assert rc(vtpm.execute(pcr_extend(7), 0)) == 0
    assert rc(vtpm.execute(command(0x145, b"\0\1"), 0)) == 0
    vtpm.hibernate(0)
    again = woken(parts)
    again.reset()
    assert rc(again.execute(command(0x144, b"\0\1"), 0)) == 0
    assert again.execute(pcr_read(7), 0)[-32:] == extended(b"\x11" * 32)


def test_one_that_its_firmware_has_not_started_does_not_hibernate(parts: Parts) -> None:
    parts.record.startup = "none"
    vtpm = parts.vtpm(Startup.NONE)
    vtpm.start()
    with pytest.raises(NotNowError):
        vtpm.hibernate(0)
    assert rc(vtpm.execute(STARTUP_CLEAR, 0)) == 0


def test_one_that_is_failed_does_not_hibernate(parts: Parts) -> None:
    running(parts).hibernate(0)
    failed = woken(parts, "failed")
    with pytest.raises(NotNowError):
        failed.hibernate(0)


@pytest.mark.parametrize("what", [VOLATILE, RESUMPTION])
def test_a_volatile_part_that_does_not_load_is_a_failure_until_a_reset_and_loses_nothing_stored(
    parts: Parts, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vtpm = running(parts)
    real = StateKeeper._save

    def damaged(keeper: StateKeeper, blobs: dict[str, bytes]) -> object:
        return real(keeper, blobs | {what: os.urandom(len(blobs[what]))})

    monkeypatch.setattr(StateKeeper, "_save", damaged)
    vtpm.hibernate(0)
    monkeypatch.undo()
    again = woken(parts)
    assert again.condition is Condition.FAILED
    assert isinstance(again.cause, ResumeRefusedError)
    again.reset()
    assert nv_content(again.execute(nv_read(INDEX, 4), 0)) == b"kept"
    assert again.execute(pcr_read(7), 0)[-32:] == bytes(32)
