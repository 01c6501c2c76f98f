"""Where relays meet: unix:PATH, tls:HOST:PORT, vsock:CID:PORT (TLS over it, too). Listening and connecting."""

import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import trio

from frontend_backend.descriptors import PeerCredentials
from manager.errors import ConfigurationError, UsageError
from manager.relay_access import Access, Client
from manager.relay_errors import RelayDeniedError
from manager.relay_holder import take_away_dead
from manager.relay_tls import encrypted, fingerprint

BACKLOG: Final = 64
_ANY: Final = "any"
_PORTS: Final = 1 << 16
_VSOCK_PORTS: Final = 1 << 32


@dataclass(frozen=True, slots=True)
class Address:
    """One address; `place` is what bind(2) and connect(2) of its family take."""

    text: str
    family: int
    place: str | tuple[str, int] | tuple[int, int]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an address.

        Raises:
            UsageError: it is none, or this kernel has no such sockets.

        """
        kind, _, rest = text.partition(":")
        if kind == "unix" and rest:
            return cls(text, socket.AF_UNIX, rest)
        host, _, number = rest.rpartition(":")
        if kind == "tls" and host and _is_port(number, _PORTS):
            host = host.removeprefix("[").removesuffix("]")
            return cls(text, socket.AF_INET6 if ":" in host else socket.AF_INET, (host, int(number)))
        if kind == "vsock" and _is_port(number, _VSOCK_PORTS):
            if not hasattr(socket, "AF_VSOCK"):
                raise UsageError("this Python knows no vsock")
            if host == _ANY or _is_port(host, _VSOCK_PORTS):
                return cls(text, socket.AF_VSOCK, (socket.VMADDR_CID_ANY if host == _ANY else int(host), int(number)))
        raise UsageError(f"'{text[:120]}' is no address: write unix:PATH, tls:HOST:PORT or vsock:CID:PORT")

    @property
    def is_local(self) -> bool:
        """Whether the kernel vouches for who is at the other end."""
        return self.family == socket.AF_UNIX

    def listen(self) -> trio.SocketListener:
        """Return a listener; of a Unix socket what a dead one left is taken away.

        Raises:
            ConfigurationError: the operating system refuses.

        """
        sock = socket.socket(self.family, socket.SOCK_STREAM)
        try:
            if self.is_local:
                _take_away_dead(str(self.place))
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(self.place)
            if self.is_local:
                os.chmod(str(self.place), 0o666)  # noqa: S103 - who may do what is decided by the peer's user id
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            raise ConfigurationError(f"cannot listen on {self.text}: {error.strerror or error}") from error
        return trio.SocketListener(trio.socket.from_stdlib_socket(sock))

    async def connect(self) -> trio.SocketStream:
        """Return a connection. Raises OSError."""
        sock = trio.socket.socket(self.family, socket.SOCK_STREAM)
        try:
            await sock.connect(self.place)
        except BaseException:
            sock.close()
            raise
        return trio.SocketStream(sock)


def _is_port(text: str, most: int) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= len(str(most)) and int(text) < most


def _take_away_dead(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            take_away_dead(Path(path))
        except FileNotFoundError:
            pass


@dataclass(slots=True)
class Welcomer:
    """The far side's end of the authentication: a new connection in, a stream and its client out."""

    access: Access
    tls: Callable[[Access], ssl.SSLContext] | None

    async def welcome(self, raw: trio.SocketStream) -> tuple[trio.abc.Stream, Client, str]:
        """Return the stream, the client, and what it is known by.

        Raises:
            RelayDeniedError: it is nobody's. trio.BrokenResourceError: it ended.

        """
        if raw.socket.family == socket.AF_UNIX:
            with socket.socket(fileno=os.dup(raw.socket.fileno())) as copy:
                uid = PeerCredentials.of(copy).uid
            client = self.access.by_uid(uid)
            if client is None:
                raise RelayDeniedError(f"user {uid} is no client")
            return raw, client, f"uid {uid}"
        if self.tls is None:
            raise RelayDeniedError("this relay has no key, so it takes no such connections")
        pins = map(fingerprint, self.access.certificates)
        stream, seen = await encrypted(raw, self.tls(self.access), pins, server=True)
        found = self.access.by_certificate(seen)
        if found is None:
            raise RelayDeniedError(f"certificate {seen} is no client's")
        return stream, found, seen
