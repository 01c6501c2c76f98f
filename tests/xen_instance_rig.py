"""An instance domain, its manager's domain and guests as tasks of one process, with a real xenstored between them.

Domains: 1 manager, 3 a guest older than the instance domain, 5 instance, from 6 guests. `own_domain` says so to each,
as all are domain 0 for this xenstored.
"""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid4

import trio
from vtpm_instance_manager import Record, SmallManager
from xen_local_kernel import LocalChannels, LocalGrants, LocalOffers, LocalXen

from frontend_backend.local import LocalRing
from frontend_backend.xen_back_trio import BackEnds
from frontend_backend.xen_device_trio import Kernel
from frontend_backend.xen_front_node_trio import device_path
from frontend_backend.xen_front_trio import XenFront
from frontend_backend.xen_ledger import Ledgers
from frontend_backend.xen_terms import Binder, BindingEndedError, BindRefusedError, Place, Terms
from frontend_backend.xs_trio import Xenstore, open_xenstore
from manager.cli_xen_instance import Interfaces, Settings, serve

MANAGER, OLDER_GUEST, INSTANCE, GUEST = 1, 3, 5, 6
_CLOSING = 2.0  # seconds for what is left to be done when a test failed
_log = logging.getLogger("vtpm.test")


@asynccontextmanager
async def store_of(domain: int, path: Path) -> AsyncIterator[Xenstore]:
    """Connect to xenstored as a domain."""
    async with open_xenstore(str(path)) as xs:

        async def own_domain() -> int:
            await trio.lowlevel.checkpoint()
            return domain

        async def is_introduced(_domain: int) -> bool:
            await trio.lowlevel.checkpoint()
            return True

        xs.own_domain = own_domain  # type: ignore[method-assign]
        xs.is_introduced = is_introduced  # type: ignore[method-assign, assignment]
        yield xs


class OneManager:
    """The manager's domain: whoever asks with the right UUID gets a ring to a small manager, one at a time."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.manager: SmallManager | None = None
        self._here = trio.Event()
        self._here.set()

    def leave(self) -> None:
        """Be away until `come_back`; the ring there is ends."""
        self._here = trio.Event()
        self.close()

    def come_back(self) -> None:
        """Answer again."""
        self._here.set()

    async def meet(self, place: Place) -> None:
        """Nothing is known."""

    def part(self, place: Place) -> None:
        """Nothing is kept."""

    async def bind(self, _place: Place, uuid: bytes) -> "_Joined":
        await self._here.wait()
        if uuid != self.record.vtpm.bytes:
            raise BindRefusedError("another vTPM", 1.0)
        return _Joined(self)

    def new_ring(self) -> LocalRing:
        self.close()
        front, back = LocalRing.pair()
        self.manager = SmallManager(back, self.record)
        return front

    def close(self) -> None:
        if self.manager is not None:
            self.manager.close()
            self.manager = None


class _Joined:
    """A binding with one ring, as a Join makes it."""

    terms = Terms(wishes=True)

    def __init__(self, manager: OneManager) -> None:
        self._manager = manager
        self._used, self._over = False, trio.Event()

    async def ring(self) -> LocalRing:
        await trio.lowlevel.checkpoint()
        if self._used:
            self._over.set()
            raise BindingEndedError("there was one already")
        self._used = True
        return self._manager.new_ring()

    async def ended(self) -> None:
        await self._over.wait()

    def close(self) -> None:
        self._over.set()


@dataclass
class Toolstack:
    """What libxl writes for a vtpm device (reference/xen-vtpm.md 4.2), and removes."""

    xs: Xenstore

    async def attach(self, front: int, back: int, uuid: UUID, device: int = 0) -> None:
        here, there = device_path(front, device), f"/local/domain/{back}/backend/vtpm/{front}/{device}"
        pairs = {
            f"{there}/frontend": here,
            f"{there}/frontend-id": str(front),
            f"{there}/online": "1",
            f"{there}/handle": str(device),
            f"{there}/uuid": str(uuid),
            f"{there}/state": "1",
            f"{here}/backend": there,
            f"{here}/backend-id": str(back),
            f"{here}/handle": str(device),
            f"{here}/state": "1",
        }

        async def body(tx: object) -> None:
            for path, value in pairs.items():
                await self.xs.write(path, value, tx)  # type: ignore[arg-type]

        await self.xs.transaction(body)

    async def destroy(self, front: int, back: int, device: int = 0, *, front_stays: bool = False) -> None:
        """Remove both ends, as for a domain that is destroyed."""
        if not front_stays:
            await self.xs.remove(device_path(front, device))
        await self.xs.remove(f"/local/domain/{back}/backend/vtpm/{front}/{device}")


@dataclass
class World:
    """Everything. `record` is what the manager knows."""

    store: Path
    directory: Path
    nursery: trio.Nursery
    toolstack: Toolstack
    record: Record
    xen: LocalXen = field(default_factory=LocalXen)
    stop: trio.Event = field(default_factory=trio.Event)
    outcome: list[BaseException | None] = field(default_factory=list)
    guest_rule: str = "any"

    @property
    def kernel(self) -> Kernel:
        return Kernel(lambda: LocalChannels(self.xen), lambda: LocalGrants(self.xen))

    @property
    def image(self) -> Path:
        return self.directory / "vtpm.img"

    @asynccontextmanager
    async def managers_domain(
        self, bind: Callable[[Xenstore], Binder] | None = None, device: int = 0, *, crashes: bool = False
    ) -> AsyncIterator[OneManager]:
        """Run the manager's domain for the time of the block; then destroy it as a domain, device included.

        It is one with a small manager, or whatever `bind` makes a binder of. One that `crashes` leaves the front end's
        node, as libxl 4.17 does, and the next device gets another number.
        """
        binder = OneManager(self.record)
        async with store_of(MANAGER, self.store) as xs, trio.open_nursery() as nursery:
            who = binder if bind is None else bind(xs)
            ends = BackEnds(xs, who, self.kernel, Ledgers(self.directory / f"ledgers-{uuid4()}"))
            await nursery.start(ends.run)
            await self.toolstack.attach(INSTANCE, MANAGER, self.record.vtpm, device)
            try:
                yield binder
            finally:
                nursery.cancel_scope.cancel()
                with trio.move_on_after(_CLOSING, shield=True):
                    await self.toolstack.destroy(INSTANCE, MANAGER, device, front_stays=crashes)
                binder.close()

    async def run_instance(self) -> None:
        """Be the instance domain's program; how it ended is in `outcome`."""
        settings = Settings(self.image, self.guest_rule, runtime_dir=self.directory / "run", uid=0)
        interfaces = Interfaces(
            lambda _path: store_of(INSTANCE, self.store),
            lambda: LocalChannels(self.xen),
            lambda: LocalOffers(self.xen),
            self.kernel,
        )
        self.stop = trio.Event()
        try:
            await serve(settings, self.stop, interfaces)
        except Exception as error:  # noqa: BLE001 - the test judges it
            _log.info("the instance domain's program: %s", error)
            self.outcome.append(error)
        else:
            self.outcome.append(None)

    async def until_ended(self) -> BaseException | None:
        """Wait until the instance domain's program has ended; return its error."""
        while not self.outcome:  # noqa: ASYNC110 - one of several runs adds it
            await trio.sleep(0.01)
        error = self.outcome.pop()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        return error

    @asynccontextmanager
    async def guest(self, domain: int = GUEST, extra_pages: int = 0, device: int = 0) -> AsyncIterator[XenFront]:
        """Run a guest whose back end is the instance domain; destroy it after the block."""
        await self.toolstack.attach(domain, INSTANCE, self.record.vtpm, device)
        channels, offers = LocalChannels(self.xen), LocalOffers(self.xen)
        try:
            async with store_of(domain, self.store) as xs, trio.open_nursery() as nursery:
                front = XenFront(xs, channels, offers, device_path(domain, device), extra_pages=extra_pages)
                await nursery.start(front.run)
                yield front
                nursery.cancel_scope.cancel()
        finally:
            with trio.move_on_after(_CLOSING, shield=True):
                await self.toolstack.destroy(domain, INSTANCE, device)
            channels.close()
            offers.close()


@asynccontextmanager
async def world(store: Path, directory: Path, family: str = "2.0") -> AsyncIterator[World]:
    """Make a world without domains; what is started in its nursery ends with the block."""
    async with store_of(0, store) as xs, trio.open_nursery() as nursery:
        yield World(store, directory, nursery, Toolstack(xs), Record(uuid4(), family))
        nursery.cancel_scope.cancel()
