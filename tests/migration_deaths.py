"""A vTPM that moves while one of the two managers is killed: at a step seen on the wire, or at a chosen system call."""

import threading
from contextlib import ExitStack
from dataclasses import dataclass

import vtpm_instance_rig as tpm
from blob_client import Machine, RefusedError, Saved
from e2e_rig import alive, wait_for
from hibernation_deaths import killed_at
from migration_rig import INDEX, Guest, Host, Wire


def answers(machine: Machine) -> bool:
    """Tell whether a guest's TPM answers; one whose instance is gone does not."""
    try:
        machine.good(tpm.nv_read(INDEX, 8))
    except (OSError, AssertionError):
        return False
    return True


class World:
    """Two hosts, and the wire that the destination reaches the source by."""

    def __init__(self, north: Host, south: Host) -> None:
        self.failed: Exception | None = None
        self.north, self.south = north, south
        self.wire = Wire(f"{south.base}/wire.sock", f"{north.base}/migrate.sock")

    def guest(self) -> tuple[Guest, Saved]:
        guest = Guest(self.north)
        guest.allow(self.south, self.wire)
        return guest, guest.saved()

    def restores(self, guest: Guest, saved: Saved) -> threading.Event:
        """A QEMU at the destination that may fail at any moment, with its manager."""
        return self.started(guest.incoming(self.south), saved)

    def started(self, machine: Machine, saved: Saved) -> threading.Event:
        """Put a state in, in another thread; the event is set at its end, `failed` says how it ended."""

        def restore() -> None:
            try:
                machine.restore(saved)
            except (RefusedError, OSError) as error:
                self.failed = error
            done.set()

        self.failed, done = None, threading.Event()
        threading.Thread(target=restore, daemon=True).start()
        return done

    def kill(self, host: Host, *, cut: bool = False) -> None:
        """The manager dies, with its hardware TPM's reset; the wire forgets what was on it; the next manager starts."""
        host.kill()
        self.wire.let_through(cut=cut)
        host.start()

    def finish(self, guest: Guest, saved: Saved) -> None:
        """The destination's QEMU is started again with the same state: it goes on there, and nowhere else."""
        if self.south.show(guest.name)["guest"] is not None:
            self.south.command("vtpm-detach", guest.name)
        machine = guest.incoming(self.south)
        machine.restore(saved)
        guest.check(machine)
        guest.moved()
        machine.end()

    def refused_at_source(self, guest: Guest) -> None:
        assert self.north.state_of(guest.name) == "frozen"
        assert self.north.command("vtpm-attach", guest.name, "x", check=False).code == 4
        assert self.north.command("vtpm-reset", guest.name, "--yes", check=False).code == 4
        assert self.north.command("vtpm-remove", guest.name, "--yes", check=False).code == 4
        assert not answers(guest.machine), "its instance is gone"


@dataclass(frozen=True)
class Death:
    """Which manager dies, and at which system call of what it does while the vTPM moves."""

    who: str
    call: str
    number: int

    def __str__(self) -> str:
        return f"{self.who}-{self.call}-{self.number}"


DEATHS = [
    Death(who, call, number)
    for who in ("north", "south")
    for call, most in (("fsync", 4), ("fdatasync", 14), ("sendto", 8), ("unlink", 1))
    for number in range(1, most + 1)
]


def die(world: World, death: Death) -> str:
    """Have a vTPM move while a manager dies; returns how it ended. Exactly one side has it, and it can be finished."""
    north, south = world.north, world.south
    guest, saved = world.guest()
    victim: Host = getattr(world, death.who)
    assert victim.manager is not None
    machine = guest.incoming(south)
    with ExitStack() as traced:
        traced.enter_context(killed_at(victim.manager.pid, death.call, death.number))
        done = world.started(machine, saved)
        wait_for(lambda: done.is_set() or not alive(victim.manager.pid), "the death, or the end of the move", 90)
        if done.is_set() and world.failed is None:
            wait_for(lambda: not alive(victim.manager.pid) or north.state_of(guest.uuid) == "removed", "either", 90)
    if not alive(victim.manager.pid):
        victim.manager.wait()
        victim.manager = None
        victim.start()
    assert done.wait(90)
    return _ended(world, guest, saved, machine)


def _ended(world: World, guest: Guest, saved: Saved, machine: Machine) -> str:
    north, south = world.north, world.south
    here, there = north.state_of(guest.uuid), south.show(guest.name)
    arrived = there["generation"] > 0
    assert arrived or here != "removed", "lost"
    assert not arrived or here in ("frozen", "missing", "removed"), f"two: {here} and {there['state']}"
    if arrived:
        guest.moved()
        if world.failed is not None:  # QEMU was not told that it worked: another one finds the state there
            machine.end(politely=False)
            south.command("vtpm-detach", guest.name)
            machine = guest.incoming(south)
            machine.boot()
            assert tpm.nv_content(machine.good(tpm.nv_read(INDEX, 8))) == guest.content
        else:
            guest.check(machine)
        return "moved"
    if here == "frozen":
        world.refused_at_source(guest)
        machine.end(politely=False)
        world.finish(guest, saved)
        return "frozen, moved by the same claim"
    assert answers(guest.machine), "its guest goes on at the source"
    south.command("vtpm-detach", guest.name)
    south.command("vtpm-remove", guest.name, "--yes")
    return "stayed"
