"""What xenstore says about one vTPM device, and what its back end writes there.

Of the guest's own directory four keys are read, each as text that somebody hostile wrote. The toolstack's keys must
agree with where they stand: they name the domain and the device of their path, and nothing else.
"""

import logging
from dataclasses import dataclass

from frontend_backend.xen_back import Seen
from frontend_backend.xen_terms import Place, parse_uuid
from frontend_backend.xenbus_table import parse_number, parse_state
from frontend_backend.xs_trio import Transaction, Xenstore, XenstoreError

_log = logging.getLogger("vtpm.xen")


@dataclass(frozen=True, slots=True)
class Sight:
    """What was read. `wrong`: why the device is not to be served, "" if nothing is wrong; `uuid`: 16 bytes."""

    seen: Seen
    uuid: bytes | None = None
    wrong: str = ""


NO_NODE = Sight(
    Seen(
        back_state=None,
        online=False,
        front_state=None,
        ring_ref=None,
        event_channel=None,
        feature=None,
        bound=False,
    )
)


class Node:
    """The back end's node of one device, and the front end's."""

    def __init__(self, xs: Xenstore, place: Place) -> None:
        """Read and write at `place`."""
        self._xs, self._place = xs, place

    async def look(self) -> Sight:
        """Read everything anew. Whether the device is bound is not known here."""
        path, front = self._place.path, self._place.front
        back_state = parse_state(await self._xs.read(f"{path}/state"))
        if back_state is None:
            return NO_NODE
        uuid, wrong = await self._identity()
        if wrong and await self._xs.read(f"{path}/state") is None:
            return NO_NODE  # the toolstack has removed it since
        seen = Seen(
            back_state=back_state,
            online=await self._xs.read(f"{path}/online") != b"0",
            front_state=parse_state(await self._of_guest(f"{front}/state")),
            ring_ref=parse_number(await self._of_guest(f"{front}/ring-ref")),
            event_channel=parse_number(await self._of_guest(f"{front}/event-channel")),
            feature=await self._of_guest(f"{front}/feature-protocol-v2"),
            bound=False,
            domain_alive=await self._alive(),
            identity="" if uuid is None else uuid.hex(),
        )
        return Sight(seen, uuid, wrong)

    async def _identity(self) -> tuple[bytes | None, str]:
        """Return the UUID, and what is wrong with what the toolstack wrote."""
        path = self._place.path
        text = await self._xs.read(f"{path}/uuid")
        uuid = parse_uuid(text)
        if uuid is None:
            return None, f"its uuid is {text!r}: not served"
        front = await self._xs.read(f"{path}/frontend")
        if front != self._place.front.encode():
            return uuid, f"its front end is said to be {front!r}, not {self._place.front}: not served"
        owner = await self._xs.read(f"{path}/frontend-id")
        if parse_number(owner) != self._place.domain:
            return uuid, f"its front end's domain is said to be {owner!r}: not served"
        return uuid, ""

    async def _of_guest(self, path: str) -> bytes | None:
        """Read what belongs to the guest; what it does not let us read it did not write."""
        try:
            return await self._xs.read(path)
        except XenstoreError as error:
            if error.name != "EACCES":
                raise
            return None

    async def _alive(self) -> bool:
        try:
            return await self._xs.is_introduced(self._place.domain)
        except XenstoreError as error:
            _log.debug("%s: %s", self._place, error)
            return True  # xenstored may tell it to dom0 alone; the toolstack takes the nodes away in any case

    async def write(self, values: dict[str, str]) -> None:
        """Write keys of our node, unless the toolstack has removed it: a write would make it anew."""

        async def body(tx: Transaction) -> None:
            if await self._xs.read(f"{self._place.path}/state", tx) is not None:
                for key, value in values.items():
                    await self._xs.write(f"{self._place.path}/{key}", value, tx)

        await self._xs.transaction(body)

    async def remove(self) -> None:
        """Remove our node, as a driver domain does."""
        await self._xs.remove(self._place.path)
