"""Durable NV_Write, covered by the store, beside two flushes of this disk and beside swtpm, which flushes nothing."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from document import Section, Table, Target
from floors import BLOCK, storage_alone, two_flushes
from options import Options, progress
from subjects import CONTENT_BYTES, Client, Subject, running_subject, running_swtpms, writes
from timing import MICROSECONDS, Call, Ratio, Sample, in_turns, on_one_cpu

LIMIT = 1.5
ROUNDS = 9
EACH = 150
OURS, FLOOR, STORAGE, PEER = "vTPM NV_Write", "two flushes", "storage code alone", "swtpm NV_Write"
ORDER = (OURS, FLOOR, STORAGE, PEER)


@dataclass(frozen=True, slots=True)
class _Parties:
    subject: Subject
    calls: dict[str, Call]
    pids: tuple[int, ...]


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
        pids = (shown["pid"], subject.manager.pid, peer.pid)
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
        free = in_turns(parties.calls, rounds, each)
        after = parties.subject.status()
        progress("durable writes: pinned to one CPU")
        with on_one_cpu(parties.pids):
            pinned = in_turns(parties.calls, rounds, each)
    return _section(free, pinned, _flushes_per_save(before, after))


def _flushes_per_save(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Return how many flushes the store had for each save: 1 when nothing else is written."""
    return float(after["store_flushes"] - before["store_flushes"]) / max(1, after["commits"] - before["commits"])


def _section(free: dict[str, Sample], pinned: dict[str, Sample], flushes: float) -> Section:
    section = Section(
        "Durable NV_Write",
        f"NV_Write of {CONTENT_BYTES} bytes, always another content, on the data socket of an attached vTPM. The "
        "answer comes when the encrypted state is flushed to the state image and its key, hash and generation are "
        f"flushed to the store. *Two flushes* is twice (write {BLOCK} bytes to a preallocated, written file, "
        "fdatasync) on the same file system. *Storage code alone* is the product's encryption, image and store "
        "without TPM, processes and rings. swtpm 0.7 writes a new file and renames it over the old one without any "
        "flush (seen with strace): after a power cut its acknowledged write may be gone, so it is no peer for "
        "durability and stands here for orientation only. The parties take turns after every call; microseconds.",
    )
    for title, samples in (("Unpinned, as it is deployed:", free), ("Client, instance and manager on one CPU:", pinned)):
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
    section.meaning += [_meaning(free, pinned), _background(flushes)]
    return section


def _meaning(free: dict[str, Sample], pinned: dict[str, Sample]) -> str:
    parts = []
    for where, samples in (("Unpinned", free), ("Pinned", pinned)):
        whole, floor, storage = (samples[name].best / MICROSECONDS for name in (OURS, FLOOR, STORAGE))
        parts.append(
            f"{where}, of {whole:.0f} us (best round), two flushes take {floor:.0f}, encryption and storage code "
            f"{storage - floor:.0f} more, and the rest, {whole - storage:.0f}, is libtpms, Python in two processes, and "
            "four wake-ups: client to instance, instance to manager and back, instance to client."
        )
    return " ".join(parts)


def _background(flushes: float) -> str:
    return (
        f"The store was flushed {flushes:.2f} times for each save: what is above 1 is the note of the volatile anchor, "
        "written in the background before PCR 22 is extended (at most every 50 ms), and checkpoints of the log. A "
        "save that meets one of them waits for it; that is the tail."
    )
