"""The manager under load: saves a second with few and with many instances at work, beside one flush for each save."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import trio
from document import Section, Table, Target
from floors import BLOCK, one_flush
from manager_rig import ModelTpm, hardware
from options import Options, progress
from ring_crowd import LEASE, Crowd, Result, crowd_of
from storage_histories import new_store, uuid_of
from subjects import scratch
from timing import in_turns

from manager.capacity import raise_descriptor_limit
from manager.committer import Committer
from manager.ring_server import RingServer
from manager.running import Running
from storage.secrets import StateKey
from storage.store import PutVtpm, VtpmRecord

LIMIT = 3.0  # design section 10: saves a second with 1,000 at work, to one flush for each save
SECONDS = 3.0
MANY = 15_000
_GROUP = UUID(int=7)
_ACTIVE = (1, 10, 100, 1000)


@contextmanager
def _records(disk: Path, count: int) -> Iterator[Committer]:
    descriptor = os.open(disk / "crowd.img", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    store = new_store(descriptor, [_GROUP], 8 << 20)
    try:
        for start in range(0, count, 1000):
            rows = range(start, min(start + 1000, count))
            store.commit([PutVtpm(VtpmRecord(uuid_of(number), _GROUP, StateKey(bytes(32)))) for number in rows])
        yield Committer(store, lambda: None)
    finally:
        store.close()
        os.close(descriptor)


async def _serve(crowd: Crowd, committer: Committer, work: Callable[[], Result]) -> Result:
    async with trio.open_nursery() as nursery:
        rings = RingServer(committer, hardware(ModelTpm()), nursery, 90.0)
        nursery.start_soon(committer.run)
        nursery.start_soon(rings.run)
        for number, ring in enumerate(crowd.rings):
            rings.add(Running(uuid_of(number), LEASE, os.getpid(), ring, "clear", "clear"))
        result = await trio.to_thread.run_sync(work)
        nursery.cancel_scope.cancel()
    rings.close()
    return result


def _measure(disk: Path, count: int, active: int, seconds: float) -> tuple[float, float]:
    """Return (saves a second, saves in a group) with `active` of `count` instances at work."""
    progress(f"manager under load: {active} of {count}")
    (disk / "crowd.img").unlink(missing_ok=True)
    with crowd_of(count, 1) as crowd, _records(disk, count) as committer:

        def work() -> Result:
            crowd.start(every=count // active, seconds=seconds)
            return crowd.results()

        result = trio.run(_serve, crowd, committer, work)
        assert not result.refused, f"{result.refused} saves were refused"
        return result.saves / result.seconds, result.saves / max(1, committer.statistics().groups)


def run(options: Options) -> Section:
    """Measure and return the section."""
    seconds = SECONDS / 10 if options.quick else SECONDS
    limit = raise_descriptor_limit()
    section = Section(
        "Manager under load",
        "Instances' ends of rings in a process of their own, each saving as soon as its last save is answered, and the "
        "product's ring server, committer and store on this disk. What is missing are the TPMs and the flush of each "
        "instance's own state image, which the manager has no part in. *One flush* is (write "
        f"{BLOCK} bytes to a written file, fdatasync): what one save alone cannot be quicker than.",
    )
    table = Table(("instances", "at work", "saves/s", "saves in a group", "to one flush a save"))
    with scratch() as disk, one_flush(disk) as flush:
        floor = in_turns({"flush": flush}, options.rounds(5), options.each(200))["flush"]
        a_second = 1e9 / floor.median
        cases = [(max(active, 1000), active) for active in _ACTIVE]
        if limit >= MANY + 4000:
            cases.append((MANY, 1000))
        for count, active in cases:
            rate, group = _measure(disk, count, active, seconds)
            table.add(f"{count:,}", f"{active:,}", f"{rate:,.0f}", f"{group:.1f}", f"{rate / a_second:.2f}")
            if (count, active) == (1000, 1000):
                ratio = a_second * LIMIT / rate
                section.targets.append(
                    Target("1,000 at work: time of a save, of a third of a flush", ratio, 1.0, "flushes of this disk")
                )
    section.tables.append(table)
    section.meaning.append(
        f"One flush takes {floor.median / 1000:.0f} us, so one flush for each save would be {a_second:,.0f} saves/s. "
        f"A process may have {limit:,} descriptors here; each ring costs the manager one."
    )
    return section
