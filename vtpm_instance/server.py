"""The instance's loop: front ends, the manager's doorbell and SIGTERM, one thing at a time.

A plain `epoll` loop without an event library: half the memory and a third of the latency of one
(reference/performance.md 1, 2). `epoll` because a ring needs its edges (`ring_port`); `poll` would also cost a few
tenths of a microsecond more. Each turn answers at most one request of each connection, so a front end that sends many
at once does not keep the others waiting. While a command takes long, `stand_in` does the control ports' part in a
second thread.
"""

import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from frontend_backend.descriptors import PeerCredentials
from frontend_backend.messages_instance import Orders
from storage.errors import StorageError
from vtpm_instance.connection import Connection, DescriptorPort, Port
from vtpm_instance.errors import (
    CommitRefusedError,
    InstanceError,
    ManagerConfusedError,
    NotNowError,
    StateNotWrittenError,
)
from vtpm_instance.front_ends import RULES, FrontEnd, Role, Rules
from vtpm_instance.handover import Handed
from vtpm_instance.journal import note
from vtpm_instance.platform import Platform
from vtpm_instance.proxy import ProxyPort
from vtpm_instance.rest import Activity, connections
from vtpm_instance.ring_port import RingPort, ServedRing, rings_anew
from vtpm_instance.sessions import PASSED, ControlPortSession, DataSession
from vtpm_instance.stand_in import StandIn
from vtpm_instance.vtpm import Vtpm

_DEAF_SECONDS: Final = 1.0  # between attempts to accept while the system has no descriptor or memory left
_EVENTS: Final = 32  # taken in one turn; without it each turn would allocate room for a thousand


class Link(Protocol):
    """What a server needs of its connection to the manager: `managerlink.ManagerLink` is one."""

    news: bool  # whether there may be something to take; plain, for a hot loop

    def fileno(self) -> int:
        """Return the descriptor that is readable when the manager has rung."""

    def on_doorbell(self) -> None:
        """Deal with a ring. Raises ManagerConfusedError, ManagerGoneError."""

    def take_orders(self) -> Orders:
        """Return the manager's orders since the last call."""

    def take_asked(self) -> bool:
        """Tell whether the manager has asked for a report since the last call."""


@dataclass(frozen=True, slots=True)
class _PlatformGone:
    platform: Platform

    def step(self) -> None:
        self.platform.platform_gone()


def _nothing(*_arguments: object) -> None:
    """Do nothing: there is no manager."""


@dataclass(frozen=True, slots=True)
class Calls:
    """What to do for the manager: send a report; say why an order to hibernate is not followed; send evidence."""

    asked: Callable[[], None] = _nothing
    awake: Callable[[str], None] = _nothing
    quote: Callable[[], None] = _nothing


class Server:
    """Serves one vTPM until it is told to stop. Knows who its owners are; everything else is in the sessions."""

    def __init__(
        self,
        vtpm: Vtpm,
        link: Link | None,
        front_end: FrontEnd,
        owners: frozenset[int],
        wakeup: int,
        calls: Calls | None = None,
        rules: Rules | None = None,
    ) -> None:
        """Serve `vtpm`; `owners` are the uids that may reset its platform, `wakeup` is readable after SIGTERM.

        Without `link` there is no manager. `rules` are the front end's own unless others are given.
        """
        self.vtpm, self._link, self._front_end, self._owners = vtpm, link, front_end, owners
        self._calls = calls or Calls()
        self.locality = vtpm.locality
        self._rules = rules or RULES[front_end]
        vtpm.auto_shutdown = self._rules.auto_shutdown
        self.platform = Platform(vtpm, self, self._rules)
        self.activity = Activity()
        self.asleep: list[Handed] | None = None  # once it is: the connections that it had
        self._stopping = False
        self._ports: list[Port] = []
        self.data_ports: list[Port] = []
        self.control_ports: list[Port] = []
        self._stand_in = StandIn(self, vtpm.cancel)
        vtpm.beside_long = self._stand_in.on_duty
        self.ring_ports: list[RingPort] = []
        self._proxy_ports: list[ProxyPort] = []
        self._busy: list[Waiting] = []
        self._epoll = select.epoll()
        self._deaf: list[Port | RingPort] = []  # ports that could not accept, and when to try again
        self._deaf_until = 0.0
        self._handlers: dict[int, Callable[[int], None]] = {}
        self.passed_port = Port(None, lambda _peer: DataSession(self), self)
        self._ports.append(self.passed_port)
        self._watch(wakeup, self._on_wakeup)
        if link is not None:
            self._watch(link.fileno(), self._on_doorbell)

    # Surroundings: what the platform asks for

    def request_cancel(self) -> bool:
        """Have the TPM command that runs give up; returns False where libtpms cannot (TPM 1.2)."""
        return self._stand_in.request_cancel()

    @property
    def busy(self) -> bool:
        """Whether a TPM command runs while this is asked: then it is the stand-in that asks."""
        return self._stand_in.busy

    def take_data_socket(self, sock: socket.socket) -> bool:
        """Serve a data connection that was passed, unless there is one whose peer is still there."""
        for old in [each for each in self.passed_port.connections if each.peer_is_gone]:
            self.drop(old)
            old.close()
        if self.passed_port.connections:
            sock.close()
            return False
        self.take_on(self.passed_port, self.passed_port.adopt(sock, PASSED))
        return True

    def end(self) -> None:
        """End after this turn."""
        self._stopping = True

    # ports

    def add_data_port(self, listener: socket.socket) -> None:
        """Take TPM commands on `listener`."""
        self.data_ports.append(self._add_port(Port(listener, lambda _peer: DataSession(self), self)))

    def add_control_port(self, listener: socket.socket) -> None:
        """Take control commands on `listener`."""

        def serve(peer: PeerCredentials | None) -> ControlPortSession:
            role = Role.OWNER if peer is not None and peer.uid in self._owners else Role.OTHER
            return ControlPortSession(self._front_end, role, self.platform, self.vtpm.family)

        kind = DescriptorPort if self._rules.takes_descriptors else Port
        self.control_ports.append(self._add_port(kind(listener, serve, self)))

    def add_ring_port(self, listener: socket.socket) -> None:
        """Hand rings out on `listener`."""
        port = RingPort(listener, self.vtpm)
        self.ring_ports.append(port)
        self._watch(port.fileno(), partial(self._on_ring_listener, port))

    def add_proxy_port(self, descriptor: int) -> None:
        """Answer what a device's driver says on the server's end of it."""

        def gone() -> None:
            self._forget(port.fileno())

        port = ProxyPort(descriptor, self, gone)
        self._proxy_ports.append(port)
        self._watch(port.fileno(), port.on_event)

    # manager and signals

    def _on_doorbell(self, _events: int) -> None:
        self.activity.rung()
        assert self._link is not None, "its doorbell rang"
        try:
            self._link.on_doorbell()
        except ManagerConfusedError as error:
            note(f"an answer nobody waits for is dropped: {error}")

    def _on_wakeup(self, _events: int) -> None:
        # Left readable: it keeps the waits of the clean stop short too (ManagerLink.watch_for_stop).
        self._stopping = True

    def _obey(self, link: Link) -> None:
        orders = link.take_orders()
        if orders & Orders.RESET:
            self.platform.reset()
        if orders & Orders.QUOTE:
            self._calls.quote()
        if orders & Orders.STOP:
            self._stopping = True
        if orders & Orders.HIBERNATE and not self._stopping:
            self._hibernate()
        if link.take_asked() and not self._stopping:
            self._calls.asked()

    def _hibernate(self) -> None:
        """Go to sleep if nothing speaks against it. Between two turns no command is under way."""
        try:
            if self._busy:
                raise NotNowError("commands are waiting")
            handed = connections(self)
            self.vtpm.hibernate(self.locality)
        except (NotNowError, StateNotWrittenError, CommitRefusedError) as error:
            self._calls.awake(str(error))
        except (InstanceError, StorageError) as error:
            note(f"hibernating failed: {error}")
        else:
            self.asleep, self._stopping = handed, True

    # the loop

    def run(self) -> None:
        """Serve until SIGTERM, the manager's order to stop, or until it sleeps (`asleep`).

        Raises:
            ManagerGoneError: manager and keeper are gone.

        """
        wait, handlers, link = self._epoll.poll, self._handlers, self._link
        while not self._stopping:
            for descriptor, events in wait(0 if self._busy else _DEAF_SECONDS if self._deaf else None, _EVENTS):
                handler = handlers.get(descriptor)
                if handler is not None:  # an earlier handler of this turn may have closed it
                    handler(events)
            if self._busy:
                waiting, self._busy = self._busy, []
                for connection in waiting:
                    connection.step()
            if link is not None and link.news:
                self._obey(link)
            if self._deaf:
                self._listen_again()

    def close(self) -> None:
        """Close all ports."""
        for port in self._ports:
            port.close()
        for ring_port in self.ring_ports:
            ring_port.close()
        for proxy_port in self._proxy_ports:
            proxy_port.close()
        self._epoll.close()
