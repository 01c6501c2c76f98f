"""Events that come often are written together, and none is left behind when the manager stops."""

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
import sqlalchemy as sa
import trio
import trio.testing

from manager.frequent_events import FrequentEvents
from storage.catalogue import Catalogue

VTPM = UUID(int=7)


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    with Catalogue.create(tmp_path / "catalogue.sqlite", bytes(32)) as made:
        yield made


def kinds(catalogue: Catalogue) -> list[str]:
    return [row.kind for row in catalogue.events(VTPM)]


async def test_many_are_one_transaction_with_the_times_they_happened(
    catalogue: Catalogue, autojump_clock: trio.testing.MockClock
) -> None:
    commits: list[object] = []
    sa.event.listen(catalogue._database.writer, "commit", commits.append)
    events = FrequentEvents(catalogue)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(events.run)
        for number in range(300):
            events.note("hibernated" if number % 2 else "resumed", VTPM, f"number {number}", 1_000_000.0 + number)
        await trio.sleep(5)
        assert len(commits) == 1
        written = catalogue.events(VTPM)
        assert [row.text for row in written] == [f"number {number}" for number in range(300)]
        assert (written[0].time, written[299].time) == ("1970-01-12T13:46:40+00:00", "1970-01-12T13:51:39+00:00")
        events.note("hibernated", VTPM, "one more", 2.0)
        await trio.sleep(5)
        assert len(commits) == 2
        nursery.cancel_scope.cancel()


async def test_what_waits_is_written_at_the_end(catalogue: Catalogue) -> None:
    events = FrequentEvents(catalogue)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(events.run)
        await trio.testing.wait_all_tasks_blocked()
        events.note("hibernated", VTPM, "just before the stop", 1.0)
        nursery.cancel_scope.cancel()
    assert kinds(catalogue) == ["hibernated"]
