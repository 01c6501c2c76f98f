"""accept-rollback: nothing without the key or the typed sentence, nothing by halves, and never without its trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from manager_rig import ModelTpm, PowerCutError, as_tpm
from storage_histories import uuid_of

from manager import rollback
from manager.anchor import Standing
from manager.config import Config, Layout
from manager.errors import ConflictError, DeniedError, IntegrityError, RolledBackError
from manager.hwtpm import HardwareTpm
from manager.keys import BootArea, catalogue_key
from manager.opening import locked_store, open_store
from manager.provision import InitOptions, initialise
from manager.recovery_errors import EscrowWrongKey
from manager.recovery_key import RecoveryPrivate, write_recovery_files
from manager.rollback import Rollback, refused_store
from storage.catalogue import AttachmentRow, Catalogue, VtpmRow
from storage.secrets import StateKey
from storage.state_image import Family, StateImage
from storage.store import PutVtpm, RecordFlags, Store, VtpmRecord
from storage.store_records import next_epoch

WEB, LATER = uuid_of(1), uuid_of(2)


class Place:
    """An installation on the model TPM, whose store goes through two times."""

    def __init__(self, base: Path, recovery: RecoveryPrivate | None) -> None:
        self.model, self.recovery = ModelTpm(), recovery
        self.layout = Layout(base / "state", base / "run")
        self.layout.state_images.mkdir(parents=True, mode=0o700)
        public = base / "recovery.pem.pub"
        if recovery is not None:
            write_recovery_files(str(base / "recovery.pem"), recovery, None)
        options = InitOptions(
            tcti="embedded",
            locality=2,
            pcrs="none" if recovery is None else "sha256:7",
            recovery=None if recovery is None else public,
            store_size=256 * 1024,
        )
        initialise(self.layout, options, as_tpm(self.model))
        self.config = Config.load(self.layout.config)

    def change(self, *records: VtpmRecord) -> bytes:
        """Open, commit, stop cleanly; returns the image."""
        with locked_store(self.layout) as descriptor:
            made = open_store(descriptor, as_tpm(self.model), self.config)
            made.store.commit([PutVtpm(record) for record in records], notes=True)
            from manager.anchor import clean_stop

            mark = clean_stop(made.store.digest())
            self.model.anchor_write(made.boot.anchor, made.secret.anchor_auth, mark)
            made.store.close()
        return self.layout.store.read_bytes()

    def opens(self) -> Standing:
        with locked_store(self.layout) as descriptor:
            made = open_store(descriptor, as_tpm(self.model), self.config)
            made.store.close()
            return made.standing

    @contextmanager
    def catalogue(self) -> Iterator[Catalogue]:
        with locked_store(self.layout) as descriptor:
            uuid = Store.read_boot_area(descriptor)[0]
            from manager.keys import PlatformSecret

            boot = BootArea.unpack(Store.read_boot_area(descriptor)[1])
            secret = PlatformSecret(self.model.sealed[boot.platform.private][0])
            with Catalogue.open(self.layout.catalogue, catalogue_key(secret.store_key, uuid), uuid) as catalogue:
                yield catalogue

    def events(self) -> list[str]:
        with self.catalogue() as catalogue:
            return [row.text for row in catalogue.events() if row.kind == rollback.EVENT]

    def accept(self, key: RecoveryPrivate | None, confirmed: str | None = None) -> Rollback:
        with refused_store(self.layout, self.config, key) as refused:
            refused.accept(refused.found.phrase if confirmed == "yes" else confirmed)
            return refused.found

    def untouched(self, act: Callable[[], object], error: type[Exception], match: str) -> None:
        before = self.layout.store.read_bytes(), dict(self.model.indices)
        with pytest.raises(error, match=match):
            act()
        assert (self.layout.store.read_bytes(), dict(self.model.indices)) == before
        assert self.events() == []


@pytest.fixture(scope="module")
def recovery() -> RecoveryPrivate:
    return RecoveryPrivate.new()


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[RecoveryPrivate | None], Place]]:
    def make(recovery: RecoveryPrivate | None) -> Place:
        place = Place(tmp_path, recovery)

        @contextmanager
        def open_it(_layout: Layout, _config: Config) -> Iterator[HardwareTpm]:
            yield as_tpm(place.model)

        monkeypatch.setattr(rollback, "open_tpm", open_it)
        return place

    return make


def record(place: Place, generation: int = 1) -> VtpmRecord:
    with locked_store(place.layout) as descriptor:
        made = open_store(descriptor, as_tpm(place.model), place.config)
        (group,) = made.store.groups()
        made.store.close()
    return VtpmRecord(WEB, group, StateKey.new(), bytes([generation]) * 32, generation, RecordFlags.NONE)


def rolled_back(place: Place) -> tuple[bytes, bytes]:
    """Put an older image in place; returns it and the newest one."""
    old = place.change(record(place))
    newest = place.change(record(place, generation=2))
    place.layout.store.write_bytes(old)
    with pytest.raises(RolledBackError):
        place.opens()
    return old, newest


def test_a_store_that_is_not_refused_is_not_gone_back_to(made: Any) -> None:
    place = made(None)
    place.change(record(place))
    place.untouched(lambda: place.accept(None, "yes"), ConflictError, "not refused")
    assert place.opens() is Standing.CLEAN


def test_without_a_recovery_key_the_sentence_has_to_be_typed_exactly(made: Any) -> None:
    place = made(None)
    _, newest = rolled_back(place)
    for typed in (None, "", "yes please", "roll back to sequence 0"):
        place.untouched(lambda typed=typed: place.accept(None, typed), DeniedError, "type exactly 'roll back to seq")
    found = place.accept(None, "yes")
    assert not found.recovery_key
    assert place.opens() is Standing.CLEAN
    (event,) = place.events()
    assert "without a recovery key, by a typed confirmation" in event
    assert f"back to sequence {found.sequence}" in event
    place.layout.store.write_bytes(newest)
    with pytest.raises(RolledBackError):
        place.opens()


def test_with_a_recovery_key_nothing_else_will_do(made: Any, recovery: RecoveryPrivate) -> None:
    place = made(recovery)
    rolled_back(place)
    place.untouched(lambda: place.accept(None, "yes"), DeniedError, "--key FILE")
    place.untouched(lambda: place.accept(RecoveryPrivate.new()), EscrowWrongKey, "Nothing was changed")
    found = place.accept(recovery)
    assert found.recovery_key
    assert place.opens() is Standing.CLEAN
    assert "with the recovery key" in place.events()[0]


def test_the_recovery_key_serves_where_the_pcrs_have_changed(made: Any, recovery: RecoveryPrivate) -> None:
    place = made(recovery)
    rolled_back(place)
    place.model.pcrs[7] = b"\x77" * 32
    place.accept(recovery)
    place.model.pcrs[7] = bytes(32)
    assert place.opens() is Standing.CLEAN


def test_a_boot_area_that_hides_the_recovery_key_does_not_do_without_it(made: Any, recovery: RecoveryPrivate) -> None:
    place = made(recovery)
    rolled_back(place)
    with locked_store(place.layout) as descriptor:
        opened_by = place.model.sealed[BootArea.unpack(Store.read_boot_area(descriptor)[1]).platform.private][0]
        from manager.keys import PlatformSecret

        with Store.open(descriptor, PlatformSecret(opened_by).store_key) as store:
            boot = BootArea.unpack(Store.read_boot_area(descriptor)[1])
            store.write_boot_area(replace(boot, recovery="", escrow=b"").pack())
    place.untouched(lambda: place.accept(None, "yes"), DeniedError, "--key FILE")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["anchor_read", "pcr22_read", "unseal", "anchor_write", "commit", "log"])
def test_cut_anywhere_it_is_refused_as_before_or_done(
    made: Any, monkeypatch: pytest.MonkeyPatch, step: str, when: str
) -> None:
    place = made(None)
    _, newest = rolled_back(place)
    with monkeypatch.context() as patched:
        if step in ("commit", "log"):
            owner: Any = Store if step == "commit" else Catalogue
            original = getattr(owner, step)

            def cut(*arguments: Any, **named: Any) -> None:
                if when == "after":
                    original(*arguments, **named)
                raise PowerCutError

            patched.setattr(owner, step, cut)
        else:
            place.model.fail[step] = when, PowerCutError()
        with pytest.raises(PowerCutError):
            place.accept(None, "yes")
    if (step, when) == ("anchor_write", "after"):
        assert place.opens() is Standing.CLEAN
        assert len(place.events()) == 1
        return
    with pytest.raises(RolledBackError):
        place.opens()
    place.accept(None, "yes")
    assert place.opens() is Standing.CLEAN
    assert place.events()
    place.layout.store.write_bytes(newest)
    with pytest.raises(RolledBackError):
        place.opens()


def test_an_image_of_the_time_before_the_acceptance_is_refused_after_it(made: Any) -> None:
    place = made(None)
    old, _ = rolled_back(place)
    place.accept(None, "yes")
    accepted = place.layout.store.read_bytes()
    place.layout.store.write_bytes(old)
    with pytest.raises(RolledBackError):
        place.opens()
    place.layout.store.write_bytes(accepted)
    assert place.opens() is Standing.CLEAN


@pytest.mark.parametrize("gone", ["undefined", "unwritten", "another's"])
def test_an_anchor_that_is_gone_is_made_anew(made: Any, gone: str) -> None:
    place = made(None)
    place.change(record(place))
    ((index, (auth, _)),) = place.model.indices.items()
    match gone:
        case "undefined":
            del place.model.indices[index]
        case "unwritten":
            place.model.indices[index] = auth, None
        case _:
            place.model.indices[index] = bytes(32), bytes(32)
    found = place.accept(None, "yes")
    assert "the durable anchor is gone" in found.why
    assert place.opens() is Standing.CLEAN


def test_what_will_be_lost_is_told(made: Any) -> None:
    place = made(None)
    image = place.layout.state_images / f"{WEB}.img"
    with open(image, "w+b") as file:
        state = StateImage.create(file.fileno(), WEB, uuid_of(9), Family.TPM20)
        state.assume_fresh()
        first = state.save({"permall": b"one"}, 1)
        state.switch()
        with place.catalogue() as catalogue:
            (group,) = [row.uuid for row in catalogue.groups()]
            catalogue.add_vtpm(VtpmRow(WEB, "web", group, "2.0"))
        known = VtpmRecord(WEB, group, first.key, first.digest, 1, RecordFlags.NONE)
        old = place.change(known)
        second = state.save({"permall": b"two"}, 2)
        place.change(replace(known, key=second.key, digest=second.digest, generation=2))
        place.change(
            VtpmRecord(LATER, group, StateKey(bytes(32)), flags=RecordFlags.FRESH),
            replace(known, generation=2, flags=RecordFlags.ATTACHED, epoch=7),
        )
    with place.catalogue() as catalogue:
        catalogue.add_vtpm(VtpmRow(LATER, "later", group, "2.0"))
        catalogue.attach(AttachmentRow(WEB, "guest", "socket", "0:0", "0660", "clear", 1, epoch=7))
    place.layout.store.write_bytes(old)
    found = place.accept(None, "yes")
    told = {(loss.name, loss.recorded, loss.newest): loss.text for loss in found.losses}
    assert "is lost" in told["web", 1, 2]
    assert "added since" in told["later", None, None]
    assert "attachment to guest guest" in told["web", None, None]
    assert found.vtpms == 1
    with place.catalogue() as catalogue:
        assert catalogue.attachments() == []
    image.unlink()
    place.layout.store.write_bytes(old)
    with refused_store(place.layout, place.config, None) as refused:
        assert any("cannot be read" in loss.text for loss in refused.found.losses)


def test_an_attachment_of_the_lost_time_never_counts_again(made: Any) -> None:
    """Whoever may write the catalogue kept genuine rows: the epochs of the time that begins must not meet theirs."""
    place = made(None)
    free, busy = replace(record(place), epoch=6), replace(record(place), uuid=LATER, epoch=3)
    busy = replace(busy, flags=RecordFlags.ATTACHED)
    old = place.change(free, busy)
    place.change(replace(free, flags=RecordFlags.ATTACHED, epoch=7))
    kept = AttachmentRow(LATER, "stays", "socket", "0:0", "0660", "clear", 1, epoch=3)
    with place.catalogue() as catalogue:
        catalogue.attach(kept)
        catalogue.attach(AttachmentRow(WEB, "lost", "socket", "0:0", "0660", "clear", 1, epoch=7))
    place.layout.store.write_bytes(old)
    place.accept(None, "yes")
    assert place.opens() is Standing.CLEAN
    with locked_store(place.layout) as descriptor:
        store = open_store(descriptor, as_tpm(place.model), place.config).store
        epochs = {one.uuid: one.epoch for one in store.vtpms()}
        store.close()
    with place.catalogue() as catalogue:
        (row,) = catalogue.attachments()
    assert replace(row, created="", epoch=3) == kept, "what was attached at that time still is"
    assert row.epoch == epochs[LATER]
    assert next_epoch(epochs[WEB]) != 7
    assert next_epoch(epochs[LATER]) != 4


def test_without_a_catalogue_it_says_so_and_asks(made: Any) -> None:
    place = made(None)
    rolled_back(place)
    place.layout.catalogue.rename(place.layout.catalogue.with_name("kept"))
    with pytest.raises(IntegrityError, match="--no-catalogue"):
        place.accept(None, "yes")
    with pytest.raises(RolledBackError):
        place.opens()
    with refused_store(place.layout, place.config, None, without_catalogue=True) as refused:
        refused.accept(refused.found.phrase)
    assert place.opens() is Standing.CLEAN


def test_a_closed_group_is_named_and_keeps_nothing_from_being_done(made: Any) -> None:
    place = made(None)
    rolled_back(place)
    platform = boot_of(place).platform.private
    place.model.sealed = {handle: kept for handle, kept in place.model.sealed.items() if handle == platform}
    found = place.accept(None, "yes")
    assert found.closed == ("default",)
    assert place.opens() is Standing.CLEAN


def boot_of(place: Place) -> BootArea:
    with locked_store(place.layout) as descriptor:
        return BootArea.unpack(Store.read_boot_area(descriptor)[1])
