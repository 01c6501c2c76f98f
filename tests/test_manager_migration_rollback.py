"""Recovery on another hardware TPM, whose store may be of before a claim: what may have left is frozen."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from uuid import UUID, uuid4

import pytest
from manager_rig import ModelTpm, as_tpm, installation, running_daemon

from manager import recovery
from manager.config import Config, Layout
from manager.errors import BusyError
from manager.group_terms import Terms, seal_key
from manager.hwtpm import HardwareTpm
from manager.hwtpm_records import SealedBlob
from manager.incoming import never_had
from manager.keys import GroupSeal
from manager.migration_box import NAMES, read, seal, write
from manager.migration_records import is_frozen
from manager.migration_rollback import begin_anew, in_words
from manager.migration_state import Arrival, Identity, MigrationState, Peer
from manager.opening import Opened, locked_store, open_store
from manager.policy import SealPolicy
from manager.recovery_pair import RecoveryPrivate
from storage.secrets import GroupKey, StateKey
from storage.store_records import GroupFlags, GroupRecord, PutGroup, PutVtpm, RecordFlags, VtpmRecord

OURS = RecoveryPrivate.new()
NOTHING = SealedBlob(b"", b"", SealPolicy.build())
LEFT, STAYS, FRESH = uuid4(), uuid4(), uuid4()


class World:
    """An installation with a vTPM that two peers may claim, whether or not that has ended, and others."""

    layout: Layout
    config: Config

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = ModelTpm()

        @contextmanager
        def open_tpm(*_: object) -> Iterator[HardwareTpm]:
            yield as_tpm(self.model)

        monkeypatch.setattr(recovery, "open_tpm", open_tpm)

    @contextmanager
    def opened(self) -> Iterator[Opened]:
        with locked_store(self.layout) as descriptor:
            made = open_store(descriptor, as_tpm(self.model), self.config)
            try:
                yield made
            finally:
                made.store.close()

    def set_up(self) -> None:
        with self.opened() as opened:
            store = opened.store
            (group,) = store.groups()
            for vtpm, flags in ((LEFT, RecordFlags.RESUMABLE), (STAYS, RecordFlags.NONE), (FRESH, RecordFlags.FRESH)):
                generation = 0 if flags & RecordFlags.FRESH else 3
                store.commit([PutVtpm(VtpmRecord(vtpm, group, StateKey(bytes(32)), bytes(32), generation, flags))])
            peers = [Peer(name, "pem", f"finger-{name}", leave_vtpms=(LEFT, FRESH), until=1) for name in ("a", "b")]
            state = MigrationState(Identity(b"key", "pem"), {peer.name: peer for peer in peers})
            state = state.with_arrival(Arrival(UUID(int=9), "a", "finger-a", 5, "ab" * 16, "cd" * 16))
            sealed = seal(opened.secret.store_key, store.uuid, state.pack())
            write(self.layout.state_dir / NAMES[0], sealed)
            digest = hashlib.sha256(sealed).hexdigest()
            store.write_boot_area(replace(opened.boot, migration=digest, identity="ef" * 32).pack())


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(monkeypatch)
    with installation(made.model, "none", OURS) as (_, made.layout, made.config):
        made.set_up()
        yield made


def check(world: World) -> None:
    with world.opened() as opened:
        store, boot = opened.store, opened.boot
        assert is_frozen(store.get(LEFT).flags)
        assert store.get(STAYS).flags == RecordFlags.NONE
        assert store.get(FRESH).flags == RecordFlags.FRESH, "it has nothing that could have left"
        state, _ = read(world.layout.state_dir, opened.secret.store_key, store.uuid, boot.migration)
        assert boot.identity == ""
        assert state.identity is None
        assert set(state.departures) == {LEFT}
        assert state.departures[LEFT].fingerprint == "finger-a,finger-b", "either could have claimed it"
        assert state.arrivals[UUID(int=9)].claim == "", "no claim of an earlier life is repeated"


def test_on_another_tpm_what_may_have_left_is_frozen_and_the_identity_is_void(world: World) -> None:
    world.model = ModelTpm(b"\x00\x0b" + b"another".ljust(32))
    _, world.config = recovery.recover(world.layout, world.config, OURS)
    check(world)


def test_it_may_be_done_again_after_a_cut(world: World) -> None:
    for _ in range(3):
        with world.opened() as opened:
            boot = opened.boot
            made = begin_anew(world.layout.state_dir, opened.secret.store_key, opened.store, boot)
            assert made.identity == ""
    check(world)


def test_a_cut_while_it_is_written_leaves_who_may_have_claimed_what_known(world: World) -> None:
    blocked = world.layout.state_dir / NAMES[1]
    blocked.mkdir()
    with world.opened() as opened, pytest.raises(OSError):
        begin_anew(world.layout.state_dir, opened.secret.store_key, opened.store, opened.boot)
    blocked.rmdir()
    with world.opened() as opened:
        begin_anew(world.layout.state_dir, opened.secret.store_key, opened.store, opened.boot)
    check(world)


def test_it_is_told_before(world: World) -> None:
    with world.opened() as opened:
        told = dict(in_words(world.layout.state_dir, opened.secret.store_key, opened.store, opened.boot))
        assert list(told) == [LEFT]
        assert "a, b" in told[LEFT]


def test_without_the_data_it_is_said_that_nothing_is_known_and_nothing_moves(world: World) -> None:
    (world.layout.state_dir / NAMES[0]).unlink()
    with world.opened() as opened:
        ((vtpm, text),) = in_words(world.layout.state_dir, opened.secret.store_key, opened.store, opened.boot)
        assert vtpm is None
        assert "not known" in text
        boot = begin_anew(world.layout.state_dir, opened.secret.store_key, opened.store, opened.boot)
        assert (boot.identity, bool(boot.migration)) == ("", True)
        assert not is_frozen(opened.store.get(LEFT).flags)


async def test_of_a_group_that_was_closed_what_may_have_left_is_frozen_once_it_is_open(world: World) -> None:
    """A group with a recovery key of its own, which is opened after the recovery, on its own."""
    theirs = RecoveryPrivate.new()
    with world.opened() as opened:
        group, key, store = uuid4(), GroupKey.new(), opened.store
        terms = Terms.of(GroupSeal("own", NOTHING, b""), "none", theirs.public.to_pem().decode())
        seal = seal_key(as_tpm(world.model), store.uuid, group, key, GroupSeal("own", NOTHING, b""), terms)
        seal = replace(seal, recovery=theirs.public.to_pem().decode())
        store.commit([PutGroup(GroupRecord(group, GroupFlags.EPOCHS, seal.pack()), key)])
        left, stays = (VtpmRecord(uuid4(), group, StateKey(bytes(32)), bytes(32), 3, RecordFlags.NONE) for _ in "ab")
        store.commit([PutVtpm(left), PutVtpm(stays)])
        state, _ = read(world.layout.state_dir, opened.secret.store_key, store.uuid, opened.boot.migration)
        sealed = peer_for(state, left.uuid, opened)
        write(world.layout.state_dir / NAMES[1], sealed)
        digest = hashlib.sha256(sealed).hexdigest()
        store.write_boot_area(replace(opened.boot, migration=digest).pack())
    world.model = ModelTpm(b"\x00\x0b" + b"another".ljust(32))
    _, world.config = recovery.recover(world.layout, world.config, OURS)
    check(world)
    async with running_daemon(world.model, (world.layout.state_dir.parent, world.layout, world.config)) as daemon:
        registry = daemon.registry
        with pytest.raises(BusyError, match="closed"):
            never_had(registry, left.uuid)
        with pytest.raises(BusyError, match="closed"):
            never_had(registry, uuid4())
        assert not never_had(registry, STAYS)
        await daemon.daemon._moves.revoke("c", 0)  # or pair it anew with other words: it may have it all the same
    recovery.recover_group(world.layout, world.config, "own", theirs)
    with world.opened() as opened:
        assert not is_frozen(opened.store.get(left.uuid).flags), "nobody has looked at it yet"
    async with running_daemon(world.model, (world.layout.state_dir.parent, world.layout, world.config)) as daemon:
        record = daemon.registry.committer.store.get
        assert is_frozen(record(left.uuid).flags)
        assert not is_frozen(record(stays.uuid).flags)
    async with running_daemon(world.model, (world.layout.state_dir.parent, world.layout, world.config)) as daemon:
        await daemon.ask("status")
    with world.opened() as opened:
        state, _ = read(world.layout.state_dir, opened.secret.store_key, opened.store.uuid, opened.boot.migration)
        assert state.claimants == ()
        assert (set(state.departures), state.doubtful) == ({LEFT, left.uuid}, ())


def peer_for(state: MigrationState, vtpm: UUID, opened: Opened) -> bytes:
    peer = Peer("c", "pem", "finger-c", leave_vtpms=(vtpm,), until=1)
    return seal(opened.secret.store_key, opened.store.uuid, state.with_peer(peer).pack())
