"""Many vTPMs attached at once, as when a host starts: several clients of the admin socket, each attach as usual."""

import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess

from document import Section, Table, Target
from options import Options, progress
from subjects import READS, Client, Subject, running_subject
from timing import MILLISECONDS, cpu_time

LIMIT = 5.0  # seconds for 1,000
WANTED = 1000
CLIENTS = 8
_TITLE = "A thousand attaches"
_SECONDS_TO_WAIT = 170


@dataclass(frozen=True, slots=True)
class _Run:
    """`seconds` from the first request to the last answer; milliseconds on a CPU for each attach, by process."""

    attaches: int
    clients: int
    seconds: float
    on_cpu: dict[str, float]


def run(options: Options) -> Section:
    """Measure and return the section."""
    wanted = 8 if options.quick else WANTED
    with running_subject() as subject:
        progress(f"attach-many: {wanted} vTPMs")
        subject.ask("add", name=_name("{}"), count=wanted + 1, first=0)
        done = _attach_all(subject, wanted)
        progress("attach-many: does each answer?")
        shown = [subject.ask("show", vtpm=_name(number))[0] for number in range(wanted)]
        for one in shown:
            with Client.on_socket(one["endpoint"]) as client:
                client.run(READS["GetRandom"])
    return _section(done)


def _name(number: int | str) -> str:
    return f"guest-{number}"


def _attach_all(subject: Subject, wanted: int) -> _Run:
    assert subject.manager is not None
    keeper = subject.keeper(subject.run_for(_name(wanted))["pid"])  # one more, to find the processes by
    lasting = {"manager": subject.manager.pid, "keeper": keeper, "spawner": subject.spawner(keeper)}
    before = {name: cpu_time(pid) for name, pid in lasting.items()}
    clients = [_client(subject, first, wanted) for first in range(CLIENTS)]
    with ExitStack() as stack:
        started = time.monotonic()
        for client in clients:
            client.start()
            stack.callback(client.kill)
        for client in clients:
            client.join(_SECONDS_TO_WAIT)
        seconds = time.monotonic() - started
    failed = [client.exitcode for client in clients if client.exitcode]
    if failed:
        raise RuntimeError(f"clients ended with {failed}")
    spent = {name: (cpu_time(pid) - before[name]) / wanted / MILLISECONDS for name, pid in lasting.items()}
    instances = [cpu_time(subject.ask("show", vtpm=_name(number))[0]["pid"]) for number in range(0, wanted, 10)]
    spent["instance"] = statistics.median(instances) / MILLISECONDS
    return _Run(wanted, CLIENTS, seconds, spent)


def _client(subject: Subject, first: int, wanted: int) -> BaseProcess:
    def attach() -> None:
        for number in range(first, wanted, CLIENTS):
            subject.run_for(_name(number))

    return get_context("fork").Process(target=attach)


def _section(done: _Run) -> Section:
    section = Section(
        _TITLE,
        f"{done.attaches:,} vTPMs that have never run, each attached by a request of its own on the admin socket, from "
        f"{done.clients} client processes at once. The clock runs from the first request to the last answer; then each "
        "vTPM has to answer a command.",
    )
    table = Table(("", ""), note="All of it, on all CPUs:")
    table.add("seconds", f"{done.seconds:.2f}")
    table.add("attaches/s", f"{done.attaches / done.seconds:.0f}")
    for name, spent in done.on_cpu.items():
        table.add(f"processor time of the {name} for each, ms", f"{spent:.2f}")
    section.tables.append(table)
    whole = done.seconds / done.attaches * WANTED
    section.targets.append(Target("1,000 attaches, seconds", whole, LIMIT, "-"))
    most = max(done.on_cpu, key=lambda name: done.on_cpu[name])
    section.meaning.append(
        f"An attach takes {sum(done.on_cpu.values()):.1f} ms of processor time in our processes, clients and kernel "
        f"threads not counted, most of it in the {most}. The manager is one process: {WANTED:,} attaches cannot take "
        f"less than {done.on_cpu['manager']:.1f} s."
    )
    return section
