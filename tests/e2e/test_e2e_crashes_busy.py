"""The manager killed again and again while several vTPMs save: the log of a small store is full every few saves."""

import os
import random
import signal
import threading
import time

import pytest
from e2e_rig import Guest, Installation, wait_for

from manager.config import Config, Layout
from manager.offline import opened_installation

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
INDEX = 0x1500016
GUESTS = 4
KILLS = 5
SMALLEST = 55 * 4096  # of the log's 192 units each save takes one

UNNAMED = "the store has a record that no name in the catalogue leads to"  # docs/commands.md; it holds nothing


class Saver(threading.Thread):
    """One guest that counts upwards in its TPM's NV as fast as it can; every answer is a promise."""

    def __init__(self, endpoint: str) -> None:
        super().__init__()
        self.guest = Guest(endpoint)
        self.guest.define(INDEX, 8)
        self.answered = self.asked = 0
        self.ended = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.ended.is_set():
                self.asked += 1
                self.guest.write(INDEX, self.asked.to_bytes(8, "big"))
                self.answered = self.asked
        except BaseException as error:  # noqa: BLE001 - told in the test's own thread
            self.failure = error


@pytest.fixture
def small(bare: Installation) -> Installation:
    bare.init("--store-size", str(SMALLEST))
    bare.start()
    return bare


def checkpoints(made: Installation) -> int:
    layout = Layout(made.state, made.runtime)
    with opened_installation(layout, Config.load(layout.config)) as opened:
        return opened.store.statistics().checkpoints


def test_kills_during_checkpoints_and_growth_lose_nothing_that_was_answered(small: Installation) -> None:
    made, rng = small, random.Random(1)
    savers = []
    for number in range(GUESTS):
        made.add(f"web-{number}")
        savers.append(Saver(made.attach(f"web-{number}", f"guest-{number}")["endpoint"]))
    for saver in savers:
        saver.start()
    for kill in range(KILLS):
        seen = [saver.answered for saver in savers]
        wait_for(lambda seen=seen: all(s.answered > n + 60 for s, n in zip(savers, seen, strict=True)), "saves")
        adding = threading.Thread(
            target=made.command,
            args=("vtpm-add", "--count", "400", "--name", f"more-{kill}-{{}}"),
            kwargs={"check": False},
        )
        adding.start()
        if kill == 0:
            adding.join()  # once to the end, so that the image has grown; then in the middle
        time.sleep(rng.random() * 0.8)
        made.kill()
        adding.join()
        made.start()
    seen = [saver.answered for saver in savers]
    wait_for(lambda: all(s.answered > n + 20 for s, n in zip(savers, seen, strict=True)), "saves after the last kill")
    made.kill()
    for saver in savers:
        saver.ended.set()
    for pid in made.processes():
        os.kill(pid, signal.SIGKILL)
    for saver in savers:
        saver.join()
        saver.guest.close()
    wait_for(lambda: not made.processes(), "everything to end")
    assert checkpoints(made) > KILLS + sum(saver.answered for saver in savers) // 192 // GUESTS
    assert made.state.joinpath("store.img").stat().st_size > SMALLEST
    made.start()
    found = made.command("vtpm", "verify", "--all", "--json", check=False).json
    wrong = {row["text"] for row in found if row["verdict"] != "ok"}
    assert wrong <= {UNNAMED}, "an add that was killed between the store's commit and the catalogue's leaves no more"
    for number, saver in enumerate(savers):
        name = f"web-{number}"
        wait_for(lambda name=name: made.show(name)["state"] == "needs-reset", name)
        made.command("vtpm-reset-platform", name)
        value = int.from_bytes(saver.guest.read(INDEX, 8), "big")
        assert value in (saver.answered, saver.answered + 1), f"{name}: {saver.answered} answered, {value} is there"
        saver.guest.close()
