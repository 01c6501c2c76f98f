"""`kill -9` of either manager at each step of a migration: then one side can run the vTPM, or an operator decides.

Never both, never none. The steps are told apart on the wire between the managers, and by what the source shows.
"""

import os
from collections.abc import Iterator

import pytest
import vtpm_instance_rig as tpm
from blob_client import Machine
from e2e_rig import wait_for
from killed_commands import needs_strace
from migration_deaths import DEATHS, Death, World, die
from migration_rig import INDEX, hosts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
# between what a claim and an arrival make durable; `./dev fuzz migration` has all of them
STEPS = ("north-fdatasync-3", "north-fdatasync-6", "south-fdatasync-2")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with hosts("north", "south") as (north, south):
        made = World(north, south)
        yield made
        made.wire.close()


@pytest.mark.parametrize("victim", ["north", "south"])
def test_before_the_freeze_nothing_has_left(world: World, victim: str) -> None:
    guest, saved = world.guest()
    world.wire.request_held = True
    qemu = world.restores(guest, saved)
    assert world.wire.seen.wait(30)
    assert world.north.state_of(guest.name) == "running"
    world.kill(getattr(world, victim), cut=True)  # what is repeated of the claim does not come through either
    guest.check(guest.machine)  # the source's guest goes on
    world.wire.let_through()  # the state that was saved is not the newest any more
    assert qemu.wait(90)
    assert world.failed is not None
    assert world.north.state_of(guest.name) == "running"
    assert world.south.state_of(guest.name) != "running" or world.south.show(guest.name)["generation"] == 0


@pytest.mark.parametrize("victim", ["north", "south"])
def test_after_the_freeze_the_same_claim_is_answered_again(world: World, victim: str) -> None:
    guest, saved = world.guest()
    world.wire.answer_held = True
    qemu = world.restores(guest, saved)
    assert world.wire.seen.wait(30)
    wait_for(lambda: world.north.state_of(guest.name) == "frozen", "the freeze")
    world.kill(getattr(world, victim))
    assert qemu.wait(60)  # manager or instance repeat the claim by themselves, and QEMU may notice nothing at all
    if world.failed is not None:
        world.refused_at_source(guest)
        world.finish(guest, saved)
    guest.moved()


def test_after_the_freeze_an_operator_takes_it_back(world: World) -> None:
    guest, saved = world.guest()
    world.wire.answer_held = True
    world.restores(guest, saved)
    assert world.wire.seen.wait(30)
    wait_for(lambda: world.north.state_of(guest.name) == "frozen", "the freeze")
    world.south.die()
    world.wire.let_through()
    assert world.north.command("vtpm-migrate-reclaim", guest.name, check=False).code == 2, "not without --yes"
    refused = world.north.command("vtpm-migrate-reclaim", guest.name, "--yes", check=False)
    assert (refused.code, "--destination-is-gone" in refused.err) == (8, True)
    assert world.north.state_of(guest.name) == "frozen"
    world.south.start()
    world.north.command("vtpm-migrate-reclaim", guest.name, "--yes")
    assert world.north.state_of(guest.name) == "detached"
    assert world.south.state_of(guest.name) == "none", "it gave up what it waited for"
    control = world.north.attach(guest.name, guest.name, "--frontend", "qemu")["control"]
    machine = Machine(control)
    machine.boot()
    assert tpm.nv_content(machine.good(tpm.nv_read(INDEX, 8))) == guest.content
    machine.end()


@pytest.mark.parametrize("victim", ["north", "south"])
def test_after_the_answer_the_state_is_committed_all_the_same(world: World, victim: str) -> None:
    guest, saved = world.guest()
    machine = guest.incoming(world.south)
    for kind, (flags, blob) in sorted(saved.items()):
        if blob:
            machine.put(kind, flags, blob)
    world.refused_at_source(guest)
    world.kill(getattr(world, victim))
    machine.call(2, (1).to_bytes(4))  # INIT, with which the destination's state is committed
    guest.check(machine)
    guest.moved()
    machine.end()


@pytest.mark.parametrize("victim", ["north", "south"])
def test_after_the_commit_the_destination_has_it_and_says_so_until_it_is_heard(world: World, victim: str) -> None:
    guest, saved = world.guest()
    machine = guest.incoming(world.south)
    for kind, (flags, blob) in sorted(saved.items()):
        if blob:
            machine.put(kind, flags, blob)
    world.wire.cut = True
    machine.call(2, (1).to_bytes(4))
    assert world.wire.seen.wait(30)
    world.refused_at_source(guest)
    reclaimed = world.north.command("vtpm-migrate-reclaim", guest.name, "--yes", check=False)
    assert reclaimed.code == 4, "the destination has it"
    world.refused_at_source(guest)
    world.kill(getattr(world, victim))
    guest.check(machine)
    guest.moved()
    machine.end()


@pytest.mark.parametrize("victim", ["north", "south"])
def test_after_the_confirmation_it_is_gone_and_repeating_it_changes_nothing(world: World, victim: str) -> None:
    guest, saved = world.guest()
    machine = guest.incoming(world.south)
    for kind, (flags, blob) in sorted(saved.items()):
        if blob:
            machine.put(kind, flags, blob)
    world.wire.answer_held = True
    machine.call(2, (1).to_bytes(4))
    assert world.wire.seen.wait(30)
    guest.moved()
    world.kill(getattr(world, victim))
    wait_for(lambda: world.south.show(guest.name)["comes_from"] is None, "the answer to the confirmation")
    guest.check(machine)
    assert world.north.state_of(guest.uuid) == "removed"
    machine.end()
    assert world.south.command("vtpm-verify", "--all", check=False).code == 0
    assert os.path.exists(world.south.show(guest.name)["state_image"])


def test_the_steps_are_steps() -> None:
    assert set(STEPS) <= {str(death) for death in DEATHS}


@pytest.mark.parametrize("death", [death for death in DEATHS if str(death) in STEPS], ids=str)
def test_killed_within_a_step_exactly_one_side_has_it(world: World, death: Death) -> None:
    needs_strace()
    die(world, death)
