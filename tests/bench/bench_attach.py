"""From "attach this stored vTPM" to its first answer, beside swtpm's start on an existing state."""

import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from document import Figure, Section, Table, Target
from e2e_rig import BIN
from floors import two_flushes
from options import Options, progress
from subjects import READS, Client, Subject, Swtpm, running_subject
from timing import MILLISECONDS, Call, Ratio, Sample, cpu_time, in_turns, minor_faults

from storage.catalogue import Catalogue

LIMIT = 1.0
ROUNDS = 7
EACH = 15
OURS, PEER, COMMAND, SHOW, FLUSHES, EVENT = (
    "attach by the admin socket, to the first answer",
    "swtpm start, to the first answer",
    "the command vtpm-attach, to the first answer",
    "the command vtpm-show",
    "two flushes of this disk",
    "one event into a catalogue",
)
_NAME = "stored"
_PLOT = "attach.svg"
_FLUSHES_IN_TURN = 4  # counted with strace: one of the catalogue, two of the store, one of the state image


@dataclass(frozen=True, slots=True)
class _Spent:
    """What an attach to its first answer takes: milliseconds on a CPU by process, page faults of the instance."""

    on_cpu: dict[str, float]
    faults: float


@dataclass(slots=True)
class _Attacher:
    """Attaches one stored vTPM again and again; keeps how long the request itself took, in nanoseconds."""

    subject: Subject
    requests: list[int] = field(default_factory=list)

    def by_socket(self) -> None:
        started = time.perf_counter_ns()
        shown = self.subject.run_for(_NAME)
        self.requests.append(time.perf_counter_ns() - started)
        _first_answer(shown["endpoint"])

    def by_command(self) -> None:
        _first_answer(self.subject.attach(_NAME)["endpoint"])

    def detach(self) -> None:
        self.subject.ask("detach", vtpm=_NAME)


def _first_answer(path: str) -> None:
    with Client.on_socket(path) as client:
        client.run(READS["GetRandom"])


def run(options: Options) -> Section:
    """Measure and return the section."""
    rounds, each = options.rounds(ROUNDS), options.each(EACH)
    with running_subject() as subject, two_flushes(subject.disk) as flushes:
        attacher, peer = _Attacher(subject), Swtpm(subject.disk / "swtpm")
        _store_states(attacher, peer)

        def start_peer() -> None:
            peer.start()
            _first_answer(peer.path)

        def show() -> None:
            subprocess.run(
                [str(BIN / "vtpm-show"), "--socket", str(subject.runtime / "admin.sock"), _NAME, "--json"],
                stdout=subprocess.DEVNULL,
                check=True,
            )

        calls: dict[str, Call] = {OURS: attacher.by_socket, PEER: start_peer, FLUSHES: flushes}
        undo: dict[str, Call] = {OURS: attacher.detach, PEER: peer.stop, COMMAND: attacher.detach}
        in_turns(calls, 1, 3, undo=undo)
        progress("attach: by the admin socket")
        attacher.requests.clear()
        before = subject.status()
        samples = in_turns(calls, rounds, each, undo=undo)
        work = _work(before, subject.status(), rounds * each)
        requests = _rounds_of(attacher.requests, rounds)
        progress("attach: by the command")
        samples |= in_turns({COMMAND: attacher.by_command, SHOW: show}, rounds, max(2, each // 3), undo=undo)
        samples |= _catalogue_alone(subject.disk, rounds, each)
        progress("attach: processor time")
        spent = _processor_time(attacher, each * 2)
    return _section(samples, requests, work, spent)


def _processor_time(attacher: _Attacher, count: int) -> _Spent:
    """Measure `count` attaches."""
    subject = attacher.subject
    assert subject.manager is not None
    keeper = subject.keeper(subject.run_for(_NAME)["pid"])
    attacher.detach()
    lasting = {"manager": subject.manager.pid, "keeper": keeper}
    spent, faults = dict.fromkeys((*lasting, "instance"), 0), 0
    for _ in range(count):
        before = {name: cpu_time(pid) for name, pid in lasting.items()}
        shown = subject.run_for(_NAME)
        _first_answer(shown["endpoint"])
        for name, pid in lasting.items():
            spent[name] += cpu_time(pid) - before[name]
        spent["instance"] += cpu_time(shown["pid"])
        faults += minor_faults(shown["pid"])
        attacher.detach()
    return _Spent({name: value / count / MILLISECONDS for name, value in spent.items()}, faults / count)


def _store_states(attacher: _Attacher, peer: Swtpm) -> None:
    """Give both a state that exists already: an NV index defined and written."""
    subject = attacher.subject
    subject.make(_NAME)
    with Client.on_socket(subject.run_for(_NAME)["endpoint"]) as client:
        client.prepare()
    attacher.detach()
    peer.start()
    with Client.on_socket(peer.path) as client:
        client.prepare()
    peer.stop()


def _catalogue_alone(disk: Path, rounds: int, each: int) -> dict[str, Sample]:
    """Time what one entry in the catalogue costs: a transaction of SQLite, durable."""
    vtpm = uuid4()
    catalogue = Catalogue.create(disk / "floor.sqlite", bytes(32))
    try:
        return in_turns({EVENT: lambda: catalogue.log("measured", vtpm, "benchmark")}, rounds, each)
    finally:
        catalogue.close()


def _rounds_of(times: list[int], rounds: int) -> Sample:
    each = len(times) // rounds
    return Sample(tuple(tuple(times[number * each : (number + 1) * each]) for number in range(rounds)))


def _work(before: dict[str, Any], after: dict[str, Any], attaches: int) -> dict[str, float]:
    """Return what the manager did for each attach and the detach after it."""
    names = ("commits", "store_flushes", "tpm_commands", "pcr22_extends", "anchor_writes")
    return {name: (after[name] - before[name]) / attaches for name in names}


def _section(samples: dict[str, Sample], requests: Sample, work: dict[str, float], spent: _Spent) -> Section:
    section = Section(
        "Attach",
        "A vTPM with a stored state is attached through a running manager: the clock runs from the request on the "
        "admin socket until GetRandom is answered on the data socket that the answer names. Then it is detached, "
        "outside the clock. Beside it swtpm is started on a state that exists, from the start of the process until "
        "it answers GetRandom; its listening socket is made beforehand and handed to it, so that nobody has to wait "
        "for it to appear. They take turns. The installed commands are timed apart, as a user meets them.",
    )
    table = Table(("", "median", "p99", "best round"), note="Milliseconds:")
    rows = {OURS: samples[OURS], "of that, the request itself": requests}
    for name, sample in (rows | {name: samples[name] for name in (PEER, COMMAND, SHOW, FLUSHES, EVENT)}).items():
        table.add(name, *(f"{value / MILLISECONDS:.2f}" for value in (sample.median, sample.p99, sample.best)))
    section.tables += [table, _shares(samples, spent)]
    ratio = Ratio.of(samples[OURS], samples[PEER])
    section.targets.append(Target("attach to first answer", ratio.median, LIMIT, "swtpm start", ratio.spread))
    section.meaning += [_meaning(samples, requests, work, spent), _commands(samples)]
    peer, flushes = samples[PEER].best / MILLISECONDS, _flushes(samples)
    parts = spent.on_cpu | {f"{_FLUSHES_IN_TURN} flushes": flushes}
    section.data |= {
        "unit": "From request to first answer: processor time and flushes, some of it at the same time, ms",
        "bars": {"attach": parts, "swtpm start": {"swtpm, all of it": peer}},
        "limit": LIMIT * peer,
        "limit_label": "limit",
    }
    section.figures.append(Figure(_PLOT, "Milliseconds of an attach by process, beside swtpm's start"))
    return section


def _shares(samples: dict[str, Sample], spent: _Spent) -> Table:
    table = Table(("", "ms"), note="Where the time goes:")
    table.add("attach to first answer, best round", f"{samples[OURS].best / MILLISECONDS:.2f}")
    for name, value in spent.on_cpu.items():
        table.add(f"processor time of the {name}", f"{value:.2f}")
    table.add(f"{_FLUSHES_IN_TURN} flushes of this disk, one after the other", f"{_flushes(samples):.2f}")
    return table


def _flushes(samples: dict[str, Sample]) -> float:
    """Return the milliseconds of an attach's flushes, if they come one after the other."""
    return samples[FLUSHES].best / MILLISECONDS / 2 * _FLUSHES_IN_TURN


def _meaning(samples: dict[str, Sample], requests: Sample, work: dict[str, float], spent: _Spent) -> str:
    return (
        f"For each attach with the detach after it the manager made {work['commits']:.1f} commits with "
        f"{work['store_flushes']:.1f} flushes of the store, sent {work['tpm_commands']:.1f} commands to the hardware "
        f"TPM with {work['pcr22_extends']:.1f} background extends of PCR 22 (each reads it first), and wrote "
        f"{work['anchor_writes']:.1f} durable anchors. An attach has four flushes in turn that swtpm does not have "
        "(counted with strace): the mark that the stored state is used up, the state after TPM2_Startup, its record, "
        "the attachment's row with its event; such a transaction of SQLite takes "
        f"{samples[EVENT].best / MILLISECONDS:.2f} ms. The request is {requests.best / MILLISECONDS:.2f} ms of the "
        f"{samples[OURS].best / MILLISECONDS:.2f} ms. The forked instance shares the spawner's memory until it touches "
        f"it: {spent.faults:.0f} page faults until its first answer are part of its processor time, and most of them, "
        "as the fork itself, happen while it stands by, before the request."
    )


def _commands(samples: dict[str, Sample]) -> str:
    own = (samples[COMMAND].best - samples[OURS].best) / MILLISECONDS
    return (
        f"The command `vtpm-attach` adds {own:.0f} ms of its own: the start of a Python interpreter and the imports; "
        f"`vtpm-show`, which hardly does anything else, takes {samples[SHOW].best / MILLISECONDS:.0f} ms. A program "
        "that attaches many uses the admin socket."
    )
