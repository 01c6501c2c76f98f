"""A disk that takes 5 ms for each flush: many vTPMs save at once, and all get their share.

Thirty real instances, not timed; `./dev bench slowdisk` has a thousand and measures.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from e2e_rig import Installation, installation
from load_clients import Served, load
from slow_disk import SlowDisk, run_on, slow_disk

from manager import client
from manager.verb_table import BY_NAME

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc for the slow disk")]
VTPMS = 30
ENOUGH = 20  # saves of the mean vTPM: one more or less is then no matter
LOADS = 10  # at most: on a busy machine one load is not enough


@dataclass(frozen=True)
class Slow:
    made: Installation
    disk: SlowDisk
    endpoints: list[str]
    pids: list[int]

    def status(self) -> dict[str, int]:
        return dict(self.made.vtpm_manager("status", "--json").json)


def attach(made: Installation, name: str) -> dict[str, Any]:
    """Attach by the admin socket: starting thirty commands would take longer than the test."""
    arguments = {argument.name: argument.default for argument in BY_NAME["attach"].arguments}
    return client.request(str(made.runtime / "admin.sock"), "attach", arguments | {"vtpm": name, "guest": name})[0]


@pytest.fixture(scope="module")
def slow() -> Iterator[Slow]:
    with slow_disk() as disk, installation() as made:
        made.init()
        run_on(disk, made)
        made.command("vtpm-add", "--count", str(VTPMS), "--name", "v{}", "--first", "0")
        shown = [attach(made, f"v{number}") for number in range(VTPMS)]
        endpoints = [one["endpoint"] for one in shown]
        load(endpoints, 0.1, 1, warm_up=0.0, define=True)
        disk.milliseconds = 5
        yield Slow(made, disk, endpoints, [one["pid"] for one in shown])
        disk.milliseconds = 0
        assert made.stop() == 0, made.tail()


def saves(slow: Slow) -> tuple[int, ...]:
    """Have all of them save until the mean has had ENOUGH; returns how many each had."""
    counts = [0] * VTPMS
    for _ in range(LOADS):
        served: Served = load(slow.endpoints, 1.0, 1, warm_up=0.2)
        counts = [before + more for before, more in zip(counts, served.counts, strict=True)]
        if sum(counts) >= ENOUGH * VTPMS:
            break
    return tuple(counts)


def test_each_gets_its_share_and_one_flush_of_the_store_covers_many(slow: Slow) -> None:
    assert slow.made.manager is not None
    assert all(slow.disk.is_under(pid) for pid in (slow.made.manager.pid, *slow.pids)), "the injection reaches all"
    before, flushes = slow.status(), slow.disk.flushes
    counts = saves(slow)
    after, flushes = slow.status(), slow.disk.flushes - flushes
    mean = sum(counts) / VTPMS
    assert mean >= ENOUGH, "hardly anything was saved"
    assert min(counts) > mean / 4, counts
    assert max(counts) < mean * 2, counts
    commits = after["commits"] - before["commits"]
    assert commits >= sum(counts), "every answered save was committed"
    assert flushes >= commits, "every save flushed its state image"
    assert after["group_commits"] - before["group_commits"] < commits / 3, "a flush for each save is no group commit"
