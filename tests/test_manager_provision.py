"""init, reseal and opening: cut anywhere, done again, and never half of it taken for the whole."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fixtures_tpm import running_swtpm
from manager_rig import SRK_NAME, ModelTpm, PowerCutError, as_tpm, initialised, lost_answer
from own_root import needs_own_root

from frontend_backend.messages_admin import ExitCode
from manager import maintenance, provision
from manager import reseal as resealing
from manager.anchor import Standing
from manager.config import Config, Layout
from manager.errors import (
    BusyError,
    ConfigurationError,
    ConflictError,
    DeniedError,
    IntegrityError,
    ManagerError,
    NotFoundError,
    RolledBackError,
    UsageError,
)
from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import TpmError
from manager.keys import BootArea, GroupSeal, PlatformSecret, catalogue_key, store_check
from manager.maintenance import Verdict
from manager.opening import Opened, locked_store, open_store, permissions_problem, read_boot_area
from manager.predicted import parse_predicted
from manager.provision import InitOptions, check_options, initialise, refuse_existing
from manager.recovery_key import RecoveryPublic
from manager.recovery_key import main as recovery_key
from storage.catalogue import Catalogue
from storage.secrets import StoreKey
from storage.store import Store

OPTIONS = InitOptions(tcti="embedded", locality=2, pcrs="none", recovery=None, store_size=256 * 1024)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "state", tmp_path / "run")
    made.state_dir.mkdir(mode=0o700)
    return made


@contextmanager
def opened(layout: Layout, model: ModelTpm, config: Config | None = None) -> Iterator[Opened]:
    with locked_store(layout) as descriptor:
        made = open_store(descriptor, as_tpm(model), config or Config.load(layout.config))
        try:
            yield made
        finally:
            made.store.close()
            made.secret.wipe()


def opens(layout: Layout, model: ModelTpm) -> Standing:
    with opened(layout, model) as made:
        assert not made.closed
        assert len(made.store.groups()) == 1
        key = catalogue_key(made.secret.store_key, made.store.uuid)
        with Catalogue.open(layout.catalogue, key) as catalogue:
            assert [group.name for group in catalogue.groups()] == ["default"]
        return made.standing


# --- init -----------------------------------------------------------------------------------------


def test_a_new_installation_opens_as_after_a_clean_stop(layout: Layout) -> None:
    model = ModelTpm()
    store = initialise(layout, OPTIONS, as_tpm(model))
    assert opens(layout, model) is Standing.CLEAN
    assert len(model.indices) == 1
    for path in (layout.store, layout.catalogue, layout.config):
        assert permissions_problem(path) is None
    assert sorted(path.name for path in layout.state_dir.iterdir()) == ["catalogue.sqlite", "config.toml", "store.img"]
    with pytest.raises(ConflictError, match="already"):
        initialise(layout, OPTIONS, as_tpm(model))
    with locked_store(layout) as descriptor:
        assert read_boot_area(descriptor)[0] == store


# every call of the TPM, and every step on the disk, at which `init` can be cut
TPM_STEPS = ["provision_srk", "anchor_free_index", "seal", "anchor_define", "anchor_write"]
DISK_STEPS: dict[str, tuple[Any, str]] = {
    "store": (Store, "create"),
    "group": (Store, "commit"),
    "checkpoint": (Store, "checkpoint"),
    "catalogue": (Catalogue, "create"),
    "catalogue row": (Catalogue, "add_group"),
    "configuration": (provision, "write_config"),
    "rename": (Path, "rename"),
}


def killed(monkeypatch: pytest.MonkeyPatch, layout: Layout, model: ModelTpm) -> None:
    """Init that is killed: nothing of it runs any more after the fault, also no clean-up."""
    with monkeypatch.context() as killing:
        real = provision.clean_up_interrupted
        calls = iter([real])

        def once(*arguments: Any) -> None:
            next(calls, lambda *_: None)(*arguments)

        killing.setattr(provision, "clean_up_interrupted", once)
        with pytest.raises((PowerCutError, TpmError, OSError)):
            initialise(layout, OPTIONS, as_tpm(model))


def again_works(layout: Layout, model: ModelTpm) -> None:
    with pytest.raises(NotFoundError), locked_store(layout):
        pass
    initialise(layout, OPTIONS, as_tpm(model))
    assert opens(layout, model) is Standing.CLEAN
    assert len(model.indices) == 1, "no NV index is left behind"
    assert sorted(path.name for path in layout.state_dir.iterdir()) == ["catalogue.sqlite", "config.toml", "store.img"]


@pytest.mark.parametrize("dies", [True, False], ids=["killed", "failed"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", TPM_STEPS)
def test_init_that_is_cut_at_the_tpm_can_be_done_again(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, step: str, when: str, dies: bool
) -> None:
    model = ModelTpm()
    model.fail[step] = when, PowerCutError()
    if dies:
        killed(monkeypatch, layout, model)
    else:
        with pytest.raises(PowerCutError):
            initialise(layout, OPTIONS, as_tpm(model))
        assert not model.indices
    again_works(layout, model)


@pytest.mark.parametrize("dies", [True, False], ids=["killed", "failed"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", DISK_STEPS)
def test_init_that_is_cut_at_the_disk_can_be_done_again(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, step: str, when: str, dies: bool
) -> None:
    model = ModelTpm()
    owner, name = DISK_STEPS[step]
    original: Callable[..., Any] = getattr(owner, name)
    if (step, when) == ("rename", "after"):
        pytest.skip("then it is in place")

    def failing(*arguments: Any, **named: Any) -> Any:
        if name == "rename" and "store" not in str(arguments[0]):
            return original(*arguments, **named)
        result = original(*arguments, **named) if when == "after" else None
        if isinstance(result, Store | Catalogue):
            result.close()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing)
        if dies:
            killed(monkeypatch, layout, model)
        else:
            with pytest.raises(OSError, match="No space"):
                initialise(layout, OPTIONS, as_tpm(model))
            assert not model.indices
    again_works(layout, model)


def test_a_tpm_that_goes_away_during_init_leaves_the_clean_up_to_the_next(layout: Layout) -> None:
    model = ModelTpm()
    model.fail = {"anchor_write": ("after", lost_answer()), "anchor_read": ("before", lost_answer())}
    with pytest.raises(TpmError):
        initialise(layout, OPTIONS, as_tpm(model))
    assert len(model.indices) == 1
    again_works(layout, model)


def test_the_index_of_another_installation_is_never_taken_for_a_leftover(tmp_path: Path, layout: Layout) -> None:
    model = ModelTpm()
    other, _ = initialised(tmp_path / "other", model)
    model.fail["anchor_define"] = "before", PowerCutError()
    with pytest.raises(PowerCutError):
        initialise(layout, OPTIONS, as_tpm(model))
    # another one takes the very index that the cut init had planned; the leftover names it
    model.fail["anchor_define"] = "before", PowerCutError()
    unfinished = layout.store.with_suffix(".new")
    with pytest.raises(PowerCutError):
        initialise(layout, OPTIONS, as_tpm(model))
    third = Layout(tmp_path / "third", tmp_path / "run")
    third.state_dir.mkdir(mode=0o700)
    initialise(third, OPTIONS, as_tpm(model))
    assert not unfinished.exists()
    again_works_beside(layout, model, 3)
    assert opens(other, model) is Standing.CLEAN
    assert opens(third, model) is Standing.CLEAN


def again_works_beside(layout: Layout, model: ModelTpm, count: int) -> None:
    initialise(layout, OPTIONS, as_tpm(model))
    assert len(model.indices) == count
    assert opens(layout, model) is Standing.CLEAN


def test_a_leftover_that_names_a_foreign_index_leaves_it_alone(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelTpm()
    model.fail["anchor_define"] = "before", PowerCutError()
    killed(monkeypatch, layout, model)
    other, _ = initialised(tmp_path / "other", model)
    again_works_beside(layout, model, 2)
    assert opens(other, model) is Standing.CLEAN


@pytest.mark.parametrize("what", ["store", "catalogue", "link"])
def test_init_over_an_installation_is_refused(layout: Layout, what: str) -> None:
    if what == "link":
        layout.store.symlink_to("nowhere")
    else:
        (layout.store if what == "store" else layout.catalogue).write_bytes(b"")
    model = ModelTpm()
    with pytest.raises(ConflictError, match="Nothing was changed"):
        initialise(layout, OPTIONS, as_tpm(model))
    assert not model.calls
    with pytest.raises(ConflictError):
        refuse_existing(layout)


def test_pcrs_without_a_recovery_key_are_refused() -> None:
    with pytest.raises(UsageError, match="lock every vTPM out"):
        check_options(replace(OPTIONS, pcrs="sha256:7"))


def test_init_on_a_real_tpm_leaves_no_index_behind(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_swtpm() as swtpm, HardwareTpm.open(swtpm.setting) as tpm:
        free = tpm.anchor_free_index()
        real = tpm.anchor_write
        for when in ("before", "after"):

            def cut(*arguments: Any, when: str = when, **named: Any) -> None:
                if when == "after":
                    real(*arguments, **named)
                raise PowerCutError

            with monkeypatch.context() as patched:
                patched.setattr(tpm, "anchor_write", cut)
                killed(patched, layout, tpm)  # type: ignore[arg-type]
            assert tpm.anchor_free_index() == free + 1, "the killed init left one"
        initialise(layout, OPTIONS, tpm)
        assert tpm.anchor_free_index() == free + 1, "one, the installation's own"
        with locked_store(layout) as descriptor:
            made = open_store(descriptor, tpm, Config.load(layout.config))
            assert made.standing is Standing.CLEAN
            made.store.close()


# --- opening --------------------------------------------------------------------------------------


def test_a_store_is_opened_by_one_manager_at_a_time(layout: Layout) -> None:
    initialise(layout, OPTIONS, as_tpm(ModelTpm()))
    with locked_store(layout), pytest.raises(BusyError), locked_store(layout):
        pass


def test_no_store_is_not_a_new_store(layout: Layout) -> None:
    with pytest.raises(NotFoundError, match="put it back"), locked_store(layout):
        pass
    assert not layout.store.exists()
    layout.store.mkdir()
    with pytest.raises(IntegrityError), locked_store(layout):
        pass


@pytest.mark.parametrize("pin", ["", "00" * 32])
def test_a_store_whose_key_is_not_the_pinned_one_is_refused(layout: Layout, pin: str) -> None:
    model = ModelTpm()
    initialise(layout, OPTIONS, as_tpm(model))
    config = Config.load(layout.config)
    forged = replace(config, tpm=replace(config.tpm, store_check=pin))
    with pytest.raises(IntegrityError, match="not made by this installation"), opened(layout, model, forged):
        pass


@pytest.mark.parametrize("pin", ["", "not hex"])
def test_without_the_pinned_name_of_the_srk_nothing_is_unsealed(layout: Layout, pin: str) -> None:
    model = ModelTpm()
    initialise(layout, OPTIONS, as_tpm(model))
    config = Config.load(layout.config)
    model.calls.clear()
    with (
        pytest.raises(ConfigurationError),
        opened(layout, model, replace(config, tpm=replace(config.tpm, srk_name=pin))),
    ):
        pass
    assert "unseal" not in model.calls


def test_two_stores_of_one_tpm_cannot_stand_for_each_other(layout: Layout, tmp_path: Path) -> None:
    model = ModelTpm()
    initialise(layout, OPTIONS, as_tpm(model))
    other, _ = initialised(tmp_path / "other", model)
    layout.store.write_bytes(other.store.read_bytes())
    with pytest.raises(IntegrityError, match="not made by this installation"), opened(layout, model):
        pass


def test_an_old_store_is_refused_and_left_as_it_is(layout: Layout) -> None:
    model = ModelTpm()
    initialise(layout, OPTIONS, as_tpm(model))
    old = layout.store.read_bytes()
    with opened(layout, model) as made:
        made.store.commit([], notes=True)
        model.anchor_write(made.boot.anchor, made.secret.anchor_auth, made.store.digest())
    layout.store.write_bytes(old)
    with pytest.raises(RolledBackError, match="older copy"), opened(layout, model):
        pass
    assert layout.store.read_bytes() == old
    assert RolledBackError("x").code is ExitCode.INTEGRITY


def test_opening_changes_no_byte(layout: Layout) -> None:
    model = ModelTpm()
    initialise(layout, OPTIONS, as_tpm(model))
    before = layout.store.read_bytes()
    with opened(layout, model):
        pass
    assert layout.store.read_bytes() == before


def test_a_group_whose_policy_does_not_hold_stays_closed_and_the_rest_opens(layout: Layout, tmp_path: Path) -> None:
    model = ModelTpm()
    assert recovery_key(["new", str(tmp_path / "recovery.pem")]) == 0
    options = replace(OPTIONS, pcrs="sha256:7", recovery=tmp_path / "recovery.pem.pub")
    initialise(layout, options, as_tpm(model))
    with opened(layout, model) as made:
        platform = made.boot.platform.private
    model.pcrs[7] = b"\x77" * 32
    secret, policy = model.sealed[platform]
    model.sealed[platform] = secret, replace(policy, branches=policy.branches[1:])
    with opened(layout, model) as made:
        (group,) = made.store.groups()
        assert "PCRs that differ: 7" in made.closed[group]
        assert not made.store.is_open(group)


# --- reseal and check -----------------------------------------------------------------------------


@pytest.fixture
def standing_tpm(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> ModelTpm:
    model = ModelTpm()

    @contextmanager
    def open_it(_layout: Layout, _config: Config) -> Iterator[HardwareTpm]:
        yield as_tpm(model)

    monkeypatch.setattr(maintenance, "open_tpm", open_it)
    monkeypatch.setattr(resealing, "open_tpm", open_it)
    initialise(layout, OPTIONS, as_tpm(model))
    return model


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["seal", "anchor_write"])
def test_a_reseal_that_is_cut_can_be_done_again_or_left(
    layout: Layout, standing_tpm: ModelTpm, step: str, when: str
) -> None:
    config = Config.load(layout.config)
    images = [layout.store.read_bytes()]
    standing_tpm.pcr22 = b"\x22" * 32  # another installation's extends must not lock this one out
    standing_tpm.fail[step] = when, PowerCutError()
    with pytest.raises(PowerCutError):
        resealing.reseal(layout, config, None, {}, None)
    images.append(layout.store.read_bytes())
    assert opens(layout, standing_tpm)
    done = resealing.reseal(layout, config, None, {}, None).done
    assert done == ["group default", "the store key"]
    assert opens(layout, standing_tpm) is Standing.CLEAN
    newest = layout.store.read_bytes()
    for image in images:
        if image != newest:
            layout.store.write_bytes(image)
            with pytest.raises(RolledBackError), opened(layout, standing_tpm):
                pass


def test_a_reseal_asks_for_pcrs_that_can_be_bound(layout: Layout, standing_tpm: ModelTpm) -> None:
    config = Config.load(layout.config)
    before = layout.store.read_bytes()
    with pytest.raises(UsageError, match="no recovery key"):
        resealing.reseal(layout, config, None, {}, "sha256:7")
    with pytest.raises(UsageError, match="not bound"):
        resealing.reseal(layout, config, None, {7: bytes(32)}, None)
    assert layout.store.read_bytes() == before
    assert "anchor_write" in standing_tpm.calls


@pytest.mark.parametrize("pair", ["7", "=", "x=00", "7=zz", "7=" + "00" * 31, "-1=" + "00" * 32, ""])
def test_a_prediction_that_is_none_is_refused(pair: str) -> None:
    with pytest.raises(UsageError, match="no predicted PCR"):
        parse_predicted([pair])
    assert parse_predicted(["7=" + "ab" * 32]) == {7: b"\xab" * 32}


@needs_own_root
def test_check_finds_nothing_but_the_weak_settings(layout: Layout, standing_tpm: ModelTpm) -> None:
    findings = maintenance.check(layout, Config.load(layout.config))
    bad = {finding.what: finding.verdict for finding in findings if finding.verdict is not Verdict.OK}
    bad.pop("runtime directory", None)  # the path of a test is longer than a socket may have
    assert bad.pop("hardware TPM: lockout password") is Verdict.WEAK
    assert bad == {"tpm.tcti": Verdict.WEAK, "tpm.pcrs": Verdict.WEAK, "recovery key": Verdict.FAILED}
    assert standing_tpm.nv_writes == 1, "it changes nothing"
    layout.state_dir.chmod(0o755)
    layout.config.chmod(0o644)
    failed = [f.what for f in maintenance.check(layout, Config.load(layout.config)) if f.verdict is Verdict.FAILED]
    assert {str(layout.state_dir), str(layout.config)} <= set(failed)


def test_check_beside_a_running_manager_says_so(layout: Layout, standing_tpm: ModelTpm) -> None:
    with locked_store(layout):
        findings = maintenance.check(layout, Config.load(layout.config))
    assert any("it runs" in finding.text for finding in findings)
    assert "unseal" not in standing_tpm.calls


def test_check_of_an_old_store_fails_with_its_code(layout: Layout, standing_tpm: ModelTpm) -> None:
    standing_tpm.indices = {index: (auth, b"\x66" * 32) for index, (auth, _) in standing_tpm.indices.items()}
    (failed,) = [f for f in maintenance.check(layout, Config.load(layout.config)) if f.code is ExitCode.INTEGRITY]
    assert "older copy" in failed.text


# --- what stands in clear -------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"nonsense", b'{"version":2}', b'{"version":1}', b"\xff\xfe"])
def test_a_boot_area_or_group_record_that_cannot_be_read_is_refused(content: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"Nothing was changed|use the manager"):
        BootArea.unpack(content)
    with pytest.raises(IntegrityError, match=r"Nothing was changed|use the manager"):
        GroupSeal.unpack(content)


def test_boot_area_and_group_record_say_what_was_put_into_them(layout: Layout) -> None:
    model = ModelTpm()
    initialise(layout, OPTIONS, as_tpm(model))
    with opened(layout, model) as made:
        assert BootArea.unpack(made.boot.pack()) == made.boot
        (record,) = made.store.groups().values()
        seal = GroupSeal.unpack(record.blob)
        assert GroupSeal.unpack(seal.pack()) == seal
        assert seal.name == "default"


def test_what_is_derived_from_the_store_key_does_not_show_it() -> None:
    key, other = StoreKey.new(), StoreKey.new()
    from uuid import uuid4

    store = uuid4()
    assert store_check(key, store) not in (store_check(other, store), store_check(key, uuid4()))
    assert catalogue_key(key, store).hex() != store_check(key, store)
    assert key.reveal() not in bytes.fromhex(store_check(key, store)) + catalogue_key(key, store)


def test_the_platform_secret_is_two_secrets_and_prints_neither() -> None:
    secret = PlatformSecret(bytes(range(64)))
    assert secret.store_key == StoreKey(bytes(range(32)))
    assert secret.anchor_auth == bytes(range(32, 64))
    assert repr(secret) == "<PlatformSecret 64 bytes>"


def test_manager_errors_carry_the_exit_code_of_their_kind() -> None:
    for error in (DeniedError, BusyError, NotFoundError, ConflictError, UsageError, IntegrityError):
        assert error.code is not ExitCode.OK
    assert ManagerError.code is ExitCode.FAILURE


def test_the_recovery_key_in_the_boot_area_is_public(tmp_path: Path, layout: Layout) -> None:
    assert recovery_key(["new", str(tmp_path / "recovery.pem")]) == 0
    options = replace(OPTIONS, pcrs="sha256:7", recovery=tmp_path / "recovery.pem.pub")
    initialise(layout, options, as_tpm(ModelTpm()))
    with locked_store(layout) as descriptor:
        boot = read_boot_area(descriptor)[1]
    RecoveryPublic.parse(boot.recovery.encode(), "the store")
    private = (tmp_path / "recovery.pem").read_bytes()
    assert not any(line in layout.store.read_bytes() for line in private.splitlines() if len(line) > 40)


def test_clean_up_says_what_it_took_away(
    layout: Layout, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelTpm()
    model.fail["anchor_write"] = "after", PowerCutError()
    killed(monkeypatch, layout, model)
    with caplog.at_level(logging.WARNING):
        again_works(layout, model)
    assert "interrupted init" in caplog.text
    assert SRK_NAME not in os.fsencode(caplog.text)


def test_what_became_another_installations_store_is_no_leftover(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut `init --store PLACE`, done again from another state directory: the first one's link leads to its store."""
    model, place = ModelTpm(), tmp_path / "volume.img"
    options = replace(OPTIONS, store=place)
    with monkeypatch.context() as patched:
        patched.setattr(Store, "create", lost_power)
        patched.setattr(provision, "clean_up_interrupted", lambda *_: None)
        with pytest.raises(PowerCutError):
            initialise(layout, options, as_tpm(model))
    other = Layout(tmp_path / "other", tmp_path / "run")
    other.state_dir.mkdir(mode=0o700)
    initialise(other, options, as_tpm(model))
    before = place.read_bytes()
    initialise(layout, OPTIONS, as_tpm(model))
    assert place.read_bytes() == before
    assert opens(other, model) is Standing.CLEAN
    assert opens(layout, model) is Standing.CLEAN
    assert len(model.indices) == 2


def test_what_became_a_file_system_is_no_leftover(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, place = ModelTpm(), tmp_path / "volume.img"
    with monkeypatch.context() as patched:
        patched.setattr(Store, "create", lost_power)
        patched.setattr(provision, "clean_up_interrupted", lambda *_: None)
        with pytest.raises(PowerCutError):
            initialise(layout, replace(OPTIONS, store=place), as_tpm(model))
    content = bytes(64 * 1024) + b"_BHRfS_M" + bytes(4096)
    place.write_bytes(content)
    initialise(layout, OPTIONS, as_tpm(model))
    assert place.read_bytes() == content


def lost_power(*_: object) -> None:
    raise PowerCutError


@pytest.mark.parametrize("step", ["store", "group", "catalogue", "rename"])
def test_a_cut_init_at_a_named_place_can_be_done_again_there(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    model, options = ModelTpm(), replace(OPTIONS, store=tmp_path / "volume.img")
    owner, name = DISK_STEPS[step]
    original: Callable[..., Any] = getattr(owner, name)

    def failing(*arguments: Any, **named: Any) -> Any:
        if name == "rename" and "store" not in str(arguments[0]):
            return original(*arguments, **named)
        raise PowerCutError

    with monkeypatch.context() as dying:
        dying.setattr(provision, "clean_up_interrupted", lambda *_: None)
        dying.setattr(owner, name, failing)
        with pytest.raises(PowerCutError):
            initialise(layout, options, as_tpm(model))
    initialise(layout, options, as_tpm(model))
    assert opens(layout, model) is Standing.CLEAN
    assert len(model.indices) == 1
    assert sorted(path.name for path in layout.state_dir.iterdir()) == ["catalogue.sqlite", "config.toml", "store.img"]


@pytest.mark.parametrize("at", [0, 4096, 32 * 1024, 64 * 1024], ids=["any", "bcache", "iso", "btrfs"])
def test_a_named_place_that_holds_a_file_system_is_refused(layout: Layout, tmp_path: Path, at: int) -> None:
    place = tmp_path / "volume.img"
    content = bytes(at) + b"superblock" + bytes(4096)
    place.write_bytes(content)
    with pytest.raises(ConflictError, match="holds something already"):
        initialise(layout, replace(OPTIONS, store=place), as_tpm(ModelTpm()))
    assert place.read_bytes() == content
