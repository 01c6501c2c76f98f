"""Hierarchy passwords: durable in the escrow before they are set, and never left behind by an init that was cut."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fixtures_tpm import SwtpmProcess, recorded_bus, running_swtpm
from manager_rig import ModelTpm, PowerCutError, as_tpm

from manager import hierarchies, provision, recovery
from manager.__main__ import main as vtpm_manager
from manager.config import Config, Layout
from manager.errors import ConflictError, DeniedError, IntegrityError, ManagerError, UsageError
from manager.hierarchies import HierarchyAuths
from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import HierarchyAuthRefused, OwnerAuthWanted, TpmError
from manager.hwtpm_hierarchies import Hierarchy
from manager.keys import PlatformSecret, PlatformSecretWithAuths
from manager.opening import locked_store, open_store, read_boot_area
from manager.provision import InitOptions, initialise
from manager.recovery_errors import EscrowWrongKey
from manager.recovery_key import RecoveryPrivate, write_recovery_files
from storage.disk import Device
from storage.secrets import SecretWiped, WrongSecretSize
from storage.store_head import BootCopy, read_boot, write_boot_copy

ALL = tuple(Hierarchy)


@pytest.fixture(scope="module")
def key() -> RecoveryPrivate:
    return RecoveryPrivate.new()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "state", tmp_path / "run")
    made.state_dir.mkdir(mode=0o700)
    return made


@pytest.fixture
def options(tmp_path: Path, key: RecoveryPrivate) -> InitOptions:
    public = write_recovery_files(str(tmp_path / "recovery.pem"), key, None)
    return InitOptions(
        tcti="embedded",
        locality=2,
        pcrs="none",
        recovery=Path(public),
        store_size=256 * 1024,
        set_hierarchy_auth=True,
    )


def escrowed(store: Path, key: RecoveryPrivate) -> dict[Hierarchy, bytes]:
    descriptor = os.open(store, os.O_RDONLY)
    try:
        uuid, boot = read_boot_area(descriptor)
    finally:
        os.close(descriptor)
    return hierarchies.open_escrow(boot.hierarchies, key, uuid)


def dies_before_cleaning_up(killing: pytest.MonkeyPatch) -> None:
    """What its first call takes away is an earlier init's; the second, after the fault, does not happen any more."""
    calls = iter([provision.clean_up_interrupted])

    def once(*arguments: Any) -> None:
        for real in calls:
            real(*arguments)
            return

    killing.setattr(provision, "clean_up_interrupted", once)


# --- what holds them ------------------------------------------------------------------------------


def test_passwords_are_packed_and_do_not_print() -> None:
    auths = {Hierarchy.OWNER: b"o" * 32, Hierarchy.LOCKOUT: b"l"}
    packed = HierarchyAuths.of(auths)
    assert [packed.auth(name) for name in ALL] == [b"o" * 32, b"", b"l"]
    assert repr(packed) == "<HierarchyAuths 99 bytes>"
    with pytest.raises(IntegrityError):
        HierarchyAuths(b"\xff" * 99).auth(Hierarchy.OWNER)
    plan = hierarchies.Plan(given=auths)
    assert "oooo" not in repr(plan)


def test_the_platform_secret_has_two_sizes_and_both_are_read() -> None:
    small = PlatformSecret.new()
    assert (small.size, small.owner_auth, small.endorsement_auth) == (64, b"", b"")
    large = small.with_auths(b"owner", b"e" * 32)
    again = PlatformSecret(large.reveal())
    assert type(again) is PlatformSecretWithAuths
    assert (again.store_key, again.anchor_auth) == (small.store_key, small.anchor_auth)
    assert (again.owner_auth, again.endorsement_auth) == (b"owner", b"e" * 32)
    for size in (0, 63, 65, 96, 127, 129):
        with pytest.raises(WrongSecretSize):
            PlatformSecret(bytes(size))
    again.wipe()
    with pytest.raises(SecretWiped):
        _ = again.owner_auth


# --- what is refused ------------------------------------------------------------------------------


def test_a_password_that_is_there_and_not_given_is_refused(layout: Layout, options: InitOptions) -> None:
    for name in ALL:
        model = ModelTpm()
        model.auths[name] = b"somebody's"
        with pytest.raises(DeniedError, match=rf"{name} hierarchy has a password already.*--{name}-auth-file"):
            initialise(layout, options, as_tpm(model))
        assert not list(layout.state_dir.iterdir())
        assert model.auths == {name: b"somebody's"}


def test_a_password_that_is_given_and_not_there_is_refused(layout: Layout, options: InitOptions) -> None:
    with pytest.raises(UsageError, match="has no password"):
        initialise(layout, replace(options, hierarchy_auths={Hierarchy.OWNER: b"x"}), as_tpm(ModelTpm()))


def test_without_a_recovery_key_nothing_is_set(layout: Layout, options: InitOptions) -> None:
    model = ModelTpm()
    with pytest.raises(UsageError, match="takes a recovery key"):
        initialise(layout, replace(options, recovery=None), as_tpm(model))
    assert model.auths == {}


@pytest.mark.parametrize("content", [b"", b"\n", b"\0\0", b"x" * 33, b"x" * 34])
def test_a_password_file_of_an_impossible_size_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "auth").write_bytes(content)
    with pytest.raises(UsageError, match="1 to 32 bytes"):
        hierarchies.read_auth(str(tmp_path / "auth"))
    with pytest.raises(UsageError, match="No such file"):
        hierarchies.read_auth(str(tmp_path / "none"))
    (tmp_path / "auth").write_bytes(b"secret\n")
    assert hierarchies.read_auth(str(tmp_path / "auth")) == b"secret"


# --- init, whole and cut --------------------------------------------------------------------------


def test_all_three_are_set_and_in_the_escrow(layout: Layout, options: InitOptions, key: RecoveryPrivate) -> None:
    model = ModelTpm()
    initialise(layout, options, as_tpm(model))
    kept = escrowed(layout.store, key)
    assert model.auths == kept
    assert set(kept) == set(ALL)
    assert len(set(kept.values())) == 3
    assert all(len(auth) > 24 for auth in kept.values())
    with pytest.raises(EscrowWrongKey):
        escrowed(layout.store, RecoveryPrivate.new())
    image = layout.store.read_bytes()
    assert not any(auth in image for auth in kept.values())
    model.used = {"owner": b"", "endorsement": b""}
    with locked_store(layout) as descriptor:
        made = open_store(descriptor, as_tpm(model), Config.load(layout.config))
        made.store.close()
    assert model.used == {"owner": kept[Hierarchy.OWNER], "endorsement": kept[Hierarchy.ENDORSEMENT]}
    sealed = [secret for secret, _ in model.sealed.values()]
    assert not any(kept[Hierarchy.LOCKOUT] in secret for secret in sealed), "only the escrow holds it"


STEPS = [f"change_hierarchy_auth {name}" for name in ALL] + ["seal", "anchor_define", "anchor_write"]


@pytest.mark.parametrize("dies", [True, False], ids=["killed", "failed"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_cut_anywhere_no_password_is_unknown(
    layout: Layout,
    options: InitOptions,
    key: RecoveryPrivate,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    when: str,
    dies: bool,
) -> None:
    model = ModelTpm()
    model.fail[step] = when, PowerCutError()
    with monkeypatch.context() as killing:
        if dies:
            dies_before_cleaning_up(killing)
        with pytest.raises(PowerCutError):
            initialise(layout, options, as_tpm(model))
    set_now = {name: auth for name, auth in model.auths.items() if auth}
    if step.endswith("lockout"):  # the installation is in place, and complete but for this
        kept = escrowed(layout.store, key)
        assert set_now.items() <= kept.items()
        hierarchies.set_made(as_tpm(model), kept)
        assert model.auths == kept
        return
    if set_now:
        assert dies
        assert set_now.items() <= escrowed(layout.store.with_suffix(".new"), key).items()
    model.used = {"owner": b"", "endorsement": b""}
    initialise(layout, options, as_tpm(model))
    assert model.auths == escrowed(layout.store, key)
    assert len(model.indices) == 1


def test_passwords_of_a_cut_init_that_cannot_be_unsealed_are_not_forgotten(
    layout: Layout, options: InitOptions, key: RecoveryPrivate, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelTpm()
    options = replace(options, pcrs="sha256:7")
    model.fail["change_hierarchy_auth endorsement"] = "after", PowerCutError()
    with monkeypatch.context() as killing:
        dies_before_cleaning_up(killing)
        with pytest.raises(PowerCutError):
            initialise(layout, options, as_tpm(model))
    model.pcrs[7] = b"\x77" * 32
    unfinished = layout.store.with_suffix(".new")
    before = unfinished.read_bytes()
    with pytest.raises(ConflictError, match="show-hierarchy-auth"):
        initialise(layout, options, as_tpm(model))
    assert unfinished.read_bytes() == before
    assert model.auths == {name: escrowed(unfinished, key)[name] for name in ALL if name is not Hierarchy.LOCKOUT}
    model.auths.clear()  # the operator took them away
    initialise(layout, options, as_tpm(model))
    assert model.auths == escrowed(layout.store, key)


def test_an_init_on_another_tpm_does_not_throw_the_passwords_of_a_cut_one_away(
    layout: Layout, options: InitOptions, key: RecoveryPrivate, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelTpm()
    model.fail["change_hierarchy_auth endorsement"] = "after", PowerCutError()
    with monkeypatch.context() as killing:
        dies_before_cleaning_up(killing)
        with pytest.raises(PowerCutError):
            initialise(layout, options, as_tpm(model))
    assert model.auths
    with pytest.raises(ConflictError, match=r"another TPM, or a cleared one.*show-hierarchy-auth"):
        initialise(layout, options, as_tpm(ModelTpm(srk=b"\0\x0b" + bytes(32))))
    assert model.auths.items() <= escrowed(layout.store.with_suffix(".new"), key).items()
    initialise(layout, options, as_tpm(model))
    assert model.auths == escrowed(layout.store, key)


def test_a_lockout_password_that_could_not_be_set_is_told(layout: Layout, options: InitOptions) -> None:
    model = ModelTpm()
    model.fail["change_hierarchy_auth lockout"] = "before", HierarchyAuthRefused("lockout")
    with pytest.raises(ManagerError, match=r"installation is made, but.*--complete"):
        initialise(layout, options, as_tpm(model))
    assert layout.store.exists()


# --- on a real TPM --------------------------------------------------------------------------------


@pytest.fixture
def swtpm() -> Iterator[SwtpmProcess]:
    with running_swtpm() as process:
        yield process


def test_a_real_tpm_takes_them_and_shows_none_on_the_bus(
    swtpm: SwtpmProcess, layout: Layout, options: InitOptions, key: RecoveryPrivate
) -> None:
    with recorded_bus(swtpm) as bus:
        with HardwareTpm.open(bus.setting) as tpm:
            initialise(layout, options, tpm)
            found = tpm.properties()
            assert (found.owner_auth_set, found.endorsement_auth_set, found.lockout_auth_set) == (True,) * 3
        kept = escrowed(layout.store, key)
        assert not any(bus.saw(auth) for auth in kept.values())
        with HardwareTpm.open(bus.setting) as tpm, locked_store(layout) as descriptor:
            tpm.open_srk(bytes.fromhex(Config.load(layout.config).tpm.srk_name))
            free = tpm.anchor_free_index()
            with pytest.raises(OwnerAuthWanted):
                tpm.anchor_define(free, bytes(32))
            made = open_store(descriptor, tpm, Config.load(layout.config))
            other = tpm.anchor_define(tpm.anchor_free_index(), bytes(32))
            tpm.anchor_undefine(other)
            assert tpm.attester.quote(tpm.attester.new_key(), 1, bytes(32)), "the endorsement password is used as well"
            made.store.close()
            with pytest.raises(HierarchyAuthRefused):
                tpm.change_hierarchy_auth(Hierarchy.ENDORSEMENT, b"wrong", b"")
        assert not any(bus.saw(auth) for auth in kept.values())
    cleared = swtpm_tool(swtpm, "tpm2_clear", "-c", "l")
    assert cleared != 0, "an empty lockout password clears nothing any more"


def swtpm_tool(swtpm: SwtpmProcess, *words: str) -> int:
    import subprocess

    environment = os.environ | {"TPM2TOOLS_TCTI": swtpm.tcti}
    return subprocess.run(words, env=environment, capture_output=True, check=False).returncode


@pytest.mark.parametrize("executes", [False, True], ids=["unsent", "unanswered"])
def test_init_cut_between_tpm_commands_leaves_no_unknown_password(
    swtpm: SwtpmProcess,
    tmp_path: Path,
    options: InitOptions,
    key: RecoveryPrivate,
    monkeypatch: pytest.MonkeyPatch,
    executes: bool,
) -> None:
    """Every 29th command, each of those that change a password among them."""
    with recorded_bus(swtpm) as bus:
        whole = fresh(tmp_path, "whole")
        with HardwareTpm.open(bus.setting) as tpm:
            before = len(bus.commands)
            initialise(whole, options, tpm)
            codes = [int.from_bytes(command[6:10]) for command in bus.commands[before:]]
        assert clear(swtpm, escrowed(whole.store, key)[Hierarchy.LOCKOUT]) == 0
        changes = [place for place, code in enumerate(codes) if code == 0x129]  # TPM2_HierarchyChangeAuth
        assert len(changes) == 3
        for place in sorted({*changes, *range(0, len(codes), 29)}):
            layout = fresh(tmp_path, f"{place}")
            with monkeypatch.context() as killing, HardwareTpm.open(bus.setting) as tpm:
                dies_before_cleaning_up(killing)
                bus.cut_at, bus.cut_executes = place, executes
                with suppress(ManagerError):
                    initialise(layout, options, tpm)
            assert bus.was_cut
            bus.cut_at, bus.was_cut = None, False
            with HardwareTpm.open(bus.setting) as tpm:
                if not layout.store.exists():
                    initialise(layout, options, tpm)
                kept = escrowed(layout.store, key)
                tpm.provision_srk()
                hierarchies.set_made(tpm, kept)
            assert clear(swtpm, kept[Hierarchy.LOCKOUT]) == 0, f"after command {place} the password is unknown"


def clear(swtpm: SwtpmProcess, lockout: bytes) -> int:
    return swtpm_tool(swtpm, "tpm2_clear", "-c", "l", f"hex:{lockout.hex()}")


def fresh(base: Path, name: str) -> Layout:
    made = Layout(base / name, base / "run")
    made.state_dir.mkdir(mode=0o700)
    return made


def test_given_passwords_are_used_kept_and_left_as_they_are(
    swtpm: SwtpmProcess, layout: Layout, options: InitOptions, key: RecoveryPrivate, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HardwareTpm.open(swtpm.setting) as tpm:
        tpm.provision_srk()
        tpm.change_hierarchy_auth(Hierarchy.OWNER, b"", b"owned")
    given = replace(options, hierarchy_auths={Hierarchy.OWNER: b"owned"})
    with HardwareTpm.open(swtpm.setting) as tpm:
        with pytest.raises(TpmError):
            initialise(layout, replace(given, hierarchy_auths={Hierarchy.OWNER: b"guess"}), tpm)
        with monkeypatch.context() as cut:
            cut.setattr(provision, "finish_store", cut_off)
            with pytest.raises(PowerCutError):
                initialise(layout, given, tpm)
        assert tpm.properties().owner_auth_set
        assert not tpm.properties().endorsement_auth_set
        initialise(layout, given, tpm)
    kept = escrowed(layout.store, key)
    assert kept[Hierarchy.OWNER] == b"owned"
    assert swtpm_tool(swtpm, "tpm2_changeauth", "-c", "o", "-p", "owned") == 0, "it is still the operator's"


def cut_off(*_: Any) -> None:
    raise PowerCutError


def test_a_wrong_endorsement_password_is_not_kept(swtpm: SwtpmProcess, layout: Layout, options: InitOptions) -> None:
    """No other command of an init uses it: the first quote would find it out."""
    with HardwareTpm.open(swtpm.setting) as tpm:
        tpm.provision_srk()
        tpm.change_hierarchy_auth(Hierarchy.ENDORSEMENT, b"", b"right")
        options = replace(options, set_hierarchy_auth=False)
        with pytest.raises(HierarchyAuthRefused):
            initialise(layout, replace(options, hierarchy_auths={Hierarchy.ENDORSEMENT: b"wrong"}), tpm)
        assert not list(layout.state_dir.iterdir())
        initialise(layout, replace(options, hierarchy_auths={Hierarchy.ENDORSEMENT: b"right"}), tpm)
    assert swtpm_tool(swtpm, "tpm2_changeauth", "-c", "e", "-p", "right") == 0, "it is still what it was"


def test_show_tells_them_and_completes_what_is_missing(
    swtpm: SwtpmProcess,
    tmp_path: Path,
    layout: Layout,
    options: InitOptions,
    key: RecoveryPrivate,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import json

    options = replace(options, tcti=swtpm.tcti)
    with HardwareTpm.open(swtpm.setting) as tpm, monkeypatch.context() as cut:
        cut.setattr(provision, "_set_lockout", cut_off)
        with pytest.raises(PowerCutError):
            initialise(layout, options, tpm)
    words = ["show-hierarchy-auth", "--state-dir", str(layout.state_dir), "--key", str(tmp_path / "recovery.pem")]
    assert vtpm_manager([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    kept = escrowed(layout.store, key)
    assert {name: bytes.fromhex(shown[f"{name}_auth"]) for name in ALL} == kept
    assert vtpm_manager([*words, "--complete"]) == 0
    assert "set the lockout password" in capsys.readouterr().out
    assert vtpm_manager([*words, "--complete"]) == 0
    assert "set the" not in capsys.readouterr().out
    assert clear(swtpm, kept[Hierarchy.LOCKOUT]) == 0


def test_completing_does_not_believe_what_stands_in_clear(
    swtpm: SwtpmProcess,
    tmp_path: Path,
    layout: Layout,
    options: InitOptions,
    key: RecoveryPrivate,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Anybody can make an escrow for a recovery public key: one who edits the image must not choose the password."""
    options = replace(options, tcti=swtpm.tcti)
    with HardwareTpm.open(swtpm.setting) as tpm, monkeypatch.context() as cut:
        cut.setattr(provision, "_set_lockout", cut_off)
        with pytest.raises(PowerCutError):
            initialise(layout, options, tpm)
    with open(layout.store, "r+b") as file:
        uuid, boot = read_boot_area(file.fileno())
        theirs = hierarchies.Plan(made=dict.fromkeys(ALL, b"the adversary's")).kept(key.public, uuid)
        device = Device(file.fileno())
        place, sequence = read_boot(device, uuid).place, read_boot(device, uuid).sequence
        write_boot_copy(device, uuid, BootCopy(1 - place, sequence + 1, replace(boot, hierarchies=theirs).pack()))
    words = ["show-hierarchy-auth", "--state-dir", str(layout.state_dir), "--key", str(tmp_path / "recovery.pem")]
    vtpm_manager([*words, "--complete"])
    capsys.readouterr()
    assert clear(swtpm, b"the adversary's") != 0


def test_a_given_password_that_the_tpm_has_not_any_more_is_not_used(
    swtpm: SwtpmProcess, layout: Layout, options: InitOptions, key: RecoveryPrivate
) -> None:
    """A recovery sets none that `init` was given: the new TPM's owner may have none, or take his away later."""
    with HardwareTpm.open(swtpm.setting) as tpm:
        tpm.provision_srk()
        tpm.change_hierarchy_auth(Hierarchy.OWNER, b"", b"owned")
    options = replace(options, tcti=swtpm.tcti, set_hierarchy_auth=False, hierarchy_auths={Hierarchy.OWNER: b"owned"})
    with HardwareTpm.open(swtpm.setting) as tpm:
        initialise(layout, options, tpm)
    assert swtpm_tool(swtpm, "tpm2_clear", "-c", "l") == 0
    _, config = recovery.recover(layout, Config.load(layout.config), key)
    with HardwareTpm.open(swtpm.setting) as tpm, locked_store(layout) as descriptor:
        assert not tpm.properties().owner_auth_set
        open_store(descriptor, tpm, config).store.close()
        tpm.anchor_undefine(tpm.anchor_define(tpm.anchor_free_index(), bytes(32)))


def test_recovery_on_a_cleared_tpm_sets_them_again(
    swtpm: SwtpmProcess, layout: Layout, options: InitOptions, key: RecoveryPrivate
) -> None:
    options = replace(options, tcti=swtpm.tcti)
    with HardwareTpm.open(swtpm.setting) as tpm:
        initialise(layout, options, tpm)
    kept = escrowed(layout.store, key)
    assert clear(swtpm, kept[Hierarchy.LOCKOUT]) == 0
    _, config = recovery.recover(layout, Config.load(layout.config), key)
    with HardwareTpm.open(swtpm.setting) as tpm, locked_store(layout) as descriptor:
        found = tpm.properties()
        assert (found.owner_auth_set, found.endorsement_auth_set, found.lockout_auth_set) == (True,) * 3
        open_store(descriptor, tpm, config).store.close()
        tpm.anchor_undefine(tpm.anchor_define(tpm.anchor_free_index(), bytes(32)))
    assert clear(swtpm, kept[Hierarchy.LOCKOUT]) == 0
