"""`init --saa` on a real TPM: what it seals, and that one cut anywhere leaves no revocation index behind."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures_tpm import SwtpmProcess, recorded_bus, running_swtpm

from manager import provision
from manager.approval_files import TARGETS
from manager.approval_key import ApproverPrivate
from manager.approval_target import Target
from manager.config import Config, Layout
from manager.errors import ManagerError, UsageError
from manager.hwtpm import HardwareTpm
from manager.hwtpm_revocation import FIRST_INDEX, LAST_INDEX
from manager.keys import BootArea
from manager.provision import InitOptions, initialise
from manager.recovery_key import RecoveryPrivate
from storage.store import Store

SAA = ApproverPrivate.new()


@pytest.fixture
def swtpm() -> Iterator[SwtpmProcess]:
    with running_swtpm() as process:
        yield process


@pytest.fixture
def options(tmp_path: Path) -> InitOptions:
    recovery, saa = tmp_path / "recovery.pub", tmp_path / "saa.pub"
    recovery.write_bytes(RecoveryPrivate.new().public.to_pem())
    saa.write_bytes(SAA.public.to_pem())
    return InitOptions(
        tcti="swtpm:path=x", locality=2, pcrs="sha256:0,7", recovery=recovery, store_size=256 * 1024, saa=saa
    )


def fresh(base: Path, name: str) -> Layout:
    made = Layout(base / name, base / "run")
    made.state_dir.mkdir(mode=0o700)
    return made


def indices(tpm: HardwareTpm) -> list[int]:
    with tpm._link.operation("look") as esapi:
        return [index for index in tpm._link.handles(esapi, 0x01000000) if FIRST_INDEX <= index <= LAST_INDEX]


def boot_area(layout: Layout) -> BootArea:
    with layout.store.open("rb") as image:
        return BootArea.unpack(Store.read_boot_area(image.fileno())[1])


def test_the_targets_are_those_that_the_keys_are_sealed_for(
    swtpm: SwtpmProcess, tmp_path: Path, options: InitOptions
) -> None:
    layout = fresh(tmp_path, "state")
    with HardwareTpm.open(swtpm.setting) as tpm:
        store = initialise(layout, options, tpm)
        boot = boot_area(layout)
        assert boot.revocation is not None
        assert indices(tpm) == [boot.revocation.index]
        assert set(tpm.revocations.read(boot.revocation)) == {0}
    assert Config.load(layout.config).tpm.pcrs == "sha256:0,7"
    told = {path.stem: json.loads(path.read_text()) for path in (layout.state_dir / TARGETS).iterdir()}
    assert set(told) == {"platform", "default"}
    platform, default = (Target.from_json(told[name], name) for name in ("platform", "default"))
    assert (platform.store, platform.slot, default.slot) == (store, 0, 1)
    assert platform.reference == boot.platform.policy.reference
    assert boot.platform.policy.approver_point == SAA.public.point
    assert told["platform"]["pcr_values"] == f"0={'00' * 32},7={'00' * 32}"


@pytest.mark.parametrize("change", [{"recovery": None}, {"pcrs": "none"}])
def test_an_approver_takes_a_recovery_key_and_pcrs(
    swtpm: SwtpmProcess, tmp_path: Path, options: InitOptions, change: dict[str, str | None]
) -> None:
    layout = fresh(tmp_path, "state")
    with HardwareTpm.open(swtpm.setting) as tpm, pytest.raises(UsageError):
        initialise(layout, replace(options, **change), tpm)
    assert list(layout.state_dir.iterdir()) == []


@pytest.mark.parametrize("executes", [False, True], ids=["unsent", "unanswered"])
def test_an_init_cut_between_tpm_commands_leaves_no_index(
    swtpm: SwtpmProcess, tmp_path: Path, options: InitOptions, monkeypatch: pytest.MonkeyPatch, executes: bool
) -> None:
    """Killed, so that it does not clean up itself: the next init in that directory does."""
    with recorded_bus(swtpm) as bus:
        with HardwareTpm.open(bus.setting) as tpm:
            before = len(bus.commands)
            initialise(fresh(tmp_path, "whole"), options, tpm)
            codes = [int.from_bytes(command[6:10]) for command in bus.commands[before:]]
        swtpm.tool("tpm2_clear", "-c", "p")
        writes = [place for place, code in enumerate(codes) if code in (0x12A, 0x137)]  # NV_DefineSpace, NV_Write
        assert len(writes) == 4, "two indices, each defined and written"
        for place in sorted({*writes, *(write + 1 for write in writes), *range(0, len(codes), 61)}):
            layout = fresh(tmp_path, f"{place}")
            with monkeypatch.context() as killing, HardwareTpm.open(bus.setting) as tpm:
                calls: Iterator[Callable[..., None]] = iter([provision.clean_up_interrupted])
                killing.setattr(provision, "clean_up_interrupted", lambda *a, c=calls: next(c, lambda *_: None)(*a))
                bus.cut_at, bus.cut_executes = place, executes
                with suppress(ManagerError):
                    initialise(layout, options, tpm)
            assert bus.was_cut
            bus.cut_at, bus.was_cut = None, False
            with HardwareTpm.open(bus.setting) as tpm:
                if not layout.store.exists():
                    initialise(layout, options, tpm)
                tpm.provision_srk()
                boot = boot_area(layout)
                assert boot.revocation is not None
                assert indices(tpm) == [boot.revocation.index], f"cut at command {place}"
                assert set(tpm.revocations.read(boot.revocation)) == {0}
            swtpm.tool("tpm2_clear", "-c", "p")
