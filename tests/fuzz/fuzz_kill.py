"""kill -9 of manager, keepers, spawners and instances, in random order, under load.

    ./dev fuzz kill [--minutes M] [--seed S] [--per-keeper N]

Several vTPMs write to NV all the time, each command durable before it is answered; what was acknowledged is recorded.
Nothing acknowledged may be lost, no command may have been executed twice, no PCR may have another value than before
unless the platform was reset, and at the end every vTPM answers and no process, descriptor, socket or lock is left
over.
"""

import argparse
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from e2e_rig import Installation, alive, installation, wait_for
from leftovers import Inventory, roles
from writers import Writer

VTPMS: Final = 5
# one deck is dealt to its end before the next, so that every run of some length has all of them
DECK: Final = (
    "instance", "instance", "instance", "instance", "spawner", "spawner", "keeper", "manager", "manager",
    "manager, twice", "manager and keeper", "manager and instance", "everything", "step down",
)  # fmt: skip
LAST_ACT: Final = ("keeper", "keeper", "instance", "instance", "spawner", "instance")
_PAUSES: Final = (0.0, 0.0, 0.02, 0.1, 0.3)  # seconds between two kills
_CALM_SECONDS: Final = 120.0  # until everything runs again; a start of the manager takes seconds on a busy machine


class Massacre:
    """One run on one installation."""

    def __init__(self, made: Installation, seed: int, vtpms: int = VTPMS) -> None:
        """Add and attach vTPMs on a running installation, and start the load."""
        self.made, self.chance = made, random.Random(seed)
        self.names = [f"vtpm-{number}" for number in range(vtpms)]
        self.writers = [Writer(made, name) for name in self.names]
        self.killed: Counter[str] = Counter()
        self.deaths: set[int] = set()
        self._deck: list[str] = []
        for writer in self.writers:
            writer.start()
        self.calm()
        self.before = Inventory.at_rest(made)

    # victims

    def _kill(self, pid: int | None) -> None:
        if pid:
            self.deaths.add(pid)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                self.deaths.discard(pid)  # it was faster

    def _some(self, role: str) -> int | None:
        pids = [pid for other, pid in roles(self.made) if other == role]
        return self.chance.choice(pids) if pids else None

    def kill_one(self) -> None:
        """Kill what the deck says."""
        if not self._deck:
            self._deck = list(DECK)
            self.chance.shuffle(self._deck)
        self.kill(self._deck.pop())

    def kill(self, what: str) -> None:
        """Kill, and start a manager where none is left."""
        match what:
            case "instance":
                self._kill(self._some("instance"))
            case "spawner" | "keeper":
                self._kill(self._some(what))
            case "manager":
                self.made.kill()
            case "manager, twice":
                self.made.kill()
                self._start_and_kill_on_the_way()
            case "manager and keeper":
                self._kill(self._some("keeper"))
                self.made.kill()
            case "manager and instance":
                self._kill(self._some("instance"))
                self.made.kill()
            case "everything":
                self.made.kill()
                for pid in self.made.processes():
                    self._kill(pid)
            case "step down":
                self.made.stop(signal.SIGHUP)
        if self.made.manager is None:
            time.sleep(self.chance.choice(_PAUSES))
            self.made.start()
        self.killed[what] += 1

    def _start_and_kill_on_the_way(self) -> None:
        """Start a manager and kill it before it can have served."""
        self.made.spawn()
        time.sleep(self.chance.uniform(0.05, 1.5))
        self.made.kill()

    # the run

    def run(self, seconds: float, kills: int = sys.maxsize) -> None:
        """Kill until the time is up, or as often as is wanted; every few times wait until everything runs again."""
        limit = time.monotonic() + seconds
        done = 0
        while time.monotonic() < limit and done < kills:
            self.kill_one()
            done += 1
            if self.chance.random() < 0.3:
                self.calm()
            else:
                time.sleep(self.chance.choice(_PAUSES))
            self.check()
        self.calm()

    def check(self) -> None:
        """Raise what a writer has found."""
        for writer in self.writers:
            writer.check()

    def calm(self) -> None:
        """Wait until every vTPM has acknowledged a write that was begun after now."""
        marks = {writer: writer.begun + 2 for writer in self.writers}

        def all_wrote() -> bool:
            self.check()
            return all(writer.acknowledged >= mark for writer, mark in marks.items())

        wait_for(all_wrote, f"every vTPM to write again; {self.made.tail()}", _CALM_SECONDS)

    def finish(self) -> None:
        """Stop the load and look for what is left over, before and after a clean stop; then everything once more.

        First some die whom the same manager and the same keeper outlive: what those two forget to give back is seen
        in them only.
        """
        for what in LAST_ACT:
            self.kill(what)
            self.calm()
        for writer in self.writers:
            writer.stop()
        self.check()
        for writer in self.writers:
            writer.recover()  # also reads what was acknowledged
        left = [pid for pid in self.deaths if alive(pid)]
        assert not left, f"killed, and still there: {left}"
        self.before.compare(lambda: self._comparable(Inventory.of(self.made)))
        assert self.made.vtpm_manager("status", "--json").json["running"] == len(self.names)
        found = self.made.command("vtpm-verify", "--all", check=False)
        assert found.code == 0, found.out + found.err
        assert self.made.stop() == 0, self.made.tail()
        wait_for(lambda: not self.made.processes(), "all processes to end after a clean stop")
        Inventory.nothing_left(self.made)
        self.made.start()
        for writer in self.writers:
            writer.recover()
            writer.close()

    def _comparable(self, now: Inventory) -> Inventory:
        """Return what is there now as if there were as many keepers as at the beginning.

        After a death instances are spread anew, perhaps over more keepers: as many processes and sockets as the manager
        knows of, and no more. What each process holds is compared as ever.
        """
        known = self.made.vtpm_manager("status", "--json").json["keepers"]
        sockets = {path: count for path, count in now.sockets.items() if _is_keepers(path)}
        roles = ("keeper", "spawner", "standby")
        if [*(now.processes[role] for role in roles), sum(sockets.values())] == [known] * 4:
            for role in roles:
                now.processes[role] = self.before.processes["keeper"]
            others = {path: count for path, count in now.sockets.items() if path not in sockets}
            before = {path: count for path, count in self.before.sockets.items() if _is_keepers(path)}
            now.sockets = Counter(others | before)
        return now

    def summary(self, seconds: float) -> str:
        """Return what was done."""
        kills = ", ".join(f"{what} {times}" for what, times in sorted(self.killed.items()))
        writes = sum(writer.acknowledged for writer in self.writers)
        resets = sum(writer.resets for writer in self.writers)
        return (
            f"fuzz kill: {self.killed.total()} kills in {seconds:.0f} s ({kills}); {len(self.writers)} vTPMs, {writes} "
            f"acknowledged writes, {resets} platform resets; nothing lost, nothing left over"
        )


def _is_keepers(path: str) -> bool:
    return Path(path).name.startswith("keeper")


def main() -> int:
    """Kill for a while."""
    parser = argparse.ArgumentParser(description="kill -9 in random order under load.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--per-keeper", type=int, default=2, metavar="N", help="vTPMs that one keeper has (default 2)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    seconds = options.seconds if options.minutes is None else options.minutes * 60
    with installation() as made:
        made.init()
        made.configure("per_keeper", options.per_keeper)
        made.start()
        sys.stdout.write(f"fuzz kill: seed {options.seed}\n")
        started = time.monotonic()
        massacre = Massacre(made, options.seed)
        try:
            massacre.run(seconds)
            massacre.finish()
        except BaseException:
            sys.stdout.write(f"fuzz kill: seed {options.seed}, after {dict(massacre.killed)}\n{made.tail()}\n")
            for writer in massacre.writers:
                writer.abandon()
            raise
        sys.stdout.write(massacre.summary(time.monotonic() - started) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
