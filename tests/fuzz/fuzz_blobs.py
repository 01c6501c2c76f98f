"""vTPMs that are saved, used and restored while instance or manager is killed, at every system call that counts.

    ./dev fuzz blobs [--seconds N] [--seed S]

All deaths in random order, again and again until the time is over, each once at least. No volatile state may live
twice, and what the guest was told is in NV must be there.
"""

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from blob_client import Machine
from blob_deaths import DEATHS, die
from e2e_rig import installation


def main() -> int:
    """Kill for a while."""
    parser = argparse.ArgumentParser(description="kill -9 at each step of a save, its first use, and a restore.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    seconds = options.seconds if options.minutes is None else options.minutes * 60
    chance, tried, died, started = random.Random(options.seed), 0, 0, time.monotonic()
    sys.stdout.write(f"fuzz blobs: seed {options.seed}\n")
    with installation() as made:
        made.init()
        made.start()
        while not tried or time.monotonic() - started < seconds:
            for death in chance.sample(DEATHS, len(DEATHS)):
                try:
                    died += die(made, f"vtpm-{tried}", death)
                except BaseException:
                    sys.stdout.write(f"fuzz blobs: {death}, number {tried + 1} of seed {options.seed}\n")
                    raise
                made.command("vtpm-detach", f"vtpm-{tried}")
                tried += 1
                while Machine.open:
                    Machine.open.pop().close()
    sys.stdout.write(
        f"fuzz blobs: {tried} steps, {died} deaths in {time.monotonic() - started:.0f} s; nothing lived twice, "
        "nothing lost\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
