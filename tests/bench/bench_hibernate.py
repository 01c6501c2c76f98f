"""Hibernation: from a command to a sleeping vTPM to its answer, and many attached of which few are awake."""

import os
import random
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from document import Section, Table, Target
from e2e_rig import wait_for
from options import Options, progress
from subjects import READS, Client, Subject, Swtpm, running_subject
from timing import MILLISECONDS, Ratio, Sample, in_turns

OURS, PEER = "a command that wakes it, to its answer", "swtpm start on its state, to the first answer"
LIMIT_MS: Final = 3.0
ROUNDS, EACH = 7, 15
AWAKE: Final = 200
_COMMANDS: Final = 4000  # of those awake, for the p99
_MIB: Final = 1024**2
_NAME: Final = "stored"
_QUICK: Final = 40  # attached in a quick run, of which a fifth is awake


def run(options: Options) -> Section:
    """Measure and return the section."""
    section = Section(
        "Hibernation",
        "A vTPM is hibernated (vtpm-hibernate), outside the clock. Then the clock runs from a command on a connection "
        "that its client has kept open, until the answer. Beside it swtpm is started on a state that exists, until it "
        "answers on a new connection. They take turns.",
    )
    _resume(section, options)
    _many(section, options)
    return section


def _resume(section: Section, options: Options) -> None:
    progress("hibernate: resumes")
    with running_subject() as subject, ExitStack() as closing:
        subject.make(_NAME)
        client = closing.enter_context(Client.on_socket(subject.run_for(_NAME)["endpoint"], timeout=30.0))
        client.prepare()
        peer = Swtpm(subject.disk / "swtpm")
        peer.start()
        with Client.on_socket(peer.path) as other:
            other.prepare()
        peer.stop()

        def start_peer() -> None:
            peer.start()
            with Client.on_socket(peer.path) as other:
                other.run(READS["GetRandom"])

        def sleep() -> None:
            subject.ask("hibernate", vtpm=_NAME)

        calls = {OURS: lambda: client.run(READS["GetRandom"]), PEER: start_peer}
        undo = {OURS: sleep, PEER: peer.stop}
        sleep()
        in_turns(calls, 1, 3, undo=undo)
        samples = in_turns(calls, options.rounds(ROUNDS), options.each(EACH), undo=undo)
    table = Table(("", "median", "p99", "best round"), note="Milliseconds:")
    for name in (OURS, PEER):
        its = samples[name]
        table.add(name, *(f"{value / MILLISECONDS:.2f}" for value in (its.median, its.p99, its.best)))
    section.tables.append(table)
    section.targets.append(Target("resume, best round", samples[OURS].best / MILLISECONDS, LIMIT_MS, "ms"))
    ratio = Ratio.of(samples[OURS], samples[PEER])
    section.meaning.append(f"A resume takes {ratio.median:.2f} times what swtpm takes to start ({ratio.spread}).")


def _many(section: Section, options: Options) -> None:
    attached = _QUICK if options.quick else options.attached
    awake = attached // 5 if options.quick else min(AWAKE, attached)
    with running_subject() as subject, ExitStack() as closing:
        names = [f"many-{number}" for number in range(attached)]
        subject.ask("add", name="many-{}", count=attached, first=0)
        before = _measure(subject)
        endpoints = _attach_and_hibernate(subject, names)
        asleep = _measure(subject)
        chosen = random.Random(1).sample(range(attached), awake)
        progress(f"hibernate: {awake} of {attached:,} wake")
        clients = [closing.enter_context(Client.on_socket(endpoints[number], timeout=60.0)) for number in chosen]
        times = _commands(clients, _COMMANDS // 20 if options.quick else _COMMANDS)
        status = subject.status()
        assert (status["hibernated"], status["running"]) == (attached - awake, awake), status
        at_work = _measure(subject)
    table = Table(("", "memory of manager and keepers, MiB", "their descriptors"))
    for what, (memory, descriptors) in (
        ("no vTPM attached", before),
        (f"{attached:,} attached, all hibernated", asleep),
        (f"{attached:,} attached, {awake} of them awake", at_work),
    ):
        table.add(what, f"{memory / _MIB:.1f}", f"{descriptors:,}")
    section.tables.append(table)
    section.meaning.append(
        f"Memory is proportional set size, that of spawners and of what stands by included, of instances not. A "
        f"hibernated vTPM costs "
        f"{(asleep[0] - before[0]) / attached / 1024:.1f} KiB of it and {(asleep[1] - before[1]) / attached:.1f} "
        f"descriptors. GetRandom of the {awake} that are awake, in turn on their own connections: median "
        f"{times.median / 1000:.0f} us, p99 {times.p99 / 1000:.0f} us."
    )


def _attach_and_hibernate(subject: Subject, names: list[str]) -> list[str]:
    endpoints = []
    for number, name in enumerate(names, 1):
        endpoints.append(str(subject.run_for(name)["endpoint"]))
        subject.ask("hibernate", vtpm=name)
        if not number % 1000:
            progress(f"hibernate: {number:,} of {len(names):,} attached and hibernated")
    wait_for(lambda: subject.status()["hibernated"] == len(names), "all to sleep")
    return endpoints


def _commands(clients: list[Client], count: int) -> Sample:
    """Wake every one with a command, then time `count` more, in random order."""
    for client in clients:
        client.run(READS["GetRandom"])
    chance, times = random.Random(2), []
    for _ in range(count):
        client = chance.choice(clients)
        started = time.perf_counter_ns()
        client.run(READS["GetRandom"])
        times.append(time.perf_counter_ns() - started)
    return Sample((tuple(times),))


def _measure(subject: Subject) -> tuple[int, int]:
    """Return (bytes of memory, descriptors) of the manager, its keepers and their spawners."""
    assert subject.manager is not None
    folder = str(subject.runtime).encode()
    pids = [subject.manager.pid]
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == subject.manager.pid:
            continue
        try:
            words, name = (entry / "cmdline").read_bytes(), (entry / "comm").read_text().strip()
        except OSError:
            continue
        if folder in words and b"vtpm_instance" in words and name != "vtpm-instance":
            pids.append(int(entry.name))
    return sum(map(_pss, pids)), sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def _pss(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
