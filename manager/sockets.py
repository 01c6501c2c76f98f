"""The listening sockets of an attached vTPM: where they lie, who may use them.

Every folder above them can be passed through by everybody and listed by nobody (0711); a vTPM's own folder is its
owner's. So whether somebody connects is decided by that folder's and the socket's owner and mode alone.
"""

import errno
import grp
import logging
import os
import pwd
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from manager.errors import ConflictError, ManagerError, UsageError
from manager.foreign_folder import remove_tree

_log = logging.getLogger("vtpm.life")

BACKLOG: Final = 64  # tpm2-tss connects anew for every command and every control request
_SOCKET_NAMES: Final = {"data": "swtpm.sock", "control": "swtpm.sock.ctrl", "ring": "ring.sock", "proxy": "device.json"}
LISTENERS_OF: Final = {
    "socket": ("data", "control"),
    "mssim": ("data", "control"),  # the simulator's command and platform port
    "qemu": ("data", "control"),
    "ring": ("ring",),
    "xen": ("ring",),  # for vtpm-xen, whose other end is the guest's
    "proxy": ("proxy",),  # no socket, but the server's end of a device: manager.ports
}
_ENDPOINTS: Final = {"qemu": "control"}  # the socket a guest is told, where it is not the first one
_DEFAULT_MODES: Final = {"qemu": "0600", "xen": "0600"}  # one user, whom QEMU or vtpm-xen runs as; others: a group
LOOPBACK: Final = "127.0.0.1"
_ON_TCP: Final = frozenset({"socket", "mssim"})  # front ends that may have ports in place of Unix sockets
_HIGHEST_PORT: Final = 65_534  # the control channel has the next one
_MODE_LIMIT: Final = 0o777
_NO_ID: Final = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Owner:
    """Who may use a vTPM's sockets; uid is also who may reset its platform."""

    uid: int
    gid: int

    @classmethod
    def ourselves(cls) -> "Owner":
        """Return who this process is."""
        return cls(os.geteuid(), os.getegid())

    @classmethod
    def parse(cls, text: str | None, default_uid: int) -> "Owner":
        """Read USER[:GROUP] (names or numbers); without text the owner is `default_uid` with its own group.

        Raises:
            UsageError: no such user or group.

        """
        user, _, group = (text or str(default_uid)).partition(":")
        try:
            entry = pwd.getpwuid(_number(user)) if user.isdecimal() else pwd.getpwnam(user)
            uid, gid = entry.pw_uid, entry.pw_gid
        except (KeyError, ValueError):
            if not user.isdecimal():
                raise UsageError(f"there is no user '{user[:80]}'") from None
            uid = gid = _number(user)
        if group:
            try:
                gid = _number(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
            except (KeyError, ValueError):
                raise UsageError(f"there is no group '{group[:80]}'") from None
        return cls(uid, gid)


def _number(text: str) -> int:
    """Return a user's or group's number; -1 as 32 bits is chown(2)'s "leave it", never somebody."""
    if len(text) > len(str(_NO_ID)) or int(text) >= _NO_ID:
        raise UsageError(f"'{text[:80]}' is no number of a user or group")
    return int(text)


def default_mode(frontend: str) -> str:
    """Return the permissions of a front end's sockets where nothing else was asked for."""
    return _DEFAULT_MODES.get(frontend, "0660")


def check_port(frontend: str, port: int | None) -> int:
    """Return the first of a front end's two TCP ports, 0 where it has Unix sockets.

    Raises:
        UsageError: no such port, or not with this front end, or not without.

    """
    if port is None:
        if frontend == "mssim":
            raise UsageError("--frontend mssim needs --tcp PORT: its clients know TCP only. Nothing was done")
        return 0
    if frontend not in _ON_TCP:
        raise UsageError(f"--tcp goes with --frontend {' and '.join(sorted(_ON_TCP))} only. Nothing was done")
    if not 0 < port <= _HIGHEST_PORT:
        raise UsageError(f"--tcp takes a port from 1 to {_HIGHEST_PORT}: the control channel has the next one")
    return port


def listen_on_ports(port: int) -> list[socket.socket]:
    """Listen for data on `port` of the loopback interface, for control on the next; the sockets are the caller's.

    Raises:
        ConflictError: somebody has one of them. ManagerError: the operating system refused for another reason.

    """
    made: list[socket.socket] = []
    for number in (port, port + 1):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        made.append(sock)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of before may still linger
            sock.bind((LOOPBACK, number))
            sock.listen(BACKLOG)
        except OSError as error:
            for each in made:
                each.close()
            kind = ConflictError if error.errno == errno.EADDRINUSE else ManagerError
            why = error.strerror or error
            raise kind(f"cannot listen on {LOOPBACK} port {number}: {why}; nothing was started") from error
    return made


def listen_on_path(
    path: Path, owner: Owner, mode: int, kind: socket.SocketKind = socket.SOCK_STREAM, backlog: int = BACKLOG
) -> socket.socket:
    """Return a listening socket at `path`, `owner`'s; whatever was there is gone. Raises OSError."""
    try:
        path.unlink(missing_ok=True)
    except IsADirectoryError:  # its owner's doing
        remove_tree(path)
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        sock.bind(str(path))
        os.chown(path, owner.uid, owner.gid)
        path.chmod(mode)
        sock.listen(backlog)  # not before: until then nobody can connect, whatever the mode was
    except OSError:
        sock.close()
        raise
    return sock


def parse_mode(text: str) -> int:
    """Return the permissions written in octal.

    Raises:
        UsageError: not octal, or more than 777.

    """
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= _MODE_LIMIT:
        raise UsageError(f"'{text[:80]}' is no mode: write permissions in octal, as in 0660")
    return mode


class SocketFolder:
    """The folder of one vTPM's sockets, `<runtime>/vtpm/<UUID>/`."""

    def __init__(self, sockets: Path, vtpm: UUID, frontend: str) -> None:
        """Name the folder; nothing is made yet."""
        self.path = sockets / str(vtpm)
        self.names = LISTENERS_OF[frontend]
        self._told = _ENDPOINTS.get(frontend, self.names[0])

    def socket_path(self, name: str) -> Path:
        """Return where the socket `name` ("data", "control", "ring") lies."""
        return self.path / _SOCKET_NAMES[name]

    @property
    def endpoint(self) -> Path:
        """The socket a guest is told; of a device the file that says which it is."""
        return self.socket_path(self._told)

    def listen(self, owner: Owner, mode: int) -> list[socket.socket]:
        """Make the folder and its sockets anew, in the order of `names`; the sockets belong to the caller.

        Raises:
            ManagerError: the operating system refused.

        """
        made: list[socket.socket] = []
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            # A folder of an earlier start is its owner's: while it were so, he could put a link in the place of a
            # socket that we are about to give him, and be given what it points to.
            os.chown(self.path, os.geteuid(), os.getegid(), follow_symlinks=False)
            self.path.chmod(0o700)
            # directory and sockets get their last owner and mode before anybody can connect
            for name in self.names:
                kind = socket.SOCK_SEQPACKET if name == "ring" else socket.SOCK_STREAM
                made.append(listen_on_path(self.socket_path(name), owner, mode, kind))
            os.chown(self.path, owner.uid, owner.gid)
            self.path.chmod(0o700 | (0o050 if mode & 0o070 else 0) | (0o005 if mode & 0o007 else 0))
        except OSError as error:
            for sock in made:
                sock.close()
            raise ManagerError(
                f"cannot make the sockets in {self.path}: {error.strerror or error}; nothing was started"
            ) from error
        return made

    def make(self) -> None:
        """Make the folder alone, for everybody to look into and nobody but us to write. Raises OSError."""
        remove_tree(self.path)  # one that is left of another front end was its owner's: there may be links of his in it
        self.path.mkdir(mode=0o700)
        self.path.chmod(0o755)

    def remove(self) -> None:
        """Remove the folder and what is in it, which is its owner's: it may take seconds. What fails is logged."""
        try:
            remove_tree(self.path)
        except OSError as error:
            _log.warning("%s was not removed: %s. It is of no use to anybody; look what is in it", self.path, error)
