"""vtpm-swtpm and a vTPM attached for QEMU, on swtpm's two channels, beside swtpm. Part of `./dev bench frontends`."""

import itertools
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import swtpm_rig
import vtpm_instance_commands as tpm
from blob_client import GET_CAPABILITY, SET_BUFFERSIZE, SET_LOCALITY, Machine
from document import Section, Table, Target
from options import Options, progress
from subjects import CONTENT_BYTES, INDEX, READS, Subject, running_subject
from timing import MICROSECONDS, Call, Ratio, Sample, in_turns, on_one_cpu

LIMIT = 1.1
ROUNDS = 9
EACH = 400
BLOCK = 20
STARTS = 15
NO_MANAGER, MANAGED, PEER = "vtpm-swtpm", "vTPM for QEMU", "swtpm"
_MILLISECONDS = 1_000_000  # nanoseconds
# command number, payload, bytes of the answer
CONTROL: Mapping[str, tuple[int, bytes, int]] = {
    "GET_CAPABILITY": (GET_CAPABILITY, b"", 8),
    "SET_LOCALITY": (SET_LOCALITY, bytes(4), 4),
    "GET_TPMESTABLISHED": (4, b"", 8),
    "GET_CONFIG": (15, b"", 8),
    "SET_BUFFERSIZE": (SET_BUFFERSIZE, bytes(4), 16),
    "GET_INFO": (18, struct.pack(">QII", 1, 0, 0), 12),
}


class _Party:
    """One TPM on its machine."""

    def __init__(self, control: str, pid: int) -> None:
        """Start the machine at `control`; `pid` serves it."""
        self.machine, self.pid = Machine(control), pid
        self.machine.reset()
        prepare = (tpm.nv_define(INDEX, CONTENT_BYTES), tpm.nv_write(INDEX, bytes(CONTENT_BYTES)))
        for packet in (tpm.STARTUP_CLEAR, *prepare, *READS.values()):
            self.machine.good(packet)
        self._contents = itertools.count()

    def control(self, name: str) -> None:
        """Run one control command."""
        number, payload, size = CONTROL[name]
        answer = self.machine.call(number, payload, size)
        if name == "GET_INFO":
            self.machine.control.recv(int.from_bytes(answer[8:12]))

    def command(self, packet: bytes) -> None:
        """Run one TPM command that stores nothing."""
        self.machine.data.sendall(packet)
        assert self.machine.data.recv(4096)[6:10] == bytes(4)

    def write(self) -> None:
        """Store something else than the time before."""
        self.command(tpm.nv_write(INDEX, next(self._contents).to_bytes(CONTENT_BYTES)))


def _parties(subject: Subject, stack: ExitStack) -> dict[str, _Party]:
    subject.make("machine")
    managed = subject.run_for("machine", "qemu")
    parties = {MANAGED: _Party(managed["control"], managed["pid"])}
    for name, command in ((NO_MANAGER, swtpm_rig.OURS), (PEER, swtpm_rig.SWTPM)):
        state = subject.disk / name
        state.mkdir()
        words = ("--tpm2", "--tpmstate", f"dir={state}")
        one = stack.enter_context(swtpm_rig.running(command, *words, flags=None, serves_data=False))
        parties[name] = _Party(str(one.ctrl), one.process.pid)
    return parties


def _started(command: tuple[str, ...], state: Path) -> None:
    """From exec to the first answer, and the end, with a state that is there."""
    state.mkdir(exist_ok=True)
    with swtpm_rig.running(command, "--tpm2", "--tpmstate", f"dir={state}") as one:
        one.tpm(tpm.get_random())
        one.stop()


def run(options: Options) -> Section:
    """Measure and return the section."""
    rounds, each = options.rounds(ROUNDS), options.each(EACH)
    with running_subject() as subject, ExitStack() as stack:
        parties = _parties(subject, stack)
        for party in parties.values():
            stack.callback(party.machine.close)
        calls: dict[str, dict[str, Call]] = {
            name: {who: partial(party.control, name) for who, party in parties.items()} for name in CONTROL
        }
        for name, packet in READS.items():
            calls[name] = {who: partial(party.command, packet) for who, party in parties.items()}
        with on_one_cpu([party.pid for party in parties.values()]):
            results = {}
            for name, of_all in calls.items():
                progress(f"front ends: {name}, pinned to one CPU")
                in_turns(of_all, 1, 2 * BLOCK)
                results[name] = in_turns(of_all, rounds, each, BLOCK)
        progress("front ends: NV_Write")
        writes = in_turns({who: party.write for who, party in parties.items()}, rounds, max(4, each // 20), 2)
        progress("front ends: starts")
        starts: dict[str, Call] = {
            NO_MANAGER: partial(_started, swtpm_rig.OURS, subject.disk / "start-ours"),
            PEER: partial(_started, swtpm_rig.SWTPM, subject.disk / "start-swtpm"),
        }
        in_turns(starts, 1, 1)
        started = in_turns(starts, options.rounds(3), options.each(STARTS))
    return _section(results, writes, started)


_Samples = dict[str, Sample]


def _section(results: dict[str, _Samples], writes: _Samples, started: _Samples) -> Section:
    section = Section(
        "Front ends of swtpm's",
        "One client in Python drives each as QEMU does: control commands on a Unix socket, TPM commands on the socket "
        f"passed by SET_DATAFD. All share one CPU and take turns after {BLOCK} calls. *vtpm-swtpm* is our command in "
        "swtpm's place, without a manager; *vTPM for QEMU* a vTPM of a running manager, `--frontend qemu`. NV_Write "
        "and starts are not pinned: ours flush a save before its answer, swtpm 0.7 does not flush. A start is from "
        "exec to the first answer, a clean stop included, with a stored state.",
    )
    head = ("command", NO_MANAGER, MANAGED, PEER, f"{NO_MANAGER} / swtpm", f"{MANAGED} / swtpm")
    table = Table(head, note="Microseconds, median / 99th percentile:")
    for name, samples in results.items():
        ratios = [Ratio.of(samples[who], samples[PEER]) for who in (NO_MANAGER, MANAGED)]
        table.add(name, *(_times(samples[who]) for who in (NO_MANAGER, MANAGED, PEER)), *map(str, ratios))
        for who, ratio in zip((NO_MANAGER, MANAGED), ratios, strict=True):
            section.targets.append(Target(f"{name}, {who}", ratio.median, LIMIT, "swtpm", ratio.spread))
    ratios = [Ratio.of(writes[who], writes[PEER]) for who in (NO_MANAGER, MANAGED)]
    table.add("NV_Write (ours: flushed)", *(_times(writes[who]) for who in (NO_MANAGER, MANAGED, PEER)),
              *map(str, ratios))  # fmt: skip
    section.tables.append(table)
    start = Table(("", NO_MANAGER, PEER, "ratio"), note="Milliseconds, median and best:")
    both = (started[NO_MANAGER], started[PEER])
    times = [f"{sample.median / _MILLISECONDS:.1f}, {sample.best / _MILLISECONDS:.1f}" for sample in both]
    start.add("start, first answer, stop", *times, str(Ratio.of(*both)))
    section.tables.append(start)
    section.meaning.append(
        "What a round trip costs more than swtpm's is the interpreter and the poll loop in it: see *Round trips* for "
        "how little of it is this project's own code. A start is the interpreter's own start and the modules it loads; "
        "under a manager instances are forked from a warm process instead."
    )
    return section


def _times(sample: Sample) -> str:
    return f"{sample.median / MICROSECONDS:.1f} / {sample.p99 / MICROSECONDS:.1f}"
