"""Listings and events are read beside the event loop: where they take seconds, guests save meanwhile."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from manager_rig import ModelTpm, installation, running_daemon

from storage.catalogue import Catalogue


@pytest.fixture
def place() -> Iterator[tuple[ModelTpm, Any]]:
    model = ModelTpm()
    with installation(model) as made:
        yield model, made


@pytest.mark.parametrize(
    ("method", "verb", "arguments", "count"),
    [
        ("listing", "list", {}, 2),
        ("events_after", "events", {}, 3),
        ("before_newest_events", "events", {"limit": 1}, 1),
    ],
)
async def test_others_get_their_turn_while_the_catalogue_is_read(
    place: tuple[ModelTpm, Any],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    verb: str,
    arguments: dict[str, Any],
    count: int,
) -> None:
    reading, went_on = trio.Event(), threading.Event()
    real = getattr(Catalogue, method)

    async with running_daemon(*place) as running, trio.open_nursery() as nursery:
        token = trio.lowlevel.current_trio_token()

        def slow(*given: Any, **more: Any) -> Any:
            token.run_sync_soon(reading.set)
            assert went_on.wait(20), "the event loop waited for the catalogue"
            return real(*given, **more)

        async def another_task() -> None:
            await reading.wait()
            went_on.set()

        for name in ("one", "two"):
            await running.ask("add", name=name)
        monkeypatch.setattr(Catalogue, method, slow)
        nursery.start_soon(another_task)
        assert len(await running.ask(verb, **arguments)) == count
