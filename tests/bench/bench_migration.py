"""Live migration under QEMU: how long a guest that uses its TPM all the time stands still, with ours and with swtpm."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from document import Section, Table
from e2e_rig import wait_for
from guest_rig import built_image
from migration_rig import Host, hosts
from options import Options, progress
from qemu_guest import define_counter, start_counting
from qemu_rig import Qemu
from qemu_tpms import Behind, Bench, Ours, Swtpm, place

OURS, PEER = "vTPM of ours, from manager to manager", "swtpm"
ROUNDS: Final = 11
SETTLED: Final = 100  # increments before and after a move
_MILLISECONDS: Final = 1000.0


@dataclass(slots=True)
class Moves:
    """What moves took, in milliseconds, as QEMU's source says and as the guest's increments show."""

    downtime: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    usual: list[float] = field(default_factory=list)  # between two increments, where nothing moves


class Traveller:
    """A guest that counts, and the places that it goes to by turns. It stands still unless it is measured."""

    def __init__(self, bench: Bench, name: str, first: Behind, following: Callable[[], Behind]) -> None:
        """following: makes ready, and returns, the next place for its TPM."""
        self._bench, self._name, self._following = bench, name, following
        self._here = first
        self._number = 0
        self._qemu = self._start()
        self._qemu.boot()
        define_counter(self._qemu.guest)
        start_counting(self._qemu.guest)
        self._qemu.monitor.execute("stop")
        self.moves = Moves()

    def _start(self, incoming: str = "") -> Qemu:
        self._number += 1
        return self._bench.qemu(self._here, f"{self._name}-{self._number}", incoming=incoming)

    def move(self) -> None:
        """Move once."""
        before, left = self._qemu, self._here
        uri = f"unix:{self._bench.directory}/{self._name}-move"
        self._here = self._following()
        self._qemu = self._start(uri)
        begun = before.ticks.count
        before.monitor.execute("cont")
        _settle(before, begun)
        shown = before.migrate(uri)
        self._qemu.arrived()
        _settle(self._qemu, 0)
        self._qemu.ticks.follow(before.ticks)
        self._qemu.monitor.execute("stop")
        ticks = before.ticks.seen[begun:] + self._qemu.ticks.seen
        values = [value for _, value in ticks]
        assert values == list(range(values[0], values[0] + len(values))), "increments lost, or made twice"
        gaps = [(later - earlier) * _MILLISECONDS for (earlier, _), (later, _) in pairwise(ticks)]
        self.moves.downtime.append(float(shown["downtime"]))
        self.moves.gap.append(max(gaps))
        self.moves.usual.append(statistics.median(gaps))
        before.kill()
        left.close()


def _settle(qemu: Qemu, begun: int) -> None:
    wait_for(lambda: qemu.ticks.count > begun + SETTLED, "increments")


def run(options: Options) -> Section:
    """Measure and return the section."""
    image = built_image("client")
    with ExitStack() as closing:
        bench = Bench(closing.enter_context(place()), image)
        closing.callback(bench.close)
        progress("migration: guests boot")
        travellers = {
            OURS: closing.enter_context(_with_ours(bench)),
            PEER: closing.enter_context(_with_swtpm(bench)),
        }
        for number in range(options.rounds(ROUNDS)):
            progress(f"migration: round {number + 1}")
            for traveller in travellers.values():
                traveller.move()
    return _section({name: traveller.moves for name, traveller in travellers.items()})


@contextmanager
def _with_ours(bench: Bench) -> Iterator[Traveller]:
    with hosts("north", "south") as both:
        north, south = both
        first = Ours(north, "traveller")
        uuid = str(first.attached["uuid"])
        at: list[Host] = [north, south]

        def following() -> Ours:
            source, destination = at
            at.reverse()
            wait_for(lambda: source.state_of("traveller") == "running", "the vTPM")
            source.authorise(destination, "--leave", "traveller")
            destination.authorise(source, "--come", uuid)
            wait_for(lambda: destination.state_of("traveller") in {"none", "removed"}, "the end of the move before")
            destination.command("vtpm-migrate-expect", source.name, uuid, "--name", "traveller")
            return Ours(destination, "traveller", add=False)

        yield Traveller(bench, "ours", first, following)


@contextmanager
def _with_swtpm(bench: Bench) -> Iterator[Traveller]:
    made: list[Swtpm] = []

    def following() -> Swtpm:
        directory = bench.directory / f"plain-{len(made)}"
        directory.mkdir()
        made.append(Swtpm(directory))
        return made[-1]

    try:
        yield Traveller(bench, "swtpm", following(), following)
    finally:
        for each in made:
            each.close()


def _section(moves: dict[str, Moves]) -> Section:
    section = Section(
        "Live migration",
        "A Linux guest under QEMU (software emulation, TIS) increments an NV counter without a pause, each increment "
        "durable. It moves to another QEMU on this machine, with its vTPM from one manager (and hardware TPM) to "
        "another, or with plain swtpm from one directory to another; then back, and so on, the two guests in turn, one "
        "standing still while the other moves. *Downtime* is what the source's query-migrate says, which does not "
        "cover what the destination does with the state. The *longest gap* lies between the arrival of two increments "
        "at the host, the last at one QEMU and the first at the other: what the guest stands still for its TPM.",
    )
    table = Table(
        ("", "downtime, median", "least", "most", "longest gap, median", "least", "most"), note="Milliseconds:"
    )
    for name, its in moves.items():
        cells = [f"{value:.0f}" for row in (its.downtime, its.gap) for value in _three(row)]
        table.add(name, *cells)
    section.tables.append(table)
    ours, peer = moves[OURS], moves[PEER]
    down, gap = (
        statistics.median(a) - statistics.median(b) for a, b in ((ours.downtime, peer.downtime), (ours.gap, peer.gap))
    )
    section.meaning.append(
        f"Ours adds {down:.0f} ms to QEMU's downtime and {gap:.0f} ms to the longest gap (medians of {len(ours.gap)} "
        f"moves each). In these the destination claims the state from the source's manager over mutual TLS, the source "
        f"freezes it durably and anchors that in its hardware TPM, and the destination commits it before its first "
        f"answer. Between two increments lie otherwise {statistics.median(ours.usual):.1f} ms with ours, which makes "
        f"each durable, and {statistics.median(peer.usual):.1f} ms with swtpm, which does not. No increment was lost, "
        f"none was made twice: every value was seen once."
    )
    return section


def _three(row: list[float]) -> tuple[float, float, float]:
    return statistics.median(row), min(row), max(row)
