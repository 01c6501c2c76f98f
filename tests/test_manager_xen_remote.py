"""vTPMs whose instances live in domains of their own: nothing runs here, and everything counts as if it did."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
import trio
from manager_rig import ModelTpm, RunningDaemon, installation, running_daemon
from vtpm_instance_commands import extended, nv_define, nv_read, nv_write
from xen_server_rig import (
    DB,
    ZEROES,
    Connection,
    Guest,
    InstanceDomain,
    carrying,
    extend,
    instance_domain,
    joined,
    pcr,
    refused,
    run,
    until_shown,
)

from frontend_backend.messages_xen import Joined, XenCode
from manager.client import RemoteError

ONCE = extended(b"\x11" * 32)
INSTANCE = Guest(11, name="web-tpm", uuid=str(DB))


@pytest.fixture
def model() -> ModelTpm:
    return ModelTpm()


@pytest.fixture
def place(model: ModelTpm) -> Iterator[Any]:
    with installation(model) as made:
        yield made


async def attached(running: RunningDaemon, **options: Any) -> dict[str, Any]:
    await running.ask("add", name="v")
    terms = {"vtpm": "v", "guest": "web", "frontend": "xen", "instance_domain": "web-tpm"} | options
    (shown,) = await running.ask("attach", **terms)
    return shown


async def in_thread(endpoint: str, *packets: bytes) -> bytes:
    return await trio.to_thread.run_sync(run, endpoint, *packets)


def lease_of(running: RunningDaemon, domain: InstanceDomain) -> int:
    served = running.attachments.running(UUID(domain.vtpm))
    assert served is not None
    return served.lease


async def start(running: RunningDaemon, domain: InstanceDomain) -> Connection:
    connection = await joined(running.layout.xen_socket, domain)
    await trio.to_thread.run_sync(domain.start, lease_of(running, domain))
    await until_shown(running, "v", state="running")
    return connection


async def test_an_instance_joins_saves_stops_and_comes_again(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        shown = await attached(running)
        assert (shown["state"], shown["pid"], shown["endpoint"], shown["state_image"]) == ("waiting", None, None, None)
        store = running.opened.store.uuid
        code, text = await refused(running.layout.xen_socket, Guest(3).bind(shown["uuid"]))
        assert (code, "web-tpm" in text) == (XenCode.WRONG_FRONTEND, True)
        assert (await refused(running.layout.xen_socket, Guest(3).join(shown["uuid"])))[0] is XenCode.DENIED
        with instance_domain(INSTANCE, shown["uuid"], store) as domain:
            async with carrying(domain):
                connection = await start(running, domain)
                (now,) = await running.ask("show", vtpm="v")
                assert (now["bound_domain"], now["bound_name"], now["pid"]) == (11, "web-tpm", None)
                await in_thread(domain.endpoint, nv_define(0x1500001, 8), nv_write(0x1500001, b"a secret"))
                (saved,) = await running.ask("show", vtpm="v")
                assert saved["generation"] > 1
                await extend(domain.endpoint)
                await running.ask("reset-platform", vtpm="v")
                assert await pcr(domain.endpoint) == ZEROES
                await extend(domain.endpoint)
                for verb in ("hibernate", "attach"):
                    with pytest.raises(RemoteError) as caught:
                        await running.ask(verb, vtpm="v", **({"guest": "web"} if verb == "attach" else {}))
                    assert caught.value.exit_code == 4
                judged = {row["what"]: row["verdict"] for row in await running.ask("verify", vtpm="v")}
                assert judged["state image"] == "elsewhere"
                await running.ask("detach", vtpm="v")
                await connection.over()
                connection.close()
                (gone,) = await running.ask("show", vtpm="v")
                assert gone["state"] == "detached"
                domain.disconnect()
                await running.ask("attach", vtpm="v", guest="web", frontend="xen", instance_domain=str(DB))
                early = await joined(running.layout.xen_socket, domain)  # and goes before it has asked for anything
                domain.disconnect()
                early.close()
                await until_shown(running, "v", bound_domain=None)
                connection = await start(running, domain)
                assert await pcr(domain.endpoint) == ZEROES, "attached anew: a power cycle"
                assert b"a secret" in await in_thread(domain.endpoint, nv_read(0x1500001, 8))
                connection.close()
                await until_shown(running, "v", state="waiting", bound_domain=None)


async def test_a_manager_that_begins_anew_goes_on_with_the_same_one(model: ModelTpm, place: Any) -> None:
    """Nothing of it is in failure, and what it wanted to save meanwhile is saved."""
    async with running_daemon(model, place) as running:
        shown = await attached(running)
        store = running.opened.store.uuid
    with instance_domain(INSTANCE, shown["uuid"], store) as domain:
        async with carrying(domain):
            lease = 0
            for stop in (True, False):  # a clean stop leaves it alone, too: its domain goes on
                async with running_daemon(model, place, stop=stop) as running:
                    connection = await joined(running.layout.xen_socket, domain)
                    if not domain.pid:
                        await trio.to_thread.run_sync(domain.start, lease_of(running, domain))
                        await until_shown(running, "v", state="running")
                        await extend(domain.endpoint)
                    await until_shown(running, "v", state="running")
                    lease = lease_of(running, domain)
                connection.close()
                domain.disconnect()
            answers: list[bytes] = []

            async def save() -> None:
                answers.append(await in_thread(domain.endpoint, nv_define(0x1500001, 8)))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(save)
                await trio.sleep(0.3)
                assert not answers, "it is not saved yet"
                async with running_daemon(model, place) as running:
                    connection = await joined(running.layout.xen_socket, domain)
                    await until_shown(running, "v", state="running")
                    with trio.fail_after(30):
                        while not answers:  # noqa: ASYNC110 - another process
                            await trio.sleep(0.01)
                    assert int.from_bytes(answers[0][6:10]) == 0, answers[0].hex()
                    assert await pcr(domain.endpoint) == ONCE
                    assert lease_of(running, domain) == lease
                    connection.close()


async def test_another_instance_domain_gets_a_new_lease_and_the_old_ones_commits_do_not_count(
    model: ModelTpm, place: Any
) -> None:
    async with running_daemon(model, place) as running:
        shown = await attached(running)
        vtpm, store = UUID(shown["uuid"]), running.opened.store.uuid
        with instance_domain(INSTANCE, shown["uuid"], store) as domain:
            async with carrying(domain):
                connection = await start(running, domain)
                first = running.attachments.running(vtpm)
                await in_thread(domain.endpoint, nv_define(0x1500001, 8))
                other = replace(INSTANCE, number=12)
                code, text = await refused(running.layout.xen_socket, other.join(shown["uuid"]))
                assert (code, "domain 11" in text) == (XenCode.TAKEN, True)
                connection.close()
                await until_shown(running, "v", state="waiting")
                (before,) = await running.ask("show", vtpm="v")
                # the old domain lives on, unheard: it saves nothing any more
                with Connection(running.layout.xen_socket) as later:
                    reply, descriptors = await later.ask(other.join(shown["uuid"]))
                    assert isinstance(reply, Joined)
                    second = running.attachments.running(vtpm)
                    assert first is not None
                    assert second is not None
                    assert second.lease > first.lease
                    assert second.startup == "failed", "the one before did not stop cleanly: its PCRs are gone"
                    write = nv_write(0x1500001, b"outdated")
                    with trio.move_on_after(1):
                        answer = await trio.to_thread.run_sync(run, domain.endpoint, write, abandon_on_cancel=True)
                        assert int.from_bytes(answer[6:10]) != 0
                    (now,) = await running.ask("show", vtpm="v")
                    assert now["generation"] == before["generation"]
                    for descriptor in descriptors:
                        os.close(descriptor)


async def test_a_crash_in_the_domain_is_failure_until_a_reset(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        shown = await attached(running)
        with instance_domain(INSTANCE, shown["uuid"], running.opened.store.uuid) as domain:
            async with carrying(domain):
                connection = await start(running, domain)
                await extend(domain.endpoint)
                os.kill(domain.pid, signal.SIGKILL)
                connection.close()
                await until_shown(running, "v", state="waiting")
                with pytest.raises(RemoteError, match="not there") as caught:
                    await running.ask("reset-platform", vtpm="v")
                assert caught.value.exit_code == 4
            domain.close()
        with instance_domain(INSTANCE, shown["uuid"], running.opened.store.uuid) as domain:
            async with carrying(domain):  # its disk is another one: it cannot have the state
                connection = await joined(running.layout.xen_socket, domain)
                await trio.to_thread.run_sync(domain.start, lease_of(running, domain))
                await until_shown(running, "v", state="quarantined")
                connection.close()
                await until_shown(running, "v", bound_domain=None)
                code, text = await refused(running.layout.xen_socket, INSTANCE.join(shown["uuid"]))
                assert (code, "quarantined" in text) == (XenCode.FAILED, True)
                await running.ask("reset-platform", vtpm="v")
                assert (await running.ask("show", vtpm="v"))[0]["state"] == "waiting"
        await running.ask("detach", vtpm="v")


async def test_detach_while_its_domain_is_away(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        shown = await attached(running)
        await running.ask("detach", vtpm="v")
        assert (await running.ask("show", vtpm="v"))[0]["state"] == "added"
        assert (await refused(running.layout.xen_socket, INSTANCE.join(shown["uuid"])))[0] is XenCode.UNKNOWN
        await running.ask("reset", vtpm="v", yes=True)
        await running.ask("remove", vtpm="v", yes=True)


async def test_a_domain_that_has_joined_and_says_nothing_is_waited_for(model: ModelTpm, place: Any) -> None:
    """Its program is stopped: nothing is logged, killed or waited for on its behalf, and detach is quick."""
    async with running_daemon(model, place) as running:
        shown = await attached(running)
        with instance_domain(INSTANCE, shown["uuid"], running.opened.store.uuid) as domain:
            connection = await joined(running.layout.xen_socket, domain)
            now = await until_shown(running, "v", bound_domain=11)
            assert now["state"] == "waiting"
            for verb, code in (("reset-platform", 4), ("hibernate", 4)):
                with pytest.raises(RemoteError) as caught:
                    await running.ask(verb, vtpm="v")
                assert caught.value.exit_code == code
            with trio.fail_after(running.config.instance.stop_timeout / 2):
                await running.ask("detach", vtpm="v")
            await connection.over()
            connection.close()


async def test_nothing_of_it_is_started_here(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        shown = await attached(running)
        image = running.layout.state_images / f"{shown['uuid']}.img"
    async with running_daemon(model, place) as running:
        await trio.sleep(0.2)
        (now,) = await running.ask("show", vtpm="v")
        assert (now["state"], now["pid"], now["reason"]) == ("waiting", None, None)
        assert not image.exists()
        (status,) = await running.ask("status")
        assert status["running"] == 0
