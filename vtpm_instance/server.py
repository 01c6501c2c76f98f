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
from functools import partial
from typing import Final

from frontend_backend.descriptors import PeerCredentials
from frontend_backend.messages_instance import Orders
from storage.errors import StorageError
from vtpm_instance.connection import Connection, Port
from vtpm_instance.control import FrontEnd, Role
from vtpm_instance.errors import (
    CommitRefusedError,
    InstanceError,
    ManagerConfusedError,
    NotNowError,
    StateNotWrittenError,
)
from vtpm_instance.handover import Handed
from vtpm_instance.journal import note
from vtpm_instance.managerlink import ManagerLink
from vtpm_instance.rest import Activity, connections
from vtpm_instance.ring_port import RingPort, ServedRing, rings_anew
from vtpm_instance.sessions import ControlPortSession, DataSession
from vtpm_instance.stand_in import StandIn
from vtpm_instance.vtpm import Vtpm

_DEAF_SECONDS: Final = 1.0  # between attempts to accept while the system has no descriptor or memory left
_EVENTS: Final = 32  # taken in one turn; without it each turn would allocate room for a thousand


class Server:
    """Serves one vTPM until it is told to stop. Knows who its owners are; everything else is in the sessions."""

    def __init__(
        self,
        vtpm: Vtpm,
        link: ManagerLink,
        front_end: FrontEnd,
        owners: frozenset[int],
        wakeup: int,
        on_asked: Callable[[], None],
        on_awake: Callable[[str], None],
        on_quote: Callable[[], None],
    ) -> None:
        """Serve `vtpm`; `owners` are the uids that may reset its platform, `wakeup` is readable after SIGTERM.

        `on_asked` sends a report when the manager wants one; `on_awake` says why an order to hibernate is not followed;
        `on_quote` sends evidence when the manager has ordered a quote.
        """
        self.vtpm, self._link, self._front_end, self._owners = vtpm, link, front_end, owners
        self._on_asked, self._on_awake, self._on_quote = on_asked, on_awake, on_quote
        self.locality = vtpm.locality
        self.activity = Activity()
        self.asleep: list[Handed] | None = None  # once it is: the connections that it had
        self._stopping = False
        self._ports: list[Port] = []
        self.data_ports: list[Port] = []
        self.control_ports: list[Port] = []
        self._stand_in = StandIn(self, vtpm.cancel)
        vtpm.beside_long = self._stand_in.on_duty
        self.ring_ports: list[RingPort] = []
        self._busy: list[Connection] = []
        self._epoll = select.epoll()
        self._deaf: list[Port | RingPort] = []  # ports that could not accept, and when to try again
        self._deaf_until = 0.0
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._watch(wakeup, self._on_wakeup)
        self._watch(link.fileno(), self._on_doorbell)

    # Machine: what control commands act on

    def set_locality(self, locality: int) -> bool:
        """Set the data channel's locality; a front end that is a plain socket has locality 0 only."""
        if locality != 0:
            return False
        self.locality = locality
        return True

    def platform_reset(self) -> bool:
        """Reset the vTPM's platform; returns False when it did not come up (it then answers failure)."""
        try:
            self.vtpm.reset()
        except (InstanceError, StorageError) as error:
            note(f"platform reset failed: {error}")
            return False
        self.locality = 0
        return True

    def cancel(self) -> bool:
        """Have the TPM command that runs give up; returns False where libtpms cannot (TPM 1.2)."""
        return self._stand_in.request_cancel()

    @property
    def busy(self) -> bool:
        """Whether a TPM command runs while this is asked: then it is the stand-in that asks."""
        return self._stand_in.busy

    # ports

    def add_data_port(self, listener: socket.socket) -> None:
        """Take TPM commands on `listener`."""
        self.data_ports.append(self._add_port(Port(listener, lambda _peer: DataSession(self), self)))

    def add_control_port(self, listener: socket.socket) -> None:
        """Take control commands on `listener`."""

        def serve(peer: PeerCredentials) -> ControlPortSession:
            role = Role.OWNER if peer.uid in self._owners else Role.OTHER
            return ControlPortSession(self._front_end, role, self)

        self.control_ports.append(self._add_port(Port(listener, serve, self)))

    def add_ring_port(self, listener: socket.socket) -> None:
        """Hand rings out on `listener`."""
        port = RingPort(listener, self.vtpm)
        self.ring_ports.append(port)
        self._watch(port.fileno(), partial(self._on_ring_listener, port))

    def _on_ring_listener(self, port: RingPort, _events: int) -> None:
        try:
            ring = port.accept(partial(self.on_ring_gone, port))
        except OSError:
            self._go_deaf(port)
            return
        if ring is not None:
            self.take_on_ring(port, ring)

    def take_on_ring(self, port: RingPort, ring: ServedRing) -> None:
        """Serve one more ring of a port."""
        events = select.EPOLLIN | (select.EPOLLET if rings_anew() else 0)
        self._watch(ring.fileno(), ring.on_doorbell, events)
        if port.full:
            self._epoll.unregister(port.fileno())

    def on_ring_gone(self, port: RingPort, ring: ServedRing) -> None:
        """Forget a ring whose guest has left."""
        if port.full:
            self._epoll.register(port.fileno(), select.EPOLLIN)
        descriptor = ring.fileno()
        del port.rings[descriptor]
        self._forget(descriptor)
        ring.close()

    def _add_port(self, port: Port) -> Port:
        self._ports.append(port)
        self._watch(port.fileno(), partial(self._on_listener, port))
        return port

    def _watch(self, descriptor: int, handler: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        self._handlers[descriptor] = handler
        self._epoll.register(descriptor, events)

    def _forget(self, descriptor: int) -> None:
        del self._handlers[descriptor]
        self._epoll.unregister(descriptor)

    def _go_deaf(self, port: Port | RingPort) -> None:
        """Leave a port alone for a while: out of descriptors or memory, who waits there would keep the loop awake."""
        self._epoll.unregister(port.fileno())
        self._deaf.append(port)
        self._deaf_until = time.monotonic() + _DEAF_SECONDS

    def _listen_again(self) -> None:
        if time.monotonic() >= self._deaf_until:
            deaf, self._deaf = self._deaf, []
            for port in deaf:
                self._epoll.register(port.fileno(), select.EPOLLIN)

    def _on_listener(self, port: Port, _events: int) -> None:
        try:
            connection = port.accept()
        except OSError:
            self._go_deaf(port)
            return
        if connection is not None:
            self.take_on(port, connection)

    def take_on(self, port: Port, connection: Connection) -> None:
        """Serve one more connection of a port."""
        self._watch(connection.fileno(), connection.on_event)
        if port.full:
            self._epoll.unregister(port.fileno())

    # Host: what connections tell us

    def wait_for(self, connection: Connection, events: int) -> None:
        """Call the connection when one of `events` happens."""
        self._epoll.modify(connection.fileno(), events)

    def come_back(self, connection: Connection) -> None:
        """Let the connection go on in the next turn."""
        self._busy.append(connection)

    def drop(self, connection: Connection) -> None:
        """Forget a connection that is about to close itself."""
        self._forget(connection.fileno())
        for port in self._ports:
            if connection in port.connections:
                was_full = port.full
                port.connections.remove(connection)
                if was_full:
                    self._epoll.register(port.fileno(), select.EPOLLIN)

    # ServerSide: what the stand-in asks for

    def listens_on(self, port: Port) -> bool:
        """Whether new connections of a port are taken just now."""
        return not port.full and port not in self._deaf

    def handle(self, descriptor: int, events: int) -> None:
        """Deal with what happened on a descriptor, unless it was closed meanwhile."""
        handler = self._handlers.get(descriptor)
        if handler is not None:
            handler(events)

    def take_busy(self, ports: list[Port]) -> list[Connection]:
        """Return the connections of `ports` that wait for their next turn, and forget that they do."""
        taken = [connection for connection in self._busy if any(connection in port.connections for port in ports)]
        self._busy = [connection for connection in self._busy if connection not in taken]
        return taken

    # manager and signals

    def _on_doorbell(self, _events: int) -> None:
        self.activity.rung()
        try:
            self._link.on_doorbell()
        except ManagerConfusedError as error:
            note(f"an answer nobody waits for is dropped: {error}")

    def _on_wakeup(self, _events: int) -> None:
        # Left readable: it keeps the waits of the clean stop short too (ManagerLink.watch_for_stop).
        self._stopping = True

    def _obey(self) -> None:
        orders = self._link.take_orders()
        if orders & Orders.RESET:
            self.platform_reset()
        if orders & Orders.QUOTE:
            self._on_quote()
        if orders & Orders.STOP:
            self._stopping = True
        if orders & Orders.HIBERNATE and not self._stopping:
            self._hibernate()
        if self._link.take_asked() and not self._stopping:
            self._on_asked()

    def _hibernate(self) -> None:
        """Go to sleep if nothing speaks against it. Between two turns no command is under way."""
        try:
            if self._busy:
                raise NotNowError("commands are waiting")
            handed = connections(self)
            self.vtpm.hibernate(self.locality)
        except (NotNowError, StateNotWrittenError, CommitRefusedError) as error:
            self._on_awake(str(error))
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
            if link.news:
                self._obey()
            if self._deaf:
                self._listen_again()

    def close(self) -> None:
        """Close all ports."""
        for port in self._ports:
            port.close()
        for ring_port in self.ring_ports:
            ring_port.close()
        self._epoll.close()
