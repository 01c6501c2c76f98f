"""A toolstack and guests for back ends under test: nodes as libxl writes them, a driver that does what Linux's does.

The xenstored is a real one (`xenstored_rig`), grants and channels are simulated (`xen_simulation`).
"""

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

import trio
from xen_simulation import Xen

from frontend_backend.errors import RingCancelledError
from frontend_backend.ring import FrontRing
from frontend_backend.xenbus_table import XenbusState
from frontend_backend.xs_trio import Permission, Transaction, Xenstore
from frontend_backend.xs_wire import Operation, encode_strings

POLL: Final = 0.002  # seconds; Linux's driver looks each 5 ms
PATIENCE: Final = 60.0  # on a busy machine


async def until(xs: Xenstore, path: str, *states: int | None) -> int | None:
    """Wait until a node says one of these numbers, or is gone (None)."""
    watch = await xs.watch(path)
    with trio.fail_after(PATIENCE):
        async for _ in watch:
            raw = await xs.read(path)
            value = None if raw is None else int(raw)
            if value in states:
                await watch.aclose()
                return value
    raise AssertionError


@dataclass
class Toolstack:
    """libxl's part. `xs` is dom0's."""

    xs: Xenstore
    xen: Xen

    async def make_domain(self, number: int, name: str, uuid: str, *, owner: int = 0) -> None:
        """Build a domain; `owner` 0 as libxl does it: the guest may read its name and not write it."""
        self.xen.domains.add(number)
        base = f"/local/domain/{number}"
        ours = (Permission(owner), Permission(number, read=True))
        for path, value in ((f"{base}/name", name), (f"{base}/vm", f"/vm/{uuid}")):
            await self.xs.write(path, value)
            await self.xs.set_permissions(path, ours)
        await self.xs._connection.ask(Operation.INTRODUCE, encode_strings(str(number), "1", "1"), base)

    async def plug(self, number: int, uuid: str, device: int = 0, **changed: str) -> str:
        """Make both ends' nodes in one transaction; returns the back end's."""
        front = f"/local/domain/{number}/device/vtpm/{device}"
        back = f"/local/domain/0/backend/vtpm/{number}/{device}"
        keys = {
            "frontend": front, "frontend-id": str(number), "online": "1", "state": "1", "handle": str(device),
            "uuid": uuid, "resume": "False",
        } | {name.replace("_", "-"): value for name, value in changed.items()}  # fmt: skip

        async def body(tx: Transaction) -> None:
            await self.xs.make(front, tx)
            await self.xs.set_permissions(front, (Permission(number), Permission(0, read=True)), tx)
            for key, value in {"backend": back, "backend-id": "0", "state": "1"}.items():
                await self.xs.write(f"{front}/{key}", value, tx)
            for key, value in keys.items():
                await self.xs.write(f"{back}/{key}", value, tx)

        await self.xs.transaction(body)
        return back

    async def unplug(self, number: int, device: int = 0) -> None:
        """Remove a device as `xl vtpm-detach` does: wait for state 6, then take the nodes away."""
        back = f"/local/domain/0/backend/vtpm/{number}/{device}"

        async def body(tx: Transaction) -> None:
            await self.xs.write(f"{back}/online", "0", tx)
            await self.xs.write(f"{back}/state", str(int(XenbusState.CLOSING)), tx)

        await self.xs.transaction(body)
        await until(self.xs, f"{back}/state", XenbusState.CLOSED)
        await self.xs.remove(back)
        await self.xs.remove(f"/local/domain/{number}/device/vtpm/{device}")


class GuestDriver:
    """Linux's driver in a domain, and who uses it."""

    def __init__(self, toolstack: Toolstack, number: int, device: int = 0, pages: int = 1) -> None:
        self.xs, self.number = toolstack.xs, number
        self.front = f"/local/domain/{number}/device/vtpm/{device}"
        self.back = f"/local/domain/0/backend/vtpm/{number}/{device}"
        self._offers, self.channels = toolstack.xen.offers(number), toolstack.xen.channels(number)
        self.page = self._offers.offer(0, pages)
        self.port = self.channels.bind_unbound(0)
        self.ring = FrontRing(self.page.page, self.page.references[1:])

    async def publish(self) -> None:
        """Say where page and channel are: state 3."""

        async def body(tx: Transaction) -> None:
            for key, value in {
                "ring-ref": str(self.page.references[0]),
                "event-channel": str(self.port),
                "feature-protocol-v2": "1",
            }.items():
                await self.xs.write(f"{self.front}/{key}", value, tx)

        await self.xs.transaction(body)
        await self.set_state(XenbusState.INITIALISED)

    async def connect(self) -> None:
        await self.publish()
        await until(self.xs, f"{self.back}/state", XenbusState.CONNECTED)
        await self.set_state(XenbusState.CONNECTED)

    async def set_state(self, state: XenbusState) -> None:
        await self.xs.write(f"{self.front}/state", str(int(state)))

    def submit(self, packet: bytes, locality: int = 0) -> None:
        self.ring.submit(packet, locality)
        self.channels.notify(self.port)

    async def answer(self) -> bytes:
        """Wait for the answer. Raises RingCancelledError."""
        with trio.fail_after(PATIENCE):
            while (answer := self.ring.poll()) is None:  # noqa: ASYNC110 - as the driver does
                await trio.sleep(POLL)
        return answer

    async def transact(self, packet: bytes, locality: int = 0) -> bytes:
        self.submit(packet, locality)
        return await self.answer()

    async def transact_or_cancelled(self, packet: bytes) -> bytes | None:
        with suppress(RingCancelledError):
            return await self.transact(packet)
        return None

    def close(self) -> None:
        """Give the page and the channel back."""
        self.ring.release()
        self._offers.close()
        self.channels.close()


@asynccontextmanager
async def connected_guest(toolstack: Toolstack, number: int, uuid: str) -> AsyncIterator[GuestDriver]:
    """Plug a device in, and connect to it."""
    await toolstack.plug(number, uuid)
    driver = GuestDriver(toolstack, number)
    try:
        await driver.connect()
        yield driver
    finally:
        driver.close()


def code(answer: bytes) -> int:
    """The response code."""
    found: int = struct.unpack_from(">I", answer, 6)[0]
    return found
