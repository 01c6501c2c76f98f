"""The sockets of the swtpm command: made from --ctrl and --server, or handed over by their descriptors.

Source: swtpm's common.c (unixio_open_socket, tcp_open_socket); reference/swtpm-libtpms-qemu.md 1.1, 1.7.
"""

import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from frontend_backend.swtpm_records import Endpoint, Kind
from frontend_backend.swtpm_suboptions import OptionError
from vtpm_instance.swtpm_process import FileIdentity, identity_of, remove_own

_BACKLOG: Final = 16  # swtpm has 1; a client that connects anew for each command must not find it full
_LONGEST_PATH: Final = 107  # bytes of a Unix socket's (unix(7)), without the zero at its end
_UNCHANGED: Final = -1  # of chown(2)


@dataclass(frozen=True, slots=True)
class Opened:
    """One channel's socket: it listens, or has its client already. `path` is ours to take away at the end."""

    sock: socket.socket
    connected: bool
    path: str | None = None
    identity: FileIdentity | None = None  # of the socket at `path`

    def remove_path(self) -> None:
        """Take the socket's path away. Where we may not any more (--chroot, --runas) it stays, as with swtpm."""
        if self.path is not None and self.identity is not None:
            remove_own(self.path, self.identity)


def open_endpoint(endpoint: Endpoint, what: str) -> Opened:
    """Return the socket of one channel; `what` names it in errors.

    Raises:
        OptionError: it cannot be had.

    """
    if endpoint.connected is not None:
        return Opened(_adopted(endpoint.connected, f"{_kind(endpoint)} client {what}"), connected=True)
    if endpoint.descriptor is not None:
        return Opened(_adopted(endpoint.descriptor, f"{_kind(endpoint)} {what}"), connected=False)
    if endpoint.path is not None:
        sock, identity = _unix(endpoint, endpoint.path)
        return Opened(sock, connected=False, path=endpoint.path, identity=identity)
    assert endpoint.port is not None, "an endpoint is one of four"
    return Opened(_tcp(endpoint, endpoint.port), connected=False)


def adopted_socket(descriptor: int) -> socket.socket:
    """Return the data channel that --fd names. Raises OptionError."""
    return _adopted(descriptor, "data channel")


def _kind(endpoint: Endpoint) -> str:
    return "UnixIO" if endpoint.kind is Kind.UNIX else "TCP"


def _adopted(descriptor: int, what: str) -> socket.socket:
    try:
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            os.set_inheritable(descriptor, False)
            return socket.socket(fileno=descriptor)
    except OSError as error:
        raise OptionError(f"Bad filedescriptor {descriptor} for {what}: {error.strerror}") from error
    raise OptionError(f"Bad filedescriptor {descriptor} for {what}")


def _unix(endpoint: Endpoint, path: str) -> tuple[socket.socket, FileIdentity]:
    """Return a listening socket at `path`, which appears there when it can be connected to, with mode and owner."""
    with suppress(FileNotFoundError):
        _refuse_other_files(path)
    place = f"{path}.{os.getpid()}"
    if len(os.fsencode(place)) > _LONGEST_PATH:
        place = path
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)  # nobody else may connect before mode and owner are what they are to be
    try:
        with suppress(FileNotFoundError):
            os.unlink(place)
        sock.bind(place)
        uid, gid = _user(endpoint.uid), _group(endpoint.gid)
        if (uid, gid) != (_UNCHANGED, _UNCHANGED):
            os.chown(place, uid, gid)
        os.chmod(place, endpoint.mode)
        sock.listen(_BACKLOG)
        identity = identity_of(os.lstat(place))
        os.rename(place, path)
    except BaseException as error:
        sock.close()
        if place != path:
            with suppress(OSError):
                os.unlink(place)
        if isinstance(error, OSError):
            raise OptionError(f"Could not open UnixIO socket: {error.strerror or error}") from error
        raise
    finally:
        os.umask(previous)
    return sock, identity


def _refuse_other_files(path: str) -> None:
    """Leave a file that is no socket alone; swtpm would delete it. An old socket is replaced."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise OptionError(f"Could not open UnixIO socket: {path} is there, and is no socket; it was left as it is")


def _user(who: int | str | None) -> int:
    if isinstance(who, str):
        import pwd  # noqa: PLC0415 - names are rare here, and the start is to be quick

        try:
            return pwd.getpwnam(who).pw_uid
        except KeyError:
            raise OptionError(f"Error parsing ctrl options: User '{who}' does not exist.") from None
    return _UNCHANGED if who is None else who


def _group(who: int | str | None) -> int:
    if isinstance(who, str):
        import grp  # noqa: PLC0415 - see _user

        try:
            return grp.getgrnam(who).gr_gid
        except KeyError:
            raise OptionError(f"Error parsing ctrl options: Group '{who}' does not exist.") from None
    return _UNCHANGED if who is None else who


def _tcp(endpoint: Endpoint, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in endpoint.address else socket.AF_INET
    try:
        raw = socket.inet_pton(family, endpoint.address)
    except OSError:
        raise OptionError(f"Could not parse the bind address '{endpoint.address}'") from None
    place: tuple[str, int] | tuple[str, int, int, int] = (endpoint.address, port)
    if family == socket.AF_INET6:
        place = (endpoint.address, port, 0, _scope(endpoint, raw))
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise OptionError(f"Could not open TCP socket: {error.strerror or error}") from error
    return sock


def _scope(endpoint: Endpoint, raw: bytes) -> int:
    """Return the interface's number that a link-local address needs."""
    if raw[0] != 0xFE or raw[1] & 0xC0 != 0x80:
        return 0
    if endpoint.interface is None:
        raise OptionError("Missing interface name for link local address")
    try:
        return socket.if_nametoindex(endpoint.interface)
    except OSError as error:
        raise OptionError(
            f"Could not convert interface name '{endpoint.interface}' to index: {error.strerror or error}"
        ) from error
