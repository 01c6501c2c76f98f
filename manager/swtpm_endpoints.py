"""The sockets of the command in swtpm's place, as its command line says them."""

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from frontend_backend.swtpm_records import Endpoint, Kind
from manager.errors import ManagerError, UsageError
from manager.sockets import Owner

_BACKLOG: Final = 16
_ALL_UIDS: Final = -1  # chown(2): leave it


def connected(endpoint: Endpoint) -> socket.socket | None:
    """Return the client that a command line brings along (clientfd=, fd= of a TCP server), None where there is none.

    Raises:
        UsageError: the descriptor is no socket.

    """
    return None if endpoint.connected is None else _inherited(endpoint.connected)


def listener(endpoint: Endpoint) -> socket.socket:
    """Return the listening socket of an endpoint that has no client yet.

    Raises:
        UsageError: the descriptor is no listening socket. ManagerError: it cannot be made.

    """
    if endpoint.descriptor is not None:
        sock = _inherited(endpoint.descriptor)
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise UsageError(f"descriptor {endpoint.descriptor} is no listening socket")
        return sock
    try:
        return _unix(endpoint) if endpoint.kind is Kind.UNIX else _tcp(endpoint)
    except OSError as error:
        where = endpoint.path if endpoint.kind is Kind.UNIX else f"{endpoint.address} port {endpoint.port}"
        raise ManagerError(f"cannot listen at {where}: {error.strerror or error}") from error


def remove(endpoint: Endpoint | None) -> None:
    """Remove the socket's name from the file system, where it has one."""
    if endpoint is not None and endpoint.path is not None:
        with suppress(FileNotFoundError):
            Path(endpoint.path).unlink()


def _inherited(descriptor: int) -> socket.socket:
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise UsageError(f"descriptor {descriptor} is no socket")
        os.set_inheritable(descriptor, False)
        return socket.socket(fileno=descriptor)
    except OSError as error:
        raise UsageError(f"descriptor {descriptor} cannot be used: {error.strerror or error}") from error


def _unix(endpoint: Endpoint) -> socket.socket:
    path = Path(str(endpoint.path))
    with suppress(FileNotFoundError):
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # nobody else connects before mode and owner are what they should be
    try:
        sock.bind(str(path))
        sock.listen(_BACKLOG)  # at once: whoever waits for the name to appear connects then
        uid, gid = _identity(endpoint)
        if (uid, gid) != (_ALL_UIDS, _ALL_UIDS):
            os.chown(path, uid, gid)
        path.chmod(endpoint.mode)
    except (OSError, UsageError):
        sock.close()
        raise
    finally:
        os.umask(before)
    return sock


def _identity(endpoint: Endpoint) -> tuple[int, int]:
    uid = _ALL_UIDS if endpoint.uid is None else Owner.parse(str(endpoint.uid), 0).uid
    if endpoint.gid is None:
        return uid, _ALL_UIDS
    return uid, Owner.parse(f"{os.geteuid()}:{endpoint.gid}", 0).gid


def _tcp(endpoint: Endpoint) -> socket.socket:
    family = socket.AF_INET6 if ":" in endpoint.address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        scope = 0 if endpoint.interface is None else socket.if_nametoindex(endpoint.interface)
        place = (endpoint.address, endpoint.port or 0)
        sock.bind((*place, 0, scope) if family == socket.AF_INET6 else place)
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock
