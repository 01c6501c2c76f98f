"""What vtpm-xen's bridge adds to a TPM command: an instance's ring, and the same ring behind the bridge's process."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import vtpm_instance_commands as tpm
from document import Section, Table
from options import Options, progress
from subjects import running_subject
from timing import MICROSECONDS, Call, Ratio, Sample, in_turns, on_one_cpu
from xen_bridge_party import bridged

from frontend_backend.front import RingFrontEnd

ROUNDS, EACH, TURN = 9, 200, 5
DIRECT, BRIDGED = "direct", "bridged"
COMMANDS = {"GetRandom(32)": tpm.get_random(32), "PCR_Extend": tpm.pcr_extend(16)}


def run(options: Options) -> Section:
    """Measure and return the section."""
    rounds, each = options.rounds(ROUNDS), options.each(EACH)
    found: dict[str, dict[str, Sample]] = {}
    with running_subject() as subject:
        subject.make("v")
        shown = subject.run_for("v", "ring")
        endpoint = Path(shown["endpoint"])
        with RingFrontEnd.connect(str(endpoint)) as ring, bridged(endpoint) as (guest, bridge):
            ways: dict[str, Callable[[bytes], bytes]] = {DIRECT: ring.transact, BRIDGED: guest.transact}
            for place, pids in (("two CPUs", ()), ("one CPU", (shown["pid"], bridge))):
                for what, command in COMMANDS.items():
                    progress(f"xen-bridge: {what}, {place}")
                    calls: dict[str, Call] = {name: partial(way, command) for name, way in ways.items()}
                    in_turns(calls, 1, 10)
                    if pids:
                        with on_one_cpu(pids):
                            found[f"{what}, {place}"] = in_turns(calls, rounds, each, TURN)
                    else:
                        found[f"{what}, {place}"] = in_turns(calls, rounds, each, TURN)
    section = Section(
        "A command over vtpm-xen's bridge",
        "A client submits commands on an instance's ring, and on a page behind a bridge in a process of its own, as "
        "vtpm-xen has one for each guest. A memfd and eventfds stand in for grant and event channel; the client is "
        f"rung, where Linux's driver looks every 5 ms. They take turns after {TURN} calls; no Xen.",
    )
    table = Table(("", "direct", "bridged", "best round", "added", "bridged / direct"), note="Microseconds, medians:")
    for what, samples in found.items():
        direct, over = samples[DIRECT], samples[BRIDGED]
        values = (direct.median, over.median, over.best, over.median - direct.median)
        table.add(what, *(f"{value / MICROSECONDS:.0f}" for value in values), str(Ratio.of(over, direct)))
    section.tables.append(table)
    section.meaning.append(
        "The bridge is two more wake-ups and one copy in each direction, in a trio loop. There is no target: Linux's "
        "driver sleeps 5 ms between two looks at the page, which is many times more."
    )
    return section
