"""vTPMs that move between two managers while one of them is killed, at every system call that counts.

    ./dev fuzz migration [--seconds N] [--seed S]

All deaths in random order, again and again until the time is over. Exactly one side has the vTPM afterwards, and the
move can be finished from there.
"""

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from migration_deaths import DEATHS, World, die
from migration_rig import hosts


def main() -> int:
    """Kill for a while."""
    parser = argparse.ArgumentParser(description="kill -9 at each step of a migration.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    seconds = options.seconds if options.minutes is None else options.minutes * 60
    chance, ends, started = random.Random(options.seed), Counter[str](), time.monotonic()
    sys.stdout.write(f"fuzz migration: seed {options.seed}\n")
    with hosts("north", "south") as (north, south):
        world = World(north, south)
        while not ends or time.monotonic() - started < seconds:
            for death in chance.sample(DEATHS, len(DEATHS)):
                try:
                    ends[die(world, death)] += 1
                except BaseException:
                    sys.stdout.write(f"fuzz migration: {death}, death {ends.total() + 1} of seed {options.seed}\n")
                    raise
                if ends and time.monotonic() - started > seconds:
                    break
        world.wire.close()
    said = ", ".join(f"{count} {end}" for end, count in ends.most_common())
    sys.stdout.write(f"fuzz migration: {ends.total()} deaths in {time.monotonic() - started:.0f} s: {said}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
