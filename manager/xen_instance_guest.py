"""Which guest an instance domain is the back end of: this domain's own rule, as a Binder for `xen_back_trio`.

The toolstack says which domain has a device here and which vTPM it is for (the key `uuid`, which the guest cannot
write); this domain says which vTPM it has, and which guest it is for. Another guest than the one before is a power
cycle. A domain's number says which: Xen counts them up, and a guest that starts anew is another domain.
"""

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final
from uuid import UUID

import trio

from frontend_backend.errors import RingError
from frontend_backend.local import LocalRing
from frontend_backend.tpmhdr import TpmFamily
from frontend_backend.xen_terms import BindingEndedError, BindRefusedError, Granted, Place, Terms
from manager.xen_backend_bindings import take_ring
from manager.xen_backend_identity import Identity
from manager.xen_backend_others import Others
from manager.xen_instance_life import Life

_log = logging.getLogger("vtpm.xen.instance")
ANY: Final = "any"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_EXTRA_PAGES: Final = 1  # as the instance's ring has (vtpm_instance.guest_ring)
_AGAIN: Final = 60.0  # seconds until a domain is looked at again that may not have the vTPM
_LAST_AGAIN: Final = 1.0  # until it is looked again whether the guest before has gone
_RING_AGAIN: Final = 0.25
_RING_SECONDS: Final = 10.0
_CLEAR: Final = frozenset({"clear", "none", "deactivated"})  # startups after which no PCR holds anything of before


class GuestBinder:
    """Grants one domain at a time the vTPM of `life`. `guest`: a domain's number or name, or ANY."""

    def __init__(
        self, life: Life, guest: str, runtime: Path, identify: Callable[[int], Awaitable[Identity]], others: Others
    ) -> None:
        """Keep in `runtime` who had it last, in this boot of ours; `identify` says who a domain is.

        `others` says which other domains have a device here.
        """
        self._life, self._guest, self._identify, self._others = life, guest, identify, others
        self._kept = runtime / "guest"
        self._boot = _BOOT_ID.read_text(encoding="ascii").strip()
        self._holder: _Grant | None = None
        self._turn = trio.Lock()

    async def meet(self, place: Place) -> None:
        """See Binder: nothing is known of a guest that only its toolstack could tell."""

    def part(self, place: Place) -> None:
        """See Binder: the grant's own end says that it is free."""
        self._others.part(place)

    async def bind(self, place: Place, uuid: bytes) -> Granted:
        """See Binder."""
        await self._refuse_stranger(place)
        granted = None
        while granted is None:
            await self._wait_for_last(place, uuid)
            granted = await self._in_turn(place, uuid)
        return granted

    async def _in_turn(self, place: Place, uuid: bytes) -> "_Grant | None":
        """Grant it; None where another one got it first, and still has a device."""
        async with self._turn:
            _, loaded = await self._life.up()
            if uuid != loaded.vtpm:
                text = f"this domain has vTPM {UUID(bytes=loaded.vtpm)}; the toolstack wants {UUID(bytes=uuid)} here"
                raise BindRefusedError(text, _AGAIN)
            await self._wait_for_holder(place)
            if await self._last_of_others(place, uuid) is not None:
                return None
            _, loaded = await self._life.up()  # which may be another life by now, on other terms
            await self._power_cycle(place)
            terms = Terms(TpmFamily(loaded.family), loaded.compat, loaded.localities, _EXTRA_PAGES)
            self._holder = _Grant(self._life, place, terms, self._let_go)
            _log.info("%s: the guest has its vTPM", place)
            return self._holder

    async def _wait_for_last(self, place: Place, uuid: bytes) -> None:
        """Wait while the domain that had it last still has a device: before a restart of ours it was its guest."""
        told = False
        while (last := await self._last_of_others(place, uuid)) is not None:
            if not told:
                _log.warning(
                    "%s waits: domain %d had the vTPM last, and still has a device for it; destroy it, or detach that "
                    "device",
                    place,
                    last,
                )
            told = True
            await trio.sleep(_LAST_AGAIN)

    async def _last_of_others(self, place: Place, uuid: bytes) -> int | None:
        """Return the domain that had it last, where that is another one than asks, and still has a device."""
        last = self._last()
        return last if last is not None and last in await self._others.of(place, uuid) else None

    async def _wait_for_holder(self, place: Place) -> None:
        """Wait while another device has the vTPM: as a rule it is just ending, as the same guest before its reboot."""
        told = False
        while self._holder is not None and self._holder.place != place:
            if not told:
                _log.warning("%s waits: %s has the vTPM", place, self._holder.place)
            told = True
            await self._holder.ended()

    async def _refuse_stranger(self, place: Place) -> None:
        if self._guest in (ANY, str(place.domain)):
            return
        name = (await self._identify(place.domain)).name
        if not name or name != self._guest:
            known = f"'{name}'" if name else "a domain whose name this domain may not read (give its number, or 'any')"
            raise BindRefusedError(f"this domain is for guest '{self._guest}', and {place.domain} is {known}", _AGAIN)

    async def _power_cycle(self, place: Place) -> None:
        """See to it that a guest does not find what another had in its PCRs, nor another boot of its own."""
        before, startup = self._last(), self._life.startup
        if before == place.domain:
            return
        if before is None and startup not in _CLEAR and place.domain < place.own:
            # It ran before this domain did: the guest whose PCRs were saved, or one that never had this vTPM.
            _log.error(
                "%s: the guest is older than this domain, which resumed a saved state, and may be another than had it: "
                "the vTPM answers with a failure until 'vtpm-reset-platform', or until the guest starts anew",
                place,
            )
            if startup != "failed":
                await self._life.restart()
        elif before is not None or startup not in _CLEAR:
            _log.info("%s: another guest than before: platform reset", place)
            while not await (await self._life.up())[0].reset_platform():
                _log.warning("%s: the instance ended while it was reset; the next one is", place)
        self._kept.write_text(f"{place.domain} {self._boot}", encoding="ascii")

    def _last(self) -> int | None:
        """Return who had it last; None where none had, as far as is known: numbers of before a boot say nothing."""
        try:
            number, boot = self._kept.read_text(encoding="ascii").split()
            return int(number) if boot == self._boot else None
        except FileNotFoundError:
            return None
        except ValueError:
            return -1  # cut short: another one in any case

    def _let_go(self, grant: "_Grant") -> None:
        if self._holder is grant:
            self._holder = None


class _Grant:
    """A binding; stands until it is closed."""

    def __init__(self, life: Life, place: Place, terms: Terms, let_go: Callable[["_Grant"], None]) -> None:
        self._life, self._let_go = life, let_go
        self._over = trio.Event()
        self.place = place
        self.terms = terms

    async def ring(self) -> LocalRing:
        """See Granted."""
        while not self._over.is_set():
            try:
                with trio.fail_after(_RING_SECONDS):
                    await self._life.up()
                    return await take_ring(self._life.ring_path)
            except (OSError, RingError, trio.TooSlowError) as error:
                _log.debug("no ring yet: %s", error)
            with trio.move_on_after(_RING_AGAIN):
                await self._over.wait()
        raise BindingEndedError("the binding was closed")

    async def ended(self) -> None:
        """See Granted."""
        await self._over.wait()

    def close(self) -> None:
        """See Granted."""
        self._over.set()
        self._let_go(self)
