"""Where processor time goes: by process from proc(5), by function from py-spy. By part of a program: see `parts`.

What lives here: reading clocks and profiles. What must not: the load that is profiled.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICK: Final = os.sysconf("SC_CLK_TCK")
_RATE: Final = 200  # samples a second
_IDLE_THREAD: Final = "WorkerThread._work (trio/_core/_thread_cache.py)"  # py-spy takes its wait for work


@dataclass(frozen=True, slots=True)
class Spent:
    """Processor time in seconds."""

    user: float
    system: float

    @property
    def together(self) -> float:
        """Both."""
        return self.user + self.system

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.user + other.user, self.system + other.system)

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(self.user - other.user, self.system - other.system)


def spent_by(pids: Iterable[int]) -> Spent:
    """Return what living processes have used so far, all their threads (proc(5), stat)."""
    total = Spent(0.0, 0.0)
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rsplit(")", 1)[1].split()
        total += Spent(int(fields[11]) / _TICK, int(fields[12]) / _TICK)
    return total


def machine_busy() -> Spent:
    """Return what all CPUs have been busy with so far, user and system, idle and stolen time left out."""
    user, nice, system, _, _, irq, soft = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:8])
    return Spent((user + nice) / _TICK, (system + irq + soft) / _TICK)


@contextmanager
def accounting(groups: Mapping[str, Iterable[int]], into: dict[str, Spent]) -> Iterator[None]:
    """Put what each group of processes uses meanwhile, and the whole machine, into `into`."""
    members = {name: list(pids) for name, pids in groups.items()}
    before, all_before = {name: spent_by(pids) for name, pids in members.items()}, machine_busy()
    yield
    into.update({name: spent_by(pids) - before[name] for name, pids in members.items()})
    into["machine"] = machine_busy() - all_before


class Profiler:
    """py-spy looking at one process for `seconds`, beside whatever this process does meanwhile."""

    def __init__(self, pid: int, seconds: float, directory: Path) -> None:
        self._output = directory / f"profile-{pid}"
        command = [str(Path(sys.executable).parent / "py-spy"), "record", "--pid", str(pid), "--rate", str(_RATE)]
        more = ["--duration", str(max(1, round(seconds))), "--format", "raw", "--output", str(self._output)]
        self._process = subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def shares(self) -> list[tuple[str, float]]:
        """Wait for the end; return functions with the share of samples that they were the innermost of, most first.

        Idle threads are left out. What waits for the disk or for an event is sampled too.

        Raises:
            RuntimeError: py-spy could not look at the process.

        """
        _, said = self._process.communicate()
        if self._process.returncode or not self._output.exists():
            raise RuntimeError(f"py-spy did not work: {said.decode(errors='replace').strip()}")
        counts: Counter[str] = Counter()
        for line in self._output.read_text(encoding="utf-8").splitlines():
            stack, _, count = line.rpartition(" ")
            function = _without_line(stack.rsplit(";", 1)[-1])
            if function != _IDLE_THREAD:
                counts[function] += int(count)
        total = max(1, counts.total())
        return [(name, count / total) for name, count in counts.most_common()]


def _without_line(frame: str) -> str:
    """Return "function (file)" of py-spy's "function (file:line)"."""
    return frame.rpartition(":")[0] + ")" if ":" in frame else frame
