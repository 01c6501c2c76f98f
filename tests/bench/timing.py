"""Taking times: calls that are compared take turns, so that noise of the machine meets them alike.

What lives here: clocks, turns, statistics, CPUs. What must not: what is being measured.
"""

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

Call = Callable[[], object]

MICROSECONDS = 1e3  # nanoseconds in one
MILLISECONDS = 1e6
_TAIL = 0.99


@dataclass(frozen=True, slots=True)
class Sample:
    """Durations of one kind of call in nanoseconds, a tuple of them for each round."""

    rounds: tuple[tuple[int, ...], ...]

    @property
    def medians(self) -> tuple[float, ...]:
        """Each round's median."""
        return tuple(statistics.median(times) for times in self.rounds)

    @property
    def median(self) -> float:
        """The median of the rounds' medians: one disturbed round does not move it."""
        return statistics.median(self.medians)

    @property
    def best(self) -> float:
        """The smallest of the rounds' medians: the round that was disturbed least."""
        return min(self.medians)

    @property
    def p99(self) -> float:
        """The 99th percentile of all calls of all rounds: the longest of fewer than a hundred."""
        everything = sorted(chain.from_iterable(self.rounds))
        return everything[math.ceil(_TAIL * len(everything)) - 1]

    @property
    def calls(self) -> int:
        """How many calls were timed."""
        return sum(map(len, self.rounds))


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times longer one sample took than another, from the ratios of the rounds they shared."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Sample, peer: Sample, times: float = 1.0) -> "Ratio":
        """Compare two samples taken in turns; the peer's durations count `times` times."""
        ratios = [mine / (theirs * times) for mine, theirs in zip(ours.medians, peer.medians, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    @property
    def spread(self) -> str:
        """The lowest and the highest round."""
        return f"{self.low:.2f} to {self.high:.2f}"

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.spread})"


def in_turns(
    calls: Mapping[str, Call], rounds: int, each: int, block: int = 1, undo: Mapping[str, Call] | None = None
) -> dict[str, Sample]:
    """Time every call `each` times in each of `rounds` rounds, taking turns after `block` calls.

    Who begins changes from turn to turn. The garbage collector is off meanwhile. `undo` names what follows each call
    outside the clock.
    """
    undoing, names = undo or {}, list(calls)
    taken: dict[str, list[tuple[int, ...]]] = {name: [] for name in calls}
    with _no_collector():
        for _ in range(rounds):
            one_round: dict[str, list[int]] = {name: [] for name in calls}
            for turn in range(max(1, each // block)):
                for name in names[::-1] if turn % 2 else names:
                    _time(calls[name], block, one_round[name], undoing.get(name, _nothing))
            for name, times in one_round.items():
                taken[name].append(tuple(times))
    return {name: Sample(tuple(times)) for name, times in taken.items()}


def cpu_time(pid: int) -> int:
    """Return how long a process and its living threads have been on a CPU, in nanoseconds (proc(5), schedstat)."""
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in Path(f"/proc/{pid}/task").iterdir())


def minor_faults(pid: int) -> int:
    """Return a process's page faults that needed no disk (proc(5), stat, minflt)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[7])


def _nothing() -> None:
    pass


def _time(call: Call, count: int, into: list[int], undo: Call) -> None:
    clock = time.perf_counter_ns
    for _ in range(count):
        started = clock()
        call()
        into.append(clock() - started)
        undo()


@contextmanager
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def on_one_cpu(pids: Iterable[int]) -> Iterator[int]:
    """Keep this process and `pids`, with all their threads, on one CPU for the while; yields its number."""
    allowed = os.sched_getaffinity(0)
    cpu = max(allowed)
    everyone = (os.getpid(), *pids)
    _place(everyone, {cpu})
    try:
        yield cpu
    finally:
        _place(everyone, allowed)


def _place(pids: Iterable[int], cpus: set[int]) -> None:
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(ProcessLookupError):  # a thread may end between the listing and the call
                os.sched_setaffinity(int(thread.name), cpus)
