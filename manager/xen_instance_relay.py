"""Between an instance in this domain and its manager in another: passes on what the instance asks, and adds our orders.

The instance's end is a local ring, the manager's a Xen ring (`xen_instance_uplink`). What crosses holds keys of this
one vTPM and is not kept. Three things are ours: the order to stop and to reset the platform, which the guest's domain
is the cause of and the manager does not see; the word of the first Load after a start; and while the manager is away
a report is answered here, so that an order reaches the instance all the same.
"""

import logging
from dataclasses import replace
from typing import Final

import trio

from frontend_backend import messages_instance as m
from frontend_backend.errors import MessageError
from frontend_backend.local import LocalRing
from frontend_backend.messages_instance import InstanceState
from frontend_backend.orders import Orders
from frontend_backend.ring import Answered, BackRing, Request
from manager.xen_instance_uplink import Uplink

_log = logging.getLogger("vtpm.xen.instance")
_NOT_HERE: Final = Orders.HIBERNATE  # nobody watches this domain's sockets for one that sleeps
_NOBODY: Final = frozenset({"manager-silent", "manager-gone"})  # reasons of a report, by vtpm_instance.errors
_ENDED: Final = frozenset({InstanceState.STOPPED, InstanceState.FAILED})


class Relay:
    """One life of an instance. `report` is its last word on itself, None before the first."""

    def __init__(self, ring: LocalRing, uplink: Uplink, first_startup: str | None) -> None:
        """Serve `ring`, the back end's end, which becomes ours; `first_startup` is what its first Load is told.

        Without `first_startup` it is told what the manager says: it is one that an earlier process of ours served.
        """
        self._ring, self._uplink, self._startup = ring, uplink, first_startup
        self._back = BackRing(ring.page, m.refusal_for_malformed)
        self._orders = Orders.NONE
        self._resetting = False
        self._news = trio.Event()
        self._complaints = 0
        self.report: m.Report | None = None
        self._gone = False
        self.stopping = False

    async def run(self) -> None:
        """Serve until the instance's end is closed."""
        try:
            self._ring.ring()  # "ask me": one that runs already reports how it is
            alive = True
            while alive:
                match self._back.take():
                    case Request(packet, _):
                        alive = await self._pass_on(packet)
                    case Answered(reason):
                        self._complain(reason)
                        self._ring.ring()
                    case None:
                        await trio.lowlevel.wait_readable(self._ring.fileno())
                        alive = self._ring.drain()
        finally:
            self._gone = True
            self._back.release()
            self._ring.close()
            self._tell()

    def wish(self) -> None:
        """Have the instance ask: the manager has something for it."""
        self._ring.ring()

    def stop(self) -> None:
        """Order a clean stop."""
        self.stopping = True
        self._order(Orders.STOP)

    async def reset_platform(self) -> bool:
        """Order a platform reset and wait for it. Returns whether it was done: False when the instance ends instead."""
        self._resetting = True
        self._order(Orders.RESET)
        while self._resetting and not self.ended:
            await self._news.wait()
        return not self.ended

    async def until_up(self) -> None:
        """Wait until the instance answers commands, be it with a failure, or is about to end, or has."""
        while self.report is None and not self._gone:
            await self._news.wait()

    @property
    def ended(self) -> bool:
        """Whether it has said its last word, or is gone without one."""
        return self._gone or (self.report is not None and self.report.state in _ENDED)

    @property
    def untold(self) -> str | None:
        """The startup that it was to be told and never was, None where it knows: only then it can have begun."""
        return self._startup

    @property
    def left_alone(self) -> bool:
        """Whether it gave up as nobody told it its state: nothing is wrong with that, and nothing begun."""
        return self.report is not None and self.report.state is InstanceState.FAILED and self.report.reason in _NOBODY

    def _order(self, orders: Orders) -> None:
        self._orders |= orders
        self._ring.ring()

    async def _pass_on(self, packet: bytes) -> bool:
        """Answer one request; returns False when the instance has gone meanwhile."""
        try:
            request = m.decode_request(packet)
        except MessageError as error:
            self._complain(str(error))
            self._finish(m.encode_reply(m.Refusal(m.RefusalCode.MALFORMED, str(error)[:200]), self._take_orders()))
            return True
        if isinstance(request, m.Report):
            self._hear(request)
            if not self._uplink.connected:
                self._finish(m.encode_reply(m.ReportReply(), self._take_orders()))
                return True
        answer, alive = await self._ask(packet)
        if answer is None:
            self._back.abort()
            self._ring.ring()
        else:
            self._finish(self._ours(answer))
        return alive

    async def _ask(self, packet: bytes) -> tuple[bytes | None, bool]:
        """Return the manager's answer, None where the instance has given its request up; and whether it lives."""
        answer, alive = None, True

        async def listen() -> None:
            nonlocal alive
            while alive and not self._back.cancelled:
                await trio.lowlevel.wait_readable(self._ring.fileno())
                alive = self._ring.drain()
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            answer = await self._uplink.ask(packet)
            nursery.cancel_scope.cancel()
        return answer, alive

    def _ours(self, answer: bytes) -> bytes:
        """Return the manager's answer with our orders."""
        try:
            reply, orders = m.decode_reply(answer)
        except MessageError:
            return answer  # what is wrong with it the instance says better
        if isinstance(reply, m.LoadReply) and self._startup is not None:
            after = reply.after_reset or reply.startup  # what the manager says from the second Load on
            reply, self._startup = replace(reply, startup=self._startup, after_reset=after), None
        return m.encode_reply(reply, (orders & ~_NOT_HERE) | self._take_orders())

    def _take_orders(self) -> Orders:
        orders, self._orders = self._orders | self._uplink.take_orders(), self._orders & Orders.STOP
        return orders

    def _hear(self, report: m.Report) -> None:
        if report.state not in (InstanceState.READY, InstanceState.STOPPED):
            _log.warning("the instance is %s: %s %s", report.state.value, report.reason, report.text)
        self.report = report
        if not self._orders & Orders.RESET:
            self._resetting = False  # a report that came before the order was handed over says how it was before
        self._tell()

    def _finish(self, answer: bytes) -> None:
        self._back.finish(answer)
        self._ring.ring()

    def _tell(self) -> None:
        news, self._news = self._news, trio.Event()
        news.set()

    def _complain(self, what: str) -> None:
        self._complaints += 1
        if self._complaints.bit_count() == 1:
            _log.warning("a request of the instance was not obeyed: %s (number %d)", what, self._complaints)
