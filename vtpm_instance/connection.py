"""Stream connections of a front end and the listener they come from, without waiting.

What lives here: bytes between a socket and a sans-IO session, one answer at a time. What must not: what the bytes
mean (`sessions`), and when to wait (`server`).
"""

import select
import socket
from collections.abc import Callable
from typing import Final, Protocol

from frontend_backend.descriptors import PeerCredentials
from frontend_backend.tpmhdr import MAX_COMMAND

MAX_CONNECTIONS: Final = 8  # a port; more wait in the listener's backlog


class Session(Protocol):
    """A sans-IO conversation: what was received goes in, one answer at a time comes out."""

    closing: bool  # set once nothing more can be read: the connection ends after the last answer

    def feed(self, data: bytes) -> None:
        """Add what was received."""

    def next_answer(self) -> bytes | None:
        """Deal with the next whole request and return its answer, None when none is whole."""

    @property
    def pending(self) -> bool:
        """Whether bytes are there that no answer was given to, a whole request perhaps."""


class Connection:
    """One accepted connection. `wants` is what to poll for; `step` answers at most one request.

    The way from `receive` to the sent answer is walked once for each command of a guest: it is kept short.
    """

    def __init__(self, sock: socket.socket, session: Session) -> None:
        """Serve `session` on `sock`, which becomes ours and non-blocking."""
        self._sock, self._session = sock, session
        self._sock.setblocking(False)
        self._unsent = b""
        self.closed = False
        self.wants = select.POLLIN

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def receive(self) -> None:
        """Take in what has arrived; a peer that is gone closes the connection."""
        try:
            data = self._sock.recv(MAX_COMMAND)
        except BlockingIOError:
            return
        except OSError:
            # The peer reset the connection: the same as an orderly end, nobody is left to answer.
            data = b""
        if data:
            self._session.feed(data)
        else:
            self.close()

    def step(self) -> bool:
        """Answer at most one request; returns whether there may be another whole one already."""
        if self._unsent:
            self._send(self._unsent)
            if self._unsent or self.closed:
                return False
        session = self._session
        answer = session.next_answer()
        if answer is None:
            return False
        self._send(answer)
        if session.closing and not self._unsent:
            self.close()
        return session.pending and not self._unsent and not self.closed

    def _send(self, data: bytes) -> None:
        try:
            sent = self._sock.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError:
            # As in receive: the command has run, its answer has no taker any more.
            self.close()
            return
        if sent == len(data):
            if self._unsent:
                self._unsent, self.wants = b"", select.POLLIN
        else:
            # A peer that does not read its answers gets no further requests read: its own queue fills, not ours.
            self._unsent, self.wants = data[sent:], select.POLLOUT

    def close(self) -> None:
        """Close the socket. May be repeated."""
        self.closed = True
        self._sock.close()


class Port:
    """A listening socket and its connections; a new session is made by `serve` from the peer's credentials."""

    def __init__(self, listener: socket.socket, serve: Callable[[PeerCredentials], Session]) -> None:
        """Take `listener` over."""
        self._listener, self._serve = listener, serve
        self._listener.setblocking(False)
        self.connections: dict[int, Connection] = {}

    def fileno(self) -> int:
        """Return the listener's descriptor."""
        return self._listener.fileno()

    @property
    def full(self) -> bool:
        """Whether no more connections are taken for now."""
        return len(self.connections) >= MAX_CONNECTIONS

    def accept(self) -> Connection | None:
        """Take one waiting connection, None when there is none any more."""
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        connection = Connection(sock, self._serve(PeerCredentials.of(sock)))
        self.connections[connection.fileno()] = connection
        return connection

    def close(self) -> None:
        """Close everything."""
        for connection in self.connections.values():
            connection.close()
        self.connections.clear()
        self._listener.close()
