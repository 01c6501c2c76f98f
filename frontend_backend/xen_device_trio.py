"""One vTPM device as its back end: reads xenstore, steps the machine (xen_back), does what it says.

The device's task alone reads, steps and acts, so that nothing is done twice at a time; watches, the binding and the
connection only tell it to look. What is mapped or bound is given back before `run` returns, however it ends.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

import trio

from frontend_backend.local import LocalRing
from frontend_backend.xen_back import (
    Action,
    BackDevice,
    Bind,
    Complain,
    Connect,
    Disconnect,
    PublishFeatures,
    RemoveNode,
    Seen,
    SetState,
    Unbind,
)
from frontend_backend.xen_connection_trio import Link
from frontend_backend.xen_kernel import EventChannels, Grants, XenError
from frontend_backend.xen_ledger import Connection, Ledgers
from frontend_backend.xen_node_trio import Node
from frontend_backend.xen_pace import Pace, Voice
from frontend_backend.xen_terms import Binder, BindingEndedError, BindRefusedError, Granted, Place, Terms
from frontend_backend.xs_trio import Watch, Xenstore

_log = logging.getLogger("vtpm.xen")

LOOKS_A_SECOND: Final = 5.0
"""Looks at one device a second. A handshake takes four; a guest that writes its state more often is not watched until
its pace allows the next look, so that xenstored and we have nothing to do with it meanwhile."""
LOOKS_AT_ONCE: Final = 40.0
"""And so many without a pause: a guest that reboots in a hurry, a toolstack that writes key by key."""
LOOK_AGAIN: Final = 60.0
"""Seconds after which a device is looked at also where nothing was heard."""
EXTRA_PAGES: Final = 1
"""Pages behind the first that a request may have: libtpms takes commands of 4096 bytes, one page carries 4088."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """How to open Xen's devices, once a connected device: what is mapped or bound then ends with it."""

    open_channels: Callable[[], EventChannels]
    open_grants: Callable[[], Grants]


class Device:
    """The back end of one device."""

    def __init__(self, xs: Xenstore, place: Place, binder: Binder, kernel: Kernel, ledgers: Ledgers) -> None:
        """Serve what stands at `place`; `run` does it."""
        self.place = place
        self._xs, self._node = xs, Node(xs, place)
        self._binder, self._kernel, self._ledgers = binder, kernel, ledgers
        self._machine = BackDevice(removes_own_node=place.own != 0)
        self._changed = trio.Event()
        self._pace = Pace(LOOKS_A_SECOND, LOOKS_AT_ONCE)
        self._uuid: bytes | None = None
        self._asking: trio.CancelScope | None = None
        self._granted: Granted | None = None
        self._granted_anew = trio.Event()
        self._terms = Terms()
        self._refused = self._lost = ""
        self._ask_again = False
        self._link: Link | None = None
        self._pumping: trio.CancelScope | None = None
        self._pump_over = trio.Event()
        self._leaving = False
        self._complained = ""
        self._voice = Voice(_log, place)
        self.told_to_look = False  # by `look`, and it has not since

    @property
    def connected(self) -> bool:
        """Whether the guest's page is mapped."""
        return self._link is not None

    def look(self) -> None:
        """Have the device looked at: something of the toolstack's may have changed."""
        self.told_to_look = True
        self._stir()

    def _stir(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        """Serve the device until its node is gone.

        Raises:
            XenstoreGoneError, XenstoreError: what is read or written here cannot be.

        """
        self._machine = BackDevice(removes_own_node=self.place.own != 0)
        self._refused = self._lost = ""
        self._ask_again = False
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_front)
                await self._serve(nursery)
                nursery.cancel_scope.cancel()
        finally:
            self._give_back()

    async def leave(self) -> None:
        """Finish the command in hand and leave everything as it is, for the next back end to take over."""
        self._leaving = True
        if self._link is not None:
            await self._link.finish_what_is_in_hand()

    def _give_back(self) -> None:
        """Give back what is held once all tasks are over; the guest's page stays as it is."""
        self._unbind()
        link, self._link = self._link, None
        if link is not None:
            link.leave()

    # what changes

    async def _watch_front(self) -> None:
        """Hear what the guest does with its `state`, no more often than its pace allows."""
        while True:
            watch = await self._xs.watch(f"{self.place.front}/state")
            try:
                pause = await self._hear(watch)
            finally:
                with trio.CancelScope(shield=True):
                    await watch.aclose()
            self._voice.say(logging.WARNING, "the guest changes its state too often: not each time is it looked at")
            await trio.sleep(pause)

    async def _hear(self, watch: Watch) -> float:
        first = True
        async for _ in watch:
            # xenstored's word that the watch stands costs nothing, or a pause would make the next one for ever
            pause = 0.0 if first else self._pace.spend(trio.current_time())
            if pause:
                return pause  # and look when it is over
            first = False
            self._stir()
        raise AssertionError("a watch that nobody closed has ended")

    async def _serve(self, nursery: trio.Nursery) -> None:
        await self._binder.meet(self.place)
        while True:
            self._changed, self.told_to_look = trio.Event(), False
            await self._act(await self._news(), nursery)
            seen = await self._see()
            await self._act(self._machine.step(seen), nursery)
            if seen.back_state is None and self._link is None and not self._changed.is_set():
                return
            with trio.move_on_after(LOOK_AGAIN):
                await self._changed.wait()

    async def _news(self) -> list[Action]:
        """Tell the machine what the tasks of binding and connection left here."""
        lost = self._lost
        if lost:
            await self._disconnect()
            self._stir()  # at whatever else there is
            return self._machine.disconnected(lost)
        refused, self._refused = self._refused, ""
        if refused:
            return self._machine.bind_refused(refused)
        if self._ask_again:
            self._ask_again = False
            return self._machine.bind_again()
        return []

    async def _see(self) -> Seen:
        sight = await self._node.look()
        if sight.wrong:
            self._complain(sight.wrong)
            return replace(sight.seen, front_state=None, bound=False)
        self._uuid = sight.uuid
        return replace(sight.seen, bound=self._granted is not None)

    # what is done

    async def _act(self, actions: Iterable[Action], nursery: trio.Nursery) -> None:
        pending = list(actions)
        while pending:
            if self._leaving:
                return
            match pending.pop(0):
                case PublishFeatures():
                    features = {"feature-protocol-v2": "1", "feature-extra-pages": str(EXTRA_PAGES), "ready": "1"}
                    await self._node.write(features)
                case SetState(state):
                    await self._node.write({"state": str(int(state))})
                case Connect(ring_ref, event_channel):
                    pending += self._connect(ring_ref, event_channel, nursery)
                case Disconnect():
                    await self._disconnect()
                case RemoveNode():
                    await self._node.remove()
                case Bind():
                    self._asking = trio.CancelScope()
                    nursery.start_soon(self._keep_bound, self._asking)
                case Unbind():
                    self._binder.part(self.place)
                    self._unbind()
                case Complain(text):
                    self._complain(text)

    def _connect(self, ring_ref: int, event_channel: int, nursery: trio.Nursery) -> list[Action]:
        connection = Connection(self.place.domain, self.place.device, ring_ref, event_channel)
        kernel = self._kernel
        try:
            self._link = Link(
                self.place, connection, lambda: self._terms, kernel.open_channels, kernel.open_grants, self._ledgers,
                self._voice,
            )  # fmt: skip
        except (XenError, OSError) as error:
            self._stir()  # at once: the front end may have changed its mind, and if not it is given up
            return self._machine.connect_failed(str(error))
        self._pumping, self._pump_over = trio.CancelScope(), trio.Event()
        nursery.start_soon(self._pump, self._link, self._pumping, self._pump_over)
        self._voice.say(logging.INFO, "connected" + (", a command was in hand" if self._link.ledger.found else ""))
        return self._machine.connected()

    async def _pump(self, link: Link, scope: trio.CancelScope, over: trio.Event) -> None:
        try:
            with scope:
                await link.run(self._next_ring)
        except* (XenError, OSError) as group:
            self._lost = "; ".join(str(error) for error in group.exceptions)
        finally:
            over.set()
            self._stir()

    async def _disconnect(self) -> None:
        link = self._link
        if link is None or self._pumping is None:
            return
        self._pumping.cancel()
        await self._pump_over.wait()  # who is cancelled here leaves it to `_give_back`
        self._link, self._lost = None, ""
        link.disconnect()
        self._voice.say(logging.INFO, "disconnected")

    def _complain(self, text: str) -> None:
        if text != self._complained:
            self._voice.say(logging.ERROR, text)
            self._complained = text

    # the binding

    async def _keep_bound(self, scope: trio.CancelScope) -> None:
        """Ask for the binding, and ask again whenever it ends; the rings there are go on meanwhile."""
        with scope:
            while self._uuid is not None:
                try:
                    granted = await self._binder.bind(self.place, self._uuid)
                except BindRefusedError as refusal:
                    self._drop_grant()
                    self._refused = str(refusal)
                    self._stir()
                    await trio.sleep(refusal.again)
                    self._ask_again = True
                    self._stir()
                    return
                self._drop_grant()
                self._granted, self._terms = granted, granted.terms
                self._granted_anew.set()
                self._granted_anew = trio.Event()
                self._stir()
                await granted.ended()

    async def _next_ring(self) -> LocalRing:
        while True:
            granted, anew = self._granted, self._granted_anew
            if granted is not None:
                try:
                    return await granted.ring()
                except BindingEndedError as error:
                    _log.debug("%s: %s", self.place, error)
            await anew.wait()

    def _drop_grant(self) -> None:
        if self._granted is not None:
            self._granted.close()
            self._granted = None

    def _unbind(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None
        self._drop_grant()
