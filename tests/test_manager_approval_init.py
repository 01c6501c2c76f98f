"""`init --saa` on a real TPM: what it seals, and that one cut anywhere leaves no revocation index behind."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from approval_rig import approve as approve_by
from fixtures_tpm import SwtpmProcess, recorded_bus, running_swtpm

from manager import provision, reseal
from manager.approval_errors import ApprovalRoom
from manager.approval_files import TARGETS
from manager.approval_key import ApproverPrivate
from manager.approval_records import approvals_in
from manager.approval_target import Target
from manager.approve_offline import Wish, approve
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


def test_of_several_approvals_all_are_installed_or_none(
    swtpm: SwtpmProcess, tmp_path: Path, options: InitOptions
) -> None:
    """The one that there is no room for says that nothing was changed."""
    layout = fresh(tmp_path, "state")
    with HardwareTpm.open(swtpm.setting) as tpm:
        initialise(layout, replace(options, tcti=swtpm.tcti), tpm)
        present = tpm.pcr_read(range(16))
    config = Config.load(layout.config)
    told = {path.stem: json.loads(path.read_text()) for path in (layout.state_dir / TARGETS).iterdir()}
    platform, default = (Target.from_json(told[name], name) for name in ("platform", "default"))
    first = [approve_by(SAA, platform, present), approve_by(SAA, default, present)]
    approve(layout, config, Wish(first))
    before = layout.store.read_bytes()
    long = [approve_by(SAA, platform, present | {7: os.urandom(32)}, number) for number in range(2, 12)]
    with pytest.raises(ApprovalRoom, match="Nothing was changed"):
        approve(layout, config, Wish(long))
    assert layout.store.read_bytes() == before
    approve(layout, config, Wish([long[0], approve_by(SAA, default, present, 2)]))
    assert [one.sequence for one in approvals_in(boot_area(layout))] == [1, 2]


def test_another_approver_who_is_named_half_way_is_named_by_doing_it_again(
    swtpm: SwtpmProcess, tmp_path: Path, options: InitOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power fails between two TPM commands; the former approver, whose key is lost, approves nothing meanwhile."""
    key, layout = RecoveryPrivate.new(), fresh(tmp_path, "state")
    targets = layout.state_dir / TARGETS
    assert options.recovery is not None
    options.recovery.write_bytes(key.public.to_pem())
    with recorded_bus(swtpm) as bus:

        @contextmanager
        def open_it(*_: object) -> Iterator[HardwareTpm]:
            with HardwareTpm.open(bus.setting) as tpm:
                yield tpm

        monkeypatch.setattr(reseal, "open_tpm", open_it)
        with open_it() as tpm:
            initialise(layout, options, tpm)
        config = Config.load(layout.config)

        def name(approver: ApproverPrivate) -> None:
            reseal.reseal(layout, config, key, {}, None, approver.public.to_pem().decode())

        before = len(bus.commands)
        name(SAA)
        count = len(bus.commands) - before
        for place in range(4, count, 5):
            following = ApproverPrivate.new()
            bus.cut_at, bus.cut_executes = place, place % 2 == 0
            with suppress(ManagerError):
                name(following)
            assert bus.was_cut
            bus.cut_at, bus.was_cut = None, False
            name(following)
            told = [Target.from_json(json.loads(path.read_text()), "it") for path in targets.iterdir()]
            assert {target.approver for target in told} == {following.public.fingerprint}, f"cut at command {place}"
            assert boot_area(layout).platform.policy.approver_point == following.public.point
