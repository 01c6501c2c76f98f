"""Arrangement (c) whole, but for Xen itself: a manager, vtpm-xen's back end, an instance domain's program, a guest."""

import functools
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
import trio
from manager_rig import ModelTpm, installation, running_daemon
from vtpm_instance_commands import extended, nv_define, nv_read, nv_write, pcr_extend, pcr_read, rc
from vtpm_instance_rig import short_directory
from xen_instance_rig import World, world
from xen_server_rig import until_shown
from xenstored_rig import running_xenstored

from frontend_backend.xen_front_trio import XenFront
from frontend_backend.xs_trio import Xenstore
from manager.xen_backend import ManagerBinder
from manager.xen_backend_identity import identify
from manager.xen_backend_others import Others
from manager.xen_backend_witness import NoWitness

OK, RC_LOCALITY = 0, 0x907
INDEX = 0x01500009
NOTHING, ONCE = bytes(32), extended(b"\x11" * 32)


@pytest.fixture
def model() -> ModelTpm:
    return ModelTpm()


@pytest.fixture
def place(model: ModelTpm) -> Iterator[Any]:
    with installation(model) as made:
        yield made


async def pcr(guest: XenFront, index: int = 7) -> bytes:
    return (await guest.transact(pcr_read(index)))[-32:]


async def test_a_guest_whose_manager_is_two_domains_away(model: ModelTpm, place: Any) -> None:
    def of_manager(running: Any, xs: Xenstore) -> ManagerBinder:
        return ManagerBinder(running.layout.xen_socket, functools.partial(identify, xs), NoWitness(), Others(xs))

    with running_xenstored() as store, short_directory() as directory, trio.fail_after(50):
        async with world(store.socket, directory) as here:
            async with running_daemon(model, place) as running:
                await running.ask("add", name="v")
                terms = {"instance_domain": "any", "localities": "0,2"}
                (shown,) = await running.ask("attach", vtpm="v", guest="web", frontend="xen", **terms)
                here.record.vtpm = UUID(shown["uuid"])
                async with here.managers_domain(functools.partial(of_manager, running)):
                    here.nursery.start_soon(here.run_instance)
                    async with here.guest() as guest:
                        await use_it(guest)
                        (saved,) = await running.ask("show", vtpm="v")
                        assert saved["state"] == "running"
                        assert saved["generation"] >= 2
                        await running.ask("reset-platform", vtpm="v")
                        assert await pcr(guest) == NOTHING
                        assert rc(await guest.transact(pcr_extend(7))) == OK
                    await stop(here)
                    await until_shown(running, "v", state="waiting")
            async with (
                running_daemon(model, place) as running,
                here.managers_domain(functools.partial(of_manager, running)),
            ):
                here.nursery.start_soon(here.run_instance)
                async with here.guest() as guest:
                    assert b"a secret" in await guest.transact(nv_read(INDEX, 8))
                    await detach_and_attach(running, guest)
                await stop(here)


async def use_it(guest: XenFront) -> None:
    assert rc(await guest.transact(nv_define(INDEX, 8))) == OK
    assert rc(await guest.transact(nv_write(INDEX, b"a secret"))) == OK
    assert rc(await guest.transact(pcr_extend(7))) == OK
    assert await pcr(guest) == ONCE
    assert rc(await guest.transact(pcr_extend(20), locality=2)) == OK
    assert rc(await guest.transact(pcr_extend(20), locality=1)) == RC_LOCALITY


async def stop(here: World) -> None:
    here.stop.set()
    assert await here.until_ended() is None


async def detach_and_attach(running: Any, guest: XenFront) -> None:
    """Take the vTPM away from its guest, and give it back: another life, the same secret."""
    assert rc(await guest.transact(pcr_extend(7))) == OK
    await running.ask("detach", vtpm="v")
    await running.ask("attach", vtpm="v", guest="web", frontend="xen", instance_domain="any")
    await until_shown(running, "v", state="running")
    assert b"a secret" in await guest.transact(nv_read(INDEX, 8))
    assert await pcr(guest) == NOTHING
