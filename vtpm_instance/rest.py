"""Whether a server may go to sleep now, how idle it was, and its connections on their way to the next instance.

What lives here: the look at all connections, and what each becomes. What must not: the commit (`vtpm`), the loop
(`server`), and bytes of guests: what was not read yet stays in its socket, and wakes the next instance.
"""

import resource
import socket
from collections.abc import Iterable
from functools import partial
from typing import Protocol

from frontend_backend.descriptors import close_all
from vtpm_instance.connection import Connection, Port
from vtpm_instance.errors import NotNowError
from vtpm_instance.handover import MAX_HANDED, Handed, Kind, count, readable
from vtpm_instance.ring_port import RingPort, ServedRing
from vtpm_instance.sessions import PASSED


class Sleepy(Protocol):
    """A server as it goes to sleep, and as the next one takes up where it left off."""

    data_ports: list[Port]
    passed_port: Port  # of data connections that came by SET_DATAFD
    control_ports: list[Port]
    ring_ports: list[RingPort]

    def take_on(self, port: Port, connection: Connection) -> None:
        """Serve one more connection of a port."""

    def take_on_ring(self, port: RingPort, ring: ServedRing) -> None:
        """Serve one more ring of a port."""

    def on_ring_gone(self, port: RingPort, ring: ServedRing) -> None:
        """Forget a ring whose guest has left."""


def connections(server: Sleepy) -> list[Handed]:
    """Return every open connection as it is handed over; all must be between two requests.

    Raises:
        NotNowError: one is not, has something to be read, or there are too many.

    """
    found = [*_of([*server.data_ports, server.passed_port], Kind.DATA), *_of(server.control_ports, Kind.CONTROL)]
    if readable(each.watched for each in found):
        raise NotNowError("a command has just arrived")
    for port in server.ring_ports:
        for ring in list(port.rings.values()):
            if not ring.quiet():
                ring.on_doorbell(0)  # the edge that told of it is gone
                raise NotNowError("a command has just arrived on a ring")
            found.append(Handed(Kind.RING, ring.descriptors()))
    if count(found) > MAX_HANDED:
        raise NotNowError(
            f"its guest has {len(found)} connections open, with {count(found)} descriptors; at most {MAX_HANDED} are "
            "kept open for one that sleeps"
        )
    return found


def _of(ports: Iterable[Port], kind: Kind) -> list[Handed]:
    found: list[Handed] = []
    for port in ports:
        for connection in port.connections:
            if not connection.quiet:
                raise NotNowError("one of its connections is in the middle of a request")
            found.append(Handed(kind, (connection.fileno(),), connection.note))
    return found


def take_up(server: Sleepy, handed: Iterable[Handed]) -> None:
    """Go on with the connections of the instance that hibernated; one of a kind that has no port is closed.

    Raises:
        NotARingError: a ring is none; its descriptors are closed.

    """
    ports = {Kind.DATA: server.data_ports, Kind.CONTROL: server.control_ports}
    for each in handed:
        if each.kind is Kind.RING and server.ring_ports:
            ring_port = server.ring_ports[0]
            gone = partial(server.on_ring_gone, ring_port)
            server.take_on_ring(ring_port, ring_port.adopt(each.descriptors, gone))
        elif each.kind is not Kind.RING and ports[each.kind]:
            passed = each.kind is Kind.DATA and each.note & PASSED
            port = server.passed_port if passed else ports[each.kind][0]
            server.take_on(port, port.adopt(socket.socket(fileno=each.descriptors[0]), each.note))
        else:
            close_all(each.descriptors)


class Activity:
    """Tells whether anything was done since the last look, without a clock or a counter in anybody's way.

    The kernel counts how often this process has gone to sleep (getrusage(2), voluntary context switches). A loop that
    was woken by nothing but the manager has slept once for each of its rings; a guest's commands make it more.
    """

    def __init__(self) -> None:
        """Begin active: nothing is known of the time before."""
        self._slept = -1
        self._rung = 0

    def rung(self) -> None:
        """Count a ring of the manager's."""
        self._rung += 1

    def was_idle(self) -> bool:
        """Tell whether nothing was done since the last call."""
        now = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        idle = self._slept >= 0 and now - self._slept <= self._rung
        self._slept, self._rung = now, 0
        return idle
