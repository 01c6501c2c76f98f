"""Connections that have not said who they are: few at once, for seconds. Nobody keeps others out with silence.

Where there are too many, one of the source that has most of them ends, the oldest: so who floods from one place ends
his own, and who floods from many has to be quicker than a handshake.
"""

import contextlib
import ipaddress
import os
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Final

import trio

from frontend_backend.descriptors import PeerCredentials

MAX_STRANGERS: Final = 32  # at once; each costs a descriptor and a TLS state of some 50 KiB
HANDSHAKE_SECONDS: Final = 10.0  # a handshake and a first message are a few packets
_ONE_NETWORK: Final = 64  # bits of an IPv6 address that one host can choose the rest of


class Strangers:
    """Those that have not said who they are."""

    def __init__(self, most: int = MAX_STRANGERS, seconds: float = HANDSHAKE_SECONDS) -> None:
        """Allow `most` at once, each for `seconds`."""
        self._most, self._seconds = most, seconds
        self._waiting: dict[trio.CancelScope, str] = {}  # in the order of their coming, with where they come from

    @contextlib.contextmanager
    def one_more(self, source: str) -> Iterator[trio.CancelScope]:
        """Bound the time of one that comes from `source`, and the number of all; look whether it was cancelled."""
        while len(self._waiting) >= self._most:
            self._end_one()
        with trio.move_on_after(self._seconds) as scope:
            self._waiting[scope] = source
            try:
                yield scope
            finally:
                self._waiting.pop(scope, None)

    def _end_one(self) -> None:
        sources = Counter(self._waiting.values())
        most = max(sources.values())
        ended = next(scope for scope, source in self._waiting.items() if sources[source] == most)
        del self._waiting[ended]
        ended.cancel()


def source_of(sock: trio.socket.SocketType) -> str:
    """Return where a connection comes from: one host, one user, one machine of a hypervisor.

    Raises:
        OSError: it has ended.

    """
    if sock.family == socket.AF_UNIX:
        with socket.socket(fileno=os.dup(sock.fileno())) as copy:
            return f"uid {PeerCredentials.of(copy).uid}"
    place = sock.getpeername()[0]
    if sock.family == socket.AF_INET6:
        address = ipaddress.IPv6Address(place.partition("%")[0])
        return str(address.ipv4_mapped or ipaddress.IPv6Network((int(address), _ONE_NETWORK), strict=False))
    return str(place)
