"""Who polls for an instance: descriptors and what to do about them, ports, and connections in the middle of something.

A plain `epoll` without an event library: half the memory and a third of the latency of one (reference/performance.md 1,
2). `epoll` because a ring needs its edges (`ring_port`); `poll` would also cost a few tenths of a microsecond more.
What lives here: which descriptor means what. What must not: what is said on it, the manager, and the loop (`server`).
"""

import select
import time
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from vtpm_instance.connection import Connection, Port
from vtpm_instance.ring_port import RingPort, ServedRing, rings_anew

DEAF_SECONDS: Final = 1.0  # between attempts to accept while the system has no descriptor or memory left


class Waiting(Protocol):
    """What has something to do in the next turn."""

    def step(self) -> None:
        """Do it."""


class Poller:
    """Watches descriptors and ports; a `connection.Host` and the stand-in's `ServerSide`."""

    def __init__(self) -> None:
        """Watch nothing yet."""
        self._ports: list[Port] = []
        self.data_ports: list[Port] = []
        self.control_ports: list[Port] = []
        self.ring_ports: list[RingPort] = []
        self._busy: list[Waiting] = []
        self._epoll = select.epoll()
        self._deaf: list[Port | RingPort] = []  # ports that could not accept, and when to try again
        self._deaf_until = 0.0
        self._handlers: dict[int, Callable[[int], None]] = {}

    # descriptors

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
        self._deaf_until = time.monotonic() + DEAF_SECONDS

    def _listen_again(self) -> None:
        if time.monotonic() >= self._deaf_until:
            deaf, self._deaf = self._deaf, []
            for port in deaf:
                self._epoll.register(port.fileno(), select.EPOLLIN)

    # ports

    def _add_port(self, port: Port) -> Port:
        self._ports.append(port)
        if port.fileno() >= 0:
            self._watch(port.fileno(), partial(self._on_listener, port))
        return port

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
        if port.full and port.fileno() >= 0:
            self._epoll.unregister(port.fileno())

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
                was_full = port.full and port.fileno() >= 0
                port.connections.remove(connection)
                if was_full:
                    self._epoll.register(port.fileno(), select.EPOLLIN)
                self._on_gone(port, connection)

    def _on_gone(self, port: Port, connection: Connection) -> None:
        """Do what is to be done when a connection of a port has ended."""

    # ServerSide: what the stand-in asks for

    def listens_on(self, port: Port) -> bool:
        """Whether new connections of a port are taken just now."""
        return port.fileno() >= 0 and not port.full and port not in self._deaf

    def handle(self, descriptor: int, events: int) -> None:
        """Deal with what happened on a descriptor, unless it was closed meanwhile."""
        handler = self._handlers.get(descriptor)
        if handler is not None:
            handler(events)

    def take_busy(self, ports: list[Port]) -> list[Connection]:
        """Return the connections of `ports` that wait for their next turn, and forget that they do."""
        mine = {connection for port in ports for connection in port.connections}
        taken = [each for each in self._busy if isinstance(each, Connection) and each in mine]
        self._busy = [each for each in self._busy if each not in taken]
        return taken

    def close(self) -> None:
        """Close all ports."""
        for port in self._ports:
            port.close()
        for ring_port in self.ring_ports:
            ring_port.close()
        self._epoll.close()
