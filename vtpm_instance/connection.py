"""Stream connections of a front end and the listener they come from, without waiting.

What lives here: bytes between a socket and a sans-IO session, one answer at a time. What must not: what the bytes
mean (the sessions), and when to wait (`server`).
"""

import select
import socket
from collections.abc import Callable
from typing import Any, Final, Protocol

from frontend_backend.descriptors import PeerCredentials, ancillary_space, descriptors_in

MAX_CONNECTIONS: Final = 8  # a port; more wait in the listener's backlog
_NO_SIGNAL: Final = socket.MSG_NOSIGNAL
_ROOM: Final = ancillary_space(2)  # one is what a command takes; with a second one it is refused


class Session(Protocol):
    """A sans-IO conversation: what was received goes in, one answer at a time comes out."""

    @property
    def buffer(self) -> Any:
        """Writable memory (buffer protocol) for what is received next; its content is used in `exchange` only."""

    @property
    def pending(self) -> bool:
        """Whether bytes are there that no answer was given to, a whole request perhaps."""

    @property
    def held(self) -> bool:
        """Whether the next request is whole but cannot be served before the command that runs has ended."""

    @property
    def closing(self) -> bool:
        """Whether nothing more can be read: the connection then ends after the last answer."""

    @property
    def note(self) -> int:
        """What the next session on this connection has to know, 0 to 255; only when nothing is pending."""

    def take_up(self, note: int) -> None:
        """Go on where the session was that had this note."""

    def end(self) -> None:
        """Give back what is kept for a peer that is gone."""

    def exchange(self, size: int) -> bytes | None:
        """Take the first `size` bytes of `buffer`, which were just received, then do as `next_answer`."""

    def next_answer(self) -> bytes | None:
        """Deal with the next whole request and return its answer, None when none is whole."""


class Host(Protocol):
    """Who polls: what a connection tells it."""

    def wait_for(self, connection: "Connection", events: int) -> None:
        """Call `on_event` when one of `events` happens."""

    def come_back(self, connection: "Connection") -> None:
        """Call `step` in the next turn, after the others had theirs."""

    def drop(self, connection: "Connection") -> None:
        """Forget a connection that is about to close itself."""


class Connection:
    """One accepted connection. The way through `on_event` is walked for each command of a guest: it is kept short."""

    def __init__(self, sock: socket.socket, session: Session, host: Host) -> None:
        """Serve `session` on `sock`, which becomes ours and non-blocking."""
        self._sock, self._session, self._host = sock, session, host
        sock.setblocking(False)
        self._receive: Callable[[Any], int] = sock.recv_into
        self._transmit, self._exchange = sock.send, session.exchange
        self._buffer = session.buffer
        self._unsent = b""
        self._waiting_turn = False

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def on_event(self, events: int) -> None:
        """Take in what has arrived and answer at most one request, or send what is left to send."""
        if self._waiting_turn:
            return  # it has whole requests waiting; they come before anything new, and before its end
        if self._unsent:
            self._on_writable(events)
            return
        try:
            size = self._receive(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            # The peer reset the connection: the same as an orderly end, nobody is left to answer.
            size = 0
        if not size:
            self._end()
            return
        answer = self._exchange(size)
        if answer is None:
            return
        try:
            sent = self._transmit(answer, _NO_SIGNAL)
        except OSError:
            sent = 0  # `_send` tries again, and tells why not
        if sent == len(answer) or self._send(answer[sent:]):
            session = self._session
            if session.pending or session.closing:
                self.go_on()

    @property
    def wants(self) -> int:
        """The events to wait for, none while its next step does not depend on its peer."""
        if self._waiting_turn or self._session.held:
            return 0
        return select.EPOLLOUT if self._unsent else select.EPOLLIN

    @property
    def held(self) -> bool:
        """Whether its next request waits for the command that runs."""
        return self._session.held and not self._waiting_turn

    @property
    def quiet(self) -> bool:
        """Whether it is between two requests, with nothing received or to be sent that could get lost."""
        session = self._session
        return not (self._unsent or self._waiting_turn or session.pending or session.held or session.closing)

    @property
    def note(self) -> int:
        """What the next one to serve this connection has to know."""
        return self._session.note

    def step(self) -> None:
        """Answer at most one request of those that are here already."""
        self._waiting_turn = False
        if self._sock.fileno() < 0:
            return  # closed since, by another's turn
        answer = self._session.next_answer()
        if answer is not None and self._send(answer):
            self.go_on()

    def go_on(self) -> None:
        """End after the last answer, or have the next request served in the next turn."""
        if self._session.closing:
            self._end()
        elif self._session.pending:
            self._waiting_turn = True
            self._host.come_back(self)

    def _send(self, data: bytes) -> bool:
        """Send; returns whether all of it went out. What did not is kept, and nothing more is read until it has."""
        try:
            sent = self._transmit(data, _NO_SIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError:
            # As in on_event: the command has run, its answer has no taker any more.
            self._end()
            return False
        if sent == len(data):
            return True
        if not self._unsent:
            self._host.wait_for(self, select.EPOLLOUT)
        self._unsent = data[sent:]
        return False

    def _on_writable(self, events: int) -> None:
        if not events & select.EPOLLOUT:
            self._end()
        elif self._send(self._unsent):
            self._unsent = b""
            self._host.wait_for(self, select.EPOLLIN)
            self.go_on()

    def _end(self) -> None:
        self._host.drop(self)
        self.close()

    def close(self) -> None:
        """Close the socket, without telling the host. May be repeated."""
        self._session.end()
        self._sock.close()

    @property
    def session(self) -> Session:
        """What is said on it."""
        return self._session

    @property
    def peer_is_gone(self) -> bool:
        """Whether its peer has hung up, though we may not have been told yet."""
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))


class DescriptorSession(Session, Protocol):
    """A session that descriptors may be passed to."""

    def take_in(self, descriptors: list[int]) -> None:
        """Take over descriptors that came with the bytes that `exchange` is given next."""


class DescriptorConnection(Connection):
    """A connection on which descriptors may come along (SCM_RIGHTS)."""

    def __init__(self, sock: socket.socket, session: DescriptorSession, host: Host) -> None:
        """Serve `session` on `sock`, as `Connection` does."""
        super().__init__(sock, session, host)
        self._take_in = session.take_in
        self._receive = self._receive_message

    def _receive_message(self, buffer: Any) -> int:
        size, ancillary, _, _ = self._sock.recvmsg_into([buffer], _ROOM, socket.MSG_CMSG_CLOEXEC)
        if ancillary:
            self._take_in(descriptors_in(ancillary))
        return size


class Port:
    """A listening socket and its connections; a new session is made by `serve` from the peer's credentials.

    One without a listener has the connections that came in another way.
    """

    def __init__(
        self, listener: socket.socket | None, serve: Callable[[PeerCredentials | None], Session], host: Host
    ) -> None:
        """Take `listener` over; connections report to `host`."""
        self._listener, self._serve, self._host = listener, serve, host
        if listener is not None:
            listener.setblocking(False)
        self.connections: set[Connection] = set()

    def fileno(self) -> int:
        """Return the listener's descriptor, -1 when there is none."""
        return -1 if self._listener is None else self._listener.fileno()

    @property
    def full(self) -> bool:
        """Whether no more connections are taken for now."""
        return len(self.connections) >= MAX_CONNECTIONS

    def accept(self) -> Connection | None:
        """Take one waiting connection, None when there is none any more.

        Raises:
            OSError: out of descriptors or memory; the connection still waits.

        """
        if self._listener is None:
            return None
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        return self.adopt(sock)

    def adopt(self, sock: socket.socket, note: int = 0) -> Connection:
        """Serve a connection that was accepted before, where the one before us left off."""
        session = self._serve(PeerCredentials.of(sock) if sock.family == socket.AF_UNIX else None)
        session.take_up(note)
        connection = self._connect(sock, session)
        self.connections.add(connection)
        return connection

    def _connect(self, sock: socket.socket, session: Session) -> Connection:
        return Connection(sock, session, self._host)

    def close(self) -> None:
        """Close everything."""
        for connection in self.connections:
            connection.close()
        self.connections.clear()
        if self._listener is not None:
            self._listener.close()


class DescriptorPort(Port):
    """A port on whose connections descriptors may come along; its sessions are `DescriptorSession`s."""

    def _connect(self, sock: socket.socket, session: Any) -> Connection:
        return DescriptorConnection(sock, session, self._host)
