"""Private memory of running instances, beside as many swtpm processes after the same commands."""

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from document import Section, Table, Target
from options import Options, progress
from subjects import READS, Client, Subject, running_subject, running_swtpms

LIMIT = 0.7
COMMANDS = 100  # each TPM has done so many when its memory is read
_PREPARING = 2 + len(READS)  # commands of Client.prepare
_KIB = "KiB"
_REPORT_EVERY = 100


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


def _fields(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text(encoding="ascii", errors="replace").splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}


def run(options: Options) -> Section:
    """Measure and return the section."""
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
        progress(f"memory: {wanted} instances")
        started = time.monotonic()
        pids = _run_instances(subject, wanted)
        our_seconds = time.monotonic() - started
        ours = [_Memory.of(pid) for pid in pids]
        assert subject.manager is not None
        manager, keeper = _Memory.of(subject.manager.pid), _Memory.of(subject.keeper(pids[0]))
    return _section(ours, theirs, manager, keeper, (our_seconds, swtpm_seconds))


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
    manager: _Memory,
    keeper: _Memory,
    seconds: tuple[float, float],
) -> Section:
    count = len(ours)
    section = Section(
        "Private memory",
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
    shared = manager.private + keeper.private
    per_vtpm = [(sum(each.private + each.page_tables for each in side) + more) / count
                for side, more in ((ours, shared), (theirs, 0))]
    table.add(
        f"everything / {count}", *(f"{value:.0f}" for value in per_vtpm), f"{per_vtpm[0] / per_vtpm[1]:.2f}"
    )
    section.tables.append(table)
    private = [statistics.median(each.private for each in side) for side in (ours, theirs)]
    section.targets.append(Target(f"private memory, {count} running", private[0] / private[1], LIMIT, "swtpm"))
    shares = (f"{manager.private / 1024:.1f}", f"{keeper.private / 1024:.1f}")
    break_even = shared / max(1.0, statistics.median(each.private + each.page_tables for each in theirs)
                              - statistics.median(each.private + each.page_tables for each in ours))
    section.meaning.append(
        f"*Everything / {count}* counts page tables and shares out the manager ({shares[0]} MiB private) and the "
        f"keeper ({shares[1]} MiB), which swtpm has no counterpart of: from about {break_even:.0f} vTPMs on the whole "
        f"installation takes less memory than as many swtpm processes. Making, attaching and exercising all "
        f"{count} took {seconds[0]:.1f} s ({seconds[1]:.1f} s for swtpm, which makes no durable record of them)."
    )
    return section
