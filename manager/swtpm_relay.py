"""Connections between whoever uses the command in swtpm's place and a vTPM's own sockets.

What lives here: bytes and passed descriptors, from one socket to another. A data connection that QEMU passes over the
control channel (SET_DATAFD) goes to the vTPM's instance itself: its commands never come by here. What must not: which
vTPM, and what is done before and after (`swtpm_managed`).
"""

import array
import logging
import selectors
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Final

from frontend_backend.descriptors import close_all

_log = logging.getLogger("vtpm.swtpm")
_AT_ONCE: Final = 64 * 1024  # bytes
_MAX_PASSED: Final = 4  # descriptors in one message; SET_DATAFD has one
_MAX_PAIRS: Final = 8  # of one channel, as many as an instance takes; more wait in the backlog
_INT: Final = array.array("i").itemsize
SHUTDOWN: Final = b"\0\0\0\x03"  # CMD_SHUTDOWN, which has no payload


class Channel(Enum):
    """What a connection is of."""

    CONTROL = "control"
    DATA = "data"


@dataclass(frozen=True, slots=True)
class Endings:
    """What ends the relay, beside SIGTERM: the last control connection, or what `--terminate` of swtpm means.

    `with_platform`: a data connection, or the control connection over which one was passed.
    """

    with_control: bool = False
    with_platform: bool = False


@dataclass(slots=True)
class _Kept:
    """What one end was sent and does not take just now; nothing more is read from the other end meanwhile."""

    data: bytes = b""
    passed: list[int] = field(default_factory=list)  # descriptors, which are ours until they are sent


@dataclass(slots=True, eq=False)
class Pair:
    """One client with its connection to the vTPM."""

    channel: Channel
    client: socket.socket
    vtpm: socket.socket
    to_client: _Kept = field(default_factory=_Kept)
    to_vtpm: _Kept = field(default_factory=_Kept)
    passed: bool = False  # whether a data connection came by here
    request: bytes = b""  # the first bytes of what is not answered yet: enough to tell a SHUTDOWN, also in pieces


@dataclass(slots=True)
class _Port:
    channel: Channel
    listener: socket.socket
    pairs: set[Pair] = field(default_factory=set)


class Relay:
    """Relays until something ends it. `connect` opens a connection to the vTPM."""

    def __init__(self, connect: Callable[[Channel], socket.socket], endings: Endings, wakeup: socket.socket) -> None:
        """Relay to what `connect` opens; something to be read on `wakeup` ends it, as SIGTERM does."""
        self._connect, self._endings = connect, endings
        self._selector = selectors.DefaultSelector()
        self._ports: dict[Channel, _Port] = {}
        self._pairs: set[Pair] = set()
        self._over = False
        self._selector.register(wakeup, selectors.EVENT_READ, self._on_wakeup)

    def listen(self, channel: Channel, listener: socket.socket) -> None:
        """Take clients on a listening socket, which becomes the relay's."""
        listener.setblocking(False)
        port = self._ports[channel] = _Port(channel, listener)
        self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(port))

    def serve(self, channel: Channel, client: socket.socket) -> None:
        """Serve a connected client, whose socket becomes the relay's.

        Raises:
            OSError: the vTPM's socket does not take us.

        """
        pair = Pair(channel, client, self._connect(channel))
        client.setblocking(False)
        pair.vtpm.setblocking(False)
        self._pairs.add(pair)
        self._watch(pair)

    def run(self) -> None:
        """Relay until the end."""
        while not self._over:
            for key, _ in self._selector.select():
                if self._is_watched(key):  # not closed or changed by an earlier one of this turn
                    key.data()

    def _is_watched(self, key: selectors.SelectorKey) -> bool:
        try:
            return self._selector.get_key(key.fileobj) is key
        except (KeyError, ValueError):  # ValueError: it is closed
            return False

    def _watch(self, pair: Pair) -> None:
        """Wait for an end that has bytes to take until it takes them, for the others until they say something."""
        for sock, own, others, read, write in (
            (pair.client, pair.to_client, pair.to_vtpm, self._from_client, self._to_client),
            (pair.vtpm, pair.to_vtpm, pair.to_client, self._from_vtpm, self._to_vtpm),
        ):
            wanted = selectors.EVENT_WRITE if own.data else 0 if others.data else selectors.EVENT_READ
            key = self._selector.get_map().get(sock)
            if key is not None and key.events == wanted:
                continue
            if key is not None:
                self._selector.unregister(sock)
            if wanted:
                self._selector.register(sock, wanted, partial(write if own.data else read, pair))

    def close(self) -> None:
        """Close everything."""
        for pair in list(self._pairs):
            self._drop(pair)
        for port in self._ports.values():
            port.listener.close()
        self._selector.close()

    def _on_wakeup(self) -> None:
        self._over = True

    def _accept(self, port: _Port) -> None:
        try:
            client, _ = port.listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        try:
            self.serve(port.channel, client)
        except OSError as error:
            _log.error("a client is turned away: the vTPM's %s socket: %s", port.channel.value, error)
            client.close()
            return
        if sum(pair.channel is port.channel for pair in self._pairs) >= _MAX_PAIRS:
            self._selector.unregister(port.listener)

    def _from_client(self, pair: Pair) -> None:
        try:
            data, passed = _receive(pair.client)
        except BlockingIOError:
            return
        except OSError:
            data, passed = b"", []  # it reset the connection: nobody is left to answer
        if not data:
            self._end(pair)
            return
        pair.passed = pair.passed or bool(passed)
        pair.request = (pair.request + data)[: len(SHUTDOWN) + 1]  # strictly one request at a time
        pair.to_vtpm = _Kept(data, passed)
        self._to_vtpm(pair)

    def _to_vtpm(self, pair: Pair) -> None:
        try:
            _send(pair.vtpm, pair.to_vtpm)
        except OSError as error:
            _log.error("the vTPM closed a connection: %s", error)
            self._end(pair)
        else:
            self._watch(pair)

    def _from_vtpm(self, pair: Pair) -> None:
        try:
            data = pair.vtpm.recv(_AT_ONCE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            _log.error("the vTPM closed a %s connection", pair.channel.value)
            self._end(pair)
            return
        pair.to_client = _Kept(data)
        self._to_client(pair)

    def _to_client(self, pair: Pair) -> None:
        try:
            _send(pair.client, pair.to_client)
        except OSError as error:
            _log.error("a client closed a %s connection: %s", pair.channel.value, error)
            self._end(pair)
            return
        self._watch(pair)
        if not pair.to_client.data:
            self._over = self._over or (pair.channel is Channel.CONTROL and pair.request == SHUTDOWN)
            pair.request = b""

    def _end(self, pair: Pair) -> None:
        """Close a connection whose client, or vTPM, is gone; and the relay with it, where that is wanted."""
        self._drop(pair)
        port = self._ports.get(pair.channel)
        if port is not None and port.listener not in self._selector.get_map():
            self._selector.register(port.listener, selectors.EVENT_READ, lambda: self._accept(port))
        if pair.channel is Channel.CONTROL:
            self._over = self._over or self._endings.with_control or (self._endings.with_platform and pair.passed)
        else:
            self._over = self._over or self._endings.with_platform
        if not self._ports and not self._pairs:
            self._over = True  # nobody can come any more

    def _drop(self, pair: Pair) -> None:
        self._pairs.discard(pair)
        for sock in (pair.client, pair.vtpm):
            if sock in self._selector.get_map():
                self._selector.unregister(sock)
            sock.close()
        close_all(pair.to_vtpm.passed)


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """Return what has come, and the descriptors with it, which are the caller's."""
    space = socket.CMSG_SPACE(_MAX_PASSED * _INT) if sock.family == socket.AF_UNIX else 0
    data, ancillary, _, _ = sock.recvmsg(_AT_ONCE, space, socket.MSG_CMSG_CLOEXEC)
    passed = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            passed.frombytes(content[: len(content) - len(content) % _INT])
    return data, list(passed)


def _send(sock: socket.socket, kept: _Kept) -> None:
    """Send as much as is taken now, descriptors with the first byte; the rest stays in `kept`."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", kept.passed))] if kept.passed else []
    try:
        sent = sock.sendmsg([kept.data], ancillary, socket.MSG_NOSIGNAL)
    except BlockingIOError:
        return
    kept.data = kept.data[sent:]
    passed, kept.passed = kept.passed, []
    close_all(passed)
