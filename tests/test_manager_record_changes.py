"""What administrators change in a record while its instance changes it, too: neither undoes what the other did."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from uuid import UUID

import pytest
import trio
from manager_rig import ModelTpm, RunningDaemon, installation, running_daemon

from frontend_backend import messages_instance as m
from frontend_backend.channel_trio import wait_doorbell
from frontend_backend.local import LocalRing
from frontend_backend.ring import FrontRing
from manager.ring_server import RingServer
from manager.running import Running
from storage.store_records import PutVtpm, RecordFlags

LEASE = 1000
RESUMABLE = RecordFlags.RESUMABLE | RecordFlags.HIBERNATED


class Instance:
    """The instance's end of a ring of a real manager's."""

    def __init__(self, manager: RunningDaemon, vtpm: UUID) -> None:
        self.manager, self.vtpm = manager, vtpm
        self.ring, back = LocalRing.pair()
        self.page = FrontRing(self.ring.page)
        self.running = Running(vtpm, LEASE, os.getpid(), back, "state", "clear")
        self.rings: RingServer = manager.attachments._instances._rings
        self.rings.add(self.running)

    async def submit(self, request: m.Request) -> None:
        """Ask, and see the manager take the question."""
        self.page.submit(m.encode_request(request))
        self.ring.ring()
        with trio.fail_after(5):
            while not self.running.busy:  # noqa: ASYNC110 - the manager has nothing that tells of it
                await trio.sleep(0.001)

    async def answer(self) -> m.Reply:
        with trio.fail_after(5):
            while (packet := self.page.poll()) is None:
                await wait_doorbell(self.ring)
        return m.decode_reply(packet)[0]

    def close(self) -> None:
        self.rings.remove(self.running)
        self.ring.close()
        self.running.ring.close()


@asynccontextmanager
async def saved_instance(flags: RecordFlags) -> AsyncIterator[Instance]:
    """An instance of a vTPM whose record has these flags and a state of generation 1."""
    model = ModelTpm()
    with installation(model) as place:
        async with running_daemon(model, place) as manager:
            await manager.ask("add", name="web")
            record = replace(manager.registry.record(manager.registry.find("web").uuid), generation=1, flags=flags)
            await manager.registry.committer.commit(PutVtpm(record))
            instance = Instance(manager, record.uuid)
            yield instance
            instance.close()


async def change(instance: Instance, nursery: trio.Nursery, add: RecordFlags) -> trio.Event:
    """Begin to change a flag, as an administrator's verb does; the event tells that it was said to be done."""
    done = trio.Event()

    async def flag() -> None:
        await instance.manager.registry.flag(instance.vtpm, add=add)
        done.set()

    nursery.start_soon(flag)
    await trio.testing.wait_all_tasks_blocked(0.01)
    return done


async def test_a_state_that_was_handed_out_cannot_be_resumed_again_whatever_flag_is_changed_meanwhile(
    nursery: trio.Nursery,
) -> None:
    async with saved_instance(RESUMABLE) as instance:
        registry = instance.manager.registry
        async with registry.committer.hold():
            await instance.submit(m.Load())
            done = await change(instance, nursery, RecordFlags.ANY_AGE)
        reply = await instance.answer()
        await done.wait()
        assert isinstance(reply, m.LoadReply)
        assert reply.startup == "state"
        assert registry.record(instance.vtpm).flags == RecordFlags.ANY_AGE


@pytest.mark.parametrize("load", [True, False])
async def test_a_flag_that_was_changed_outlives_what_an_instance_asks_meanwhile(
    nursery: trio.Nursery, load: bool
) -> None:
    async with saved_instance(RESUMABLE) as instance:
        registry = instance.manager.registry
        async with registry.committer.hold():
            done = await change(instance, nursery, RecordFlags.ANY_AGE)
            await instance.submit(m.Load() if load else m.Commit(2, b"\1" * 32, b"\2" * 32, LEASE))
        assert isinstance(await instance.answer(), m.LoadReply if load else m.CommitReply)
        await done.wait()
        record = registry.record(instance.vtpm)
        assert (record.flags, record.generation) == (RecordFlags.ANY_AGE, 1 if load else 2)
