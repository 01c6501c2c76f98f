"""A vTPM that sleeps and wakes while one of its processes is killed, at every system call that counts.

    ./dev fuzz hibernation [--seconds N] [--seed S]

All deaths in random order, again and again until the time is over, each once at least. What the guest was acknowledged
must be there, or the vTPM must ask for a platform reset.
"""

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from e2e_rig import installation
from hibernation_deaths import DEATHS, Extender, die


def main() -> int:
    """Kill for a while."""
    parser = argparse.ArgumentParser(description="kill -9 at each step of going to sleep and waking.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    seconds = options.seconds if options.minutes is None else options.minutes * 60
    chance, died, started = random.Random(options.seed), 0, time.monotonic()
    sys.stdout.write(f"fuzz hibernation: seed {options.seed}\n")
    with installation() as made:
        made.init()
        made.start()
        made.add("web")
        extender = Extender(made, "web", made.attach("web")["endpoint"])
        while not died or time.monotonic() - started < seconds:
            for death in chance.sample(DEATHS, len(DEATHS)):
                try:
                    die(extender, death)
                except BaseException:
                    sys.stdout.write(f"fuzz hibernation: {death}, death {died + 1} of seed {options.seed}\n")
                    raise
                died += 1
        extender.guest.close()
    sys.stdout.write(
        f"fuzz hibernation: {died} deaths in {time.monotonic() - started:.0f} s, {extender.resets} platform resets; "
        "nothing lost, nothing used twice\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
