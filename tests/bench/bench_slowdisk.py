"""A thousand real vTPMs saving at once, on this disk and on one whose flush takes 5 ms: rate, waiting, fairness."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from document import Section, Table, Target
from load_clients import Served, load
from options import Options, progress
from parts import where_the_cpus_go
from profiles import Profiler, Spent, accounting
from slow_disk import SlowDisk, run_on, slow_disk
from subjects import Subject, scratch
from timing import MICROSECONDS

SLOW_MS: Final = 5.0
GAIN: Final = 3  # saves a second, over one flush for each save
UNFAIR: Final = 2.0  # the best served over the worst served, at most
CLIENTS: Final = 2  # processes
_SECONDS, _QUICK_SECONDS, _WARM_UP = 15.0, 2.0, 2.0
_ATTACHERS: Final = 8
_FLUSHES: Final = 200
_SHOW_SECONDS: Final = 0.1  # between two questions of an administrator
_PROFILE_SECONDS: Final = 5.0
_TOP: Final = 8
_AS_IT_IS, _SLOW = "this disk", f"each flush {SLOW_MS:g} ms longer"

# Run with the shim and without: prints the median time of one write and flush, in nanoseconds.
_FLOOR: Final = """
import os, statistics, sys, time
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
os.pwrite(fd, bytes(1 << 20), 0); os.fsync(fd)
times = []
for number in range(int(sys.argv[2])):
    begin = time.perf_counter_ns()
    os.pwrite(fd, bytes(512), number % 2048 * 512); os.fdatasync(fd)
    times.append(time.perf_counter_ns() - begin)
print(statistics.median(times))
"""


@dataclass(slots=True)
class _Result:
    """One disk's numbers. `flush` in nanoseconds; `spent` by group of processes, over `served` and its warm-up."""

    served: Served
    flush: float
    spent: dict[str, Spent]
    saves: int  # warm-up included, as are the next three
    groups: int
    store_flushes: int
    flushes: int
    shows: list[float]  # milliseconds until an administrator had an answer

    @property
    def limit(self) -> float:
        """Saves a second if each had a flush of its own, one after the other."""
        return 1e9 / self.flush


@dataclass(frozen=True, slots=True)
class _Bed:
    """Attached vTPMs on a disk that can be made slow."""

    subject: Subject
    slow: SlowDisk
    endpoints: list[str]
    instances: list[int]

    def check(self) -> None:
        """Make sure that nobody has the disk as it is while it is said to be slow."""
        assert self.subject.manager is not None
        for pid in (self.subject.manager.pid, self.instances[0], self.instances[-1]):
            assert self.slow.is_under(pid), f"process {pid} does not have the slow disk"

    def flush(self) -> float:
        """Return the median time of one write and flush now, in nanoseconds, in a process with the slow disk."""
        done = subprocess.run(
            [sys.executable, "-c", _FLOOR, str(self.subject.disk / "floor"), str(_FLUSHES)],
            env=self.slow.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return float(done.stdout)

    def measure(self, milliseconds: float, seconds: float) -> _Result:
        """Have all of them save all the time."""
        assert self.subject.manager is not None
        self.slow.milliseconds = milliseconds
        groups = {"instances": self.instances, "manager": [self.subject.manager.pid]}
        flush, spent = [self.flush()], {}
        before, flushes = self.subject.status(), self.slow.flushes
        with accounting(groups, spent), self._administrator() as shows:
            served = load(self.endpoints, seconds, CLIENTS, warm_up=_WARM_UP)
        after, flushes = self.subject.status(), self.slow.flushes - flushes
        flush.append(self.flush())
        counted = (after[name] - before[name] for name in ("commits", "group_commits", "store_flushes"))
        return _Result(served, median(flush), spent, *counted, flushes, shows)

    @contextmanager
    def _administrator(self) -> Iterator[list[float]]:
        """Ask for one vTPM again and again meanwhile; yields the list that gets each answer's milliseconds."""
        times: list[float] = []
        done = threading.Event()

        def ask() -> None:
            while not done.wait(_SHOW_SECONDS):
                started = time.perf_counter()
                self.subject.ask("show", vtpm="v0")
                times.append((time.perf_counter() - started) * 1000)

        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(ask)
            try:
                yield times
            finally:
                done.set()
            asking.result()


@contextmanager
def _bed(count: int) -> Iterator[_Bed]:
    with slow_disk() as slow, scratch() as disk, tempfile.TemporaryDirectory(prefix="vb") as base:
        subject = Subject(Path(base), disk)
        try:
            subject.init()
            run_on(slow, subject)
            progress(f"slow disk: attaching {count} vTPMs")
            subject.ask("add", count=count, name="v{}", first=0)
            with ThreadPoolExecutor(_ATTACHERS) as pool:
                shown = list(pool.map(lambda number: subject.run_for(f"v{number}"), range(count)))
            bed = _Bed(subject, slow, [one["endpoint"] for one in shown], [one["pid"] for one in shown])
            bed.check()
            load(bed.endpoints, 0.1, CLIENTS, warm_up=0.0, define=True)
            yield bed
            slow.milliseconds = 0
            subject.stop()
        finally:
            slow.milliseconds = 0
            subject.tear_down()


def run(options: Options) -> Section:
    """Measure and return the section."""
    seconds, count = (_QUICK_SECONDS, 20) if options.quick else (_SECONDS, options.active)
    with _bed(count) as bed:
        progress("slow disk: all of them save, on this disk")
        quick = bed.measure(0.0, seconds)
        progress(f"slow disk: all of them save, {SLOW_MS:g} ms a flush")
        slow = bed.measure(SLOW_MS, seconds)
        progress("slow disk: profiles")
        bed.slow.milliseconds = 0
        profiles = _profiles(bed)
    return _section(count, {_AS_IT_IS: quick, _SLOW: slow}, profiles)


def _profiles(bed: _Bed) -> list[Table]:
    """Profile everything, then the manager, under all clients; and an instance that alone has a client.

    Of many, each instance hardly runs.
    """
    assert bed.subject.manager is not None
    processes = {"instances": bed.instances, "manager": [bed.subject.manager.pid]}
    found = where_the_cpus_go(bed.subject, bed.endpoints, CLIENTS, processes)
    for name, pid, endpoints in (
        ("Innermost Python functions (py-spy), manager, all save", bed.subject.manager.pid, bed.endpoints),
        ("Innermost Python functions (py-spy), instance, it alone saves", bed.instances[0], bed.endpoints[:1]),
    ):
        profiler = Profiler(pid, _PROFILE_SECONDS, bed.subject.disk)
        load(endpoints, _PROFILE_SECONDS, min(CLIENTS, len(endpoints)), warm_up=1.0)
        found.append(_profile(name, profiler.shares()))
    return found


def _section(count: int, results: dict[str, _Result], profiles: list[Table]) -> Section:
    section = Section(
        "Many saving at once, and a slow disk",
        f"{count:,} attached vTPMs, each a real instance, each with one durable NV_Write in flight all the time, from "
        f"{CLIENTS} client processes. Once on this disk, once with every flush of manager, keeper and instances "
        f"{SLOW_MS:g} ms longer than the disk needs (`tests/slow_flush.c`, preloaded; the same processes, the "
        "delay is switched on while they run). *One flush per save* is what a program could do that flushes once for "
        "each save, one after the other: one over the time of (write 512 bytes, fdatasync), measured before and after "
        "each load on the same disk, as slow. Every save here needs two flushes, of its state image and of the store.",
    )
    section.tables += [_rates(results), _fairness(results), _processors(results), *profiles]
    for name, result in results.items():
        section.targets.append(
            Target(
                f"saves/s, {count:,} active, {name}",
                result.served.rate / result.limit,
                GAIN,
                "one flush per save",
                at_least=True,
            )
        )
    slow = results[_SLOW].served
    section.targets.append(
        Target(
            f"saves of the vTPM that got most, {_SLOW}", max(slow.counts) / max(1, min(slow.counts)), UNFAIR, "of least"
        )
    )
    section.meaning.append(_meaning(results))
    return section


def _rates(results: dict[str, _Result]) -> Table:
    table = Table(
        (
            "",
            "saves/s",
            "one flush per save, /s",
            "times that",
            "a save, median, ms",
            "p99, ms",
            "longest, ms",
            "`show` by the admin socket, median and longest, ms",
        ),
        note="Saves, how long each took, and how long an administrator waited meanwhile:",
    )
    for name, result in results.items():
        served = result.served
        table.add(
            name,
            f"{served.rate:,.0f}",
            f"{result.limit:,.0f}",
            f"{served.rate / result.limit:.2f}",
            *(f"{served.percentile(share) / 1000:.0f}" for share in (0.5, 0.99, 1.0)),
            f"{median(result.shows):.0f}, {max(result.shows):.0f}",
        )
    return table


def _fairness(results: dict[str, _Result]) -> Table:
    table = Table(
        ("", "least", "mean", "most", "Jain's index", "saves in a group", "flushes of the store for a save"),
        note="Saves of a single vTPM while the clock ran, and what the store did:",
    )
    for name, result in results.items():
        counts = result.served.counts
        table.add(
            name,
            str(min(counts)),
            f"{result.served.mean:.1f}",
            str(max(counts)),
            f"{result.served.jain:.4f}",
            f"{result.saves / max(1, result.groups):.0f}",
            f"{result.store_flushes / max(1, result.saves):.3f}",
        )
    return table


def _processors(results: dict[str, _Result]) -> Table:
    table = Table(
        ("", "", "user, us", "system, us", "of what the CPUs did"),
        note="Processor time for each save. *Everything else* is the clients, the kernel's own threads, and whoever "
        "else was on the machine:",
    )
    for name, result in results.items():
        spent = dict(result.spent)
        machine = spent.pop("machine")
        spent["everything else"] = machine - spent["instances"] - spent["manager"]
        for who, used in spent.items():
            each = (f"{value * 1e6 / max(1, result.saves):.0f}" for value in (used.user, used.system))
            table.add(name, who, *each, f"{100 * used.together / machine.together:.0f} %")
    return table


def _profile(name: str, shares: list[tuple[str, float]]) -> Table:
    table = Table(("", "samples"), note=f"{name}, this disk:")
    for function, share in shares[:_TOP]:
        table.add(f"`{function}`", f"{100 * share:.0f} %")
    return table


def _meaning(results: dict[str, _Result]) -> str:
    quick, slow = results[_AS_IT_IS], results[_SLOW]
    us = 1e6 / max(1, quick.saves)
    instances, manager = quick.spent["instances"].together * us, quick.spent["manager"].together * us
    cpus = os.cpu_count() or 1
    return (
        f"On this disk a flush takes {quick.flush / MICROSECONDS:.0f} us, so {GAIN} times one flush per save is "
        f"{GAIN * quick.limit:,.0f} saves a second, for each of which {cpus} CPUs have "
        f"{cpus * 1e6 / (GAIN * quick.limit):.0f} us. The instance uses {instances:.0f} us for a save and the manager "
        f"{manager:.0f} us: with nothing else on them the CPUs could do {cpus * 1e6 / (instances + manager):,.0f} a "
        f"second, whatever the disk does. With {SLOW_MS:g} ms a flush, instances wait for their own flushes side by "
        f"side, and one flush of the store covers {slow.saves / max(1, slow.groups):.0f} saves."
    )
