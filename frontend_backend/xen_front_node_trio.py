"""What xenstore says about a front end's vTPM device, and what the front end writes there."""

import logging
from collections.abc import Callable

import trio

from frontend_backend.xen_front import FrontSeen
from frontend_backend.xen_kernel import DomainId
from frontend_backend.xenbus_table import XenbusState, parse_number, parse_state
from frontend_backend.xs_trio import Transaction, Watch, Xenstore, XenstoreError

_log = logging.getLogger("vtpm.xen.front")
_SERVED = frozenset({XenbusState.INITIALISING, XenbusState.INIT_WAIT, XenbusState.INITIALISED, XenbusState.CONNECTED})


def device_path(domain: DomainId, device: int) -> str:
    """Return where in xenstore the toolstack makes a domain's vTPM device."""
    return f"/local/domain/{domain}/device/vtpm/{device}"


class FrontNode:
    """The front end's node of one device, and the back end's. `changed` is called when either may say something new.

    One that `follows` goes on with another device of its domain once its own has no back end, and that one has: after
    the death of a back end's domain libxl 4.17 leaves the old device, and gives the next one another number.
    """

    def __init__(self, xs: Xenstore, path: str, changed: Callable[[], None], *, follows: bool = False) -> None:
        """Read and write at `path`."""
        self._xs, self.path, self._changed = xs, path, changed
        self._follows, self._uuid = follows, b""  # what the toolstack says that the device is for, as far as is known
        self._own: Watch | None = None
        self._back: tuple[str, Watch] | None = None

    async def begin(self, nursery: trio.Nursery) -> None:
        """Watch our own node, by a task of `nursery`."""
        self._own = await self._xs.watch(self.path.rpartition("/")[0] if self._follows else self.path)
        nursery.start_soon(self._follow, self._own)

    async def end(self) -> None:
        """Watch nothing any more."""
        if self._own is not None:
            await self._own.aclose()
        if self._back is not None:
            await self._back[1].aclose()

    async def _follow(self, watch: Watch) -> None:
        async for _ in watch:
            self._changed()

    async def see(self, nursery: trio.Nursery) -> FrontSeen:
        """Read everything as it is at one moment; from then on the back end is watched that the toolstack names.

        Raises:
            XenstoreError: too busy a store. XenstoreGoneError: it went away.

        """
        seen = await self._xs.transaction(self._see)
        if self._back is not None and self._back[0] != seen.backend:
            (_, watch), self._back = self._back, None
            await watch.aclose()
        if self._back is None and seen.backend:
            try:
                watch = await self._xs.watch(seen.backend)
            except XenstoreError as error:
                _log.warning("%s: the back end's node %s cannot be watched: %s", self.path, seen.backend, error)
            else:
                self._back = seen.backend, watch
                nursery.start_soon(self._follow, watch)
        return seen

    async def _see(self, tx: Transaction) -> FrontSeen:
        if self._follows:
            await self._follow_device(tx)
        place = await self._place_of(self.path, tx)
        return FrontSeen(
            front_state=parse_state(await self._read(f"{self.path}/state", tx)),
            backend=place,
            backend_id=parse_number(await self._read(f"{self.path}/backend-id", tx)),
            back_state=parse_state(await self._read(f"{place}/state", tx)) if place else None,
            feature=await self._read(f"{place}/feature-protocol-v2", tx) if place else None,
            extra_pages=(parse_number(await self._read(f"{place}/feature-extra-pages", tx)) or 0) if place else 0,
        )

    async def _place_of(self, path: str, tx: Transaction) -> str | None:
        """Return where the back end of the device at `path` stands."""
        backend = await self._read(f"{path}/backend", tx)
        return backend.decode("ascii", "replace") if backend else None

    async def _follow_device(self, tx: Transaction) -> None:
        """Stay with the device that has a back end, or take another that has, for the same vTPM."""
        uuid = await self._served(self.path, tx)
        root = self.path.rpartition("/")[0]
        others = [] if uuid is not None else await self._list(root, tx)
        for number in sorted((name for name in others if name.isdecimal()), key=int):
            found = await self._served(f"{root}/{number}", tx)
            if found is not None and self._uuid in (b"", found):
                _log.warning("%s has no back end any more; going on with device %s", self.path, number)
                self.path, uuid = f"{root}/{number}", found
                break
        self._uuid = uuid or self._uuid

    async def _served(self, path: str, tx: Transaction) -> bytes | None:
        """Return the UUID that the device at `path` is for, None where nobody serves it."""
        place = await self._place_of(path, tx)
        state = parse_state(await self._read(f"{place}/state", tx)) if place else None
        return await self._read(f"{place}/uuid", tx) or b"" if state in _SERVED else None

    async def _list(self, path: str, tx: Transaction) -> list[str]:
        try:
            return await self._xs.list(path, tx) or []
        except XenstoreError as error:
            _log.debug("%s cannot be listed: %s", path, error)
            return []

    async def _read(self, path: str, tx: Transaction) -> bytes | None:
        try:
            return await self._xs.read(path, tx)
        except XenstoreError as error:
            _log.debug("%s cannot be read: %s", path, error)  # as good as not there yet
            return None

    async def write(self, values: dict[str, str]) -> None:
        """Write keys of our node, unless the toolstack has removed it: a write would make it anew."""

        async def body(tx: Transaction) -> None:
            if await self._xs.read(f"{self.path}/state", tx) is not None:
                for key, value in values.items():
                    await self._xs.write(f"{self.path}/{key}", value, tx)

        await self._xs.transaction(body)

    async def remove(self, *keys: str) -> None:
        """Remove keys of our node, where they are there."""
        for key in keys:
            await self._xs.remove(f"{self.path}/{key}")
