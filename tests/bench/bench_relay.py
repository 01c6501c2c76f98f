"""What vtpm-relay adds to a TPM command: swtpm on its socket, and through both sides of a relay."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import vtpm_instance_commands as tpm
from document import Section, Table
from options import Options, progress
from relay_rig import Loopback, QemuClient, relay, swtpm
from timing import MICROSECONDS, Call, Ratio, Sample, in_turns

ROUNDS, EACH, TURN = 9, 200, 5
DIRECT, UNIX, TLS = "direct", "relay, Unix", "relay, TLS"
COMMANDS = {"GetRandom(32)": tpm.get_random(32), "PCR_Extend": tpm.pcr_extend(16)}


@contextmanager
def _clients() -> Iterator[dict[str, QemuClient]]:
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="br")))
        places = {name: stack.enter_context(swtpm(base, name))[0] for name in ("d", "u", "t")}
        plain = stack.enter_context(relay([places["u"]]))
        encrypted = stack.enter_context(relay([places["t"]], spaces=Loopback()))
        for each in (plain, encrypted):
            each.start_far()
            each.start_near()
        paths = {DIRECT: base / "d" / "ctrl", UNIX: plain.control("u"), TLS: encrypted.control("t")}
        clients = {name: QemuClient(path) for name, path in paths.items()}
        for client in clients.values():
            stack.callback(client.close)
            client.power_on()
        yield clients


def run(options: Options) -> Section:
    """Measure and return the section."""
    rounds, each = options.rounds(ROUNDS), options.each(EACH)
    found: dict[str, dict[str, Sample]] = {}
    with _clients() as clients:
        for what, command in COMMANDS.items():
            progress(f"relay: {what}")
            calls: dict[str, Call] = {name: partial(client.raw, command) for name, client in clients.items()}
            in_turns(calls, 1, 10)
            found[what] = in_turns(calls, rounds, each, TURN)
    section = Section(
        "A command through the relay",
        "A client in Python hands swtpm a data descriptor, as QEMU does, on swtpm's control socket and on the near "
        "side's of two relays: one over a Unix socket, one over TLS 1.3 on 127.0.0.1, both with `--hold`. All on this "
        f"machine. They take turns after {TURN} calls.",
    )
    table = Table(
        ("", "direct", "relay, Unix", "best round", "relay, TLS", "best round", "Unix / direct"),
        note="Microseconds, medians:",
    )
    for what, samples in found.items():
        values = (
            samples[DIRECT].median,
            samples[UNIX].median,
            samples[UNIX].best,
            samples[TLS].median,
            samples[TLS].best,
        )
        numbers = [f"{value / MICROSECONDS:.0f}" for value in values]
        table.add(what, *numbers, str(Ratio.of(samples[UNIX], samples[DIRECT])))
    section.tables.append(table)
    section.meaning.append(
        "Each command passes two Python processes with a trio loop, and two notes to the holder. There is no target: "
        "it is a price for vTPMs in another machine, to be known. A command that saves takes milliseconds anyway."
    )
    return section
