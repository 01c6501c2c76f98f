"""A vTPM device of this domain, as front end in user space: gntalloc, an event channel, xenstore, trio.

What lives here: the actions of `xen_front`, and waiting for answers. The page and the channel belong to one connection;
when the back end goes (its domain ends, the toolstack replaces the device) both are withdrawn, and the next back end
gets new ones. Who waits for an answer then learns that nobody will give it, and decides himself what that means.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import trio

from frontend_backend.errors import PageError, RingClosedError
from frontend_backend.ring import FrontRing
from frontend_backend.xen_front import (
    FrontAction,
    FrontComplain,
    FrontDevice,
    Offer,
    Publish,
    SetFrontState,
    Start,
    Unpublish,
    Withdraw,
)
from frontend_backend.xen_front_node_trio import FrontNode
from frontend_backend.xen_kernel import (
    ChannelRefusedError,
    EventChannels,
    GrantOffers,
    OfferedPages,
    XenError,
)
from frontend_backend.xenbus_table import XenbusState
from frontend_backend.xs_trio import Xenstore, XenstoreError, XenstoreGoneError

_log = logging.getLogger("vtpm.xen.front")
LOOK_AGAIN: Final = 1.0  # seconds between looks at the page: a back end may die between its answer and its ring
CANCEL_GRACE: Final = 1.0  # seconds in which a back end should give a cancelled command back
_CLOSING: Final = 2.0  # seconds for what is left to be written to xenstore at the end


def _nothing() -> None:
    pass


@dataclass(slots=True)
class _Offered:
    """What one connection has."""

    pages: OfferedPages
    port: int
    ring: FrontRing


class XenFront:
    """One device `device/vtpm/<n>`. One command at a time; for tasks of one trio loop.

    `on_wish` is called when the back end rang and gave no answer; `on_change` when it has come, or gone.
    """

    def __init__(
        self,
        xs: Xenstore,
        channels: EventChannels,
        offers: GrantOffers,
        path: str,
        *,
        extra_pages: int = 0,
        follows: bool = False,
    ) -> None:
        """Use the caller's open devices; `path` is the device's in xenstore. `follows`: see FrontNode."""
        self._channels, self._offers = channels, offers
        self._node = FrontNode(xs, path, self._look_again, follows=follows)
        self._device = FrontDevice(extra_pages=extra_pages)
        self._offered: _Offered | None = None
        self._started = False
        self._changed = trio.Event()
        self._heard = trio.Event()
        self._turn = trio.Lock()
        self._look = trio.Event()  # xenstore says something new
        self._awaiting = False
        self.on_wish: Callable[[], None] = _nothing
        self.on_change: Callable[[], None] = _nothing

    @property
    def connected(self) -> bool:
        """Whether there is a back end."""
        return self._started

    async def until_connected(self) -> None:
        """Wait for a back end."""
        while not self._started:
            await self._changed.wait()

    # commands

    async def transact(self, packet: bytes, locality: int = 0, *, roomy: bool = False) -> bytes:
        """Submit a command to the back end that is there, or comes, and wait for its answer.

        `roomy`: with room for the answer in the extra pages, if there are any; a packet of more than one page has that.

        Who cancels this cancels the command on the page, too, and waits CANCEL_GRACE at most until it is taken off.

        Raises:
            RingClosedError: the back end went before it answered; whether it acted is not known.
            RingCancelledError: it gave the command back. PageError: its answer is malformed.
            ValueError: see FrontRing.submit.

        """
        async with self._turn:
            offered = await self._free_page()
            if roomy and offered.ring.extra_pages:
                offered.ring.submit_long(packet, locality, offered.ring.extra_pages)
            else:
                offered.ring.submit(packet, locality)
            self._awaiting = True
            try:
                self._notify(offered)
                return await self._answer(offered)
            except trio.Cancelled:
                with trio.CancelScope(shield=True):
                    await self._give_up(offered)
                raise
            finally:
                self._awaiting = False

    async def _free_page(self) -> _Offered:
        """Wait for a back end, and until it has taken what was cancelled before off the page."""
        while True:
            await self.until_connected()
            offered, heard = self._offered, self._heard
            assert offered is not None, "connected"
            if not offered.ring.in_flight:
                return offered
            with trio.move_on_after(LOOK_AGAIN):
                await heard.wait()

    async def _answer(self, offered: _Offered) -> bytes:
        while True:
            heard = self._heard
            if self._offered is not offered:
                raise RingClosedError
            answer = offered.ring.poll()
            if answer is not None:
                return answer
            with trio.move_on_after(LOOK_AGAIN):
                await heard.wait()

    async def _give_up(self, offered: _Offered) -> None:
        """Cancel, and give the back end a moment to take the command off the page."""
        limit = trio.current_time() + CANCEL_GRACE
        try:
            if self._offered is offered:
                offered.ring.cancel()
                self._notify(offered)
            while self._offered is offered and offered.ring.in_flight and trio.current_time() < limit:
                with trio.move_on_after(limit - trio.current_time()):
                    await self._heard.wait()
            if self._offered is offered:
                offered.ring.discard()
        except PageError as error:  # who asks next is told; who has given up wants no answer
            _log.debug("%s: %s", self._node.path, error)

    def cancel(self) -> None:
        """Ask the back end to give the command in flight up; who waits for it goes on waiting."""
        if self._offered is not None and self._awaiting:
            self._offered.ring.cancel()
            self._notify(self._offered)

    def _look_again(self) -> None:
        self._look.set()

    def _notify(self, offered: _Offered) -> None:
        try:
            self._channels.notify(offered.port)
        except ChannelRefusedError as error:  # it is gone; xenstore tells soon
            _log.debug("%s: %s", self._node.path, error)

    # life

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be the device's front end until cancelled; then tell the back end, and withdraw everything.

        Raises:
            XenstoreGoneError: xenstore went away.

        """
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen)
                await self._node.begin(nursery)
                task_status.started()
                await self._step_for_ever(nursery)
        finally:
            with trio.move_on_after(_CLOSING, shield=True), suppress(XenstoreError, XenstoreGoneError):
                await self._do(self._device.close())
                await self._node.end()
            self._withdraw()

    async def _step_for_ever(self, nursery: trio.Nursery) -> None:
        while True:
            self._look = trio.Event()
            try:
                seen = await self._node.see(nursery)
            except XenstoreError as error:  # it is no answer to what we asked
                _log.warning("%s: %s; looking again", self._node.path, error)
                await trio.sleep(LOOK_AGAIN)
                continue
            # what a back end offers it says before it leaves this state; who wants nothing of that need not wait for it
            if not self._device.extra_pages or seen.back_state is not XenbusState.INITIALISING:
                await self._do(self._device.step(seen))
            await self._look.wait()

    async def _listen(self) -> None:
        """Hear the event channel."""
        while True:
            await trio.lowlevel.wait_readable(self._channels.fileno())
            try:
                for port in self._channels.pending():
                    self._channels.unmask(port)
            except ChannelRefusedError as error:  # events were lost, or the port is gone: look all the same
                _log.debug("%s: %s", self._node.path, error)
            self._hear()

    def _hear(self) -> None:
        heard, self._heard = self._heard, trio.Event()
        heard.set()
        if self._started and not self._awaiting:
            self.on_wish()

    # actions

    async def _do(self, actions: list[FrontAction]) -> None:
        while actions:
            actions = [more for action in actions for more in await self._act(action)]

    async def _act(self, action: FrontAction) -> list[FrontAction]:
        match action:
            case Offer():
                return self._offer(action)
            case Publish():
                await self._publish()
            case SetFrontState(state):
                await self._node.write({"state": str(int(state))})
            case Start():
                self._started = True
                self._tell()
            case Withdraw():
                self._withdraw()
            case Unpublish():
                await self._node.remove("ring-ref", "event-channel")
            case FrontComplain(text):
                _log.warning("%s: %s", self._node.path, text)
        return []

    def _offer(self, action: Offer) -> list[FrontAction]:
        try:
            pages = self._offers.offer(action.domain, 1 + action.extra_pages)
        except XenError as error:
            return self._device.offer_failed(str(error))
        try:
            port = self._channels.bind_unbound(action.domain)
        except XenError as error:
            pages.withdraw()
            return self._device.offer_failed(str(error))
        self._offered = _Offered(pages, port, FrontRing(pages.page, pages.references[1:]))
        return self._device.offered()

    async def _publish(self) -> None:
        offered = self._offered
        assert offered is not None, "what is published was offered"
        await self._node.write(
            {
                "ring-ref": str(offered.pages.references[0]),
                "event-channel": str(offered.port),
                "feature-protocol-v2": "1",
            }
        )

    def _withdraw(self) -> None:
        offered, self._offered, self._started = self._offered, None, False
        if offered is None:
            return
        heard, self._heard = self._heard, trio.Event()
        heard.set()  # who waits for an answer sees that there will be none
        offered.ring.release()
        self._channels.unbind(offered.port)
        offered.pages.withdraw()
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()
        self.on_change()
