"""One connected Xen device: the guest's page mapped, its event channel bound, a bridge to the instance's ring.

What lives here: what is mapped and bound, and the tasks that hear both ends. What must not: xenstore (xen_back_trio),
states (xen_back), what crosses the bridge (bridge).
"""

import logging
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Final

import trio

from frontend_backend.bridge import WISH_INTERVAL, Bridge, Wake
from frontend_backend.channel_trio import wait_doorbell
from frontend_backend.errors import PageError
from frontend_backend.local import LocalRing
from frontend_backend.ring import BackRing, FrontRing, Request
from frontend_backend.ring_extent import ExtraPages
from frontend_backend.tpmhdr import MAX_COMMAND, ResponseCode, TpmFamily, error_response
from frontend_backend.xen_compat import Rewritten
from frontend_backend.xen_compat import inspect as compat_inspect
from frontend_backend.xen_kernel import ChannelRefusedError, EventChannels, Grants, XenError
from frontend_backend.xen_ledger import Connection, Ledgers
from frontend_backend.xen_pace import Pace, Voice
from frontend_backend.xen_terms import Place, Terms

_log = logging.getLogger("vtpm.xen")
NextRing = Callable[[], Awaitable[LocalRing]]

RINGS_A_SECOND: Final = 2000.0
"""Rings a second of one guest that are heard: Linux's driver makes 200 commands a second at most (it polls each 5 ms).
A guest that rings more often finds its channel masked for the rest of the time, which costs us nothing; an instance,
which rings once for each answer, its bell full."""
RINGS_AT_ONCE: Final = 500.0
"""And so many without a pause."""
RING_PATIENCE: Final = 20.0
"""Seconds that a command waits for an instance that is away. Linux's driver gives up after 120 s, and a boot that sends
three commands should not last minutes; an instance that crashed is back within a second, a manager within 10."""
SHORT_LIFE: Final = 0.1
"""Seconds between two rings to the instance where the first did not last longer than that."""
LEAVE_SECONDS: Final = 5.0
"""Seconds that a command in hand gets when we are told to stop; then it is given back, as cancelled."""

_MALFORMED: Final = {
    TpmFamily.TPM_2_0: ResponseCode.COMMAND_SIZE,
    TpmFamily.TPM_1_2: ResponseCode.TPM12_BAD_PARAM_SIZE,
}
_LOCALITY: Final = {TpmFamily.TPM_2_0: ResponseCode.LOCALITY, TpmFamily.TPM_1_2: ResponseCode.TPM12_BAD_LOCALITY}
_FAILURE: Final = {TpmFamily.TPM_2_0: ResponseCode.FAILURE, TpmFamily.TPM_1_2: ResponseCode.TPM12_FAIL}


class Link:
    """What is mapped and bound for one device, and the bridge over it. Made whole or not at all."""

    def __init__(
        self,
        place: Place,
        connection: Connection,
        terms: Callable[[], Terms],
        open_channels: Callable[[], EventChannels],
        open_grants: Callable[[], Grants],
        ledgers: Ledgers,
        voice: Voice,
    ) -> None:
        """Map and bind what the front end published; `terms` is asked at each command, for they may change.

        Raises:
            XenError, OSError: it could not be; nothing stays mapped, bound or open.

        """
        self.place, self._terms, self._voice, self.in_hand = place, terms, voice, False
        self._resources = ExitStack()
        with ExitStack() as made:
            grants = open_grants()
            made.callback(grants.close)
            pages = grants.map(place.domain, [connection.ring_ref])
            made.callback(pages.unmap)
            self._channels = open_channels()
            made.callback(self._channels.close)
            self._port = self._channels.bind_interdomain(place.domain, connection.event_channel)
            self.ledger = ledgers.open(connection)
            made.callback(self.ledger.close)
            self._grants = grants
            back = BackRing(
                pages.page,
                self._refuse,
                map_extra=self._map_extra,
                extra_pages=terms().extra_pages,
                most=MAX_COMMAND,
            )
            made.callback(back.release)
            self.bridge = Bridge(
                back,
                None,
                inspect=self._inspect,
                before_submit=self._take,
                after_answer=self._settle,
                wishes=terms().wishes,
            )
            self._back = back
            self._resources = made.pop_all()
        self._ring: LocalRing | None = None
        self._failing = False
        self._pace, self._instances_pace = (Pace(RINGS_A_SECOND, RINGS_AT_ONCE) for _ in range(2))
        self._changed = trio.Event()
        self._hearing = trio.CancelScope()

    def _refuse(self, reason: str) -> bytes:
        _log.debug("%s: a malformed request: %s", self.place, reason)
        family = self._terms().family
        return error_response(family, _MALFORMED[family])

    def _map_extra(self, references: tuple[int, ...]) -> ExtraPages:
        try:
            return self._grants.map(self.place.domain, references)
        except XenError as error:
            raise PageError(f"its extra pages cannot be mapped: {error}") from error

    def _inspect(self, packet: bytes, locality: int) -> bytes | Rewritten | None:
        terms = self._terms()
        if terms.wishes:
            return None  # not commands: the manager's protocol
        if not terms.allows(locality):
            return error_response(terms.family, _LOCALITY[terms.family])
        return compat_inspect(packet, locality) if terms.compat else None

    def _take(self) -> None:
        self.ledger.take()
        self.in_hand = True

    def _settle(self) -> None:
        self.ledger.settle()
        self.in_hand = False
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _wake(self, whom: Wake) -> None:
        if whom & Wake.BACK:
            self._channels.notify(self._port)
        if whom & Wake.FRONT and self._ring is not None:
            self._ring.ring()

    async def run(self, next_ring: NextRing) -> None:
        """Carry requests and answers until cancelled; `next_ring` waits for a new ring to the instance."""
        self._wake(self.bridge.start(in_hand=self.ledger.found))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hear_guest)
            nursery.start_soon(self._hear_instances, next_ring)
            if self._terms().wishes:  # an instance in its domain waits for its manager as long as it wants to
                nursery.start_soon(self._repeat_wishes)
            else:
                nursery.start_soon(self._lose_patience)

    async def _hear_guest(self) -> None:
        with self._hearing:
            while True:
                await trio.lowlevel.wait_readable(self._channels.fileno())
                try:
                    self._channels.pending()
                except ChannelRefusedError as error:
                    _log.debug("%s: %s", self.place, error)  # rings were lost: look, as after any
                pause = self._pace.spend(trio.current_time())
                if pause:
                    await trio.sleep(pause)
                self._channels.unmask(self._port)
                self._wake(self.bridge.on_back())
                if self._failing:
                    self._fail()

    async def _hear_instances(self, next_ring: NextRing) -> None:
        while True:
            ring = await next_ring()
            since = trio.current_time()
            try:
                await self._hear_instance(ring)
            except PageError as error:
                self._voice.say(logging.ERROR, f"the instance broke its ring: {error}")
            finally:
                self._ring = None
                ring.close()
                self._tell()
            if trio.current_time() - since < SHORT_LIFE:
                await trio.sleep(SHORT_LIFE)

    async def _hear_instance(self, ring: LocalRing) -> None:
        front = FrontRing(ring.page)
        self._ring, self._failing = ring, False
        self._tell()
        try:
            self._wake(self.bridge.replace_front(front))
            alive = True
            while alive:
                alive = await wait_doorbell(ring)
                pause = self._instances_pace.spend(trio.current_time())
                if pause and alive:
                    await trio.sleep(pause)  # what it rings meanwhile is heard as one
                self._wake(self.bridge.on_front())  # also at its end: it may have answered before
                if self.bridge.wishing:
                    self._tell()
        finally:
            self._wake(self.bridge.lose_front())
            front.release()

    async def _lose_patience(self) -> None:
        """Answer with failure what has waited too long for an instance, and what comes until there is one again."""
        while True:
            if self._ring is None and not self._failing:
                with trio.move_on_after(RING_PATIENCE):
                    while self._ring is None:
                        await self._changed.wait()
                if self._ring is None:
                    self._failing = True
                    self._voice.say(
                        logging.WARNING, f"no instance for {RING_PATIENCE:g} s: commands fail until it is back"
                    )
                    self._fail()
            await self._changed.wait()

    def _fail(self) -> None:
        taken = self._back.take()
        if isinstance(taken, Request):
            family = self._terms().family
            self._back.finish(error_response(family, _FAILURE[family]))
        if taken is not None:
            self._wake(Wake.BACK)

    async def _repeat_wishes(self) -> None:
        while True:
            if not self.bridge.wishing:
                await self._changed.wait()
                continue
            await trio.sleep(WISH_INTERVAL)
            self._wake(self.bridge.tick())

    async def finish_what_is_in_hand(self) -> None:
        """Take nothing more; return when the command in hand is answered, or LEAVE_SECONDS have passed."""
        self._hearing.cancel()
        with trio.move_on_after(LEAVE_SECONDS):
            while self.in_hand:
                await self._changed.wait()

    def disconnect(self) -> None:
        """Give back what is in hand, unmap, unbind, forget the mark: the guest's page goes."""
        with ExitStack() as ends:  # one that fails keeps none of the others
            ends.callback(self.ledger.discard)
            ends.callback(self._resources.close)
            self._wake(self.bridge.close())

    def leave(self) -> None:
        """Unmap and unbind, and leave page and mark as they are for the next back end. `run` must be over."""
        self._resources.close()
