"""What vtpm-xen is to the manager, played: asks for guests' devices and for instances' rings, and carries the latter.

Real are the manager, its instances, and an instance domain's keeper and instance; Xen's rings are left out.
"""

import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import trio
from vtpm_instance_commands import pcr_extend, pcr_read
from vtpm_instance_rig import KeeperProcess, running_keeper

from frontend_backend.bridge import Bridge, Wake
from frontend_backend.channel_trio import receive_message_trio, send_message_trio
from frontend_backend.descriptors import close_all
from frontend_backend.errors import ChannelClosedError
from frontend_backend.front import RingFrontEnd
from frontend_backend.local import LocalRing
from frontend_backend.messages_keeper import Spawn, Spawned
from frontend_backend.messages_xen import (
    Bind,
    Bound,
    Join,
    Joined,
    XenCode,
    XenRefusal,
    XenReply,
    decode_xen,
    encode_xen,
)
from frontend_backend.ring import BackRing, FrontRing
from manager import state_files
from storage.state_format import Family
from storage.state_image import StateImage

WEB = UUID("4a7f2a70-95cb-4a1f-8cb0-1d1c9a0a3f01")
DB = UUID("b4f6f2a8-24b1-4f2b-9a3d-86d5b9c0d702")
ZEROES = bytes(32)


@dataclass(frozen=True, slots=True)
class Guest:
    """A domain as vtpm-xen sees it."""

    number: int
    name: str = "web"
    uuid: str = str(WEB)
    label: str = ""
    device: int = 0
    ran_before: bool | None = False
    resumed: bool = False

    def bind(self, vtpm: str) -> Bind:
        facts = (self.number, self.device, self.name, self.uuid, self.label, self.ran_before, self.resumed)
        return Bind(UUID(vtpm).bytes, *facts)

    def join(self, vtpm: str) -> Join:
        return Join(UUID(vtpm).bytes, self.number, self.device, self.name, self.uuid, self.label)

    def rebooted(self, number: int) -> "Guest":
        return replace(self, number=number)


class Connection:
    """One device's connection to the manager."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(str(path))
        self.sock.setblocking(False)

    async def ask(self, request: Bind | Join) -> tuple[XenReply, list[int]]:
        await send_message_trio(self.sock, encode_xen(request))
        with trio.fail_after(30):
            data, descriptors = await receive_message_trio(self.sock, max_descriptors=4)
        reply = decode_xen(data)
        assert isinstance(reply, Bound | Joined | XenRefusal)
        return reply, descriptors

    async def over(self) -> None:
        """Wait until the manager ends it."""
        with trio.fail_after(30):
            try:
                await receive_message_trio(self.sock)
            except (ChannelClosedError, OSError):
                return
        raise AssertionError("the manager said something more")

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def bound(path: Path, request: Bind) -> tuple[Connection, Bound]:
    """Ask for a device that is granted; the connection is the caller's to close."""
    connection = Connection(path)
    reply, _ = await connection.ask(request)
    assert isinstance(reply, Bound), reply
    return connection, reply


async def refused(path: Path, request: Bind | Join) -> tuple[XenCode, str]:
    """Ask for a device that is not granted; returns why."""
    with Connection(path) as connection:
        reply, descriptors = await connection.ask(request)
        assert isinstance(reply, XenRefusal), reply
        assert not descriptors
        await connection.over()
        return reply.code, reply.text


def run(endpoint: str, *packets: bytes) -> bytes:
    """Submit commands on a ring of an instance; returns the last answer."""
    answer = b""
    with RingFrontEnd.connect(endpoint) as ring:
        for packet in packets:
            answer = ring.transact(packet, timeout=20)
    return answer


async def pcr(endpoint: str, index: int = 7) -> bytes:
    answer: bytes = await trio.to_thread.run_sync(run, endpoint, pcr_read(index))
    assert int.from_bytes(answer[6:10]) == 0, answer.hex()
    return answer[-32:]


async def extend(endpoint: str, index: int = 7) -> None:
    answer = await trio.to_thread.run_sync(run, endpoint, pcr_extend(index))
    assert int.from_bytes(answer[6:10]) == 0, answer.hex()


class InstanceDomain:
    """A domain with an instance and its disk; the ring that the manager gave is carried to it by a bridge."""

    def __init__(self, keeper: KeeperProcess, guest: Guest, vtpm: str, family: str = "2.0") -> None:
        self.keeper, self.guest, self.vtpm, self.family = keeper, guest, vtpm, family
        self.directory = keeper.path.parent
        self.image = self.directory / "state.img"
        self.endpoint = str(self.directory / "guest.ring")
        self.pid = self.lease = 0
        self._inner, self._theirs = LocalRing.pair()
        self.bridge = Bridge(BackRing(self._inner.page, lambda _why: b""), None, wishes=True)
        self._outer: LocalRing | None = None

    def make_image(self, store: UUID) -> None:
        with self.image.open("x+b") as file:
            family = Family.TPM20 if self.family == "2.0" else Family.TPM12
            StateImage.create(file.fileno(), UUID(self.vtpm), store, family)

    def start(self, lease: int) -> None:
        """Start the instance, as the domain's own program does, with the lease that its manager tells."""
        self.lease = lease
        page, doorbell = self._theirs.descriptors()
        spare, kept = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        image = state_files.open_locked(self.image, create=False)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        Path(self.endpoint).unlink(missing_ok=True)
        listener.bind(self.endpoint)
        listener.listen(4)
        try:
            vtpm, uid = UUID(self.vtpm).bytes, os.geteuid()
            request = Spawn(vtpm, self.lease, self.family, 0, 0, "xen", uid, uid, ("ring",))
            handed = [page, doorbell, kept.fileno(), image, listener.fileno()]
            reply, received = self.keeper.client.call(request, handed)
            assert isinstance(reply, Spawned), reply
            self.pid = reply.pid
            close_all(received)
        finally:
            os.close(image)
            for each in (spare, kept, listener):
                each.close()

    def connect(self, descriptors: list[int]) -> None:
        """Carry on over a ring that the manager gave."""
        self._outer = LocalRing.adopt(*descriptors)
        self._ring(self.bridge.replace_front(FrontRing(self._outer.page)))

    def disconnect(self) -> None:
        self._ring(self.bridge.lose_front())
        if self._outer is not None:
            self._outer.close()
        self._outer = None

    async def carry(self) -> None:
        """Pump until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._from_instance)
            nursery.start_soon(self._from_manager)

    async def _from_instance(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._inner.fileno())
            if not self._inner.drain():
                return
            self._ring(self.bridge.on_back())

    async def _from_manager(self) -> None:
        while True:
            outer = self._outer
            if outer is None:
                await trio.sleep(0.01)
                continue
            with trio.move_on_after(0.05):
                await trio.lowlevel.wait_readable(outer.fileno())
            if outer is not self._outer:
                continue
            alive = outer.drain()
            self._ring(self.bridge.on_front())
            if not alive:
                self.disconnect()

    def _ring(self, wake: Wake) -> None:
        if wake & Wake.BACK:
            self._inner.ring()
        if wake & Wake.FRONT and self._outer is not None:
            self._outer.ring()

    def close(self) -> None:
        self.disconnect()
        for ring in (self._inner, self._theirs):
            ring.close()


@contextmanager
def instance_domain(guest: Guest, vtpm: str, store: UUID, family: str = "2.0") -> Iterator[InstanceDomain]:
    with running_keeper() as keeper:
        domain = InstanceDomain(keeper, guest, vtpm, family)
        try:
            domain.make_image(store)
            yield domain
        finally:
            domain.close()


@asynccontextmanager
async def carrying(domain: InstanceDomain) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(domain.carry)
        yield
        nursery.cancel_scope.cancel()


async def joined(path: Path, domain: InstanceDomain) -> Connection:
    """Have a domain join; the connection is the caller's."""
    connection = Connection(path)
    reply, descriptors = await connection.ask(domain.guest.join(domain.vtpm))
    assert isinstance(reply, Joined), reply
    domain.connect(descriptors)
    return connection


async def until_shown(running: Any, vtpm: str, **wanted: Any) -> dict[str, Any]:
    """Wait until vtpm-show says this; returns all of it."""
    shown: dict[str, Any] = {}
    with trio.move_on_after(30):
        while True:
            (shown,) = await running.ask("show", vtpm=vtpm)
            if all(shown[name] == value for name, value in wanted.items()):
                return shown
            await trio.sleep(0.01)
    raise AssertionError(f"{wanted} was not to be: {shown}")
