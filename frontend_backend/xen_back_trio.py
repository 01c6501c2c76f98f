"""All vTPM devices of this domain as their back end: `backend/vtpm` watched, one task a device.

What lives here: what is read from xenstore, when, and what is done with what the machine (xen_back) says. What must
not: states (xen_back), pages and channels (xen_connection_trio), who may have which vTPM (a Binder).

A device costs only itself: its task has a pace of its own, and an error in it ends that device's connection and nothing
else. Of what a guest writes, only its own device's `state`, `ring-ref`, `event-channel` and `feature-protocol-v2` are
read.
"""

import logging
from typing import Final

import trio

from frontend_backend.xen_device_trio import Device, Kernel
from frontend_backend.xen_ledger import Ledgers
from frontend_backend.xen_terms import Binder, Place
from frontend_backend.xs_trio import Xenstore, XenstoreGoneError

_log = logging.getLogger("vtpm.xen")

MOST_DEVICES: Final = 1024
"""Devices served at once: each costs up to eight descriptors, of which a process here may have 20,000."""
MOST_OF_A_DOMAIN: Final = 8
"""Devices of one domain. Linux's driver takes one; a toolstack that makes more is in error, and starves no others."""
AFTER_AN_ERROR: Final = 5.0
"""Seconds after which a device whose task failed is tried again."""


class BackEnds:
    """The devices."""

    def __init__(self, xs: Xenstore, binder: Binder, kernel: Kernel, ledgers: Ledgers) -> None:
        """Serve what xenstore shows; `run` does it."""
        self._xs, self._binder, self._kernel, self._ledgers = xs, binder, kernel, ledgers
        self._devices: dict[tuple[int, int], Device] = {}
        self._own = 0
        self._root = ""
        self._leaving = False

    @property
    def devices(self) -> list[Device]:
        """Return those that are served now."""
        return list(self._devices.values())

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled, or until `leave`; started once the watch stands.

        Raises:
            XenstoreGoneError: xenstored is gone.

        """
        self._own = await self._xs.own_domain()
        self._root = Place(self._own, 0, 0).root
        watch = await self._xs.watch(self._root)
        try:
            async with trio.open_nursery() as nursery:
                await self._find_all(nursery)
                self._forget_marks()
                task_status.started()
                async for path in watch:
                    await self._look_at(path, nursery)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await watch.aclose()

    async def leave(self) -> None:
        """Take no more commands, wait for those in hand, and leave all devices as they are for the next back end."""
        self._leaving = True
        async with trio.open_nursery() as nursery:
            for device in self.devices:
                nursery.start_soon(device.leave)

    async def _look_at(self, path: str, nursery: trio.Nursery) -> None:
        """Tell the device that a changed path belongs to; anything above a device may mean any."""
        parts = path.removeprefix(self._root).strip("/").split("/")
        if not path.startswith(self._root + "/") or len(parts) < 2:
            await self._find_all(nursery)
        elif parts[0].isdecimal() and parts[1].isdecimal():
            self._add(int(parts[0]), int(parts[1]), nursery)

    async def _find_all(self, nursery: trio.Nursery) -> None:
        present = set()
        for domain in await self._xs.list(self._root) or []:
            for device in await self._xs.list(f"{self._root}/{domain}") or []:
                if domain.isdecimal() and device.isdecimal():
                    present.add((int(domain), int(device)))
        for key, served in self._devices.items():
            if key not in present:
                served.look()
        for key in sorted(present - self._devices.keys()):
            self._add(*key, nursery)

    def _add(self, domain: int, device: int, nursery: trio.Nursery) -> None:
        key = domain, device
        if key in self._devices:
            self._devices[key].look()
        elif self._leaving:
            return
        elif len(self._devices) >= MOST_DEVICES or self._count(domain) >= MOST_OF_A_DOMAIN:
            limits = MOST_DEVICES, MOST_OF_A_DOMAIN
            _log.error("%d/%d is not served: at most %d devices, %d of one domain", *key, *limits)
        else:
            self._devices[key] = Device(self._xs, Place(self._own, *key), self._binder, self._kernel, self._ledgers)
            nursery.start_soon(self._serve, key)

    def _count(self, domain: int) -> int:
        return sum(known == domain for known, _ in self._devices)

    async def _serve(self, key: tuple[int, int]) -> None:
        """Run one device's task; whatever goes wrong in it stays there."""
        device = self._devices[key]
        try:
            while True:
                try:
                    await device.run()
                except Exception as error:
                    if _gone(error):
                        raise
                    _log.exception("%s: tried again in %g s", device.place, AFTER_AN_ERROR)
                else:
                    if device.told_to_look:
                        continue  # another one has been made at its place while it ended
                    self._ledgers.forget(*key)  # also where its page went while an error kept us from it
                    return
                await trio.sleep(AFTER_AN_ERROR)
        finally:
            del self._devices[key]

    def _forget_marks(self) -> None:
        for domain, device in self._ledgers.known():
            if (domain, device) not in self._devices:
                self._ledgers.forget(domain, device)


def _gone(error: BaseException) -> bool:
    """Tell whether xenstored is gone, which no device gets over."""
    if isinstance(error, BaseExceptionGroup):
        return any(_gone(one) for one in error.exceptions)
    return isinstance(error, XenstoreGoneError)
