"""Keys and groups: hardware TPM commands at start, opening one group, and what a key rotation costs those who save."""

import os
import threading
import time
from dataclasses import dataclass
from functools import partial

from bench_quotes import add_quotes
from document import Section, Table, Target
from fixtures_tpm import running_swtpm
from options import Options, progress
from subjects import Client, Subject, running_subject, writes
from timing import MILLISECONDS, Sample, in_turns

from manager.hwtpm import HardwareTpm
from manager.policy import SealPolicy

VTPMS = (1, 100, 20_000)
GROUPS = 10
UNLOCKS = 50
UNLOCK_MS = 20.0  # the goal of issue 4


@dataclass(frozen=True, slots=True)
class _Rotation:
    """Milliseconds: the whole verb, and the longest save of a guest of the group, meanwhile and without it."""

    verb: float
    slowest: float
    usual: float


def run(options: Options) -> Section:
    """Measure and return the section."""
    numbers = tuple(min(number, 200) for number in VTPMS) if options.quick else VTPMS
    starts: dict[tuple[int, int], int] = {}
    with running_subject() as subject:
        have = 0
        for number in numbers:
            if number > have:
                subject.ask("add", count=number - have, name=f"v{have}-{{}}")
                have = number
            progress(f"trust: start with {have} vTPMs")
            starts[have, 1] = _start(subject)
        for number in range(1, GROUPS):
            subject.ask("group-add", name=f"tenant-{number}")
        progress(f"trust: start with {GROUPS} groups")
        starts[have, GROUPS] = _start(subject)
        progress(f"trust: rotation of a group with {have} vTPMs")
        rotation = _rotate(subject)
    progress("trust: opening one group")
    unlock, plain = _unlock(options)
    section = _section(starts, have, rotation, unlock, plain)
    add_quotes(section, options)
    return section


def _start(subject: Subject) -> int:
    """Stop everything, start again; return the commands that the hardware TPM got until it served, and settled."""
    subject.stop()
    subject.start()
    return int(subject.status()["tpm_commands"])


def _rotate(subject: Subject) -> _Rotation:
    """Rotate the default group while one of its vTPMs saves without a pause."""
    subject.make("guest")
    endpoint = subject.run_for("guest")["endpoint"]
    with Client.on_socket(endpoint) as client:
        client.prepare()
        packets, times, ended = writes(), list[tuple[float, float]](), threading.Event()

        def save() -> None:
            while not ended.is_set():
                began = time.perf_counter()
                client.run(next(packets))
                times.append((began, time.perf_counter()))

        saver = threading.Thread(target=save)
        saver.start()
        time.sleep(1.0)
        began = time.perf_counter()
        subject.ask("group-rotate", group="default")
        verb = time.perf_counter() - began
        ended.set()
        saver.join()
    during = [end - start for start, end in times if end > began]
    before = [end - start for start, end in times if end <= began]
    return _Rotation(verb * 1e3, max(during, default=0.0) * 1e3, sorted(before)[len(before) // 2] * 1e3)


def _unlock(options: Options) -> tuple[Sample, Sample]:
    """Time the unsealing of a group's key as it is bound by default, and the least that a TPM does: 8 random bytes."""
    with running_swtpm() as swtpm, HardwareTpm.open(swtpm.setting) as tpm:
        tpm.provision_srk()
        blob = tpm.seal(os.urandom(32), SealPolicy.build(pcrs=[tpm.pcr_values_to_seal((0, 2, 4, 7))]))
        calls = {"unlock": partial(tpm.unseal, blob), "random": partial(tpm.random, 8)}
        taken = in_turns(calls, options.rounds(5), options.each(UNLOCKS))
    return taken["unlock"], taken["random"]


def _section(
    starts: dict[tuple[int, int], int], most: int, rotation: _Rotation, unlock: Sample, plain: Sample
) -> Section:
    section = Section(
        "Trust: keys and groups",
        "Commands to the hardware TPM from the start of a manager until it serves (`tpm_commands`), with vTPMs that "
        "are not attached, on the embedded TPM. The time to open one group is that of `HardwareTpm.unseal` on an "
        "swtpm, bound to four PCRs at locality 2, in an encrypted session; beside `HardwareTpm.random` of 8 bytes, "
        "which is one command in such a session.",
    )
    table = Table(("vTPMs", "groups", "TPM commands at start"))
    for (vtpms, groups), commands in starts.items():
        table.add(f"{vtpms:,}", str(groups), str(commands))
    times = Table(("", "median, ms", "p99, ms"))
    for name, sample in (("open one group", unlock), ("GetRandom", plain)):
        times.add(name, f"{sample.median / MILLISECONDS:.2f}", f"{sample.p99 / MILLISECONDS:.2f}")
    turned = Table(("vTPMs of the group", "the whole rotation, ms", "slowest save meanwhile, ms", "usual save, ms"))
    turned.add(f"{most:,}", f"{rotation.verb:.0f}", f"{rotation.slowest:.1f}", f"{rotation.usual:.2f}")
    section.tables += [table, times, turned]
    few, many = min(starts), (most, 1)
    each = (starts[most, GROUPS] - starts[many]) / (GROUPS - 1)
    section.targets += [
        Target(f"TPM commands at start, {most:,} vTPMs", starts[many], starts[few], "as many as with 1 vTPM"),
        Target("open one group, ms", unlock.median / MILLISECONDS, UNLOCK_MS, "the goal"),
    ]
    section.meaning.append(
        f"A start takes as many commands whatever the number of vTPMs, and {each:g} more for each further group: load "
        "the sealed object, start a policy session, satisfy it, unseal, flush. A rotation seals its key while saves "
        "go on and holds them back only while the store writes the group's records anew, with one root."
    )
    return section
