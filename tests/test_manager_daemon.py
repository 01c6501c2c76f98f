"""How a manager stops: which of several signals counts."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
from e2e_rig import alive
from manager_rig import ModelTpm, RunningDaemon, installation, running_daemon


@pytest.fixture
def model() -> ModelTpm:
    return ModelTpm()


@pytest.fixture
def place(model: ModelTpm) -> Iterator[Any]:
    with installation(model) as made:
        yield made


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - other processes
            await trio.sleep(0.01)


async def signalled_while_stepping_down(running: RunningDaemon, number: signal.Signals) -> int:
    """Tell the manager to step down and, while it writes the anchor, send `number`; returns an instance's process."""
    await running.ask("add", name="a")
    (shown,) = await running.ask("attach", vtpm="a", guest="g")
    async with running.daemon._anchoring._durable_lock:
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: not running.layout.admin_socket.exists())
        os.kill(os.getpid(), number)
        await trio.sleep(0.2)
    return int(shown["pid"])


async def test_a_stop_while_it_steps_down_stops_everything(model: ModelTpm, place: Any) -> None:
    """Else the instances would go on, and whoever sent SIGTERM would take them for stopped."""
    async with running_daemon(model, place) as running:
        pid = await signalled_while_stepping_down(running, signal.SIGTERM)
    assert not alive(pid)


async def test_being_told_twice_to_step_down_is_no_stop(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        pid = await signalled_while_stepping_down(running, signal.SIGHUP)
    assert alive(pid)
    async with running_daemon(model, place) as running:
        assert (await running.ask("show", vtpm="a"))[0]["pid"] == pid
