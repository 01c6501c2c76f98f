"""Fuzz Xen devices: whole lives with several mishaps each, in interleavings that a seed names, and hostile guests.

    python tests/fuzz/fuzz_xen.py --seconds 60 [--seed N] [--replay N]

Back ends, front ends, toolstack and manager are the parties of tests/xen_model.py over a simulated Xen. A life that
breaks a promise is named by its seed; `--replay` lives it once more.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hypothesis import Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from xen_happenings import HAPPENINGS
from xen_model import DRIVER_DOMAIN, FRONTS, ConformingModel, Device, HostileModel, QuietModel

EXAMPLES: Final = 50  # of each rule-based model, between two rounds of lives
LIVES: Final = 400  # a round


@contextmanager
def named(number: int) -> Iterator[None]:
    """Tell which life it was that broke a promise."""
    try:
        yield
    except BaseException:
        sys.stderr.write(f"xen: it broke in a life that --replay {number} repeats\n")
        raise


def live(number: int) -> None:
    """Live one life: two guests, a random schedule, and mishaps at random steps."""
    chance = random.Random(number)
    model = QuietModel(chance.choice((0, DRIVER_DOMAIN)), chance.choice(FRONTS))
    model.add_device(chance.choice((0, DRIVER_DOMAIN)), "other", chance.choice(FRONTS))
    for _ in range(chance.randrange(1, 6)):
        wander(model, chance)
        device = chance.choice(model.devices)
        device.troubled = True
        happen(model, device, chance)
    wander(model, chance)
    model.teardown()


def wander(model: QuietModel, chance: random.Random) -> None:
    """Let everybody go on for a while, in runs of a few steps."""
    parties = [party for device in model.devices for party in device.parties()]
    for _ in range(chance.randrange(60)):
        party = chance.choice(parties)
        for _ in range(chance.randrange(1, 8)):
            party()
        model.check_books()
    if chance.randrange(3) == 0:
        model.settle()
        for device in model.devices:
            device.check_served()
    for device in model.devices:
        if device.attached and device.alive and not device.front.gone:
            device.wants()


def happen(model: QuietModel, device: Device, chance: random.Random) -> None:
    """Have one mishap, if it can happen now."""
    if not device.attached:
        device.start_anew(model.new_place)
    elif device.alive and not device.detaching:
        HAPPENINGS[chance.choice(sorted(HAPPENINGS))](device)


def main() -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--replay", type=int, default=None, metavar="N")
    options = parser.parse_args()
    if options.replay is not None:
        live(options.replay)
        return 0
    start = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    limit = time.monotonic() + options.seconds
    lives = examples = 0
    while time.monotonic() < limit:
        for _ in range(LIVES):
            number = start + lives
            with named(number):
                live(number)
            lives += 1
        for model in (ConformingModel, HostileModel):
            run_examples(model, start + examples)
            examples += EXAMPLES
    sys.stdout.write(f"xen: {lives} lives and {examples} rule-based examples from seed {start}, no promise broken\n")
    return 0


def run_examples(model: type[ConformingModel | HostileModel], number: int) -> None:
    """Run one rule-based model for a while; raises what breaks, with the steps that lead there."""
    chosen = settings(
        max_examples=EXAMPLES,
        stateful_step_count=60,
        deadline=None,
        database=None,
        suppress_health_check=(),
        phases=(Phase.generate, Phase.shrink),
    )
    run_state_machine_as_test(seed(number)(model), settings=chosen)


if __name__ == "__main__":
    sys.exit(main())
