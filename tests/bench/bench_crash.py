"""`./dev bench crash`: power cuts in generated lives of the store until the time is over, on all CPUs; or damage.

What is generated and what must hold: tests/crash_plans.py, tests/crash_lives.py, tests/damage_sweep.py. Nothing is
timed but the run itself. A failure prints a plan to live again with --replay, as short as it could be made, keeps the
image, and ends the run with 1.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.queues import Queue
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crash_lives import CrashError, Findings
from crash_plans import Plan, fails
from crash_starts import STARTS, start_image
from damage_sweep import DamageError, Sweep, whole_image

CUTS = 300  # of one part of a life; all of them would be the same few steps again and again
REPLAY_CUTS = 1_000_000
BAR = 30
ROUNDS = 8  # shares of the damage sweep


@dataclass(frozen=True)
class Outcome:
    """What became of one life, or of one share of the damage."""

    seed: int
    counted: Counter[str]
    failure: str = ""


Results = Queue  # of Outcome, and None for a worker that ended


def live(seed: int, cuts: int) -> Outcome:
    """Live the plan of a seed."""
    findings, failure = Findings(), ""
    try:
        Plan.by_chance(seed).live(findings, cuts)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the result
        failure = f"{type(error).__name__}: {error}"
    return Outcome(seed, Counter(asdict(findings)), failure)


def sweep(job: tuple[bytes, int]) -> Outcome:
    """Judge one share of all bytes; `job`: the image, which share."""
    image, share = job
    judge = Sweep(image, ROUNDS, share)
    try:
        judge.run()
    except DamageError as error:
        return Outcome(share, judge.judged, str(error))
    return Outcome(share, judge.judged)


class Progress:
    """One line that is written over and over on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()
        self._terminal = sys.stderr.isatty()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def say(self, share: float, text: str, *, last: bool = False) -> None:
        """Show how much is done (0 to 1), at most five times a second, or every half minute in a file."""
        now = time.monotonic()
        if not last and now - self._said < (0.2 if self._terminal else 30):
            return
        self._said = now
        full = min(BAR, int(share * BAR))
        line = f"[{'#' * full}{'.' * (BAR - full)}] {text}"
        end = "\n" if last or not self._terminal else ""
        sys.stderr.write(f"\r{line}\x1b[K{end}" if self._terminal else f"crash: {line}{end}")
        sys.stderr.flush()


def work(asked: argparse.Namespace, number: int, until: float, results: "Results") -> None:
    """Live every so-many-th seed until the histories or the time are used up; None says that it is over."""
    for done, seed in enumerate(range(asked.seed + number, sys.maxsize, asked.workers)):
        if time.monotonic() > until or (asked.histories and done * asked.workers + number >= asked.histories):
            break
        results.put(live(seed, asked.cuts))
    results.put(None)


def run_lives(asked: argparse.Namespace) -> int:
    """Live one life after the other until histories or minutes are used up."""
    for name in STARTS:
        start_image(name)  # before the fork: the same for everybody
    total: Counter[str] = Counter()
    lives, progress = 0, Progress()
    limit = asked.minutes * 60 or float("inf")
    context = multiprocessing.get_context("fork")
    results: Results = context.Queue()
    until = time.monotonic() + limit
    workers = [context.Process(target=work, args=(asked, n, until, results)) for n in range(asked.workers)]
    for worker in workers:
        worker.start()
    working = len(workers)
    while working:
        outcome = results.get()
        if outcome is None:
            working -= 1
            continue
        lives += 1
        total.update(outcome.counted)
        if outcome.failure:
            for worker in workers:
                worker.terminate()
            return report(outcome, asked.cuts)
        share = lives / asked.histories if asked.histories else progress.seconds / limit
        progress.say(share, f"{lives} histories, {total['cuts']} crash images, {rate(total, progress)} opens/s")
    for worker in workers:
        worker.join()
    progress.say(1, f"{lives} histories, {total['cuts']} crash images, {rate(total, progress)} opens/s", last=True)
    print(f"crash: {lives} histories from seed {asked.seed}, {total['cuts']} crash images in {progress.seconds:.0f} s.")
    print("All open, hold every acknowledged commit and nothing half, and the anchors take them. In them were:")
    names = {
        "went_on": "images on which was committed, checkpointed and opened again",
        "rounds": "checkpoints of several rounds",
        "taken_back": "images whose newest root was torn or is taken back",
        "grown": "images that grew",
        "shrunk": "images that shrank",
        "scrubbed": "steps of scrubs",
        "full": "refusals for want of room, with nothing lost",
        "closed": "groups left closed at an open",
        "boots": "boot areas written",
        "anchors": "anchors written",
    }
    for name, text in names.items():
        print(f"{total[name]:10d} {text}")
    return 0


def rate(total: Counter[str], progress: Progress) -> int:
    """Opens in a second: one for each image, two more where it went on."""
    return int((total["cuts"] + 2 * total["went_on"]) / max(progress.seconds, 0.001))


def report(outcome: Outcome, cuts: int) -> int:
    """Say what failed and how to see it again."""
    plan = Plan.by_chance(outcome.seed)
    print(f"\ncrash: seed {outcome.seed} FAILED: {outcome.failure}\n  {plan}", flush=True)
    short = plan.shortened(cuts)
    keep(short, cuts)
    print(f"  ./dev bench crash --replay '{short}'")
    return 1


def keep(plan: Plan, cuts: int) -> None:
    """Write the image of a failure where somebody can look at it."""
    error = fails(plan, cuts)
    if error is None:
        print("  it does not fail each time: sectors have random keys")
        return
    descriptor, name = tempfile.mkstemp(prefix="vtpm-crash-", suffix=".img")
    with open(descriptor, "wb") as file:
        file.write(error.image)
    print(f"  {error}\n  what was on the disk: {name}")


def replay(text: str) -> int:
    """Live one plan with every cut."""
    plan, findings = Plan.parse(text), Findings()
    try:
        plan.live(findings, REPLAY_CUTS)
    except CrashError as error:
        print(f"crash: FAILED: {error}")
        keep(plan, REPLAY_CUTS)
        return 1
    print(f"crash: {findings.cuts} crash images of '{plan}' are whole")
    return 0


def run_damage(asked: argparse.Namespace) -> int:
    """Change every byte that means anything, each by itself."""
    image, judged, progress = whole_image(), Counter[str](), Progress()
    with multiprocessing.get_context("fork").Pool(asked.workers) as pool:
        shares = pool.imap_unordered(sweep, [(image, share) for share in range(ROUNDS)])
        for number, outcome in enumerate(shares, 1):
            judged.update(outcome.counted)
            if outcome.failure:
                print(f"damage: FAILED: {outcome.failure}")
                return 1
            progress.say(number / ROUNDS, f"{sum(judged.values())} bytes", last=number == ROUNDS)
    print(f"damage: {sum(judged.values())} bytes changed, each by itself, in {progress.seconds:.0f} s. Every one was")
    print("found, and where it is; what else is in the store was served. Of them:")
    for name, number in judged.items():
        print(f"{number:10d} {name}")
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run what was asked for; returns 1 when anything failed."""
    parser = argparse.ArgumentParser(
        prog="./dev bench crash", description="Power cuts in generated lives of the store."
    )
    parser.add_argument(
        "--minutes", type=float, default=0, metavar="M", help="how long (default 10, if no --histories)"
    )
    parser.add_argument("--histories", type=int, default=0, metavar="N", help="how many lives")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the first life's (default 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: CPUs)")
    parser.add_argument("--cuts", type=int, default=CUTS, metavar="N", help=f"of one part of a life (default {CUTS})")
    parser.add_argument("--replay", metavar="PLAN", help="live this plan once more, with every cut")
    parser.add_argument("--damage", action="store_true", help="change every live byte instead")
    asked = parser.parse_args(arguments)
    if min(asked.minutes, asked.histories, asked.seed) < 0 or min(asked.workers, asked.cuts) < 1:
        parser.error("numbers are positive")
    if asked.replay is not None:
        try:
            Plan.parse(asked.replay)
        except ValueError as error:
            parser.error(str(error))
        return replay(asked.replay)
    if asked.damage:
        return run_damage(asked)
    if not asked.minutes and not asked.histories:
        asked.minutes = 10
    return run_lives(asked)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
