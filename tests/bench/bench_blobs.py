"""A state blob out and in, as QEMU's save and restore do it, beside swtpm. Part of `./dev bench frontends`."""

import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import vtpm_instance_commands as tpm
from blob_client import SHUTDOWN, Machine, Saved
from document import Section, Table, Target
from floors import two_flushes
from options import Options, progress
from subjects import CONTENT_BYTES, INDEX, Subject, running_subject
from timing import MICROSECONDS, Call, Ratio, Sample, in_turns

LIMIT = 1.0
ROUNDS = 9
EACH = 40
TURN = 5  # calls in a row before the other has its turn
OURS, PEER, FLUSHES = "vTPM", "swtpm", "two flushes"


@dataclass
class _Party:
    """One TPM on its machine: saved, used, restored."""

    machine: Machine
    saved: Saved = field(default_factory=dict)

    def save(self) -> None:
        self.saved = self.machine.save()

    def use(self) -> None:
        self.machine.good(tpm.pcr_read(16))

    def restore(self) -> None:
        self.machine.restore(self.saved)

    def both(self) -> None:
        self.save()
        self.restore()


@contextmanager
def _swtpm(directory: Path) -> Iterator[str]:
    """Run swtpm with a control socket, as libvirt does."""
    directory.mkdir()
    path = str(directory / "control.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        control = f"type=unixio,fd={listener.fileno()}"
        state = ("--tpmstate", f"dir={directory}", "--log", f"file={directory / 'log'}")
        process = subprocess.Popen(
            ["swtpm", "socket", "--tpm2", *state, "--ctrl", control], pass_fds=[listener.fileno()]
        )
    try:
        yield path
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


@contextmanager
def _parties(subject: Subject) -> Iterator[dict[str, _Party]]:
    with ExitStack() as stack:
        subject.make("saved")
        paths = {OURS: subject.run_for("saved", "qemu")["control"]}
        paths[PEER] = stack.enter_context(_swtpm(subject.disk / "swtpm"))
        parties = {}
        for name, path in paths.items():
            machine = Machine(path)
            stack.callback(machine.close)
            machine.boot()
            machine.good(tpm.nv_define(INDEX, CONTENT_BYTES))
            machine.good(tpm.nv_write(INDEX, bytes(CONTENT_BYTES)))
            parties[name] = _Party(machine)
        yield parties
        parties[PEER].machine.call(SHUTDOWN)


def run(options: Options) -> Section:
    """Measure and return the section."""
    rounds, each = options.rounds(ROUNDS), options.each(EACH)
    with running_subject() as subject, two_flushes(subject.disk) as flushes, _parties(subject) as parties:
        progress("state blobs: save")
        saves = {name: party.save for name, party in parties.items()}
        uses: dict[str, Call] = {name: party.use for name, party in parties.items()}
        in_turns(saves, 1, 5, undo=uses)
        saved = in_turns(saves, rounds, each, TURN, undo=uses)
        progress("state blobs: restore")
        for party in parties.values():
            party.save()
        restores = {name: party.restore for name, party in parties.items()}
        restored = in_turns(restores, rounds, each, TURN, undo=saves)
        progress("state blobs: save and restore")
        for party in parties.values():
            party.use()
        both: dict[str, Call] = {name: party.both for name, party in parties.items()}
        whole = in_turns(both | {FLUSHES: flushes}, rounds, each, TURN, undo=uses)
        progress("state blobs: the first command after a save")
        first = in_turns(uses, rounds, each, TURN, undo=saves)
    return _section(saved, restored, whole, first)


_Samples = dict[str, Sample]


def _section(saved: _Samples, restored: _Samples, whole: _Samples, first: _Samples) -> Section:
    section = Section(
        "Save and restore of a state blob",
        "A client in Python does what QEMU does on the control channel of a vTPM attached with `--frontend qemu`, and "
        "of swtpm: *save* is GET_STATEBLOB three times, *restore* STOP, SET_STATEBLOB twice and INIT with what was "
        f"saved last, into the process that saved it. They take turns after {TURN} calls. After each save, outside the "
        "clock, a command is run, so that the next one saves another state; each restore is of a state saved just "
        "before, outside the clock. Ours encrypts and asks the manager for a key. Neither flushes anything here: what "
        "was saved or restored is made durable, as a generation of its own, before its next command, which has a row "
        "of its own; swtpm 0.7 never flushes.",
    )
    table = Table(
        ("", "vTPM, median", "best round", "swtpm, median", "best round", "ratio", "calls"), note="Microseconds:"
    )
    rows = {"save": saved, "restore": restored, "save and restore": whole, "first command after a save": first}
    for name, samples in rows.items():
        times = [
            f"{value / MICROSECONDS:.0f}"
            for sample in (samples[OURS], samples[PEER])
            for value in (sample.median, sample.best)
        ]
        table.add(name, *times, str(Ratio.of(samples[OURS], samples[PEER])), str(samples[OURS].calls))
    section.tables.append(table)
    ratio = Ratio.of(whole[OURS], whole[PEER])
    section.targets.append(Target("save and restore of a state blob", ratio.median, LIMIT, "swtpm", ratio.spread))
    floor, once = whole[FLUSHES].best / MICROSECONDS, first[OURS].best / MICROSECONDS
    section.meaning.append(
        "A save waits for the manager once, which makes a header and wraps a key: two wake-ups more than swtpm has. "
        f"The first command after a save or a restore waits for a commit ({once:.0f} us in the best round, of which "
        f"two flushes of this disk, one after the other, are {floor:.0f} us): from then on what was saved is not the "
        "newest state any more, and is not taken back without permission."
    )
    return section
