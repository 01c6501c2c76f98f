"""Which other domains the toolstack has given a device for the same vTPM: nobody takes it from the one that had it.

While a binding stands, its holder keeps others away. Between two lives of a back end none stands, and whoever asks
first would get it; so each question says who else may be meant, and the one that had it last is waited for.
"""

import trio

from frontend_backend.xen_terms import Place, parse_uuid
from frontend_backend.xs_trio import Xenstore, XenstoreError


class Others:
    """The devices of this back end's domain, as the toolstack wrote them."""

    def __init__(self, xs: Xenstore) -> None:
        """Look in `xs`; all devices are read once, each later one is told of by its own question."""
        self._xs = xs
        self._first = trio.Lock()
        self._known: dict[tuple[int, int], bytes] | None = None

    async def of(self, place: Place, uuid: bytes) -> tuple[int, ...]:
        """Return the domains that live and have a device for this vTPM, but the one at `place`.

        Raises:
            XenstoreGoneError: xenstored is gone. XenstoreError: it may not be read.

        """
        async with self._first:
            if self._known is None:
                self._known = await self._all(place.root)
        self._known[place.domain, place.device] = uuid
        same = [key for key, known in self._known.items() if known == uuid and key[0] != place.domain]
        return tuple(sorted({domain for domain, device in same if await self._is_there(place, domain, device, uuid)}))

    def part(self, place: Place) -> None:
        """Forget a device that goes."""
        if self._known is not None:
            self._known.pop((place.domain, place.device), None)

    async def _all(self, root: str) -> dict[tuple[int, int], bytes]:
        found = {}
        for domain in await self._xs.list(root) or []:
            for device in await self._xs.list(f"{root}/{domain}") or []:
                uuid = parse_uuid(await self._xs.read(f"{root}/{domain}/{device}/uuid"))
                if uuid is not None and domain.isdecimal() and device.isdecimal():
                    found[int(domain), int(device)] = uuid
        return found

    async def _is_there(self, place: Place, domain: int, device: int, uuid: bytes) -> bool:
        if parse_uuid(await self._xs.read(f"{place.root}/{domain}/{device}/uuid")) != uuid:
            return False
        try:
            return await self._xs.is_introduced(domain)
        except XenstoreError:
            return True  # xenstored may tell it to dom0 alone; the toolstack takes the nodes away in any case
