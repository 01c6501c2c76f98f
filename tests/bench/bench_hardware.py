"""Hardware TPM commands: for a guest's command, for a save, at start. And whether anybody waits for one."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

from document import Section, Table, Target
from e2e_rig import wait_for
from options import Options, progress
from subjects import READS, Client, Subject, running_subject, writes
from timing import MICROSECONDS, Call, Sample, in_turns

FEW, MANY = 1, 100
READINGS = 1000
SAVES = 300
STOPPED_CALLS = 100
PATIENCE = 5.0  # seconds for an answer while the TPM is stopped; then it counts as having waited
_SETTLED_AFTER = 0.3  # seconds without a new command: the extends come at most 50 ms after a save


@dataclass(frozen=True, slots=True)
class _Count:
    """Commands sent to the hardware TPM, and the background work among them."""

    commands: int
    extends: int
    anchors: int
    commits: int

    @classmethod
    def of(cls, subject: Subject) -> "_Count":
        """Count, once the background work that is due has been done."""
        last: list[dict[str, Any]] = [subject.status()]
        quiet_since = [time.monotonic()]

        def quiet() -> bool:
            now = subject.status()
            if now["tpm_commands"] != last[0]["tpm_commands"]:
                last[0], quiet_since[0] = now, time.monotonic()
            return time.monotonic() - quiet_since[0] >= _SETTLED_AFTER

        wait_for(quiet, "the hardware TPM to have nothing to do")
        found = last[0]
        return cls(found["tpm_commands"], found["pcr22_extends"], found["anchor_writes"], found["commits"])

    def since(self, other: "_Count") -> "_Count":
        """Return what was added since `other`."""
        return _Count(
            self.commands - other.commands,
            self.extends - other.extends,
            self.anchors - other.anchors,
            self.commits - other.commits,
        )


def run(options: Options) -> Section:
    """Measure and return the section."""
    many = 5 if options.quick else MANY
    with running_subject() as subject:
        subject.make("guest-1")
        endpoint = subject.run_for("guest-1")["endpoint"]
        with Client.on_socket(endpoint) as client:
            client.prepare()
            progress("hardware TPM: commands for commands of a guest")
            at_rest = _Count.of(subject)
            for number in range(options.each(READINGS)):
                client.run(list(READS.values())[number % len(READS)])
            after_reads = _Count.of(subject)
            packets = writes()
            for _ in range(options.each(SAVES)):
                client.run(next(packets))
            after_saves = _Count.of(subject)
            progress("hardware TPM: stopped, while a guest goes on")
            frozen = _with_a_stopped_tpm(subject, endpoint, options)
        progress("hardware TPM: commands at start")
        starts = {FEW: _restart(subject)}
        for number in range(2, many + 1):
            subject.make(f"guest-{number}")
            subject.run_for(f"guest-{number}")
        progress(f"hardware TPM: start with {many} vTPMs")
        starts[many] = _restart(subject)
    return _section(after_reads.since(at_rest), after_saves.since(after_reads), frozen, starts, options)


def _restart(subject: Subject) -> tuple[_Count, float]:
    """Stop everything, start again; return what the start took: counters, and seconds until it serves."""
    subject.stop()
    started = time.monotonic()
    subject.start()
    seconds = time.monotonic() - started
    return _Count.of(subject), seconds


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _with_a_stopped_tpm(subject: Subject, endpoint: str, options: Options) -> dict[str, tuple[Sample, Sample | None]]:
    """Time a read and a save while the hardware TPM runs, and while its process is stopped.

    The second is None where the answer waited for it.
    """
    found: dict[str, tuple[Sample, Sample | None]] = {}
    rounds, each = options.rounds(3), options.each(STOPPED_CALLS)
    for name, packets in (("GetRandom", repeat(READS["GetRandom"])), ("NV_Write", writes())):
        with Client.on_socket(endpoint, PATIENCE) as client:
            calls: dict[str, Call] = {name: partial(_run_next, client, packets)}
            running = in_turns(calls, rounds, each)[name]
            with _stopped(subject.embedded_tpm()):
                try:
                    frozen = in_turns(calls, rounds, each)[name]
                except TimeoutError:
                    frozen = None
        found[name] = running, frozen
    return found


def _run_next(client: Client, packets: Iterator[bytes]) -> None:
    client.run(next(packets))


def _section(
    reads: _Count,
    saves: _Count,
    frozen: dict[str, tuple[Sample, Sample | None]],
    starts: dict[int, tuple[_Count, float]],
    options: Options,
) -> Section:
    section = Section(
        "Hardware TPM commands",
        "Counted by the manager (`tpm_commands` of `vtpm-manager status --json`), on the embedded TPM. PCR 22, the "
        "volatile anchor, is extended in the background, at most every 50 ms while there are saves. Then the "
        "hardware TPM's process is stopped (SIGSTOP) while a guest reads and saves: what is answered then "
        "has not waited for it.",
    )
    counts = Table(("", "guest commands", "commits", "TPM commands", "PCR 22 extends", "anchor writes"))
    for name, guest, count in (
        ("commands that store nothing", options.each(READINGS), reads),
        ("NV_Write", options.each(SAVES), saves),
    ):
        counts.add(name, str(guest), *map(str, (count.commits, count.commands, count.extends, count.anchors)))
    section.tables += [counts, _stopped_table(frozen)]
    per_extend = saves.commands / max(1, saves.extends)
    at_start = Table(("vTPMs started", "TPM commands", "PCR 22 extends", "the rest", "seconds to serve"))
    rest = {vtpms: count.commands - per_extend * count.extends for vtpms, (count, _) in starts.items()}
    for vtpms, (count, seconds) in starts.items():
        at_start.add(str(vtpms), str(count.commands), str(count.extends), f"{rest[vtpms]:g}", f"{seconds:.2f}")
    section.tables.append(at_start)
    waited = {name: int(stopped is None) for name, (_, stopped) in frozen.items()}
    section.targets += [
        Target("TPM commands caused by commands that store nothing", reads.commands, 0, "none"),
        Target("guest commands that waited for a stopped TPM", waited["GetRandom"], 0, "none"),
        Target("saves that waited for a stopped TPM", waited["NV_Write"], 0, "none"),
        Target(f"TPM commands at start, {max(starts)} vTPMs", rest[max(starts)], rest[FEW], "as many as with 1 vTPM"),
    ]
    section.meaning.append(
        f"An extend of PCR 22 took {per_extend:g} commands (the value is read first), all in the background; how many "
        "there are follows the time that saves take, not their number. *The rest* at start is what is left without "
        "the extends for the vTPMs that saved during the start: opening and checking the TPM, unsealing, writing "
        "the durable anchor."
    )
    return section


def _stopped_table(frozen: dict[str, tuple[Sample, Sample | None]]) -> Table:
    table = Table(("", "TPM runs, median", "p99", "TPM stopped, median", "p99", "answered"), note="Microseconds:")
    for name, (running, stopped) in frozen.items():
        first = (f"{value / MICROSECONDS:.0f}" for value in (running.median, running.p99))
        if stopped is None:
            table.add(name, *first, "-", "-", f"no, not within {PATIENCE:g} s")
        else:
            second = (f"{value / MICROSECONDS:.0f}" for value in (stopped.median, stopped.p99))
            table.add(name, *first, *second, f"all {stopped.calls}")
    return table
