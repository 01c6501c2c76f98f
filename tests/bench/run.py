"""Measure, print ratios and targets, write docs/benchmarks.md. Run by ./dev bench [NAME ...] [--instances N].

Nothing fails because a number is missed: the run says so and shows what holds it back. It fails when something that
is measured does not work.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench_attach
import bench_hardware
import bench_memory
import bench_rings
import bench_roundtrip
import bench_save
import bench_store
import document
import surroundings
from options import Options, progress
from subjects import REPOSITORY

DOCUMENT = REPOSITORY / "docs" / "benchmarks.md"
MAX_INSTANCES = 500
BENCHES: dict[str, Callable[[Options], document.Section]] = {
    "roundtrip": bench_roundtrip.run,
    "save": bench_save.run,
    "memory": bench_memory.run,
    "attach": bench_attach.run,
    "rings": bench_rings.run,
    "hardware": bench_hardware.run,
    "store": bench_store.run,
}


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev bench", description="Measure beside swtpm, in one run.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; default: all")
    parser.add_argument("--instances", type=int, default=50, metavar="N", help="for memory; at most 500 (default 50)")
    parser.add_argument("--quick", action="store_true", help="a few calls each: shows that the tool works, no more")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"default: {DOCUMENT.name}, for a whole run only")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in BENCHES:
            parser.error(f"unknown benchmark {name}; there are: {', '.join(BENCHES)}")
    if not 1 <= options.instances <= MAX_INSTANCES:
        parser.error(f"--instances is 1 to {MAX_INSTANCES}")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run what was asked for; returns 0 also when targets are missed."""
    asked = _options(arguments)
    options = Options(asked.instances, asked.quick)
    names = asked.names or list(BENCHES)
    started, load = time.monotonic(), surroundings.load()
    sections = []
    for number, name in enumerate(names, 1):
        progress(f"{number} of {len(names)}: {name}")
        sections.append(BENCHES[name](options))
        print(document.as_text(sections[-1]), flush=True)
    seconds = time.monotonic() - started
    whole = list(names) == list(BENCHES) and not asked.quick
    output = asked.output or (DOCUMENT if whole else None)
    if output is not None:
        facts = surroundings.facts(load, seconds)
        output.write_text(document.as_markdown(facts, surroundings.NOISE, sections), encoding="utf-8")
    targets = [target for section in sections for target in section.targets]
    held = sum(target.held for target in targets)
    where = f"written to {output}" if output else f"{DOCUMENT.name} is written by a whole run only"
    print(f"bench: {held} of {len(targets)} targets held, {seconds:.0f} s; {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
