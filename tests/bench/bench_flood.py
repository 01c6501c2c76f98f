"""Floods and their neighbours: what the manager and a quiet vTPM still get while others never stop."""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import vtpm_instance_rig as tpm
from document import Section, Table
from e2e_rig import Guest
from options import Options, progress
from subjects import running_subject

from manager.client import request

FLOODS: Final = 20
_FORK: Final = multiprocessing.get_context("fork")
_PAUSE: Final = 0.01  # seconds between two requests of the one that is measured: it is no flood itself
_INDEX: Final = 0x1500016


@dataclass(slots=True)
class _Latencies:
    """Seconds of each request, sorted."""

    seconds: list[float]

    def row(self) -> tuple[str, str]:
        """Return median and 99th percentile in milliseconds, as text."""
        last = self.seconds[min(len(self.seconds) - 1, int(len(self.seconds) * 0.99))]
        return f"{1000 * statistics.median(self.seconds):.2f}", f"{1000 * last:.2f}"


def run(options: Options) -> Section:
    """Measure without and with floods and return the section."""
    count, floods = (20, 4) if options.quick else (300, FLOODS)
    with running_subject() as subject:
        path = str(subject.runtime / "admin.sock")
        request(path, "add", {"count": floods, "name": "flood-{}"})
        request(path, "add", {"name": "quiet"})
        (shown,) = request(path, "attach", {"vtpm": "quiet", "guest": "g"})
        quiet = Guest(shown["endpoint"])
        quiet.define(_INDEX, 8)
        asked: dict[str, Callable[[], object]] = {
            "the manager: `vtpm-show`": lambda: request(path, "show", {"vtpm": "quiet"}),
            "a quiet vTPM: GetRandom": lambda: quiet.good(tpm.get_random(8)),
            "a quiet vTPM: NV_Write, durable": lambda: quiet.write(_INDEX, b"12345678"),
        }
        progress("flood: without floods")
        alone = {name: _measure(call, count) for name, call in asked.items()}
        progress(f"flood: with {floods} floods")
        with_floods, answers = _under_fire(path, floods, asked, count)
        quiet.close()
    section = Section(
        "Floods and their neighbours",
        f"{floods} guests send GetRandom without a pause, each in a process of its own; beside them one asks "
        f"every {1000 * _PAUSE:.0f} ms. Milliseconds until the answer. Instances have nice "
        "5 (`vtpm_instance.confine`), the guests here at nice 0.",
    )
    table = Table(("", "alone, median", "alone, p99", "floods, median", "floods, p99"))
    for name in asked:
        table.add(name, *alone[name].row(), *with_floods[name].row())
    section.tables.append(table)
    section.meaning.append(f"The floods got {answers:,.0f} answers a second together.")
    return section


def _measure(call: Callable[[], object], count: int) -> _Latencies:
    seconds = []
    for _ in range(count):
        time.sleep(_PAUSE)
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return _Latencies(sorted(seconds))


def _under_fire(
    path: str, floods: int, asked: dict[str, Callable[[], object]], count: int
) -> tuple[dict[str, _Latencies], float]:
    """Measure while `floods` vTPMs are flooded; also returns their answers a second."""
    endpoints = [
        request(path, "attach", {"vtpm": f"flood-{n + 1}", "guest": "g"})[0]["endpoint"] for n in range(floods)
    ]
    answered = _FORK.RawArray("Q", floods)
    guests = [_FORK.Process(target=_flood, args=(endpoint, answered, n)) for n, endpoint in enumerate(endpoints)]
    for guest in guests:
        guest.start()
    try:
        time.sleep(1.0)
        before, started = sum(answered), time.perf_counter()
        found = {name: _measure(call, count) for name, call in asked.items()}
        rate = (sum(answered) - before) / (time.perf_counter() - started)
    finally:
        for guest in guests:
            guest.kill()
            guest.join()
    return found, rate


def _flood(endpoint: str, answered: Any, number: int) -> None:
    os.setsid()  # as a virtual machine: a group of its own to the scheduler (sched(7), autogroup)
    guest, command = Guest(endpoint), tpm.get_random(8)
    while True:
        guest.transmit(command)
        answered[number] += 1
