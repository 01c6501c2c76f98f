"""Measure, print ratios and targets, keep them in docs/benchmarks.json and .md. Run by ./dev bench [NAME ...].

Nothing fails because a number is missed: the run says so and shows what holds it back. It fails when something that
is measured does not work.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench_attach
import bench_attach_many
import bench_blobs
import bench_flood
import bench_frontends
import bench_hardware
import bench_hibernate
import bench_keepers
import bench_many
import bench_memory
import bench_migration
import bench_relay
import bench_rings
import bench_roundtrip
import bench_save
import bench_slowdisk
import bench_store
import bench_trust
import bench_xen
import bench_xen_bridge
import document
import drawings
import surroundings
from options import Options, progress
from subjects import REPOSITORY

DOCS = REPOSITORY / "docs"
DOCUMENT, RESULTS = DOCS / "benchmarks.md", DOCS / "benchmarks.json"
MAX_INSTANCES = 500
MAX_ACTIVE = 3000  # a keeper has five descriptors for each, of 20,000 here
BENCHES: dict[str, Callable[[Options], document.Section]] = {
    "roundtrip": bench_roundtrip.run,
    "save": bench_save.run,
    "memory": bench_memory.run,
    "attach": bench_attach.run,
    "attach-many": bench_attach_many.run,
    "rings": bench_rings.run,
    "hardware": bench_hardware.run,
    "trust": bench_trust.run,
    "store": bench_store.run,
    "many": bench_many.run,
    "slowdisk": bench_slowdisk.run,
    "flood": bench_flood.run,
    "keepers": bench_keepers.run,
    "hibernate": bench_hibernate.run,
    "migration": bench_migration.run,
    "swtpm": bench_frontends.run,
    "blobs": bench_blobs.run,
    "relay": bench_relay.run,
    "xen-bridge": bench_xen_bridge.run,
    "xen": bench_xen.run,
    "many-large": bench_many.run_large,
}
GROUPS = {
    "instance": ("roundtrip", "memory", "attach", "attach-many", "hibernate", "save"),  # what one instance costs
    "frontends": ("swtpm", "blobs", "migration", "relay"),  # what QEMU and others meet, beside swtpm
}
ON_DEMAND = frozenset({"many-large", "xen"})  # minutes: only when it is named


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev bench", description="Measure beside swtpm, in one run.")
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"of {', '.join((*BENCHES, *GROUPS))}; default: all but {', '.join(ON_DEMAND)}",
    )
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument("--instances", type=int, default=50, metavar="N", help="for memory; at most 500 (default 50)")
    parser.add_argument("--active", type=int, default=1000, metavar="N", help="for slowdisk (default 1000)")
    parser.add_argument("--attached", type=int, default=5000, metavar="N", help="for hibernate (default 5000)")
    parser.add_argument("--quick", action="store_true", help="a few calls each: shows that the tool works, no more")
    parser.add_argument("--no-write", action="store_true", help=f"leave {DOCUMENT.name} as it is, as --quick does")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write this run's sections to FILE instead")
    parser.add_argument("--redraw", action="store_true", help=f"make {DOCUMENT.name} and plots from {RESULTS.name}")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in BENCHES and name not in GROUPS:
            parser.error(f"unknown benchmark {name}; there are: {', '.join((*BENCHES, *GROUPS))}")
    options.names = [one for name in options.names for one in GROUPS.get(name, (name,))]
    if not 1 <= options.instances <= MAX_INSTANCES:
        parser.error(f"--instances is 1 to {MAX_INSTANCES}")
    if not 1 <= options.active <= MAX_ACTIVE:
        parser.error(f"--active is 1 to {MAX_ACTIVE}")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run what was asked for; returns 0 also when targets are missed."""
    asked = _options(arguments)
    if asked.list:
        print("\n".join((*BENCHES, *(f"{name}: {' '.join(parts)}" for name, parts in GROUPS.items()))))
        return 0
    if asked.redraw:
        write(document.load_entries(RESULTS))
        return 0
    options = Options(asked.instances, asked.quick, asked.active, asked.attached)
    names = asked.names or [name for name in BENCHES if name not in ON_DEMAND]
    machine, started = surroundings.machine(), time.monotonic()
    entries: dict[str, document.Entry] = {}
    for number, name in enumerate(names, 1):
        progress(f"{number} of {len(names)}: {name}")
        load, began = surroundings.load(), time.monotonic()
        section = BENCHES[name](options)
        line = surroundings.line(load, time.monotonic() - began)
        entries[name] = document.Entry(document.Run(machine, line), section)
        print(document.as_text(section), flush=True)
        if not (asked.quick or asked.no_write or asked.output):
            keep(name, entries[name])  # at once: a later benchmark may fail
    if asked.output:
        asked.output.write_text(document.as_markdown(surroundings.NOISE, entries), encoding="utf-8")
    targets = [target for entry in entries.values() for target in entry.section.targets]
    held = sum(target.held for target in targets)
    where = asked.output or (f"{DOCUMENT.name} is as it was" if asked.quick or asked.no_write else DOCUMENT)
    print(f"bench: {held} of {len(targets)} targets held, {time.monotonic() - started:.0f} s; {where}")
    return 0


def keep(name: str, entry: document.Entry) -> None:
    """Replace one benchmark's results, and nothing else, in the results and in the document."""
    write(document.replaced(document.load_entries(RESULTS), name, entry, list(BENCHES)))


def write(entries: Mapping[str, document.Entry]) -> None:
    """Write results, document and drawings."""
    document.save_entries(RESULTS, entries)
    DOCUMENT.write_text(document.as_markdown(surroundings.NOISE, entries), encoding="utf-8")
    for entry in entries.values():
        for figure in entry.section.figures:
            (DOCS / figure.file).write_bytes(drawings.DRAW[figure.file](entry.section.data))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
