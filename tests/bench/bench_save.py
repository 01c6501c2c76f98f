"""Durable NV_Write, covered by the store, beside two flushes of this disk and beside swtpm, which flushes nothing."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from document import Section, Table, Target
from floors import BLOCK, storage_alone, two_flushes
from options import Options, progress
from subjects import CONTENT_BYTES, Client, Subject, running_subject, running_swtpms, writes
from timing import MICROSECONDS, Call, Ratio, Sample, cpu_time, in_turns, on_one_cpu

LIMIT = 1.5
ROUNDS = 9
EACH = 150
TURN = 10  # calls in a row before the next party has its turn
OURS, FLOOR, STORAGE, PEER = "vTPM NV_Write", "two flushes", "storage code alone", "swtpm NV_Write"
ORDER = (OURS, FLOOR, STORAGE, PEER)


@dataclass(frozen=True, slots=True)
class _Parties:
    """What is timed, and the processes that do it by what they are called in the text."""

    subject: Subject
    calls: dict[str, Call]
    pids: dict[str, int]


@contextmanager
def _parties() -> Iterator[_Parties]:
    with ExitStack() as stack:
        subject = stack.enter_context(running_subject())
        (peer,) = stack.enter_context(running_swtpms(subject.disk))
        subject.make("saver")
        shown = subject.run_for("saver")
        calls: dict[str, Call] = {}
        for name, path in ((OURS, shown["endpoint"]), (PEER, peer.path)):
            client = stack.enter_context(Client.on_socket(path))
            client.prepare()
            calls[name] = _writer(client)
        calls[FLOOR] = stack.enter_context(two_flushes(subject.disk))
        calls[STORAGE] = stack.enter_context(storage_alone(subject.disk))
        assert subject.manager is not None
        pids = {"instance": shown["pid"], "manager": subject.manager.pid, "swtpm": peer.pid}
        yield _Parties(subject, {name: calls[name] for name in ORDER}, pids)


def _writer(client: Client) -> Call:
    packets = writes()

    def write() -> None:
        client.run(next(packets))

    return write


def run(options: Options) -> Section:
    """Measure and return the section."""
    rounds, each = options.rounds(ROUNDS), options.each(EACH)
    with _parties() as parties:
        in_turns(parties.calls, 1, 20)
        progress("durable writes: unpinned")
        before = parties.subject.status()
        free = in_turns(parties.calls, rounds, each, TURN)
        after = parties.subject.status()
        progress("durable writes: pinned to one CPU")
        with on_one_cpu(parties.pids.values()):
            pinned = in_turns(parties.calls, rounds, each, TURN)
        progress("durable writes: processor time")
        work = _processor_time(parties, each)
    return _section(free, pinned, work, _flushes_per_save(before, after))


def _processor_time(parties: _Parties, count: int) -> dict[str, float]:
    """Return microseconds on a CPU for each save, by process, unpinned, background work included."""
    before = {name: cpu_time(pid) for name, pid in parties.pids.items()}
    for _ in range(count):
        parties.calls[OURS]()
    spent = {name: cpu_time(pid) - before[name] for name, pid in parties.pids.items()}
    return {name: spent[name] / count / MICROSECONDS for name in ("instance", "manager")}


def _flushes_per_save(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Return how many flushes the store had for each save: 1 when nothing else is written."""
    flushes: int = after["store_flushes"] - before["store_flushes"]
    commits: int = after["commits"] - before["commits"]
    return flushes / max(1, commits)


def _section(free: dict[str, Sample], pinned: dict[str, Sample], work: dict[str, float], flushes: float) -> Section:
    section = Section(
        "Durable NV_Write",
        f"NV_Write of {CONTENT_BYTES} bytes, always another content, on the data socket of an attached vTPM. The "
        "answer comes when the encrypted state is flushed to the state image and its key, hash and generation are "
        f"flushed to the store. *Two flushes* is twice (write {BLOCK} bytes to a preallocated, written file, "
        "fdatasync) on the same file system. *Storage code alone* is the product's encryption, image and store "
        "without TPM, processes and rings. swtpm 0.7 writes a new file and renames it over the old one without any "
        "flush (seen with strace): after a power cut its acknowledged write may be gone, so it is no peer for "
        "durability and stands here for orientation only. The parties take turns after "
        f"{TURN} calls; microseconds.",
    )
    for title, samples in (
        ("Unpinned, as it is deployed:", free),
        ("Client, instance and manager on one CPU:", pinned),
    ):
        table = Table(("", "median", "p99", "best round", "to two flushes", "calls"), note=title)
        for name in ORDER:
            sample = samples[name]
            times = (f"{value / MICROSECONDS:.0f}" for value in (sample.median, sample.p99, sample.best))
            table.add(name, *times, str(Ratio.of(sample, samples[FLOOR])), str(sample.calls))
        section.tables.append(table)
    for where, samples in (("unpinned", free), ("pinned", pinned)):
        ratio = Ratio.of(samples[OURS], samples[FLOOR])
        section.targets.append(
            Target(f"NV_Write, durable, {where}", ratio.median, LIMIT, "two flushes of this disk", ratio.spread)
        )
    section.tables.append(_shares(free, pinned, work))
    section.meaning += [_meaning(free, work), _background(flushes)]
    return section


def _shares(free: dict[str, Sample], pinned: dict[str, Sample], work: dict[str, float]) -> Table:
    table = Table(
        ("", "unpinned", "pinned"),
        note="Where the time goes (best rounds, microseconds). Processor time is of unpinned saves, flushing included.",
    )
    rows = []
    for samples in (free, pinned):
        whole, floor, storage = (samples[name].best / MICROSECONDS for name in (OURS, FLOOR, STORAGE))
        rows.append((whole, floor, storage - floor, whole - storage))
    names = ("a save", "of that: two flushes", "encryption and storage code", "everything else")
    for name, *values in zip(names, *rows, strict=True):
        table.add(name, *(f"{value:.0f}" for value in values))
    for name, value in work.items():
        table.add(f"processor time of the {name}", f"{value:.0f}", "")
    return table


def _meaning(free: dict[str, Sample], work: dict[str, float]) -> str:
    whole, floor, storage = (free[name].best / MICROSECONDS for name in (OURS, FLOOR, STORAGE))
    return (
        f"With two flushes at {floor:.0f} us the target leaves {floor * (LIMIT - 1):.0f} us for all else. Encryption "
        f"and storage code take {storage - floor:.0f}; *everything else*, {whole - storage:.0f}, is libtpms, the "
        f"Python of two processes, and at least four wake-ups: client to instance, instance to manager and back, "
        "instance to client. Where the manager commits in a worker thread there are two more, between thread and "
        f"event loop. On a CPU the instance spends {work['instance']:.0f} us and the manager {work['manager']:.0f} us "
        "for a save, storage and the background anchor included."
    )


def _background(flushes: float) -> str:
    return (
        f"The store was flushed {flushes:.2f} times for each save: what is above 1 is the note of the volatile anchor, "
        "written in the background before PCR 22 is extended (at most every 50 ms), and checkpoints of the log. A "
        "save that meets one of them waits for it."
    )
