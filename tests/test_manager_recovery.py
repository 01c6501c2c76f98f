"""Recovery and resealing of installations with several groups, each with the recovery key it may have of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from uuid import uuid4

import pytest
from manager_rig import ModelTpm, as_tpm, installation

from manager import maintenance, recovery
from manager import reseal as resealing
from manager.config import Config, Layout
from manager.errors import ConflictError, IntegrityError, NotFoundError
from manager.group_terms import Terms, seal_key
from manager.hwtpm import HardwareTpm
from manager.hwtpm_records import SealedBlob
from manager.keys import GroupSeal, catalogue_key
from manager.maintenance import Verdict
from manager.opening import Opened, locked_store, open_store, read_boot_area
from manager.policy import SealPolicy
from manager.recovery_errors import EscrowWrongKey
from manager.recovery_pair import RecoveryPrivate, RecoveryPublic
from storage.catalogue import Catalogue
from storage.disk import Device
from storage.secrets import GroupKey, StateKey
from storage.store_head import BootCopy, read_boot, write_boot_copy
from storage.store_records import GroupFlags, GroupRecord, PutGroup, PutVtpm, VtpmRecord

OURS, THEIRS = RecoveryPrivate.new(), RecoveryPrivate.new()
OURS_PEM, THEIRS_PEM = (key.public.to_pem().decode() for key in (OURS, THEIRS))
NOTHING = SealedBlob(b"", b"", SealPolicy.build())


class World:
    """An installation bound to PCR 7 with the groups default, shared (our recovery key) and own (another)."""

    def __init__(self, layout: Layout, config: Config, model: ModelTpm) -> None:
        self.layout, self.config, self.model = layout, config, model
        with self.opened() as opened:
            for name, pem in (("shared", ""), ("own", THEIRS_PEM)):
                seal = GroupSeal(name, NOTHING, b"", pcrs="sha256:7,8" if pem else "", recovery=pem)
                group, key, store = uuid4(), GroupKey.new(), opened.store
                seal = seal_key(as_tpm(model), store.uuid, group, key, seal, Terms.of(seal, "sha256:7", OURS_PEM))
                store.commit([PutGroup(GroupRecord(group, GroupFlags.EPOCHS, seal.pack()), key)])
                store.commit([PutVtpm(VtpmRecord(uuid4(), group, StateKey(bytes(32))))])

    @contextmanager
    def opened(self) -> Iterator[Opened]:
        with locked_store(self.layout) as descriptor:
            made = open_store(descriptor, as_tpm(self.model), self.config)
            try:
                yield made
            finally:
                made.store.close()

    def closed(self) -> set[str]:
        with self.opened() as opened:
            groups = opened.store.groups()
            return {GroupSeal.unpack(groups[group].blob).name for group in opened.closed}

    def events(self) -> list[tuple[str, str]]:
        with self.opened() as opened:
            key = catalogue_key(opened.secret.store_key, opened.store.uuid)
            with Catalogue.open(self.layout.catalogue, key) as catalogue:
                return [(event.kind, event.text) for _, event in catalogue.events_after(0)]

    def recover(self, key: RecoveryPrivate) -> recovery.Recovered:
        done, self.config = recovery.recover(self.layout, self.config, key)
        return done

    def reseal(self, key: RecoveryPrivate | None, **predicted: bytes) -> resealing.Resealed:
        values = {int(pcr[1:]): value for pcr, value in predicted.items()}
        done = resealing.reseal(self.layout, self.config, key, values, None)
        self.config = done.config
        return done


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    model = ModelTpm()
    with installation(model, "sha256:7", OURS) as (_, layout, config):
        made = World(layout, config, model)

        @contextmanager
        def open_it(_layout: Layout, _config: Config) -> Iterator[HardwareTpm]:
            yield as_tpm(made.model)

        for module in (recovery, resealing, maintenance):
            monkeypatch.setattr(module, "open_tpm", open_it)
        yield made


def test_another_tpm_gets_the_groups_of_the_key_that_is_given_and_the_others_one_by_one(world: World) -> None:
    world.model = ModelTpm(srk=b"\x00\x0b" + b"\x77" * 32)
    done = world.recover(OURS)
    assert (done.groups, done.vtpms, set(done.left)) == (["default", "shared"], 1, {"own"})
    assert "recover --group own" in done.left["own"]
    assert world.closed() == {"own"}
    assert any(kind == "recovered" and "still closed: own" in text for kind, text in world.events())
    with pytest.raises(EscrowWrongKey):
        recovery.recover_group(world.layout, world.config, "own", OURS)
    with pytest.raises(NotFoundError):
        recovery.recover_group(world.layout, world.config, "nobody", THEIRS)
    assert world.closed() == {"own"}
    assert recovery.recover_group(world.layout, world.config, "own", THEIRS) == 1
    assert world.closed() == set()
    assert any(kind == "group-recovered" and text.startswith("own: 1 vTPMs") for kind, text in world.events())


def test_a_group_with_its_own_key_keeps_its_own_terms_when_it_is_recovered(world: World) -> None:
    world.model = ModelTpm(srk=b"\x00\x0b" + b"\x77" * 32)
    world.recover(OURS)
    recovery.recover_group(world.layout, world.config, "own", THEIRS)
    with world.opened() as opened:
        seals = {seal.name: seal for seal in (GroupSeal.unpack(r.blob) for r in opened.store.groups().values())}
    points = {name: seal.sealed.policy.recovery_point for name, seal in seals.items()}
    assert points["own"] == THEIRS.public.signing_point
    assert points["shared"] == points["default"] == OURS.public.signing_point
    selections = {name: getattr(seal.sealed.policy.branches[0], "selection", None) for name, seal in seals.items()}
    assert selections == {"own": (7, 8), "shared": (7,), "default": (7,)}


def test_recovery_with_a_groups_own_key_alone_does_not_open_the_installation(world: World) -> None:
    world.model = ModelTpm(srk=b"\x00\x0b" + b"\x77" * 32)
    with pytest.raises(EscrowWrongKey):
        world.recover(THEIRS)


def test_on_its_own_tpm_nothing_is_recovered(world: World) -> None:
    with pytest.raises(ConflictError):
        world.recover(OURS)


def test_a_recovery_can_be_done_again_after_it_was_cut_short(world: World) -> None:
    world.model = ModelTpm(srk=b"\x00\x0b" + b"\x77" * 32)
    for call in ("seal", "anchor_define", "anchor_write"):
        for when in ("before", "after"):
            world.model.fail[call] = when, KeyboardInterrupt()  # type: ignore[assignment]
            with pytest.raises(KeyboardInterrupt):
                world.recover(OURS)
    assert world.recover(OURS).groups == ["default", "shared"]
    assert world.closed() == {"own"}


def test_after_a_change_of_pcrs_a_reseal_does_what_the_key_opens_and_leaves_the_rest(world: World) -> None:
    world.model.pcrs[7] = b"\x11" * 32
    done = world.reseal(OURS)
    assert (done.done, set(done.left)) == (["group default", "group shared", "the store key"], {"own"})
    assert world.closed() == {"own"}
    assert recovery.recover_group(world.layout, world.config, "own", THEIRS) == 1
    assert world.closed() == set()


def test_a_reseal_without_a_key_does_not_stop_at_a_closed_group(world: World) -> None:
    world.model.pcrs[8] = b"\x11" * 32  # only the group `own` is bound to it
    assert world.closed() == {"own"}
    done = world.reseal(None, _7=b"\x22" * 32)
    assert set(done.left) == {"own"}
    world.model.pcrs[7] = b"\x22" * 32
    assert world.closed() == {"own"}


def test_a_reseal_with_predicted_values_is_for_every_group_that_is_bound_to_them(world: World) -> None:
    assert not world.reseal(None, _8=b"\x33" * 32, _7=b"\x22" * 32).left
    world.model.pcrs[7], world.model.pcrs[8] = b"\x22" * 32, b"\x33" * 32
    assert world.closed() == set()


def test_check_says_of_each_group_whether_it_opens(world: World) -> None:
    world.model.pcrs[8] = b"\x11" * 32
    findings = {finding.what: finding for finding in maintenance.check(world.layout, world.config)}
    assert findings["group shared"].verdict is Verdict.OK
    assert findings["group own"].verdict is Verdict.FAILED
    assert "PCR 8 is 1111" in findings["group own"].text
    assert findings["seals, store and anchors"].verdict is Verdict.OK


def test_a_group_record_of_an_older_manager_follows_the_installations_selection(world: World) -> None:
    """Such a record does not say to which PCRs it was to be bound."""
    world.config = replace(world.config, tpm=replace(world.config.tpm, pcrs="sha256:7"))
    done = resealing.reseal(world.layout, world.config, None, {}, "none")
    assert done.config.tpm.pcrs == "none"
    world.config = done.config
    world.model.pcrs[7] = b"\x11" * 32
    assert world.closed() == {"own"}, "which was made with PCRs of its own"


def test_a_recovery_key_put_into_the_boot_area_gets_no_escrow(world: World) -> None:
    """With the right signing key, and the escrow key of whoever writes the disk."""
    evil = RecoveryPrivate.new()
    forged = RecoveryPublic(OURS.public.signing, evil.public.escrow)
    with locked_store(world.layout) as descriptor:
        store, boot = read_boot_area(descriptor)
        changed = replace(boot, recovery=forged.to_pem().decode()).pack()
        copies = {copy.place: copy for copy in (read_boot(Device(descriptor), store),)}
        for place in (0, 1):
            sequence = max(copy.sequence for copy in copies.values()) + 1
            write_boot_copy(Device(descriptor), store, BootCopy(place, sequence, changed))
    with pytest.raises(IntegrityError, match="boot area"):
        world.reseal(None)
    world.model = ModelTpm(srk=b"\x00\x0b" + b"\x77" * 32)
    with pytest.raises(IntegrityError, match="boot area"):
        world.recover(OURS)
