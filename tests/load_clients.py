"""Load on many vTPMs at once, from a few processes, and whether each got its share."""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROGRAM: Final = Path(__file__).with_name("closed_loop.py")


@dataclass(frozen=True, slots=True)
class Served:
    """What happened within `seconds`: saves by vTPM, their latencies in microseconds, sorted."""

    seconds: float
    counts: tuple[int, ...]
    latencies: tuple[int, ...]

    @property
    def rate(self) -> float:
        """Saves a second, all together."""
        return sum(self.counts) / self.seconds

    @property
    def mean(self) -> float:
        """Saves of a vTPM."""
        return statistics.mean(self.counts)

    @property
    def jain(self) -> float:
        """Jain's fairness index: 1 when all got the same, 1/n when one got everything (DEC-TR-301, 1984)."""
        squares = sum(count * count for count in self.counts)
        return sum(self.counts) ** 2 / (len(self.counts) * squares) if squares else 0.0

    def percentile(self, share: float) -> float:
        """Return a latency in microseconds."""
        return self.latencies[min(len(self.latencies) - 1, int(share * len(self.latencies)))]


def load(
    endpoints: Sequence[str], seconds: float, processes: int, *, warm_up: float = 1.0, define: bool = False
) -> Served:
    """Keep one durable NV_Write of each vTPM in flight for a while.

    Raises:
        RuntimeError: a client did not end well; a vTPM went away or refused.

    """
    running = []
    for number in range(processes):
        child = subprocess.Popen(
            [sys.executable, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        running.append(child)
        order = {
            "endpoints": endpoints[number::processes],
            "seconds": seconds,
            "warm_up": warm_up,
            "define": define,
        }
        _tell(child, json.dumps(order))
    for child in running:
        _hear(child)
    for child in running:
        _tell(child, "go")
    heard = [json.loads(_hear(child)) for child in running]
    for child in running:
        child.communicate()
    counts = tuple(count for one in heard for count in one["counts"])
    return Served(seconds, counts, tuple(sorted(latency for one in heard for latency in one["latencies"])))


def _tell(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdin is not None
    child.stdin.write(line + "\n")
    child.stdin.flush()


def _hear(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise RuntimeError(f"a client of the benchmark ended with status {child.wait()}")
    return line
