"""Hostile commands for real instances: started by manager, keeper and spawner, spoken to as guests do.

    ./dev fuzz instance [--minutes M] [--seed S]      ./dev fuzz instance --replay FILE

Three vTPMs are under fire, a fourth is their neighbour: TPM 2.0 and TPM 1.2 on data and control sockets, TPM 2.0 on
ring pages. After each batch an instance still answers, or it has ended; then only it has, the manager has logged and
counted it, and it comes back after a platform reset with its state. A crash is printed with its seed, and the last
commands are written to a file that --replay plays again. Exit code 1 if anything crashed, hung or did not come back.
"""

import argparse
import json
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import vtpm_instance_rig as tpm
from e2e_rig import Guest, Installation, alive, installation, wait_for
from hostile_steps import Step, corpus
from victims import HungError, Victim, WrongAnswerError

BATCH: Final = 250  # steps between two platform resets
_REBIRTH: Final = 40  # batches of one vTPM between two new TPMs
_KINDS: Final = (("data", "2.0", "socket"), ("old", "1.2", "socket"), ("page", "2.0", "ring"))
_TURNS: Final = (0, 2, 0, 1, 0, 2)  # whose batch it is
_NEIGHBOUR_INDEX: Final = 0x1500016
_FAILURE: Final = {"2.0": 0x101, "1.2": 0x09}
_SHOWN_STEPS: Final = 5


class Fuzz:
    """One run: an installation, its vTPMs, and what was found."""

    def __init__(self, made: Installation, seed: int, kinds: tuple[tuple[str, str, str], ...] = _KINDS) -> None:
        """Set everything up on a running installation."""
        self.made, self.seed = made, seed
        self.victims = [Victim(made, name, family, front, f"{seed}-{name}") for name, family, front in kinds]
        self._add_neighbour()
        self._batches = [0] * len(self.victims)
        status = made.vtpm_manager("status", "--json").json
        self._servants = {"manager": made.manager.pid if made.manager else 0, "keeper": status["keeper_pid"]}
        self.found: list[str] = []
        self.crashes = 0
        self.sabotage: int | None = (
            None  # before which step of a batch the instance is ended, to see that it is noticed
        )
        self.files = Path(tempfile.gettempdir())

    # the neighbour

    def _add_neighbour(self) -> None:
        self.made.add("neighbour")
        shown = self.made.attach("neighbour")
        self._neighbour, self._neighbour_pid = Guest(shown["endpoint"]), shown["pid"]
        self._neighbour.define(_NEIGHBOUR_INDEX, 8)
        self._neighbour.write(_NEIGHBOUR_INDEX, b"neighbor")
        self._neighbour.extend(7, b"\x77" * 32)
        self._neighbours_pcr = self._neighbour.pcr(7)

    def check_others(self, victim: Victim | None) -> None:
        """Make sure that nobody but `victim` has suffered."""
        pids = self._servants | {"neighbour": self._neighbour_pid} | {one.name: one.pid for one in self.victims}
        ended = {name for name, pid in pids.items() if not alive(pid)} - {victim.name if victim else None}
        if ended:
            raise WrongAnswerError(f"others have ended too: {sorted(map(str, ended))}")
        if self._neighbour.pcr(7) != self._neighbours_pcr or self._neighbour.read(_NEIGHBOUR_INDEX, 8) != b"neighbor":
            raise WrongAnswerError("the neighbour's state has changed")

    # batches

    def run(self, seconds: float, batches: int = sys.maxsize) -> None:
        """Run batches until the time is up, or as many as are wanted."""
        limit = time.monotonic() + seconds
        done = 0
        while time.monotonic() < limit and done < batches:
            self.batch(_TURNS[done % len(_TURNS)] % len(self.victims))
            done += 1
        self.check_others(None)

    def batch(self, number: int) -> None:
        """Run one batch on one vTPM, and see that it answers and is what it was."""
        victim, turn = self.victims[number], self._batches[number]
        self._batches[number] += 1
        if turn and turn % _REBIRTH == 0:
            victim.reborn()
        if turn % 3 == 0:
            victim.open_doors()
        scripted: list[Step] = (
            [("command", packet) for packet in corpus()] if not turn and victim.family == "2.0" else []
        )
        try:
            for place in range(max(BATCH, len(scripted))):
                if place == self.sabotage:
                    self.sabotage = None
                    os.kill(victim.pid, signal.SIGSEGV)
                self._play(victim, scripted[place] if place < len(scripted) else victim.steps.next())
            self._settle(victim)
        except (HungError, WrongAnswerError) as error:
            self._note(victim, str(error))
            if victim.lives:
                os.kill(victim.pid, signal.SIGKILL)
            self._come_back(victim)
        if turn % 5 == 0:
            self.check_others(None)

    def _play(self, victim: Victim, step: Step) -> None:
        try:
            victim.play(step)
        except OSError as error:
            self._after(victim, error)

    def _after(self, victim: Victim, error: OSError) -> None:
        """Find out why a connection ended: the instance has, or it broke a promise."""
        victim.close()
        limit = time.monotonic() + 1.0
        while victim.lives and time.monotonic() < limit:
            time.sleep(0.01)
        if victim.lives:
            raise WrongAnswerError(f"{victim.name}: its instance lives, but: {error!r}")
        self._crashed(victim)

    def _settle(self, victim: Victim) -> None:
        """After a batch: it answers; after a platform reset it has its state."""
        try:
            victim.answers()
            victim.reset_platform()
            found = victim.read_sentinel()
        except OSError as error:
            self._after(victim, error)
            return
        if found != victim.sentinel:
            raise WrongAnswerError(f"{victim.name}: its state is {found.hex()}, it was {victim.sentinel.hex()}")

    # crashes

    def events(self, kind: str = "crashed") -> int:
        """Return how many events of a kind the manager has counted."""
        with sqlite3.connect(f"file:{self.made.state}/catalogue.sqlite?mode=ro", uri=True) as catalogue:
            (count,) = catalogue.execute("select count(*) from events where kind = ?", (kind,)).fetchone()
        catalogue.close()
        return int(count)

    def _crashed(self, victim: Victim) -> None:
        """Tell of a crash, and check what is promised of one."""
        self.crashes += 1
        pid = victim.pid
        self._note(victim, f"instance {pid} ended while it was fuzzed")
        self._come_back(victim)
        self.check_others(victim)
        wait_for(lambda: f"instance {pid} ended" in self._told(), f"the manager to tell of instance {pid}")

    def _told(self) -> str:
        with sqlite3.connect(f"file:{self.made.state}/catalogue.sqlite?mode=ro", uri=True) as catalogue:
            rows = catalogue.execute("select text from events where kind = 'crashed'").fetchall()
        catalogue.close()
        logged = self.made.log.read_text()
        return "\n".join(text for (text,) in rows) if "ended unexpectedly" in logged else ""

    def _come_back(self, victim: Victim) -> None:
        """Wait for the instance that follows; it answers failure until a platform reset, and then has its state."""
        old = victim.pid
        victim.close()

        def followed() -> bool:
            (shown,) = victim.ask("show", vtpm=victim.name)
            return shown["state"] in ("needs-reset", "down") and shown["pid"] != old

        wait_for(followed, f"{victim.name} after its instance ended")
        (shown,) = victim.ask("show", vtpm=victim.name)
        if shown["state"] == "needs-reset":
            victim.pid = shown["pid"]
            packet = tpm.get_random(8) if victim.family == "2.0" else tpm.command12(0x46, (8).to_bytes(4))
            code = int.from_bytes(victim.transmit(packet)[6:10])
            if code != _FAILURE[victim.family]:
                raise WrongAnswerError(f"{victim.name} answers {code:#x} before its platform was reset")
        victim.ask("reset-platform", vtpm=victim.name)
        victim.pid = victim.ask("show", vtpm=victim.name)[0]["pid"]
        victim.close()
        victim.forget()
        if victim.read_sentinel() != victim.sentinel:
            raise WrongAnswerError(f"{victim.name} came back with another state")

    def _note(self, victim: Victim, what: str) -> None:
        path = self.files / f"fuzz-instance-{self.seed}-{victim.name}-{len(self.found)}.jsonl"
        victim.save(path, what)
        last = "".join(f"\n    {kind} {data.hex()}" for kind, data in list(victim.history)[-_SHOWN_STEPS:])
        text = (
            f"seed {self.seed}: {what[:2000]}\n  replay: ./dev fuzz instance --replay {path}\n  the last steps:{last}"
        )
        self.found.append(text)
        sys.stdout.write(f"FOUND {text}\n")

    # telling

    def summary(self, seconds: float) -> str:
        """Return what was done, in a few lines."""
        count = sum(victim.commands for victim in self.victims)
        lines = [f"fuzz instance: {count} commands in {seconds:.1f} s ({count / seconds:.0f}/s) from seed {self.seed}"]
        for family in ("2.0", "1.2"):
            codes: Counter[int] = Counter()
            for victim in self.victims:
                codes += victim.codes if victim.family == family else Counter()
            seen = " ".join(f"{code:#x}:{times}" for code, times in sorted(codes.items()))
            lines.append(f"  TPM {family}, {len(codes)} response codes: {seen}")
        return "\n".join([*lines, f"  {self.crashes} crashes, {len(self.found)} findings"])

    def close(self) -> None:
        """Let go of every connection."""
        self._neighbour.close()
        for victim in self.victims:
            victim.close()


def replay(made: Installation, path: Path) -> int:
    """Play a file of steps again; returns 1 when it ends an instance or makes it hang."""
    head, *lines = path.read_text().splitlines()
    about = json.loads(head)
    fuzz = Fuzz(made, 0, (("again", about["family"], about["frontend"]),))
    (victim,) = fuzz.victims
    for line in lines:
        kind, data = json.loads(line)
        fuzz._play(victim, (kind, bytes.fromhex(data)))
        if fuzz.found:
            break
    else:
        fuzz._settle(victim)
    fuzz.close()
    sys.stdout.write(f"replayed {len(lines)} steps of '{about['why'][:200]}': {len(fuzz.found)} findings\n")
    return 1 if fuzz.found else 0


def main() -> int:
    """Fuzz for a while, or replay."""
    parser = argparse.ArgumentParser(description="Hostile commands for real instances.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--sabotage", type=int, help="end the instance with SIGSEGV at this step, to see it noticed")
    options = parser.parse_args()
    with installation() as made:
        made.init()
        made.start()
        if options.replay is not None:
            return replay(made, options.replay)
        fuzz = Fuzz(made, options.seed)
        fuzz.sabotage = options.sabotage
        started = time.monotonic()
        try:
            fuzz.run(options.seconds if options.minutes is None else options.minutes * 60)
        except BaseException:
            sys.stdout.write(f"fuzz instance: stopped, seed {options.seed}\n{made.tail()}\n")
            raise
        sys.stdout.write(fuzz.summary(time.monotonic() - started) + "\n")
        fuzz.close()
        return 1 if fuzz.found else 0


if __name__ == "__main__":
    sys.exit(main())
