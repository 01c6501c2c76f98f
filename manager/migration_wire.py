"""How managers reach each other: mutual TLS over a Unix socket or TCP, one request and one answer a connection.

The only module of migration with sockets. Whoever connects without a pinned certificate gets no further than the
handshake, and takes no place from a manager that has one; how many of each manager's requests are served at once, for
how long, and what they may send is limited.
"""

import errno
import logging
import os
import socket
import ssl
import stat
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from frontend_backend import messages_migration as m
from frontend_backend.errors import ChannelClosedError, MessageError, RingError
from manager.accepting import accept_clients
from manager.errors import BusyError, ConfigurationError, DeniedError, ManagerError, UsageError
from manager.migration_identity import fingerprint_of
from manager.sockets import BACKLOG
from manager.strangers import HANDSHAKE_SECONDS, Strangers, source_of

_log = logging.getLogger("vtpm.migration")
MAX_REQUESTS: Final = 16  # of one manager, worked on at once; the others wait
MAX_CONNECTIONS: Final = 64  # of one manager; each costs a descriptor and a TLS state of some 50 KiB
SERVE_SECONDS: Final = 60.0  # a freeze waits for a flush, the hardware TPM, and an instance's last save
ASK_SECONDS: Final = 75.0  # above the other side's own limit
_LOOPBACK: Final = "127.0.0.1"
_MAX_PORT: Final = 65535

Handle = Callable[[str, m.MigrationRequest], Awaitable[m.MigrationReply]]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a manager listens: a Unix socket's path, or a host and a port."""

    path: Path | None = None
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"unix:{self.path}" if self.path is not None else f"tcp:{host}:{self.port}"


def parse_address(text: str) -> Address:
    """Return the address in `unix:/PATH`, `tcp:PORT` (this host's loopback) or `tcp:HOST:PORT`; IPv6 in brackets.

    Raises:
        UsageError: it is none.

    """
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest.startswith("/"):
        return Address(path=Path(rest))
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and port.isdecimal() and 0 < int(port) <= _MAX_PORT:
        return Address(host=host.removeprefix("[").removesuffix("]") or _LOOPBACK, port=int(port))
    raise UsageError(f"'{text[:120]}' is no address: write unix:/PATH, tcp:PORT (loopback), or tcp:HOST:PORT")


def listen(address: Address) -> socket.socket:
    """Return a listening socket; a Unix socket is for its user only, until somebody changes its mode.

    Raises:
        ConfigurationError: it cannot be made.

    """
    try:
        sock = _bound_unix(address.path) if address.path is not None else _bound_tcp(address)
    except OSError as error:
        raise ConfigurationError(
            f"[migration] listen: cannot listen at {address}: {error.strerror or error}; nothing was started"
        ) from error
    sock.setblocking(False)
    return sock


def _bound_unix(path: Path) -> socket.socket:
    """Take the place of the socket of a manager before us, and of nothing else: an operator named this path."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(errno.EEXIST, "what is there is no socket, and was left alone")
        path.unlink()
    sock = socket.socket(socket.AF_UNIX)
    previous = os.umask(0o177)
    try:
        sock.bind(str(path))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(previous)
    return sock


def _bound_tcp(address: Address) -> socket.socket:
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, place = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


@dataclass(slots=True)
class _Room:
    """What one manager has of this one."""

    connections: int = 0
    requests: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(MAX_REQUESTS))


class MigrationServer:
    """Answers other managers."""

    def __init__(
        self,
        context: Callable[[], ssl.SSLContext | None],
        knows: Callable[[str], bool],
        handle: Handle,
        patience: float = HANDSHAKE_SECONDS,
    ) -> None:
        """Serve with what `context` returns for each connection (None: nobody is paired); `handle` answers.

        `knows` tells whether a fingerprint is a peer's; `patience`: seconds for the handshake, again for the request,
        and again for taking the answer.
        """
        self._context, self._knows, self._handle, self._patience = context, knows, handle, patience
        self._strangers = Strangers(seconds=patience)
        self._rooms = defaultdict[str, _Room](_Room)  # by fingerprint; as many as there are peers

    async def run(self, listener: socket.socket) -> None:
        """Accept until cancelled."""
        await accept_clients(listener, self._serve, "another manager")

    async def _serve(self, client: socket.socket) -> None:
        try:
            with trio.socket.from_stdlib_socket(client) as sock:
                await self._one_request(trio.SocketStream(sock))
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, RingError) as error:
            _log.info("a connection of another manager ended: %s", _cause(error))
        except trio.TooSlowError:
            _log.info("a connection of another manager was too slow")
        except Exception:  # noqa: BLE001 - our own mistake in one request must not end every vTPM's manager
            _log.exception("a request of another manager failed in a way nobody foresaw")

    async def _one_request(self, client: trio.SocketStream) -> None:
        context = self._context()
        if context is None:
            return
        stream = trio.SSLStream(client, context, server_side=True, https_compatible=True)
        with self._strangers.one_more(source_of(client.socket)) as waiting:
            await stream.do_handshake()
        if waiting.cancelled_caught:
            raise trio.TooSlowError
        who = _peer(stream)
        if not self._knows(who):  # a peer's key can make more of them, and OpenSSL takes those for its
            return
        room = self._rooms[who]
        room.connections += 1
        try:
            reply = await self._reply_to(stream, who, room)
            with trio.fail_after(self._patience):
                await stream.send_all(m.encode_migration_reply(reply))
                await stream.aclose()
        finally:
            room.connections -= 1

    async def _reply_to(self, stream: "trio.SSLStream[trio.SocketStream]", who: str, room: _Room) -> m.MigrationReply:
        if room.connections > MAX_CONNECTIONS:
            return m.Refused(m.MigrationRefusal.BUSY, f"more than {MAX_CONNECTIONS} requests at once")
        with trio.fail_after(self._patience):
            body = await _receive(stream)
        try:
            request = m.decode_migration_request(body)
        except MessageError as error:
            return m.Refused(m.MigrationRefusal.MALFORMED, str(error)[:200])
        with trio.move_on_after(SERVE_SECONDS):
            async with room.requests:
                return await self._handle(who, request)
        return m.Refused(m.MigrationRefusal.BUSY, f"it was not done within {SERVE_SECONDS:g} s")


async def ask(address: Address, context: ssl.SSLContext, who: str, request: m.MigrationRequest) -> m.MigrationReply:
    """Ask another manager; what answers is the one with this fingerprint, or nothing.

    Raises:
        BusyError: it cannot be reached, or did not answer in time: whether it did what was asked is not known.
        DeniedError: the other side does not know us, or is another one. ManagerError: an answer that is none.

    """
    try:
        with trio.fail_after(ASK_SECONDS):
            with await _connected(address) as sock:
                return await _asked(
                    trio.SSLStream(trio.SocketStream(sock), context, https_compatible=True), who, request
                )
    except trio.TooSlowError as error:
        raise BusyError(f"the manager at {address} gave no answer within {ASK_SECONDS:g} s") from error
    except MessageError as error:
        raise ManagerError(f"the manager at {address} answered what this one does not understand: {error}") from error
    except (OSError, trio.BrokenResourceError, ChannelClosedError) as error:
        cause = _cause(error)
        if isinstance(cause, ssl.SSLError):
            raise DeniedError(
                f"the manager at {address} and this one refuse each other's certificate ({cause.reason or cause}). "
                f"Pair both with 'vtpm-migrate-authorise'; 'vtpm-migrate-identity' shows who each one is"
            ) from error
        raise BusyError(
            f"the manager at {address} ended the connection without an answer: it has ended itself, or it does not "
            f"take this manager's certificate (any more); 'vtpm-migrate-authorise' there pairs them"
        ) from error


async def _asked(
    stream: "trio.SSLStream[trio.SocketStream]", who: str, request: m.MigrationRequest
) -> m.MigrationReply:
    await stream.do_handshake()
    if _peer(stream) != who:
        raise DeniedError("there answers a manager with another certificate than was expected")
    await stream.send_all(m.encode_migration_request(request))
    return m.decode_migration_reply(await _receive(stream))


async def _connected(address: Address) -> trio.socket.SocketType:
    sock: trio.socket.SocketType | None = None
    try:
        family, place = int(socket.AF_UNIX), str(address.path)
        if address.path is None:
            found = await trio.socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            family, place = found[0][0], found[0][4]  # type: ignore[assignment] # what connect takes
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        await sock.connect(place)
    except BaseException as error:
        if sock is not None:
            sock.close()
        if isinstance(error, OSError):
            raise BusyError(f"the manager at {address} cannot be reached: {error.strerror or error}") from error
        raise
    return sock


def _peer(stream: "trio.SSLStream[trio.SocketStream]") -> str:
    """Return the fingerprint of the certificate at the other end."""
    certificate = stream.getpeercert(binary_form=True)
    assert certificate is not None, "CERT_REQUIRED: a handshake without one has failed"
    return fingerprint_of(certificate)


async def _receive(stream: "trio.SSLStream[trio.SocketStream]") -> bytes:
    return await _exactly(stream, m.body_size(await _exactly(stream, m.LENGTH.size)))


async def _exactly(stream: "trio.SSLStream[trio.SocketStream]", size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        piece = await stream.receive_some(size - len(content))
        if not piece:
            raise ChannelClosedError
        content += piece
    return bytes(content)


def _cause(error: BaseException) -> BaseException:
    """Return what is behind trio's own words."""
    while isinstance(error, trio.BrokenResourceError) and error.__cause__ is not None:
        error = error.__cause__
    return error
