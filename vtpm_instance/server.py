"""The instance's poll loop: front ends, the manager's doorbell and SIGTERM, one thing at a time.

A plain `poll` loop without threads or an event library: half the memory and a third of the latency of one
(reference/performance.md 1, 2). Each turn answers at most one request of each connection, so a front end that sends
many at once does not keep the others waiting.
"""

import os
import select
import socket
from collections.abc import Callable
from functools import partial
from typing import Final

from frontend_backend.descriptors import PeerCredentials
from frontend_backend.messages_instance import Orders
from storage.errors import StorageError
from vtpm_instance.connection import Connection, Port
from vtpm_instance.control import ControlSession, FrontEnd, Role
from vtpm_instance.errors import FramingError, InstanceError, ManagerConfusedError
from vtpm_instance.framing import CommandStream, is_whole_command
from vtpm_instance.journal import note
from vtpm_instance.managerlink import ManagerLink
from vtpm_instance.ring_port import RingPort, ServedRing
from vtpm_instance.vtpm import Vtpm, wrong_size_response

_WAKEUP_BYTES: Final = 64


class DataSession:
    """One data connection: raw TPM commands in, raw responses out."""

    def __init__(self, server: "Server") -> None:
        """Serve `server`'s vTPM at the locality the control channel has set."""
        self._server = server
        self._execute = server.vtpm.execute
        self._stream = CommandStream()
        self.pending = self.closing = False

    def exchange(self, data: bytes) -> bytes | None:
        """Add what was received, then do as `next_answer`."""
        if not self.pending and is_whole_command(data):
            return self._execute(data, self._server.locality)
        self._stream.feed(data)
        return self.next_answer()

    def next_answer(self) -> bytes | None:
        """Execute the next whole command; one with an impossible size is answered and ends the connection."""
        try:
            command = self._stream.next_command()
        except FramingError:
            self.closing = True
            return wrong_size_response(self._server.vtpm.family)
        self.pending = self._stream.pending
        return None if command is None else self._execute(command, self._server.locality)


class ControlPortSession(ControlSession):
    """One control connection; it ends when its peer closes it."""

    closing = False

    def exchange(self, data: bytes) -> bytes | None:
        """Add what was received, then do as `next_answer`."""
        self.feed(data)
        return self.next_answer()


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
    ) -> None:
        """Serve `vtpm`; `owners` are the uids that may reset its platform, `wakeup` is readable after SIGTERM.

        `on_asked` sends a report when the manager wants one.
        """
        self.vtpm, self._link, self._front_end, self._owners = vtpm, link, front_end, owners
        self._wakeup, self._on_asked = wakeup, on_asked
        self.locality = 0
        self._stopping = False
        self._ports: list[Port] = []
        self._ring_ports: list[RingPort] = []
        self._busy: list[Connection] = []
        self._poll = select.poll()
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

    # ports

    def add_data_port(self, listener: socket.socket) -> None:
        """Take TPM commands on `listener`."""
        self._add_port(Port(listener, lambda _peer: DataSession(self), self))

    def add_control_port(self, listener: socket.socket) -> None:
        """Take control commands on `listener`."""

        def serve(peer: PeerCredentials) -> ControlPortSession:
            role = Role.OWNER if peer.uid in self._owners else Role.OTHER
            return ControlPortSession(self._front_end, role, self)

        self._add_port(Port(listener, serve, self))

    def add_ring_port(self, listener: socket.socket) -> None:
        """Hand rings out on `listener`."""
        port = RingPort(listener, self.vtpm)
        self._ring_ports.append(port)
        self._watch(port.fileno(), partial(self._on_ring_listener, port))

    def _on_ring_listener(self, port: RingPort, _events: int) -> None:
        ring = port.accept()
        if ring is None:
            return
        self._watch(ring.fileno(), partial(self._on_ring, port, ring))
        if port.full:
            self._poll.unregister(port.fileno())

    def _on_ring(self, port: RingPort, ring: ServedRing, _events: int) -> None:
        if ring.on_doorbell():
            return
        if port.full:
            self._poll.register(port.fileno(), select.POLLIN)
        descriptor = ring.fileno()
        del self._handlers[descriptor], port.rings[descriptor]
        self._poll.unregister(descriptor)
        ring.close()

    def _add_port(self, port: Port) -> None:
        self._ports.append(port)
        self._watch(port.fileno(), partial(self._on_listener, port))

    def _watch(self, descriptor: int, handler: Callable[[int], None], events: int = select.POLLIN) -> None:
        self._handlers[descriptor] = handler
        self._poll.register(descriptor, events)

    def _on_listener(self, port: Port, _events: int) -> None:
        connection = port.accept()
        if connection is None:
            return
        self._watch(connection.fileno(), connection.on_event)
        if port.full:
            self._poll.unregister(port.fileno())

    # Host: what connections tell us

    def wait_for(self, connection: Connection, events: int) -> None:
        """Call the connection when one of `events` happens."""
        self._poll.modify(connection.fileno(), events)

    def come_back(self, connection: Connection) -> None:
        """Let the connection go on in the next turn."""
        self._busy.append(connection)

    def drop(self, connection: Connection, descriptor: int) -> None:
        """Forget a connection that has closed itself."""
        del self._handlers[descriptor]
        self._poll.unregister(descriptor)
        for port in self._ports:
            if connection in port.connections:
                was_full = port.full
                port.connections.remove(connection)
                if was_full:
                    self._poll.register(port.fileno(), select.POLLIN)

    # manager and signals

    def _on_doorbell(self, _events: int) -> None:
        try:
            self._link.on_doorbell()
        except ManagerConfusedError as error:
            note(f"an answer nobody waits for is dropped: {error}")

    def _on_wakeup(self, _events: int) -> None:
        os.read(self._wakeup, _WAKEUP_BYTES)
        self._stopping = True

    def _obey(self) -> None:
        orders = self._link.take_orders()
        if orders & Orders.RESET:
            self.platform_reset()
        if orders & Orders.STOP:
            self._stopping = True
        if self._link.take_asked():
            self._on_asked()

    # the loop

    def run(self) -> None:
        """Serve until SIGTERM or the manager's order to stop.

        Raises:
            ManagerGoneError: manager and keeper are gone.

        """
        poll, handlers, link = self._poll.poll, self._handlers, self._link
        while not self._stopping:
            for descriptor, events in poll(0 if self._busy else None):
                handler = handlers.get(descriptor)
                if handler is not None:  # an earlier handler of this turn may have closed it
                    handler(events)
            if self._busy:
                waiting, self._busy = self._busy, []
                for connection in waiting:
                    connection.step()
            if link.news:
                self._obey()

    def close(self) -> None:
        """Close all ports."""
        for port in self._ports:
            port.close()
        for ring_port in self._ring_ports:
            ring_port.close()
