"""Round trips of commands that store nothing, on an attached vTPM's socket and ring, beside swtpm's socket."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from document import Figure, Section, Table, Target
from floors import echo_server, libtpms_alone
from options import Options, progress
from subjects import READS, Client, running_subject, running_swtpms
from timing import MICROSECONDS, Call, Ratio, Sample, cpu_time, in_turns, on_one_cpu

LIMIT_SOCKET = 1.3
LIMIT_RING = 1.0
BLOCK = 20  # commands in a row before the next party has its turn
ROUNDS = 9
EACH = 800
SOCKET, RING, PEER, ECHO = "vTPM, socket", "vTPM, ring", "swtpm, socket", "Python echo"
_PLOT = "round-trips.svg"
_ANSWER_BYTES = 44  # of GetRandom(32)


@dataclass(frozen=True, slots=True)
class _Parties:
    """Who takes commands, and the processes that serve them."""

    clients: Mapping[str, Client]
    echo: Call
    pids: Mapping[str, int]

    def calls(self, packet: bytes) -> dict[str, Call]:
        """Return one call a party; the echo is sent the same however large the packet."""
        return {name: partial(client.run, packet) for name, client in self.clients.items()} | {ECHO: self.echo}


@contextmanager
def _parties() -> Iterator[_Parties]:
    with ExitStack() as stack:
        subject = stack.enter_context(running_subject())
        (peer,) = stack.enter_context(running_swtpms(subject.disk))
        subject.make("socket")
        subject.make("ring")
        by_socket, by_ring = subject.run_for("socket"), subject.run_for("ring", "ring")
        clients = {
            SOCKET: stack.enter_context(Client.on_socket(by_socket["endpoint"])),
            RING: stack.enter_context(Client.on_ring(by_ring["endpoint"])),
            PEER: stack.enter_context(Client.on_socket(peer.path)),
        }
        for client in clients.values():
            client.prepare()
        echo_pid, echo = stack.enter_context(echo_server(_ANSWER_BYTES))
        yield _Parties(clients, echo, {SOCKET: by_socket["pid"], RING: by_ring["pid"], PEER: peer.pid, ECHO: echo_pid})


def run(options: Options) -> Section:
    """Measure and return the section."""
    rounds, each = options.rounds(ROUNDS), options.each(EACH)
    with _parties() as parties:
        progress("round trips: pinned to one CPU")
        with on_one_cpu(parties.pids.values()):
            pinned = _all(parties, rounds, each, BLOCK)
            progress("round trips: pinned, another party at each command")
            turns = _all(parties, rounds, each // 2, 1)
            work = {name: _processor_time(parties, name, each * 5) for name in parties.clients}
        progress("round trips: unpinned")
        free = _all(parties, rounds, each // 4, BLOCK)
    progress("round trips: libtpms alone")
    with libtpms_alone() as calls, on_one_cpu(()):
        inside = in_turns(calls, rounds, each, BLOCK)
    return _section(pinned, turns, free, inside, work)


_Results = dict[str, dict[str, Sample]]


def _processor_time(parties: _Parties, name: str, count: int) -> tuple[float, float]:
    """Return microseconds on a CPU for a PCR_Read in the client and in the server, the kernel's work included."""
    client, pids = parties.clients[name], (os.getpid(), parties.pids[name])
    before = [cpu_time(pid) for pid in pids]
    for _ in range(count):
        client.run(READS["PCR_Read"])
    ours, theirs = ((cpu_time(pid) - earlier) / count / MICROSECONDS for pid, earlier in zip(pids, before, strict=True))
    return ours, theirs


def _all(parties: _Parties, rounds: int, each: int, block: int) -> _Results:
    for packet in READS.values():  # caches and byte code learn the way before anything is timed
        in_turns(parties.calls(packet), 1, 2 * BLOCK)
    return {name: in_turns(parties.calls(packet), rounds, each, block) for name, packet in READS.items()}


def _section(
    pinned: _Results,
    turns: _Results,
    free: _Results,
    inside: dict[str, Sample],
    work: dict[str, tuple[float, float]],
) -> Section:
    section = Section(
        "Round trips",
        "An attached vTPM of a running manager and `swtpm socket`, each on a persistent connection from one client "
        "process, and a second vTPM on the local ring (both ends in Python). *Pinned*: client and servers share one "
        "CPU, so that the cost of the code is measured and not that of waking another CPU. *Unpinned*: the scheduler "
        f"places them. The parties take turns after {BLOCK} commands. Times are microseconds, median / 99th "
        "percentile; ratios are to swtpm in the same rounds, with the lowest and highest round.",
    )
    for title, results in (
        ("Pinned to one CPU:", pinned),
        ("Pinned, the parties take turns after every single command (caches are cold for everybody):", turns),
        ("Unpinned:", free),
    ):
        section.tables.append(_table(title, results))
    for name in READS:
        for party, limit in ((SOCKET, LIMIT_SOCKET), (RING, LIMIT_RING)):
            ratio = Ratio.of(pinned[name][party], pinned[name][PEER])
            section.targets.append(
                Target(f"{name}, {party.split(', ')[1]}, pinned", ratio.median, limit, "swtpm, socket", ratio.spread)
            )
    section.tables += [_shares(pinned, inside), _work_table(work)]
    section.data |= {"commands": list(READS), "limits": {SOCKET: LIMIT_SOCKET, RING: LIMIT_RING}}
    for which, results in (("pinned", pinned), ("free", free)):
        section.data[which] = {
            party: [samples[party].median / MICROSECONDS for samples in results.values()]
            for party in (SOCKET, RING, PEER)
        }
    section.figures.append(Figure(_PLOT, "Microseconds of a command: vTPM by socket, vTPM by ring, swtpm"))
    section.meaning.append(_meaning(pinned, inside))
    return section


def _table(title: str, results: _Results) -> Table:
    table = Table(("command", SOCKET, RING, PEER, "socket / swtpm", "ring / swtpm"), note=title)
    for name, samples in results.items():
        ratios = (Ratio.of(samples[party], samples[PEER]) for party in (SOCKET, RING))
        table.add(name, *(_times(samples[party]) for party in (SOCKET, RING, PEER)), *map(str, ratios))
    return table


def _times(sample: Sample) -> str:
    return f"{sample.median / MICROSECONDS:.1f} / {sample.p99 / MICROSECONDS:.1f}"


def _shares(pinned: _Results, inside: dict[str, Sample]) -> Table:
    table = Table(
        ("command", SOCKET, "Python echo", "libtpms from Python", "ours", f"ours at {LIMIT_SOCKET}", "swtpm"),
        note="Where the time goes, pinned (best round, microseconds). *Python echo* is a round trip to a Python "
        "process that only polls, receives and sends; *libtpms from Python* is the command in-process through the "
        "same binding; *ours* is what is left for everything this project adds, and how much "
        "that may be if the target is to hold.",
    )
    for name in READS:
        samples = pinned[name]
        whole, echo, call, peer = (
            sample.best / MICROSECONDS for sample in (samples[SOCKET], samples[ECHO], inside[name], samples[PEER])
        )
        table.add(
            name,
            *(f"{value:.1f}" for value in (whole, echo, call)),
            *(f"{value - echo - call:.1f}" for value in (whole, peer * LIMIT_SOCKET)),
            f"{peer:.1f}",
        )
    return table


def _work_table(work: dict[str, tuple[float, float]]) -> Table:
    table = Table(
        ("PCR_Read", "client", "server", "together"),
        note="Processor time for a command, pinned, many in a row, microseconds. The socket's clients are the same "
        "code; on the ring the client is Python that reads, checks and writes the shared page, and so is the server; "
        "its doorbell is a pair of pipes, two system calls a command on each side.",
    )
    for name, (ours, theirs) in work.items():
        table.add(name, f"{ours:.1f}", f"{theirs:.1f}", f"{ours + theirs:.1f}")
    return table


def _meaning(pinned: _Results, inside: dict[str, Sample]) -> str:
    floors = [(pinned[name][ECHO].best + inside[name].best) / pinned[name][PEER].best for name in READS]
    return (
        f"A Python server that did nothing but call libtpms would be at {min(floors):.2f} to {max(floors):.2f} times "
        "swtpm: that is what interpreter, poll loop and binding cost, and no change of our own code goes below it. "
        "swtpm does the same three system calls for a command (poll, read, write). Unpinned, waking a sleeping "
        "process on another CPU costs more than the command, and the scheduler decides which party pays it: those "
        "figures jump between two modes from run to run and say little about either program."
    )
