import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from manager_rig import ModelTpm, RunningDaemon, installation, running_daemon

from manager.client import RemoteError
from manager.config import Config, Layout
from manager.errors import IntegrityError
from manager.keys import BootArea
from manager.migration_box import NAMES, MigrationBox, read, seal, unseal
from manager.migration_identity import make, parse_certificate
from manager.migration_state import Arrival, Departure, Identity, MigrationState, Peer
from storage.secrets import StoreKey
from storage.store import Store

VTPM, GROUP = UUID(int=5), UUID(int=6)
Place = tuple[Path, Layout, Config]


def peer(name: str = "south", until: int = 100) -> Peer:
    return Peer(name, "certificate", f"{name}-finger", "tcp:1", (VTPM,), (), (), (GROUP,), until, 1, 0)


def full() -> MigrationState:
    state = MigrationState(Identity(b"key", "pem")).with_peer(peer()).with_peer(peer("north"))
    state = state.with_departure(Departure(VTPM, "south", "f", "aa" * 16, "bb" * 16, 7, 1000))
    return state.with_arrival(Arrival(GROUP, "north", "g", 1001, "cc" * 16, "dd" * 16))


@pytest.fixture
def place() -> Iterator[Place]:
    with installation(ModelTpm()) as made:
        yield made


def box_of(daemon: RunningDaemon) -> MigrationBox:
    opened = daemon.opened
    return MigrationBox(daemon.layout.state_dir, opened.secret.store_key, opened.store.uuid, daemon.daemon._approvals)


def test_the_document_comes_back_as_it_was() -> None:
    assert MigrationState.unpack(full().pack()) == full()
    assert MigrationState.unpack(MigrationState().pack()) == MigrationState()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"version": 2}', b'{"version": 1}'])
def test_what_is_no_document_is_refused(content: bytes) -> None:
    with pytest.raises(IntegrityError):
        MigrationState.unpack(content)


def test_a_field_of_another_type_is_refused() -> None:
    for right, wrong in ((b'"generation":7', b'"generation":"7"'), (b'"peer":"south"', b'"peer":null')):
        content = full().pack()
        assert right in content
        with pytest.raises(IntegrityError):
            MigrationState.unpack(content.replace(right, wrong))


def test_who_may_take_what_ends_with_its_time_and_is_for_what_was_named() -> None:
    other = UUID(int=9)
    assert peer().may_take(VTPM, other, 99.9)
    assert not peer().may_take(VTPM, other, 100)
    assert not peer().may_take(other, other, 1)
    assert not peer().may_take(other, GROUP, 1), "that group may come, not leave"
    assert peer().may_bring(other, GROUP, 1)
    assert not peer().may_bring(VTPM, other, 1)
    assert not peer().may_bring(other, GROUP, 100)


def test_it_is_sealed_to_this_store_and_key() -> None:
    key, store = StoreKey.new(), uuid4()
    sealed = seal(key, store, b"content")
    assert unseal(key, store, sealed) == b"content"
    assert b"content" not in sealed
    assert seal(key, store, b"content") != sealed
    for wrong_key, wrong_store, wrong in (
        (StoreKey.new(), store, sealed),
        (key, uuid4(), sealed),
        (key, store, sealed[:-1] + bytes([sealed[-1] ^ 1])),
        (key, store, b"x" + sealed[1:]),
        (key, store, b""),
    ):
        with pytest.raises(IntegrityError):
            unseal(wrong_key, wrong_store, wrong)


async def test_what_was_saved_counts_after_a_restart_and_nothing_older_does() -> None:
    model = ModelTpm()
    with installation(model) as place:
        layout = place[1]
        async with running_daemon(model, place) as daemon:
            box = box_of(daemon)
            await box.save(lambda state: state.with_peer(peer()))
            (old,) = [content for _, content in box.files()]
            await box.save(lambda state: state.without_peer("south"))
            await box.save(lambda state: state.with_peer(peer("east")))
            key = StoreKey(daemon.opened.secret.store_key.view)
            store, boot = daemon.opened.store.uuid, daemon.opened.boot
            assert (layout.state_dir / NAMES[0]).stat().st_mode & 0o777 == 0o600
        async with running_daemon(model, place) as daemon:
            assert set(box_of(daemon).state.peers) == {"east"}
        index = read(layout.state_dir, key, store, boot.migration)[1]
        other = layout.state_dir / NAMES[1 - index]
        other.write_bytes(b"a write that power cut short")
        assert set(read(layout.state_dir, key, store, boot.migration)[0].peers) == {"east"}
        for name in NAMES:  # a genuine file of before the revocation
            (layout.state_dir / name).write_bytes(old)
        with pytest.raises(IntegrityError, match="not the newest"):
            read(layout.state_dir, key, store, boot.migration)
        async with running_daemon(model, place) as daemon:  # it runs all the same, and moves nothing
            box = box_of(daemon)
            with pytest.raises(IntegrityError):
                _ = box.state
            with pytest.raises(IntegrityError):
                await box.save(lambda state: state)
            assert (await daemon.ask("status"))[0]["vtpms"] == 0
            with pytest.raises(RemoteError, match="--anew"):
                await daemon.ask("migrate-identity")
            with pytest.raises(RemoteError, match="--yes"):
                await daemon.ask("migrate-identity", anew=True)
            made = await daemon.ask("migrate-identity", anew=True, yes=True)
            with pytest.raises(RemoteError, match="not missing"):
                await daemon.ask("migrate-identity", anew=True, yes=True)
        async with running_daemon(model, place) as daemon:
            assert await daemon.ask("migrate-identity") == made
            assert box_of(daemon).state.peers == {}, "nobody is paired by what an old file says"


def test_older_managers_refuse_a_store_that_knows_of_migration(place: Place) -> None:
    boot = BootArea.unpack(_boot(place))
    assert boot.migration == ""
    assert BootArea.unpack(replace(boot, migration="ab" * 32, identity="cd" * 32).pack()).identity == "cd" * 32
    assert b'"version":3' in _json(replace(boot, migration="ab" * 32))
    assert b'"version":3' not in _json(boot), "and only such a one"


def test_an_identity_is_its_own_and_no_other_file_is_one() -> None:
    store = uuid4()
    made, again = make(store), make(store)
    pem, fingerprint, owner = parse_certificate(made.certificate)
    assert (pem, owner) == (made.certificate, store)
    assert parse_certificate(again.certificate)[1] != fingerprint
    assert made.key.hex() not in repr(made)
    assert repr(made.key) not in repr(made)
    for text in ("", "no", made.certificate[:200], made.certificate.replace("A", "B")):
        with pytest.raises(Exception, match="no certificate of a manager"):
            parse_certificate(text)


def _boot(place: Place) -> bytes:
    with place[1].store.open("rb") as file:
        return Store.read_boot_area(file.fileno())[1]


def _json(boot: BootArea) -> bytes:
    return zlib.decompress(boot.pack())
