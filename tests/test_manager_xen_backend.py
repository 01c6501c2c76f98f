"""vtpm-xen's parts with a real xenstored, manager and instances: only grants and channels are simulated."""

import functools
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import trio
from manager_rig import ModelTpm, RunningDaemon, installation, running_daemon
from vtpm_instance_commands import create_primary_rsa, extended, get_random, nv_write, pcr_extend, pcr_read
from xen_guest_party import PATIENCE, GuestDriver, Toolstack, code, connected_guest, until
from xen_simulation import Xen
from xenstored_rig import Xenstored, running_xenstored

from frontend_backend import xen_back_trio, xen_connection_trio, xen_device_trio
from frontend_backend.errors import RingCancelledError, RingError
from frontend_backend.local import LocalRing
from frontend_backend.messages_instance import (
    Load,
    LoadReply,
    Random,
    RandomReply,
    Refusal,
    decode_reply,
    encode_request,
)
from frontend_backend.tpmhdr import MAX_COMMAND, ResponseCode
from frontend_backend.tpmif import MAX_PACKET
from frontend_backend.xen_back_trio import BackEnds
from frontend_backend.xen_device_trio import LOOKS_AT_ONCE, Device, Kernel
from frontend_backend.xen_ledger import Connection, Ledgers
from frontend_backend.xen_terms import BindingEndedError, Place, Terms
from frontend_backend.xenbus_table import XenbusState
from frontend_backend.xs_trio import Xenstore, XenstoreError, XenstoreGoneError, open_xenstore
from manager import xen_backend, xen_backend_bindings
from manager.xen_backend import ManagerBinder
from manager.xen_backend_identity import identify
from manager.xen_backend_others import Others
from manager.xen_backend_witness import NoWitness

DOMAIN = "4a7f2a70-95cb-4a1f-8cb0-1d1c9a0a3f01"
OTHER = "b4f6f2a8-24b1-4f2b-9a3d-86d5b9c0d702"


@pytest.fixture(autouse=True)
def _asks_soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (xen_backend, xen_backend_bindings):
        monkeypatch.setattr(module, "LAST_PAUSE", xen_backend_bindings.FIRST_PAUSE)


@pytest.fixture
def model() -> ModelTpm:
    return ModelTpm()


@pytest.fixture
def place(model: ModelTpm) -> Iterator[Any]:
    with installation(model) as made:
        yield made


@pytest.fixture(scope="module")
def store() -> Iterator[Xenstored]:
    with running_xenstored() as running:
        yield running


@dataclass
class Host:
    """One dom0."""

    xs: Xenstore
    xen: Xen
    toolstack: Toolstack
    socket: Path
    directory: Path

    @asynccontextmanager
    async def back_end(self) -> AsyncIterator[BackEnds]:
        """Run what `vtpm-xen run` runs; at the end of the block it leaves as for SIGTERM."""
        binder = ManagerBinder(self.socket, functools.partial(identify, self.xs), NoWitness(), Others(self.xs))
        kernel = Kernel(lambda: self.xen.channels(0), lambda: self.xen.grants_of(0))
        ends = BackEnds(self.xs, binder, kernel, Ledgers(self.directory))
        async with trio.open_nursery() as nursery:
            await nursery.start(ends.run)
            yield ends
            await ends.leave()
            nursery.cancel_scope.cancel()
        assert not self.xen.leaks(0)


@pytest.fixture
async def host(store: Xenstored, place: Any, tmp_path: Path) -> AsyncIterator[Host]:
    async with open_xenstore(str(store.socket)) as xs:
        await xs.remove("/local/domain")
        xen = Xen()
        yield Host(xs, xen, Toolstack(xs, xen), place[1].xen_socket, tmp_path / "marks")


async def attached(running: RunningDaemon, name: str = "web", **options: Any) -> str:
    await running.ask("add", name=name)
    (shown,) = await running.ask("attach", vtpm=name, guest=name, frontend="xen", **options)
    return str(shown["uuid"])


async def said(caplog: pytest.LogCaptureFixture, words: str) -> None:
    with trio.fail_after(PATIENCE):
        while words not in caplog.text:  # noqa: ASYNC110 - only the log tells
            await trio.sleep(0.01)


async def in_hand(ends: BackEnds) -> None:
    """Wait until an instance has the command of the only guest."""
    (device,) = ends.devices
    with trio.fail_after(PATIENCE):
        while device._link is None or not device._link.in_hand:
            await trio.lowlevel.checkpoint()


async def pcr(guest: GuestDriver, index: int = 7) -> bytes:
    return (await guest.transact(pcr_read(index)))[-32:]


async def test_a_guest_has_its_vtpm_and_keeps_it_while_back_end_and_manager_come_and_go(
    host: Host, model: ModelTpm, place: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await host.toolstack.make_domain(5, "web", DOMAIN)
    async with running_daemon(model, place, stop=False) as running:
        uuid = await attached(running)
        async with host.back_end():
            back = await host.toolstack.plug(5, uuid)
            guest = GuestDriver(host.toolstack, 5)
            guest.submit(get_random())  # before anybody looks, as Linux's driver does inside its probe
            await guest.connect()
            assert code(await guest.answer()) == 0
            assert code(await guest.transact(pcr_extend(7))) == 0
            assert code(await guest.transact(get_random(), locality=2)) == ResponseCode.LOCALITY
            assert code(await guest.transact(get_random(), locality=200)) == ResponseCode.LOCALITY
            assert await host.xs.read(f"{back}/feature-protocol-v2") == b"1"
        guest.submit(pcr_read(7))  # nobody is there; state 4 stays
        assert await host.xs.read(f"{back}/state") == b"4"
        async with host.back_end():
            assert (await guest.answer())[-32:] == extended(b"\x11" * 32), "no power cycle: the same domain"
    async with host.back_end():  # and no manager
        await said(caplog, "the manager is away")
        assert await host.xs.read(f"{back}/state") == b"4", "it is still a vTPM's"
        guest.submit(get_random())
        async with running_daemon(model, place):
            assert code(await guest.answer()) == 0
            assert code(await guest.transact(get_random())) == 0
            await host.toolstack.unplug(5)
    guest.close()


async def test_of_two_domains_that_may_have_it_the_one_that_had_it_keeps_it_over_a_restart(
    host: Host, model: ModelTpm, place: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Both live, the attachment says `any`, and the other one's device is found first."""
    await host.toolstack.make_domain(7, "web", DOMAIN)
    async with running_daemon(model, place) as running:
        uuid = await attached(running, domain="any")
        guest = GuestDriver(host.toolstack, 7)
        async with host.back_end():
            await host.toolstack.plug(7, uuid)
            await guest.connect()
            assert code(await guest.transact(pcr_extend(7))) == 0
            await host.toolstack.make_domain(5, "other", OTHER)
            await host.toolstack.plug(5, uuid)
            await said(caplog, "is bound to domain 7")
        async with host.back_end():
            assert await pcr(guest) == extended(b"\x11" * 32), "no power cycle"
            await said(caplog, "is bound to domain 7")
        guest.submit(pcr_read(7))
        async with host.back_end():
            assert (await guest.answer())[-32:] == extended(b"\x11" * 32)
            await host.toolstack.unplug(7)
            other = GuestDriver(host.toolstack, 5)
            await other.connect()
            assert await pcr(other) == bytes(32), "the next one has it, and finds nothing of the guest before"
            await host.toolstack.unplug(5)
        guest.close()
        other.close()


async def test_a_guest_waits_for_a_manager_that_is_away(
    host: Host, model: ModelTpm, place: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await host.toolstack.make_domain(5, "web", DOMAIN)
    async with running_daemon(model, place) as running:
        uuid = await attached(running)
    async with host.back_end():
        back = await host.toolstack.plug(5, uuid)
        await until(host.xs, f"{back}/state", XenbusState.INIT_WAIT)
        guest = GuestDriver(host.toolstack, 5)
        await guest.publish()
        await said(caplog, "the manager is away")
        assert await host.xs.read(f"{back}/state") == b"2"
        assert not host.xen.mappings, "nothing of the guest's is touched before the manager allows it"
        async with running_daemon(model, place):
            await guest.connect()
            assert code(await guest.transact(get_random())) == 0
    guest.close()


async def test_a_domain_that_the_attachment_does_not_name_is_turned_away(
    host: Host, model: ModelTpm, place: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_daemon(model, place) as running, host.back_end():
        uuid = await attached(running)
        await host.toolstack.make_domain(6, "evil", OTHER)
        back = await host.toolstack.plug(6, uuid)
        await until(host.xs, f"{back}/state", XenbusState.CLOSED)
        # a domain that may write its own name is not who it says
        await host.toolstack.make_domain(7, "web", OTHER, owner=7)
        back = await host.toolstack.plug(7, uuid)
        await until(host.xs, f"{back}/state", XenbusState.CLOSED)
        assert "/local/domain/7/name may be written by the domain itself" in caplog.text
        # nor does it help to name another's directory or number
        await host.toolstack.make_domain(8, "web", DOMAIN)
        for changed in ({"frontend": "/local/domain/7/device/vtpm/0"}, {"frontend_id": "7"}, {"uuid": "1-2"}):
            back = await host.toolstack.plug(8, changed.pop("uuid", uuid), **changed)
            guest = GuestDriver(host.toolstack, 8)
            await guest.publish()
            await trio.sleep(0.3)
            assert await host.xs.read(f"{back}/state") != b"4"
            guest.close()
            await host.xs.remove(back)
            await host.xs.remove(guest.front)
        assert not host.xen.mappings


async def test_an_unplug_during_a_command_executes_it_once(host: Host, model: ModelTpm, place: Any) -> None:
    await host.toolstack.make_domain(5, "web", DOMAIN)
    async with running_daemon(model, place) as running, host.back_end() as ends:
        uuid = await attached(running)
        async with connected_guest(host.toolstack, 5, uuid) as guest:
            await guest.transact(pcr_extend(7))
            guest.submit(create_primary_rsa())
            await in_hand(ends)
            guest.ring.discard()
            await host.toolstack.unplug(5)
            with pytest.raises(RingCancelledError):
                guest.ring.poll()
        async with connected_guest(host.toolstack, 5, uuid) as guest:
            assert await pcr(guest) == extended(b"\x11" * 32)
            assert code(await guest.transact(get_random())) == 0


async def test_an_instance_that_dies_gives_the_command_back_and_is_found_again(
    host: Host, model: ModelTpm, place: Any
) -> None:
    await host.toolstack.make_domain(5, "web", DOMAIN)
    async with running_daemon(model, place) as running, host.back_end() as ends:
        uuid = await attached(running)
        async with connected_guest(host.toolstack, 5, uuid) as guest:
            (shown,) = await running.ask("show", vtpm="web")
            guest.submit(create_primary_rsa())
            await in_hand(ends)
            os.kill(shown["pid"], signal.SIGKILL)
            with pytest.raises(RingCancelledError):
                await guest.answer()
            assert code(await guest.transact(get_random())) == ResponseCode.FAILURE, (
                "its PCRs are gone: no TPM as before"
            )
            await running.ask("reset-platform", vtpm="web")
            assert code(await guest.transact(get_random())) == 0


async def test_a_detached_vtpm_fails_its_guests_commands_until_it_is_attached_again(
    host: Host, model: ModelTpm, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xen_connection_trio, "RING_PATIENCE", 0.2)
    await host.toolstack.make_domain(5, "web", DOMAIN)
    async with running_daemon(model, place) as running, host.back_end():
        uuid = await attached(running)
        async with connected_guest(host.toolstack, 5, uuid) as guest:
            assert code(await guest.transact(get_random())) == 0
            await running.ask("detach", vtpm="web")
            assert code(await guest.transact(get_random())) == ResponseCode.FAILURE
            await running.ask("attach", vtpm="web", guest="web", frontend="xen")
            with trio.fail_after(30):
                while code(await guest.transact(get_random())):  # noqa: ASYNC110 - as a driver does
                    await trio.sleep(0.05)


async def test_a_guest_that_flaps_does_not_hold_another_up(
    host: Host, model: ModelTpm, place: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await host.toolstack.make_domain(5, "web", DOMAIN)
    await host.toolstack.make_domain(6, "db", OTHER)
    async with running_daemon(model, place) as running, host.back_end() as ends:
        first, second = await attached(running), await attached(running, "db")
        async with connected_guest(host.toolstack, 5, first) as guest:
            await host.toolstack.plug(6, second)
            hostile = GuestDriver(host.toolstack, 6)
            for number in range(int(LOOKS_AT_ONCE) * 5):
                await hostile.set_state(XenbusState(number % 7))
                hostile.channels.notify(hostile.port)
                if not number % 20:
                    assert code(await guest.transact(get_random())) == 0
            assert "changes its state too often" in caplog.text
            await hostile.connect()
            assert code(await hostile.transact(get_random())) == 0
            await trio.sleep(1)
            caplog.clear()
            await trio.sleep(1)
            assert not caplog.records, "it is quiet, and so is the log"
            assert sum(device.connected for device in ends.devices) == 2
            hostile.close()


async def test_a_mark_of_a_killed_back_end_gives_the_command_back(
    host: Host, model: ModelTpm, place: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await host.toolstack.make_domain(5, "web", DOMAIN)
    async with running_daemon(model, place) as running:
        uuid = await attached(running)
        async with connected_later(host, uuid) as guest:
            mark = Connection(5, 0, guest.page.references[0], guest.port)
            with Ledgers(host.directory).open(mark) as ledger:
                ledger.take()
            guest.submit(pcr_extend(7))
            async with host.back_end():
                with pytest.raises(RingCancelledError):
                    await guest.answer()
                assert await pcr(guest) == bytes(32)
                assert code(await guest.transact(pcr_extend(7))) == 0
                assert await pcr(guest) == extended(b"\x11" * 32)


@asynccontextmanager
async def connected_later(host: Host, uuid: str) -> AsyncIterator[GuestDriver]:
    """A guest whose back end is gone, as SIGKILL leaves it: both in state 4."""
    async with host.back_end(), connected_guest(host.toolstack, 5, uuid):
        pass
    guest = GuestDriver(host.toolstack, 5)
    await guest.publish()
    await guest.set_state(XenbusState.CONNECTED)
    yield guest
    guest.close()


async def test_an_instance_domain_joins_its_manager_again_after_the_managers_death(
    host: Host, model: ModelTpm, place: Any
) -> None:
    await host.toolstack.make_domain(5, "web-tpm", OTHER)
    load = encode_request(Load())
    async with host.back_end():
        async with running_daemon(model, place, stop=False) as running:
            uuid = await attached(running, instance_domain="web-tpm")
            back = await host.toolstack.plug(5, uuid)
            guest = GuestDriver(host.toolstack, 5)
            await guest.connect()
            reply, _ = decode_reply(await guest.transact(load))
            assert isinstance(reply, LoadReply)
            assert reply.vtpm == UUID(uuid).bytes
            assert len(reply.store) == len(reply.vtpm), "what only an instance elsewhere needs"
            reply, _ = decode_reply(await guest.transact(get_random()))
            assert isinstance(reply, Refusal), "this ring speaks the manager's protocol: there is no TPM behind it"
        assert await host.xs.read(f"{back}/state") == b"4"
        guest.submit(encode_request(Random(8)))
        async with running_daemon(model, place):
            reply, _ = decode_reply(await guest.answer())
            assert isinstance(reply, RandomReply | Refusal), "the next manager's: the page outlived the first"
            await host.toolstack.unplug(5)
    guest.close()


async def test_a_guest_wakes_an_instance_that_hibernates(host: Host, model: ModelTpm, place: Any) -> None:
    await host.toolstack.make_domain(5, "web", DOMAIN)
    async with running_daemon(model, place) as running, host.back_end():
        uuid = await attached(running)
        async with connected_guest(host.toolstack, 5, uuid) as guest:
            await guest.transact(pcr_extend(7))
            await running.ask("hibernate", vtpm="web")
            (shown,) = await running.ask("show", vtpm="web")
            assert shown["state"] == "hibernated"
            assert await pcr(guest) == extended(b"\x11" * 32)


async def test_a_command_that_one_page_does_not_carry_takes_another(host: Host, model: ModelTpm, place: Any) -> None:
    await host.toolstack.make_domain(5, "web", DOMAIN)
    async with running_daemon(model, place) as running, host.back_end():
        back = await host.toolstack.plug(5, await attached(running))
        guest = GuestDriver(host.toolstack, 5, pages=2)
        await guest.connect()
        assert await host.xs.read(f"{back}/feature-extra-pages") == b"1"
        longest = nv_write(0x01500016, bytes(MAX_COMMAND - len(nv_write(0x01500016, b""))))
        assert len(longest) == MAX_COMMAND > MAX_PACKET
        assert code(await guest.transact(longest)) not in (0, ResponseCode.COMMAND_SIZE), "the TPM's own refusal"
        guest.submit(longest + b"!")
        assert code(await guest.answer()) == ResponseCode.COMMAND_SIZE
        guest.ring._references = (0,)  # nobody granted that one
        assert code(await guest.transact(longest)) == ResponseCode.COMMAND_SIZE
        assert code(await guest.transact(get_random())) == 0
        await host.toolstack.unplug(5)
        guest.close()


class SlowBinder:
    """Grants everything; hands no ring out before `go`, cancelled or not; says so when a binding is to fail."""

    def __init__(self) -> None:
        self.go, self.fail = trio.Event(), trio.Event()
        self.terms = Terms()
        self.waits = trio.Event()

    async def meet(self, place: Place) -> None:
        """Nothing is known."""

    def part(self, place: Place) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is held."""

    async def bind(self, _place: Place, _uuid: bytes) -> "SlowBinder":
        return self

    async def ring(self) -> LocalRing:
        self.waits.set()
        with trio.CancelScope(shield=True):
            await self.go.wait()
        await trio.sleep_forever()
        raise AssertionError

    async def ended(self) -> None:
        await self.fail.wait()
        raise XenstoreError("EIO", "read", "what the manager asked for")


@asynccontextmanager
async def alone(host: Host, binder: SlowBinder) -> AsyncIterator[BackEnds]:
    """Run a back end that asks no manager."""
    kernel = Kernel(lambda: host.xen.channels(0), lambda: host.xen.grants_of(0))
    ends = BackEnds(host.xs, binder, kernel, Ledgers(host.directory))
    async with trio.open_nursery() as nursery:
        await nursery.start(ends.run)
        yield ends
        nursery.cancel_scope.cancel()


async def test_an_error_while_a_device_disconnects_leaves_nothing_mapped(host: Host) -> None:
    await host.toolstack.make_domain(5, "web", DOMAIN)
    binder = SlowBinder()
    async with alone(host, binder) as ends, connected_guest(host.toolstack, 5, OTHER) as guest:
        await binder.waits.wait()
        (device,) = ends.devices
        pumping = device._pumping
        assert pumping is not None
        await guest.set_state(XenbusState.CLOSING)
        with trio.fail_after(PATIENCE):
            while not pumping.cancel_called:
                await trio.lowlevel.checkpoint()
            binder.fail.set()
            await trio.sleep(0.1)
            assert host.xen.leaks(0)
            binder.go.set()
            while host.xen.leaks(0):  # noqa: ASYNC110
                await trio.sleep(0.01)


async def test_a_device_made_anew_while_the_one_before_ends_is_served(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    await host.toolstack.make_domain(5, "web", DOMAIN)
    run, again = Device.run, trio.Event()

    async def slow_to_end(self: Device) -> None:
        await run(self)
        if not again.is_set():
            again.set()
            await host.toolstack.plug(5, OTHER)
            await trio.sleep(0.2)

    monkeypatch.setattr(Device, "run", slow_to_end)
    async with alone(host, SlowBinder()):
        back = await host.toolstack.plug(5, OTHER)
        await until(host.xs, f"{back}/state", XenbusState.INIT_WAIT)
        await host.toolstack.unplug(5)
        await again.wait()
        await until(host.xs, f"{back}/state", XenbusState.INIT_WAIT)


async def test_a_guest_that_comes_and_goes_for_ever_does_not_fill_the_log(
    host: Host, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xen_device_trio, "LOOKS_A_SECOND", 1000.0)
    monkeypatch.setattr(xen_device_trio, "LOOKS_AT_ONCE", 10000.0)
    caplog.set_level(logging.INFO)
    await host.toolstack.make_domain(5, "web", DOMAIN)
    binder = SlowBinder()
    binder.go.set()
    async with alone(host, binder):
        back = await host.toolstack.plug(5, OTHER)
        guest = GuestDriver(host.toolstack, 5)
        for number in range(100):
            if number % 2:
                await guest.connect()
            else:  # a page that nobody granted, another one each time
                await host.xs.write(f"{guest.front}/event-channel", str(number + 1000))
                await host.xs.write(f"{guest.front}/ring-ref", str(number + 1000))
                await host.xs.write(f"{guest.front}/feature-protocol-v2", "1")
                await guest.set_state(XenbusState.INITIALISED)
                await until(host.xs, f"{back}/state", XenbusState.CLOSED)
            await guest.set_state(XenbusState.CLOSED)
            await until(host.xs, f"{back}/state", XenbusState.INIT_WAIT)
        assert "does not" in caplog.text or "are not granted" in caplog.text
        assert "5/0: connected" in caplog.text
        assert len(caplog.records) < 70
        guest.close()


async def test_a_device_that_was_an_instances_and_becomes_a_guests_claims_no_locality(host: Host) -> None:
    class Changing(SlowBinder):
        """First a Join is granted, then a Bind."""

        async def ring(self) -> LocalRing:
            if self.terms.wishes:
                await self.fail.wait()
                raise BindingEndedError
            front, self.instance = LocalRing.pair()
            return front

        async def ended(self) -> None:
            if not self.terms.wishes:
                await trio.sleep_forever()
            await self.fail.wait()
            self.terms = Terms()

    await host.toolstack.make_domain(5, "web", DOMAIN)
    binder = Changing()
    binder.terms = Terms(wishes=True)
    async with alone(host, binder), connected_guest(host.toolstack, 5, OTHER) as guest:
        guest.submit(get_random(), locality=3)
        binder.fail.set()
        with trio.fail_after(5):
            assert code(await guest.answer()) == ResponseCode.LOCALITY
    binder.instance.close()


async def test_a_device_that_is_gone_leaves_no_mark(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xen_back_trio, "AFTER_AN_ERROR", 0.5)
    await host.toolstack.make_domain(5, "web", DOMAIN)
    binder = SlowBinder()
    binder.go.set()
    async with alone(host, binder) as ends, connected_guest(host.toolstack, 5, OTHER) as guest:
        assert Ledgers(host.directory).known() == [(5, 0)]
        binder.fail.set()
        with trio.fail_after(PATIENCE):
            while host.xen.leaks(0):  # noqa: ASYNC110
                await trio.sleep(0.01)
            await host.xs.remove(guest.back)  # its task is not there to see it
            while ends.devices:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert not Ledgers(host.directory).known()


async def test_an_endpoint_that_hands_no_ring_out_is_asked_again(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "ring"))
        listener.listen()
        async with trio.open_nursery() as nursery:

            async def answer() -> None:
                sock = (await trio.to_thread.run_sync(listener.accept))[0]
                sock.send(b"nothing")
                sock.close()

            nursery.start_soon(answer)
            with pytest.raises(RingError):
                await xen_backend_bindings.take_ring(tmp_path / "ring")


async def test_without_xenstore_it_ends_and_gives_everything_back(model: ModelTpm, place: Any, tmp_path: Path) -> None:
    with running_xenstored() as store:
        try:
            async with open_xenstore(str(store.socket)) as xs:
                xen = Xen()
                host = Host(xs, xen, Toolstack(xs, xen), place[1].xen_socket, tmp_path / "marks")
                await host.toolstack.make_domain(5, "web", DOMAIN)
                async with (
                    running_daemon(model, place) as running,
                    host.back_end(),
                    connected_guest(host.toolstack, 5, await attached(running)),
                ):
                    assert xen.mappings
                    store.kill()
                    with trio.fail_after(30):
                        await trio.sleep_forever()
        except* XenstoreGoneError:
            pass
        else:
            raise AssertionError("nobody noticed")
        assert not xen.leaks(0)
