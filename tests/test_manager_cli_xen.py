"""The command vtpm-xen on a machine without Xen: what it says, its exit codes, and what it makes of Xen's word."""

import fcntl
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast
from uuid import UUID

import pytest
from xenstored_rig import running_xenstored

from frontend_backend.messages_admin import ExitCode
from frontend_backend.xen_hypercalls import DomainInfo, Hypervisor
from frontend_backend.xen_terms import Place
from manager import xen_backend_witness
from manager.cli_xen import LEDGERS, main
from manager.xen_backend_identity import Identity
from manager.xen_backend_witness import XenWitness

without_xen = pytest.mark.skipif(os.path.exists("/dev/xen/evtchn"), reason="this machine has Xen")


@without_xen
def test_a_machine_without_xen_is_told_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--json", "--runtime-dir", str(tmp_path)]) == ExitCode.NOT_FOUND
    found = {each["what"]: each for each in json.loads(capsys.readouterr().out)["findings"]}
    assert not found["event channels"]["ok"]
    assert "modprobe xen-evtchn" in found["event channels"]["text"]
    assert not found["manager"]["needed"], "guests wait for it"
    assert main(["run", "--runtime-dir", str(tmp_path)]) == ExitCode.NOT_FOUND
    assert "there is no xenstore here" in capsys.readouterr().err


@without_xen
def test_check_looks_at_a_xenstore_and_leaves_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_xenstored() as store:
        words = ["--runtime-dir", str(tmp_path), "--xenstore", str(store.socket)]
        assert main(["check", *words]) == ExitCode.NOT_FOUND, "there are no event channels here"
        said = capsys.readouterr().out
        assert "own nodes              ok" in said
        assert "0 in /local/domain/0/backend/vtpm" in said
        assert main(["run", *words]) == ExitCode.NOT_FOUND
        assert "/dev/xen/evtchn" in capsys.readouterr().err


def test_a_second_back_end_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marks = tmp_path / LEDGERS
    marks.mkdir()
    with (marks / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["run", "--runtime-dir", str(tmp_path)]) == ExitCode.CONFLICT
    assert "another vtpm-xen" in capsys.readouterr().err


def test_a_directory_that_cannot_be_used_is_the_callers_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / LEDGERS).write_text("a file")
    assert main(["run", "--runtime-dir", str(tmp_path)]) == ExitCode.USAGE
    assert str(tmp_path / LEDGERS) in capsys.readouterr().err


@dataclass
class Xen:
    """What a hypervisor says of one domain, as the simulation plays kernels: its answers, and no more."""

    domain: DomainInfo
    past: bool = False  # its first processor has a kernel's registers
    data_address: int = 0

    @property
    def data(self) -> memoryview:
        return memoryview(bytearray(5112) + bytes([self.past]) + bytes(55))

    def info(self, domain: int) -> DomainInfo | None:
        return self.domain if domain == self.domain.domain else None

    def domctl(self, _command: int, _domain: int, _payload: bytes = b"") -> tuple[int, bytes]:
        return self.domain.domain, bytes(128)

    def label(self, _ssidref: int) -> str:
        return ""

    def runs(self) -> None:
        self.domain = replace(self.domain, cpu_time=10**9, paused=False)


BUILT = DomainInfo(5, str(UUID(int=5)), cpu_time=0, paused=True, dying=False, shutdown_code=None, hvm=False, ssidref=0)
PLACE, WHO = Place(0, 5, 0), Identity("web", BUILT.uuid)


def ran_before(xen: Xen, directory: Path) -> bool | None:
    return XenWitness(cast("Hypervisor", xen), directory).testify(PLACE, WHO).ran_before


def met(xen: Xen, directory: Path) -> XenWitness:
    witness = XenWitness(cast("Hypervisor", xen), directory)
    witness.meet(PLACE)
    return witness


def test_a_guest_that_gets_its_vtpm_as_it_is_built_is_not_late_however_soon_it_runs(tmp_path: Path) -> None:
    xen = Xen(BUILT)
    met(xen, tmp_path)
    assert ran_before(xen, tmp_path) is False
    xen.runs()
    assert ran_before(xen, tmp_path) is False


def test_another_vtpm_that_comes_to_the_device_later_is_late(tmp_path: Path) -> None:
    xen = Xen(BUILT)
    met(xen, tmp_path).bound(PLACE)
    xen.runs()
    assert ran_before(xen, tmp_path) is True, "detached and attached anew under the guest, which then asks again"


def test_a_guest_that_ran_for_long_before_anybody_gave_it_its_vtpm_is_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xen = Xen(BUILT)
    met(xen, tmp_path)
    monkeypatch.setattr(xen_backend_witness, "EARLY_SECONDS", -1.0, raising=False)
    assert ran_before(xen, tmp_path) is False, "still as it was built"
    xen.runs()
    assert ran_before(xen, tmp_path) is True


def test_a_restored_guest_that_does_not_find_its_vtpm_as_it_left_it_is_late(tmp_path: Path) -> None:
    xen = Xen(BUILT, past=True)
    met(xen, tmp_path)
    assert ran_before(xen, tmp_path) is True, "its kernel ran in another life"


def test_a_full_disk_is_no_word_for_a_guest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    xen = Xen(BUILT)
    (tmp_path / ".5-0.met").mkdir()  # where the note is written first
    met(xen, tmp_path)
    assert "cannot be written" in caplog.text
    assert ran_before(xen, tmp_path) is None
