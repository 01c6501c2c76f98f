"""Instances that do not end as they should cannot keep the manager waiting: neither a verb nor its own stop.

A stopped process stands for one that was taken over and heeds nothing; what such a one would say is said for it.
"""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
import trio
from e2e_rig import alive
from manager_rig import ModelTpm, RunningDaemon, installation, running_daemon

from frontend_backend import messages_instance as m
from manager import keeper_client, orphans
from manager.client import RemoteError
from manager.running import Running
from vtpm_instance.syscalls import call, number_of

SECONDS = 12.0  # far above what a kill takes; before they were ended here, each of these waited for ever


@pytest.fixture
def model() -> ModelTpm:
    return ModelTpm()


@pytest.fixture
def place(model: ModelTpm) -> Iterator[Any]:
    with installation(model) as (base, layout, config):
        yield base, layout, replace(config, instance=replace(config.instance, stop_timeout=0.5))


async def attached(running: RunningDaemon) -> Running:
    await running.ask("add", name="web")
    await running.ask("attach", vtpm="web", guest="g")
    instance = running.attachments.running(running.registry.find("web").uuid)
    assert instance is not None
    return instance


def copies_of(pid: int, what: str) -> list[int]:
    """Copies of a process's descriptors; those of "socket:" have its end of the ring among them."""
    pidfd = os.pidfd_open(pid)
    try:
        names = [name for name in os.listdir(f"/proc/{pid}/fd") if int(name) > 2]
        wanted = [name for name in names if what in os.readlink(f"/proc/{pid}/fd/{name}")]
        return [call("pidfd_getfd", number_of("pidfd_getfd"), pidfd, int(name), 0) for name in wanted]
    finally:
        os.close(pidfd)


async def test_one_that_says_it_cannot_load_and_lives_on_is_ended(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        instance = await attached(running)
        os.kill(instance.pid, signal.SIGSTOP)

        async def say_failed_when_told_to_reset() -> None:
            while instance.orders is m.Orders.NONE:  # noqa: ASYNC110 - an instance has no event to give
                await trio.sleep(0.01)
            instance.take_orders()
            instance.take_report(m.Report(m.InstanceState.FAILED, "evil", "so I say"))

        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(say_failed_when_told_to_reset)
                with pytest.raises(RemoteError, match="quarantined"):
                    await running.ask("reset-platform", vtpm="web")
            await running.ask("detach", vtpm="web")
        assert not alive(instance.pid)


async def test_one_whose_ring_an_accomplice_keeps_is_detached(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        instance = await attached(running)
        kept = copies_of(instance.pid, "socket:")
        os.kill(instance.pid, signal.SIGKILL)
        try:
            with trio.fail_after(SECONDS):
                await running.ask("detach", vtpm="web")
                await running.ask("attach", vtpm="web", guest="another")
        finally:
            for descriptor in kept:
                os.close(descriptor)


async def test_one_that_outlives_its_keeper_is_ended_and_comes_back(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        instance = await attached(running)
        os.kill(instance.pid, signal.SIGSTOP)
        os.kill(running.daemon._keepers.first.pid, signal.SIGKILL)
        with trio.fail_after(SECONDS):
            await running.ask("detach", vtpm="web")
            await running.ask("attach", vtpm="web", guest="another")
        assert not alive(instance.pid)


async def test_one_that_lets_go_of_its_state_image_after_its_ring_comes_back(model: ModelTpm, place: Any) -> None:
    """On a busy machine a process that is about to end may be seen between the two."""
    async with running_daemon(model, place) as running:
        instance = await attached(running)
        (image,) = copies_of(instance.pid, ".img")  # the lock is the open file's, not the process's
        os.kill(instance.pid, signal.SIGKILL)
        await instance.ended.wait()
        with trio.fail_after(SECONDS):
            while not (running.attachments.reason(instance.vtpm) or "").count("in use"):  # noqa: ASYNC110 - as above
                await trio.sleep(0.01)
            os.close(image)
            while running.attachments.running(instance.vtpm) is None:  # noqa: ASYNC110 - as above
                await trio.sleep(0.01)


async def test_another_process_under_the_same_number_is_left_alone() -> None:
    start = orphans.start_of(os.getpid())
    assert start is not None
    await orphans.end(os.getpid(), start - 1)
    await orphans.end(os.getpid(), None)


async def test_one_that_was_made_too_late_is_ended(
    model: ModelTpm, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keeper was stopped while it was asked, and answers when nobody waits any more."""
    async with running_daemon(model, place) as running:
        await running.ask("add", name="web")
        await running.ask("add", name="other")
        await running.ask("attach", vtpm="other", guest="g")  # keeper and spawner are up
        keeper = running.attachments._instances.endings._keeper
        monkeypatch.setattr(keeper_client, "_ANSWER_SECONDS", 2.0)

        async def let_it_go_on() -> None:
            await trio.sleep(2.5)
            os.kill(keeper.first.pid, signal.SIGCONT)

        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                os.kill(keeper.first.pid, signal.SIGSTOP)
                nursery.start_soon(let_it_go_on)
                with pytest.raises(RemoteError, match="gave no answer"):
                    await running.ask("attach", vtpm="web", guest="g")
            monkeypatch.undo()
            await running.ask("attach", vtpm="web", guest="g")
            web = running.registry.find("web").uuid
            kept = await keeper.list()
        assert [UUID(bytes=one.vtpm) for one in kept].count(web) == 1, "nothing of the late one is left"
