"""Anchors on a real TPM, cut or reset between any two TPM commands, with an adversary who keeps every image.

    ./dev fuzz anchors [--minutes M | --seconds N] [--seed S]

Every place of a run is taken, in interval and in strict mode, with one seed after the other until the time is over:
the command at that place is the last one and not carried out, or carried out unheard, or the TPM is reset before it.
Then every image ever written is offered, the log cut too, before and after a TPM reset.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trio
from anchor_cuts import Cuts, commands_of_a_run, life, wired_tpm


async def lives(seed: int, until: float) -> Cuts:
    found = Cuts()
    with wired_tpm() as tpm:
        while True:
            for strict in (False, True):
                for place in range(await commands_of_a_run(tpm, strict=strict)):
                    for plan in ({"cut_at": place}, {"cut_at": place, "executes": True}, {"reset_at": place}):
                        await life(tpm, seed, found, strict=strict, **plan)
                        seed += 1
                        wrong = [*found.accepted_old, *found.locked_out, *found.lost_saves]
                        if wrong or time.monotonic() > until:
                            return found
                sys.stderr.write(f"fuzz anchors: {found.lives} lives, {found.offered} images offered\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    seconds = asked.minutes * 60 + asked.seconds or 60
    found = trio.run(lives, asked.seed, time.monotonic() + seconds)
    sys.stdout.write(
        f"anchors: {found.lives} lives, {found.cut} cut between two TPM commands, {found.resets} TPM resets there; "
        f"{found.offered} images offered, {found.refused} refused, {found.cut_logs} cut logs\n"
    )
    wrong = {"old accepted": found.accepted_old, "locked out": found.locked_out, "saves lost": found.lost_saves}
    for name, cases in wrong.items():
        sys.stdout.write("\n  ".join([f"{name}: {len(cases)}", *cases[:5]]) + "\n")
    return 1 if any(wrong.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
