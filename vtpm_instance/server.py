"""The instance's loop: front ends, the manager's doorbell and SIGTERM, one thing at a time.

Each turn answers at most one request of each connection, so a front end that sends many at once does not keep the
others waiting. While a command takes long, `stand_in` does the control ports' part in a second thread. How descriptors
are watched is in `polling`.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from frontend_backend.descriptors import PeerCredentials
from frontend_backend.orders import Orders
from storage.errors import StorageError
from vtpm_instance.condition import Condition
from vtpm_instance.connection import Connection, DescriptorPort, Port, Session
from vtpm_instance.errors import (
    CommitRefusedError,
    InstanceError,
    ManagerConfusedError,
    NotNowError,
    StateNotWrittenError,
)
from vtpm_instance.front_ends import RULES, FrontEnd, Role, Rules
from vtpm_instance.guest_ring import PAGES, GuestRing, GuestTerms
from vtpm_instance.handover import Handed
from vtpm_instance.journal import note
from vtpm_instance.mssim import COMMAND_PORT, PLATFORM_PORT, MssimSession
from vtpm_instance.platform import Platform
from vtpm_instance.polling import DEAF_SECONDS, Poller
from vtpm_instance.proxy import ProxyPort
from vtpm_instance.rest import Activity, connections
from vtpm_instance.ring_port import RingPort, ServedRing
from vtpm_instance.sessions import PASSED, ControlPortSession, DataSession, SwtpmDataSession
from vtpm_instance.stand_in import StandIn
from vtpm_instance.vtpm import Vtpm

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


@dataclass(slots=True)
class _PlatformGone:
    """The end of a machine, dealt with in the main thread and not within a command; once."""

    platform: Platform
    done: bool = False

    def step(self) -> None:
        if not self.done:
            self.done = True
            self.platform.platform_gone()


def _nothing(*_arguments: object) -> None:
    """Do nothing: there is no manager."""


@dataclass(frozen=True, slots=True)
class Calls:
    """What to do for the manager: send a report; say why an order to hibernate is not followed; send evidence."""

    asked: Callable[[], None] = _nothing
    awake: Callable[[str], None] = _nothing
    quote: Callable[[], None] = _nothing


class Server(Poller):
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
        super().__init__()
        self.vtpm, self._link, self._front_end, self._owners = vtpm, link, front_end, owners
        self._calls = calls or Calls()
        self.rules = rules or RULES[front_end]
        self.locality = vtpm.locality
        self.platform = Platform(vtpm, self, self.rules)
        self.set_locality = self.platform.set_locality
        vtpm.auto_shutdown = self.rules.auto_shutdown
        self.activity = Activity()
        self.asleep: list[Handed] | None = None  # once it is: the connections that it had
        self._stopping = False
        self._stand_in = StandIn(self, vtpm.cancel)
        vtpm.beside_long = self._stand_in.on_duty
        self._proxy_ports: list[ProxyPort] = []
        self._platform_gone: _PlatformGone | None = None
        self.passed_port = Port(None, self._data_session, self)
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
        self._drop_passed([each for each in self.passed_port.connections if each.peer_is_gone])
        if self.passed_port.connections:
            sock.close()
            return False
        self._see_off()
        self.take_on(self.passed_port, self.passed_port.adopt(sock, PASSED))
        return True

    def _see_off(self) -> None:
        """Deal with the end of the machine before, which would be taken for that of the new one later."""
        for port in self.control_ports:
            for connection in port.connections:
                if isinstance(connection.session, ControlPortSession):
                    connection.session.is_platform = False
        if self._platform_gone is not None:
            self._platform_gone.step()

    def let_data_socket_go(self) -> None:
        """Close the data connection that was passed: its machine is gone, whoever else may have a copy of its end."""
        self._drop_passed(list(self.passed_port.connections))

    def _drop_passed(self, connections: list[Connection]) -> None:
        for connection in connections:
            if connection in self._busy:
                self._busy.remove(connection)
            self.drop(connection)
            connection.close()

    def end(self) -> None:
        """End after this turn."""
        self._stopping = True

    # front ends

    def _data_session(self, _peer: PeerCredentials | None) -> Session:
        if self._front_end is FrontEnd.MSSIM:
            return MssimSession(COMMAND_PORT, self, self.platform)
        return SwtpmDataSession(self) if self.rules.like_swtpm else DataSession(self)

    def _control_session(self, peer: PeerCredentials | None) -> Session:
        if self._front_end is FrontEnd.MSSIM:
            return MssimSession(PLATFORM_PORT, self, self.platform)
        role = Role.OWNER if peer is not None and peer.uid in self._owners else Role.OTHER
        return ControlPortSession(self._front_end, role, self.platform, self.vtpm.family)

    def add_data_port(self, listener: socket.socket) -> None:
        """Take TPM commands on `listener` (a Unix or TCP one; a TCP one without delays, which its connections inherit).

        Of a vTPM attached as `mssim` it is the simulator's command port.
        """
        self.data_ports.append(self._add_port(Port(listener, self._data_session, self)))

    def add_control_port(self, listener: socket.socket | None) -> None:
        """Take control commands on `listener`; of a vTPM attached as `mssim`, the platform port's requests."""
        kind = DescriptorPort if self.rules.takes_descriptors else Port
        self.control_ports.append(self._add_port(kind(listener, self._control_session, self)))

    def take_control_socket(self, sock: socket.socket) -> None:
        """Serve a control connection that is there already, on a port of its own."""
        self.add_control_port(None)
        self.take_on(self.control_ports[-1], self.control_ports[-1].adopt(sock))

    def add_ring_port(self, listener: socket.socket, terms: GuestTerms | None = None) -> None:
        """Hand rings out on `listener`; with `terms` to what passes a Xen guest's commands on."""
        if terms is None:
            port = RingPort(listener, lambda ring, gone: ServedRing(ring, self.vtpm, gone))
        else:
            port = RingPort(listener, lambda ring, gone: GuestRing(ring, self.vtpm, gone, terms), PAGES)
        self.ring_ports.append(port)
        self._watch(port.fileno(), partial(self._on_ring_listener, port))

    def add_proxy_port(self, descriptor: int) -> None:
        """Answer what a device's driver says on the server's end of it."""

        def gone() -> None:
            self._forget(port.fileno())
            if self.rules.ends_with_data:
                self.end()

        port = ProxyPort(descriptor, self, gone)
        self._proxy_ports.append(port)
        self._watch(port.fileno(), port.on_event)

    def _on_gone(self, port: Port, connection: Connection) -> None:
        if port in self.control_ports:
            if self.rules.ends_with_control:
                self.end()
            if isinstance(connection.session, ControlPortSession) and connection.session.is_platform:
                self._platform_gone = _PlatformGone(self.platform)
                self._busy.append(self._platform_gone)
        elif self.rules.ends_with_data:
            self.end()

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
            if self.vtpm.condition is Condition.OFF:
                self._calls.asked()  # nothing has changed, but the manager waits to hear how it is
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
            for descriptor, events in wait(0 if self._busy else DEAF_SECONDS if self._deaf else None, _EVENTS):
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
        for proxy_port in self._proxy_ports:
            proxy_port.close()
        super().close()
