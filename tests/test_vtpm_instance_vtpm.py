"""Conditions of a vTPM, and its commands with the real library in this process."""

import os
import select
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from uuid import uuid4

import pytest
from vtpm_instance_commands import (
    SHUTDOWN_STATE,
    STARTUP_CLEAR,
    extended,
    get_random,
    nv_define,
    pcr_extend,
    pcr_read,
    rc,
)
from vtpm_instance_manager import Record, SmallManager

from frontend_backend.local import LocalRing
from frontend_backend.measurements import Measurement
from frontend_backend.messages_instance import RefusalCode
from frontend_backend.tpmhdr import TpmFamily
from storage.state_image import Emulator, Family, StateImage
from vtpm_instance.condition import TRANSITIONS, Change, Condition
from vtpm_instance.control import FrontEnd
from vtpm_instance.errors import (
    BootNotMeasuredError,
    CommitRefusedError,
    CrashedBeforeError,
    HardwarePcrsError,
    ManagerConfusedError,
    WrongFamilyError,
)
from vtpm_instance.libtpms import the_tpm
from vtpm_instance.managerlink import ManagerLink
from vtpm_instance.server import Server
from vtpm_instance.statekeeper import StateKeeper
from vtpm_instance.tpm_commands import Startup
from vtpm_instance.vtpm import Vtpm

INDEX = 0x01500001


class Parts:
    """A vTPM and what it stands on."""

    def __init__(self, path: Path) -> None:
        self.record = Record(uuid4(), commit_timeout=0.2)
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        StateImage.create(self.descriptor, self.record.vtpm, uuid4(), Family.TPM20)
        front, back = LocalRing.pair()
        self.link, self.manager = ManagerLink(front), SmallManager(back, self.record)
        self.announced: list[tuple[Condition, type[Exception] | None]] = []

    def vtpm(self, after_reset: Startup = Startup.CLEAR, family: TpmFamily = TpmFamily.TPM_2_0) -> Vtpm:
        emulator = Emulator("libtpms", "0.9.2")
        keeper = StateKeeper(self.record.vtpm, self.record.lease, self.descriptor, self.link, emulator)

        def announce(condition: Condition, cause: Exception | None) -> None:
            self.announced.append((condition, type(cause) if cause else None))

        return Vtpm(the_tpm(), keeper, family, after_reset, announce)

    def close(self) -> None:
        the_tpm().terminate()
        self.manager.close()
        self.link.close()
        os.close(self.descriptor)


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    made = Parts(tmp_path / "state.img")
    yield made
    made.close()


def test_the_table_of_conditions_ends_with_stopped_and_never_loses_a_failure() -> None:
    for condition, change in product(Condition, Change):
        target = TRANSITIONS.get((condition, change))
        assert condition is not Condition.STOPPED or target is None
        assert change is not Change.FAILED or target in (Condition.FAILED, None)
        assert target is not Condition.OFF or change is Change.POWERED_OFF
    assert set(TRANSITIONS.values()) == set(Condition)


def test_a_start_is_one_commit(parts: Parts) -> None:
    vtpm = parts.vtpm()
    vtpm.start()
    assert (vtpm.condition, parts.record.commits) == (Condition.RUNNING, 1)
    assert parts.announced == [(Condition.RUNNING, None)]


def test_hardware_pcrs_come_after_each_startup_clear_and_not_after_a_resume(parts: Parts) -> None:
    parts.record.hw_pcrs = {0: b"\xaa" * 32, 7: b"\xbb" * 32}
    vtpm = parts.vtpm()
    vtpm.start()
    assert (parts.record.commits, parts.record.pcr_reads) == (1, 1)
    assert vtpm.execute(pcr_read(7), 0)[-32:] == extended(b"\xbb" * 32)
    assert vtpm.execute(pcr_read(1), 0)[-32:] == bytes(32)
    vtpm.execute(pcr_extend(7), 0)
    assert vtpm.stop()
    parts.record.startup = "state"
    again = parts.vtpm()
    again.start()
    assert again.execute(pcr_read(7), 0)[-32:] == extended(b"\xbb" * 32, b"\x11" * 32)
    assert parts.record.pcr_reads == 1
    parts.record.hw_pcrs[7] = b"\xcc" * 32  # the hardware's has moved on
    again.reset()
    assert again.execute(pcr_read(7), 0)[-32:] == extended(b"\xcc" * 32)


KERNEL, CMDLINE = (Measurement.of(what, [what.encode()]) for what in ("kernel", "cmdline"))


def measured_by(*measurements: Measurement) -> bytes:
    return extended(*(measurement.digests["sha256"] for measurement in measurements))


def test_each_boot_has_its_measurements_before_the_first_command_and_a_resume_none(parts: Parts) -> None:
    parts.record.measured = (KERNEL.pack(), CMDLINE.pack())
    vtpm = parts.vtpm()
    vtpm.start()
    assert (parts.record.commits, parts.record.measurements) == (1, 0), "they came with the state"
    assert vtpm.execute(pcr_read(4), 0)[-32:] == measured_by(KERNEL)
    assert vtpm.execute(pcr_read(5), 0)[-32:] == measured_by(CMDLINE)
    vtpm.execute(pcr_extend(5), 0)
    parts.record.measured = (CMDLINE.pack(), CMDLINE.pack())
    vtpm.reset()
    assert parts.record.measurements == 1
    assert vtpm.execute(pcr_read(4), 0)[-32:] == bytes(32)
    assert vtpm.execute(pcr_read(5), 0)[-32:] == measured_by(CMDLINE, CMDLINE)
    assert vtpm.stop()
    parts.record.startup, parts.record.measured = "state", (KERNEL.pack(),)
    again = parts.vtpm()
    again.start()
    assert again.execute(pcr_read(4), 0)[-32:] == bytes(32)
    assert again.execute(pcr_read(5), 0)[-32:] == measured_by(CMDLINE, CMDLINE)
    again.reset()  # what it loaded with says nothing of this boot
    assert again.execute(pcr_read(4), 0)[-32:] == measured_by(KERNEL)


def test_measurements_that_cannot_be_had_or_read_leave_a_vtpm_that_answers_failure(parts: Parts) -> None:
    parts.record.measured = (KERNEL.pack()[:-1],)
    vtpm = parts.vtpm()
    vtpm.start()
    assert parts.announced == [(Condition.FAILED, BootNotMeasuredError)]
    parts.record.measured = (bytes([4]) + (1).to_bytes(4) + b"\0\x0b" + bytes(32),)  # SHA-256 alone, of four banks
    with pytest.raises(BootNotMeasuredError):
        vtpm.reset()
    parts.manager.refuse_measurements = RefusalCode.DENIED
    with pytest.raises(BootNotMeasuredError):
        vtpm.reset()
    assert rc(vtpm.execute(pcr_read(4), 0)) == 0x101
    assert (parts.record.fresh, parts.record.commits) == (True, 0)
    parts.manager.refuse_measurements, parts.record.measured = None, (KERNEL.pack(),)
    vtpm.reset()
    assert vtpm.execute(pcr_read(4), 0)[-32:] == measured_by(KERNEL)


def test_without_the_hardware_pcrs_it_asked_for_a_vtpm_answers_failure_until_a_reset(parts: Parts) -> None:
    parts.record.hw_pcrs, parts.record.measured = {0: b"\xaa" * 32}, (KERNEL.pack(),)
    parts.manager.refuse = RefusalCode.UNAVAILABLE
    vtpm = parts.vtpm()
    vtpm.start()
    assert parts.announced == [(Condition.FAILED, HardwarePcrsError)]
    assert rc(vtpm.execute(pcr_read(0), 0)) == 0x101
    assert (parts.record.fresh, parts.record.commits) == (True, 0), "nothing was kept of the half-made TPM"
    parts.manager.refuse, parts.record.measured = None, (CMDLINE.pack(),)
    vtpm.reset()
    assert vtpm.execute(pcr_read(0), 0)[-32:] == extended(b"\xaa" * 32)
    assert vtpm.execute(pcr_read(4), 0)[-32:] == bytes(32), "another boot, by what the manager says now"
    assert vtpm.execute(pcr_read(5), 0)[-32:] == measured_by(CMDLINE)


def test_a_stop_shuts_down_for_the_guest_and_commits_once(parts: Parts) -> None:
    vtpm = parts.vtpm()
    vtpm.start()
    vtpm.execute(pcr_extend(7), 0)
    assert vtpm.stop()
    assert (parts.record.commits, parts.record.resumable) == (2, True)
    assert the_tpm().running is None
    parts.record.startup = "state"
    again = parts.vtpm()
    again.start()
    assert again.execute(pcr_read(7), 0)[-32:] == extended(b"\x11" * 32)


def test_a_stop_after_the_guests_own_shutdown_sends_none_and_is_final_all_the_same(parts: Parts) -> None:
    vtpm = parts.vtpm()
    vtpm.start()
    assert rc(vtpm.execute(SHUTDOWN_STATE, 0)) == 0
    state = dict(the_tpm().blobs)
    assert vtpm.stop()
    assert the_tpm().blobs == state
    assert parts.record.resumable


def test_a_stop_that_is_not_acknowledged_is_raised_and_not_final(parts: Parts) -> None:
    vtpm = parts.vtpm()
    vtpm.start()
    parts.manager.refuse = RefusalCode.STORE_FAILED
    with pytest.raises(CommitRefusedError):
        vtpm.stop()
    assert not parts.record.resumable
    assert vtpm.condition is Condition.FAILED


def test_after_a_crash_the_state_is_checked_but_not_changed_until_the_reset(parts: Parts) -> None:
    parts.vtpm().start()
    the_tpm().terminate()
    parts.record.startup = "failed"
    before = parts.record.commits
    vtpm = parts.vtpm()
    vtpm.start()
    assert (vtpm.condition, parts.record.commits) == (Condition.FAILED, before)
    assert isinstance(vtpm.cause, CrashedBeforeError)
    assert not vtpm.stop()
    assert parts.record.commits == before


def test_a_crash_before_the_first_commit_makes_no_tpm_until_the_reset(parts: Parts) -> None:
    parts.record.startup = "failed"
    vtpm = parts.vtpm()
    vtpm.start()
    assert rc(vtpm.execute(get_random(), 0)) == 0x101
    vtpm.reset()
    assert rc(vtpm.execute(get_random(), 0)) == 0


def test_a_failed_reset_leaves_it_failed_and_the_next_one_brings_it_back(parts: Parts) -> None:
    vtpm = parts.vtpm()
    vtpm.start()
    parts.manager.refuse = RefusalCode.STORE_FAILED
    with pytest.raises(CommitRefusedError):
        vtpm.reset()
    assert rc(vtpm.execute(get_random(), 0)) == 0x101
    parts.manager.refuse = None
    vtpm.reset()
    assert rc(vtpm.execute(get_random(), 0)) == 0


def test_where_firmware_starts_the_tpm_it_is_stirred_after_that(parts: Parts) -> None:
    parts.record.startup = "none"
    vtpm = parts.vtpm()
    vtpm.start()
    assert rc(vtpm.execute(get_random(), 0)) == 0x100
    assert rc(vtpm.execute(STARTUP_CLEAR, 0)) == 0
    assert rc(vtpm.execute(get_random(), 0)) == 0
    vtpm.reset()
    assert rc(vtpm.execute(get_random(), 0)) == 0x100


def test_a_command_that_failed_to_save_is_not_executed_again(parts: Parts) -> None:
    vtpm = parts.vtpm()
    vtpm.start()
    parts.manager.refuse = RefusalCode.STORE_FAILED
    assert rc(vtpm.execute(nv_define(INDEX, 8), 0)) == 0x101
    assert parts.manager.refused == 1
    assert rc(vtpm.execute(nv_define(INDEX, 8), 0)) == 0x101
    assert parts.manager.refused == 1


def test_a_first_state_that_cannot_be_saved_waits_for_a_reset(parts: Parts) -> None:
    parts.manager.refuse = RefusalCode.STORE_FAILED
    vtpm = parts.vtpm()
    vtpm.start()
    assert parts.announced == [(Condition.FAILED, CommitRefusedError)]
    parts.manager.refuse = None
    vtpm.reset()
    assert rc(vtpm.execute(get_random(), 0)) == 0


def test_an_unknown_startup_is_refused(parts: Parts) -> None:
    parts.record.startup = "sideways"
    with pytest.raises(ManagerConfusedError):
        parts.vtpm().start()


def test_a_record_of_another_family_is_refused(parts: Parts) -> None:
    with pytest.raises(WrongFamilyError):
        parts.vtpm(family=TpmFamily.TPM_1_2).start()


def test_the_cause_of_a_failure_keeps_no_frame_and_so_no_key_alive(parts: Parts) -> None:
    vtpm = parts.vtpm()
    vtpm.start()
    parts.manager.refuse = RefusalCode.STORE_FAILED
    assert rc(vtpm.execute(nv_define(INDEX, 4), 0)) == 0x101
    assert isinstance(vtpm.cause, CommitRefusedError)
    link: BaseException | None = vtpm.cause
    while link is not None:
        assert link.__traceback__ is None
        link = link.__cause__ or link.__context__


def test_a_stop_signal_stays_readable_so_that_the_last_commit_waits_no_longer_than_its_grace(parts: Parts) -> None:
    vtpm = parts.vtpm()
    vtpm.start()
    wakeup, wake = os.pipe()
    server = Server(vtpm, parts.link, FrontEnd.SOCKET, frozenset(), wakeup)
    os.write(wake, b"x")
    server.run()
    server.close()
    assert select.select([wakeup], [], [], 0)[0]
    os.close(wake)
    os.close(wakeup)
