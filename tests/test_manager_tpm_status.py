"""tpm-status, of the TPM itself (of a running manager: tests/e2e); and how many places of a chip we use."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from fixtures_tpm import BusRelay, SwtpmProcess, recorded_bus, running_swtpm
from tpm2_pytss import TPM2_CC

from manager import recovery, reseal
from manager.__main__ import main as vtpm_manager
from manager.anchor import clean_stop
from manager.config import Config, Layout
from manager.hwtpm import HardwareTpm
from manager.opening import locked_store, open_store
from manager.provision import InitOptions, initialise
from manager.recovery_key import RecoveryPrivate, write_recovery_files

OBJECTS, SESSIONS = 2, 1  # what docs/hardware.md says we use; the smallest chips have 3 of each
LOADS = {TPM2_CC.Load, TPM2_CC.LoadExternal, TPM2_CC.CreatePrimary, TPM2_CC.ContextLoad, TPM2_CC.CreateLoaded}


def tool(swtpm: SwtpmProcess, *words: str) -> int:
    environment = os.environ | {"TPM2TOOLS_TCTI": swtpm.tcti}
    return subprocess.run(words, env=environment, capture_output=True, check=False).returncode


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert vtpm_manager(["tpm-status", *words, "--json"]) == 0
    document: dict[str, object] = json.loads(capsys.readouterr().out)
    return document


def test_a_tpm_of_no_installation_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_swtpm() as swtpm:
        places = ("--state-dir", str(tmp_path), "--runtime-dir", str(tmp_path), "--tcti", swtpm.tcti)
        found = shown(capsys, *places)
        assert found["self_test"] == "passed"
        assert (found["in_lockout"], found["lockout_counter"]) == (False, 0)
        assert not found["owner_auth_set"]
        assert not found["lockout_auth_set"]
        assert found["anchor_index"] is None
        assert "sha256" in str(found["pcr_banks"])
        assert tool(swtpm, "tpm2_changeauth", "-c", "l", "locked") == 0
        assert tool(swtpm, "tpm2_dictionarylockout", "-s", "-n", "5", "-t", "7", "-l", "9", "-p", "locked") == 0
        swtpm.stop()
        swtpm.start()
        again = shown(capsys, *places)
        assert again["lockout_auth_set"]
        assert (again["lockout_most"], again["lockout_interval"], again["lockout_recovery"]) == (5, 7, 9)
        assert isinstance(found["reset_count"], int)
        assert again["reset_count"] == found["reset_count"] + 1


def test_an_installations_tpm_shows_its_anchor_until_somebody_takes_it_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = Layout(tmp_path / "state", tmp_path / "run")
    layout.state_dir.mkdir(mode=0o700)
    with running_swtpm() as swtpm:
        options = InitOptions(swtpm.tcti, 2, "none", None, 256 * 1024)
        with HardwareTpm.open(swtpm.setting) as tpm:
            initialise(layout, options, tpm)
        places = ("--state-dir", str(layout.state_dir), "--runtime-dir", str(layout.runtime_dir))
        found = shown(capsys, *places)
        assert (found["anchor_index"], found["anchor_defined"]) == ("0x01800100", True)
        assert (found["storage_root_key"], found["nv_indices"]) == (True, 1)
        assert tool(swtpm, "tpm2_nvundefine", "0x01800100", "-C", "o") == 0
        assert shown(capsys, *places)["anchor_defined"] is False


def test_failure_mode_is_told_with_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_swtpm() as swtpm, recorded_bus(swtpm) as bus:
        bus.alter[int(TPM2_CC.GetTestResult)] = bytes.fromhex("80010000000a00000101")
        words = ["tpm-status", "--state-dir", str(tmp_path), "--runtime-dir", str(tmp_path)]
        assert vtpm_manager([*words, "--tcti", f"swtpm:path={bus.path}"]) == 7
        assert "failure mode" in capsys.readouterr().err


class HighWater:
    """How many objects and sessions were loaded at once, by what went over the bus."""

    def __init__(self, bus: BusRelay) -> None:
        live: dict[str, set[int]] = {"objects": set(), "sessions": set()}
        self.objects = self.sessions = self.commands = 0
        for command, response in zip(bus.commands, bus.responses, strict=True):
            code, refused = int.from_bytes(command[6:10]), int.from_bytes(response[6:10])
            self.commands += 1
            if refused:
                assert refused not in (0x902, 0x903, 0x905), f"the TPM had no room for command 0x{code:x}"
                continue
            handle = int.from_bytes(response[10:14])
            if code == TPM2_CC.StartAuthSession:
                live["sessions"].add(handle)
            elif code in LOADS:
                live["objects"].add(handle)
            elif code == TPM2_CC.FlushContext:
                gone = int.from_bytes(command[10:14])
                live["sessions"].discard(gone)
                live["objects"].discard(gone)
            elif code in (TPM2_CC.HashSequenceStart, TPM2_CC.HMAC_Start):
                pytest.fail("sequences take an object each: count them here")
            self.objects = max(self.objects, len(live["objects"]))
            self.sessions = max(self.sessions, len(live["sessions"]))
        self.left = live


def test_what_a_small_chip_has_is_never_exceeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """init, open, anchors, reseal, recover on a cleared TPM; every command on the bus counted."""
    key = RecoveryPrivate.new()
    public = write_recovery_files(str(tmp_path / "recovery.pem"), key, None)
    layout = Layout(tmp_path / "state", tmp_path / "run")
    layout.state_dir.mkdir(mode=0o700)
    with running_swtpm() as swtpm, recorded_bus(swtpm) as bus:
        tcti = f"swtpm:path={bus.path}"
        options = InitOptions(tcti, 2, "sha256:0,7", Path(public), 256 * 1024, set_hierarchy_auth=True)
        with HardwareTpm.open(bus.setting) as tpm:
            initialise(layout, options, tpm)
        config = Config.load(layout.config)
        with HardwareTpm.open(bus.setting) as tpm, locked_store(layout) as descriptor:
            made = open_store(descriptor, tpm, config)
            tpm.pcr22_extend(made.store.digest())
            tpm.anchor_write(made.boot.anchor, made.secret.anchor_auth, clean_stop(made.store.digest()))
            tpm.random(64)
            tpm.status()
            made.store.close()
        reseal.reseal(layout, config, key, {7: bytes(32)}, None)
        clear_by_platform(swtpm, bus)
        recovery.recover(layout, config, key)
        water = HighWater(bus)
    assert 1 <= water.objects <= OBJECTS
    assert 1 <= water.sessions <= SESSIONS
    assert water.left == {"objects": set(), "sessions": set()}
    assert water.commands > 100


def clear_by_platform(swtpm: SwtpmProcess, bus: BusRelay) -> None:
    kept = len(bus.commands)
    assert tool(swtpm, "tpm2_clear", "-c", "p") == 0
    assert len(bus.commands) == kept, "the tool's own commands are not ours"
