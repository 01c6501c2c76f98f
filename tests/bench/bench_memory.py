"""Private memory of running instances, beside as many swtpm processes after the same commands."""

import os
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from document import Figure, Section, Table, Target
from options import Options, progress
from subjects import READS, Client, Subject, running_subject, running_swtpms

LIMIT = 0.7
COMMANDS = 100  # each TPM has done so many when its memory is read
_PREPARING = 2 + len(READS)  # commands of Client.prepare
_KIB = "KiB"
_TITLE = "Private memory"
_REPORT_EVERY = 100
_PLOT = "instance-memory.svg"
_OWN = ("anonymous", "[heap]", "[stack]")  # mappings without a file


@dataclass(frozen=True, slots=True)
class _Memory:
    """One process, in KiB. `private` is USS: what would be free if it ended, page tables not counted."""

    private: int
    proportional: int
    page_tables: int

    @classmethod
    def of(cls, pid: int) -> "_Memory":
        """Read smaps_rollup and status (proc(5)); PermissionError for another user's process."""
        smaps = _fields(Path(f"/proc/{pid}/smaps_rollup"))
        status = _fields(Path(f"/proc/{pid}/status"))
        private = smaps["Private_Clean"] + smaps["Private_Dirty"] + smaps["Private_Hugetlb"]
        return cls(private, smaps["Pss"], status["VmPTE"])

    def plus(self, other: "_Memory") -> "_Memory":
        """Return both together."""
        return _Memory(
            self.private + other.private, self.proportional + other.proportional, self.page_tables + other.page_tables
        )


def _fields(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text(encoding="ascii", errors="replace").splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}


def _private_by_kind(pid: int) -> dict[str, int]:
    """Return a process's private KiB by what is mapped: file, heap, stack, anonymous (proc(5), smaps)."""
    found: dict[str, int] = {}
    name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            name = Path(words[5]).name if len(words) > 5 else "anonymous"
        elif words[0] in ("Private_Clean:", "Private_Dirty:") and words[1] != "0":
            found[name] = found.get(name, 0) + int(words[1])
    return found


def run(options: Options) -> Section:
    """Measure and return the section; without root it says that nothing was measured."""
    if os.geteuid() != 0:
        return Section(_TITLE, "Not measured: an instance's memory is open to root only (prctl(2), PR_SET_DUMPABLE).")
    wanted = 4 if options.quick else options.instances
    with running_subject() as subject:
        with ExitStack() as stack:
            progress(f"memory: {wanted} swtpm processes")
            started = time.monotonic()
            peers = stack.enter_context(running_swtpms(subject.disk, wanted))
            for peer in peers:
                _exercise(peer.path)
            swtpm_seconds = time.monotonic() - started
            theirs = [_Memory.of(peer.pid) for peer in peers]
            their_kinds = _private_by_kind(peers[-1].pid)
        progress(f"memory: {wanted} instances")
        started = time.monotonic()
        pids = _run_instances(subject, wanted)
        our_seconds = time.monotonic() - started
        ours = [_Memory.of(pid) for pid in pids]
        assert subject.manager is not None
        keeper_pid = subject.keeper(pids[0])
        manager, keeper = (
            _Memory.of(subject.manager.pid),
            _Memory.of(keeper_pid).plus(_Memory.of(subject.spawner(keeper_pid))),
        )
        for pid in subject.standing_by(keeper_pid):
            keeper = keeper.plus(_Memory.of(pid))
        kinds = _private_by_kind(pids[-1]), their_kinds
    return _section(ours, theirs, (manager, keeper), kinds, (our_seconds, swtpm_seconds))


def _run_instances(subject: Subject, wanted: int) -> list[int]:
    pids = []
    for number in range(1, wanted + 1):
        name = f"guest-{number}"
        subject.make(name)
        shown = subject.run_for(name)
        _exercise(shown["endpoint"])
        pids.append(shown["pid"])
        if number % _REPORT_EVERY == 0:
            progress(f"memory: {number} instances run")
    return pids


def _exercise(path: str) -> None:
    """Let a TPM do COMMANDS commands; it keeps running afterwards."""
    with Client.on_socket(path) as client:
        client.prepare()
        for packet in islice(cycle(READS.values()), COMMANDS - _PREPARING):
            client.run(packet)


def _section(
    ours: Sequence[_Memory],
    theirs: Sequence[_Memory],
    shared: tuple[_Memory, _Memory],
    kinds: tuple[dict[str, int], dict[str, int]],
    seconds: tuple[float, float],
) -> Section:
    count = len(ours)
    section = Section(
        _TITLE,
        f"{count} vTPMs running at once in a manager, each after {COMMANDS} commands (an NV index defined and "
        "written, then GetRandom, PCR_Read, PCR_Extend and NV_Read in turn), and as many swtpm processes after the "
        "same. *Private* is the unique set size from smaps_rollup; *page tables* is VmPTE and comes on top for both.",
    )
    table = Table((_KIB, "instance", "swtpm", "ratio"), note=f"Medians over {count} processes, {_KIB}:")
    for what in ("private", "proportional", "page_tables"):
        mine, other = (statistics.median(getattr(each, what) for each in side) for side in (ours, theirs))
        table.add(what.replace("_", " "), f"{mine:.0f}", f"{other:.0f}", f"{mine / other:.2f}")
    largest = [max(each.private for each in side) for side in (ours, theirs)]
    table.add("private, largest", *map(str, largest), f"{largest[0] / largest[1]:.2f}")
    manager, keeper = shared
    more = manager.private + keeper.private
    per_vtpm = [
        (sum(each.private + each.page_tables for each in side) + more) / count
        for side, more in ((ours, more), (theirs, 0))
    ]
    table.add(f"everything / {count}", *(f"{value:.0f}" for value in per_vtpm), f"{per_vtpm[0] / per_vtpm[1]:.2f}")
    section.tables.append(table)
    private = [statistics.median(each.private for each in side) for side in (ours, theirs)]
    section.targets.append(Target(f"private memory, {count} running", private[0] / private[1], LIMIT, "swtpm"))
    section.tables.append(_where(kinds))
    section.data |= {
        "unit": f"Private memory of one, {_KIB}",
        "bars": {party: _largest(of) for party, of in zip(("instance", "swtpm"), kinds, strict=True)},
        "limit": LIMIT * private[1],
        "limit_label": f"limit, {LIMIT} of swtpm",
    }
    section.figures.append(Figure(_PLOT, "Private memory of an instance and of swtpm, by what is mapped"))
    section.meaning += [_meaning(ours, theirs, (manager, keeper)), _times(count, seconds)]
    return section


def _largest(kinds: dict[str, int]) -> dict[str, int]:
    """Return what a plot can show: the anonymous mappings, heap and stack, and files together."""
    named = {name: kinds.get(name, 0) for name in _OWN}
    return named | {"files, copied when written to": sum(kinds.values()) - sum(named.values())}


def _where(kinds: tuple[dict[str, int], dict[str, int]]) -> Table:
    table = Table(("mapping", "instance", "swtpm"), note=f"Where the private memory of one of each lies, {_KIB}:")
    for name in sorted(kinds[0].keys() | kinds[1].keys(), key=lambda name: -kinds[0].get(name, 0)):
        table.add(name, *(str(side.get(name, 0)) for side in kinds))
    return table


def _meaning(ours: Sequence[_Memory], theirs: Sequence[_Memory], shared: tuple[_Memory, _Memory]) -> str:
    manager, keeper = shared
    mine, other = (statistics.median(each.private + each.page_tables for each in side) for side in (ours, theirs))
    both = manager.private + keeper.private
    if mine < other:
        balance = f"from about {both / (other - mine):.0f} vTPMs on the whole takes less than as many swtpm processes"
    else:
        balance = "so the whole takes more than as many swtpm processes, however many there are"
    return (
        f"*Everything / {len(ours)}* counts page tables and shares out the manager ({manager.private / 1024:.1f} MiB "
        f"private) and the keeper with its spawner and the next instance ({keeper.private / 1024:.1f} MiB), which "
        f"swtpm has no counterpart of; {balance}. An "
        "instance is forked from the spawner and shares its pages until it writes to them. Python writes to a page "
        "whenever it uses an object on it, because the reference count lies in the object. *Anonymous* and *heap* hold "
        "such copies and libtpms' own tables; the two are not told apart here."
    )


def _times(count: int, seconds: tuple[float, float]) -> str:
    return (
        f"Making, attaching and exercising all {count}, one after the other, took {seconds[0]:.1f} s "
        f"({seconds[1]:.1f} s for swtpm, which makes no durable record of them)."
    )
