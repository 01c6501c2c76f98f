"""Xen: from `xl create` to /dev/tpm0, what the back end adds to a command, and how small a manager's domain may be.

The peer is the smallest back end there is: a page of Python without any state machine, in front of swtpm
(peers/tpmback.py). Both serve the same guests in the same boot of Xen, in turns. Everything runs under QEMU's software
emulation, many times slower than a machine: ratios count, not milliseconds.
"""

import base64
import contextlib
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import vtpm_instance_commands as tpm
import xen_domains as domains
from document import Section, Table, Target
from options import Options, progress
from timing import MILLISECONDS, Sample
from xen_rig import Domain, XenError, XenHost, domain_config, guest_config, xen_host

HERE = Path(__file__).resolve().parent
PROBE, PEER = HERE / "xen_probe.py", HERE / "peers" / "tpmback.py"
PYTHON = "/opt/vtpm-manager/bin/python"
ROUNDS, CALLS, KERNEL_CALLS = 2, 200, 100
AIM_MIB = 192
SMALL_SECONDS = 60.0  # 15 on a machine that is not busy
SIZES_MIB = (320, 256, 224, 208, AIM_MIB)
COMMAND = tpm.get_random(16).hex()
OURS, THEIRS = "vtpm-xen", "tpmback"
UUIDS = {"web": "11111111-1111-4111-8111-111111111111", "probe": "22222222-2222-4222-8222-222222222222"}
DIRECT = "33333333-3333-4333-8333-333333333333"
RING = f"{domains.RUNTIME}/vtpm/{DIRECT}/ring.sock"


def _into(place: XenHost | Domain, path: str, file: Path) -> None:
    """Put a file of ours into a domain, in one line of its shell."""
    place.good(f"echo {base64.b64encode(file.read_bytes()).decode()} | base64 -d >{path}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(line) for line in text.split())


def _start(host: XenHost, name: str) -> None:
    if name == OURS:
        domains.start_back_end(host)
    else:
        domains.background(host, "/run/tpmback 2", "ready")


def _prepare(host: XenHost) -> None:
    progress("xen: the manager in dom0, for the guests of both rounds")
    _into(host, "/tmp/probe.py", PROBE)
    _into(host, "/tmp/tpmback.py", PEER)
    host.write("/run/tpmback", "#!/bin/sh\nexec python3.11 -u /tmp/tpmback.py $1")
    host.good("chmod +x /run/tpmback")
    domains.install(host, pcrs="none")
    domains.start_manager(host)
    for name, uuid in UUIDS.items():
        host.good(f"vtpm-add --name {name} --uuid {uuid} --quiet && vtpm-attach {name} {name} --frontend xen --quiet")
    host.good(f"vtpm-add --name direct --uuid {DIRECT} --quiet && vtpm-attach direct direct --frontend ring --quiet")


def _to_device(host: XenHost) -> tuple[float, float, Domain]:
    """Create a guest; return the seconds of `xl create`, those until it has /dev/tpm0, and the guest."""
    config = guest_config("web", vtpm=[f"backend=0,uuid={UUIDS['web']}"], memory=domains.GUEST_MIB)
    host.write("/tmp/web.cfg", config)
    began = host.clock()
    host.good("xl create -q /tmp/web.cfg")
    created = host.clock() - began
    guest = host.opened("web")
    guest.ready()
    guest.good("until [ -c /dev/tpm0 ]; do sleep 0.02; done")
    return created, host.clock() - began, guest


def _probe_domain(host: XenHost) -> Domain:
    """A domain with Python that is a front end in user space: it hears of an answer without polling for it."""
    device = f"backend=0,uuid={UUIDS['probe']}"
    made = host.create("probe", domain_config("probe", memory=domains.INSTANCE_MIB, vtpm=[device]))
    made.ready()
    _into(made, "/tmp/probe.py", PROBE)
    return made


class Found:
    """What was measured, by back end."""

    def __init__(self) -> None:
        self.create: dict[str, list[float]] = {OURS: [], THEIRS: []}
        self.device: dict[str, list[float]] = {OURS: [], THEIRS: []}
        self.kernel: dict[str, list[tuple[int, ...]]] = {OURS: [], THEIRS: []}
        self.front: dict[str, list[tuple[int, ...]]] = {OURS: [], THEIRS: []}
        self.direct: dict[str, list[tuple[int, ...]]] = {OURS: [], THEIRS: []}


def _plain_swtpm(host: XenHost) -> str:
    """A swtpm without Xen, as tpmback starts them; returns its socket."""
    at = "type=unixio,path=/tmp/direct"
    words = f"--tpmstate dir=/tmp/direct --server {at}/data --ctrl {at}/ctrl --flags not-need-init,startup-clear"
    host.good(f"mkdir -p /tmp/direct; swtpm socket --tpm2 {words} --terminate --daemon")
    return "/tmp/direct/data"


def _round(host: XenHost, name: str, options: Options, found: Found) -> None:
    _start(host, name)
    created, seconds, guest = _to_device(host)
    found.create[name].append(created)
    found.device[name].append(seconds)
    found.kernel[name].append(_numbers(guest.good(f"timed /dev/tpm0 {options.each(KERNEL_CALLS)} {COMMAND}")))
    host.good("xl destroy web")
    probe = _probe_domain(host)
    count = options.each(CALLS)
    found.front[name].append(_numbers(probe.good(f"{PYTHON} /tmp/probe.py {count} {COMMAND} front")))
    host.good("xl destroy probe")
    way = f"ring {RING}" if name == OURS else f"socket {_plain_swtpm(host)}"
    found.direct[name].append(_numbers(host.good(f"{PYTHON} /tmp/probe.py {count} {COMMAND} {way}")))
    domains.end(host, name)


def _measure(options: Options) -> Found:
    found = Found()
    with xen_host(disks=1, progress=sys.stderr) as host:
        _prepare(host)
        for number in range(options.rounds(ROUNDS)):
            for name in (THEIRS, OURS) if number % 2 else (OURS, THEIRS):
                progress(f"xen: round {number + 1}, {name}")
                _round(host, name, options, found)
    return found


# --- how small ---


@contextlib.contextmanager
def _small_host() -> Iterator[XenHost]:
    with xen_host(disks=1, memory=2048, progress=sys.stderr) as host:
        yield host


def _serves(host: XenHost, mib: int, *, first: bool) -> dict[str, int] | None:
    """Whether a manager's domain of this size serves a guest; then the most each program had resident, in KiB."""
    try:
        vtpmd = domains.driver_domain(host, "vtpmd", "/dev/vdd", memory=mib)
        if first:
            domains.install(vtpmd)
        domains.start_manager(vtpmd, SMALL_SECONDS)
        domains.start_back_end(vtpmd)
        vtpm = (
            domains.new_vtpm(vtpmd, "web", "--domain any") if first else vtpmd.good("vtpm-list --quiet").splitlines()[0]
        )
        guest = domains.guest(host, "web", "vtpmd", vtpm)
        guest.good("tpm2 getrandom --hex 8")
        peaks = vtpmd.good("grep -H -E '^(Name|VmHWM)' /proc/[0-9]*/status | sed 's/^[^:]*://'")
        vtpmd.good("free -m")
    except (XenError, TimeoutError) as error:
        progress(f"xen: {mib} MiB are too few: {str(error)[-300:]}")
        return None
    finally:
        host.run("xl destroy web; xl destroy vtpmd")
    return _peaks(peaks)


def _peaks(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    name = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == "Name":
            name = value.strip()
        else:
            found[name] = max(found.get(name, 0), int(value.split()[0]))
    return {name: kib for name, kib in found.items() if name.startswith(("vtpm", "python"))}


def _smallest(options: Options) -> tuple[list[tuple[int, bool]], dict[str, int]]:
    """Make the domain smaller until it serves no more; what was tried, and what programs took in the last."""
    tried: list[tuple[int, bool]] = []
    peaks: dict[str, int] = {}
    with _small_host() as host:
        for size in SIZES_MIB[: 1 if options.quick else None]:
            progress(f"xen: a manager's domain of {size} MiB")
            found = _serves(host, size, first=not tried)
            tried.append((size, found is not None))
            if found is None:
                break
            peaks = found
    return tried, peaks


# --- the section ---


def _milliseconds(sample: Sample) -> tuple[str, str]:
    return f"{sample.median / MILLISECONDS:.2f}", f"{sample.p99 / MILLISECONDS:.2f}"


def _latencies(section: Section, found: Found) -> None:
    table = Table(
        ("GetRandom(16)", OURS, "99 %", f"{THEIRS} + swtpm", "99 %", "ratio of medians"),
        note="Milliseconds, median of the rounds' medians and 99th percentile of all calls:",
    )
    added = {}
    for what, times in (
        ("through Linux's xen-tpmfront, in the guest", found.kernel),
        ("through a front end in user space, in a domain", found.front),
        ("without Xen: the instance's ring, swtpm's socket", found.direct),
    ):
        ours, theirs = Sample(tuple(times[OURS])), Sample(tuple(times[THEIRS]))
        table.add(what, *_milliseconds(ours), *_milliseconds(theirs), f"{ours.median / theirs.median:.2f}")
        added[what] = (ours.median, theirs.median)
    section.tables.append(table)
    (_, front, direct) = added.values()
    ours, theirs = ((front[number] - direct[number]) / MILLISECONDS for number in (0, 1))
    section.meaning.append(
        "What the back end, Xen's ring and the front end in user space (Python on both sides) add, second row less "
        f"third: {ours:.2f} ms with {OURS}, {theirs:.2f} ms "
        f"with {THEIRS}. Linux's driver looks at the page every 5 ms, which is most of the first row."
    )


def _starts(section: Section, found: Found) -> None:
    table = Table(("", OURS, "rounds", f"{THEIRS} + swtpm", "rounds"), note="Seconds, medians of the rounds:")
    for what, times in (
        ("`xl create` itself", found.create),
        ("`xl create` until /dev/tpm0 is there", found.device),
    ):
        cells = []
        for name in (OURS, THEIRS):
            listed = ", ".join(f"{seconds:.1f}" for seconds in times[name])
            cells += [f"{statistics.median(times[name]):.1f}", listed]
        table.add(what, *cells)
    section.tables.append(table)


def _sizes(section: Section, tried: list[tuple[int, bool]], peaks: dict[str, int]) -> None:
    note = "Memory of the smallest driver domain that served a guest, with manager and back end in it:"
    table = Table(("program", "most resident, MiB"), note=note)
    for name, kib in sorted(peaks.items()):
        table.add(name, f"{kib / 1024:.0f}")
    section.tables.append(table)
    listed = ", ".join(f"{size} MiB {'serves' if good else 'does not'}" for size, good in sorted(tried))
    section.meaning.append(f"Tried: {listed}. Of it Debian's kernel takes 50 MiB for itself (of 192: 142 are left).")
    works = [size for size, good in tried if good]
    if works:
        section.targets.append(Target("memory of a manager's domain, MiB", min(works), AIM_MIB, "the aim of issue 7"))


def run(options: Options) -> Section:
    """Measure and return the section."""
    return section_of(options, _measure(options), *_smallest(options))


def section_of(options: Options, found: Found, tried: list[tuple[int, bool]], peaks: dict[str, int]) -> Section:
    """Return the section for what was measured."""
    section = Section(
        "Xen",
        "Xen 4.17 and Debian's kernel under QEMU's software emulation with one processor, so that everything is many "
        "times slower than on a machine. `tpmback` is the page of Python that this project began with: no "
        "checks, no state machine, one command at a time for all guests; each guest has an swtpm of its own behind it, "
        "without saves to an encrypted store. Both served the same guests in one boot, in turns, "
        f"{options.rounds(ROUNDS)} rounds.",
    )
    _starts(section, found)
    _latencies(section, found)
    if tried:
        _sizes(section, tried, peaks)
    return section
