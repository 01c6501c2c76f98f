"""Keeps the far side's connections to instances over a restart of the relay: a process of its own, without keys.

An instance takes the end of QEMU's control connection for the end of QEMU's machine, and switches the TPM off. So the
relay's process leaves copies of the descriptors here, each with a note of what it is; its successor takes them over.
The holder never reads or writes them. It goes when nobody has asked for them for `LINGER_SECONDS`: then they end.

    python -I -m manager.relay_holder DESCRIPTOR-OF-ITS-LISTENER
"""

import errno
import os
import socket
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from frontend_backend.descriptors import PeerCredentials, close_all, receive_message, send_message
from frontend_backend.errors import ChannelClosedError, MessageTruncatedError

_CONNECT_SECONDS: Final = 10.0
_BACKLOG_FULL: Final = 0.01  # seconds until the next try
LINGER_SECONDS: Final = 120.0  # that a relay may be away; longer than any restart
KEY_BYTES: Final = 18  # a session and one of its channels
MAX_ITEMS: Final = 4096  # two a vTPM
MAX_NOTE: Final = 1024  # bytes
DESCRIPTORS: Final = 2  # of an item at most
# the first byte of each message; then a key, then a note
PUT, NOTE, DROP, TAKE, ITEM, END = b"P", b"N", b"D", b"T", b"I", b"E"


class Holder:
    """What is kept, and the one client that is served."""

    def __init__(self, listener: socket.socket) -> None:
        """Serve `listener`."""
        self._listener = listener
        self._items: dict[bytes, tuple[bytes, list[int]]] = {}

    def run(self) -> None:
        """Serve one client after the other until none has come for long."""
        self._listener.settimeout(LINGER_SECONDS)
        while True:
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                return
            with client:
                if PeerCredentials.of(client).uid in (0, os.geteuid()):
                    self._serve(client)

    def _serve(self, client: socket.socket) -> None:
        while True:
            try:
                data, descriptors = receive_message(client, 1 + KEY_BYTES + MAX_NOTE, DESCRIPTORS)
            except (ChannelClosedError, ConnectionResetError):
                return
            except MessageTruncatedError:
                continue  # out of descriptors: what was to be kept is not, and ends with its relay
            try:
                self._do(client, data[:1], data[1 : 1 + KEY_BYTES], data[1 + KEY_BYTES :], descriptors)
            except OSError:
                return

    def _do(self, client: socket.socket, what: bytes, key: bytes, note: bytes, descriptors: list[int]) -> None:
        if what == PUT and (key in self._items or len(self._items) < MAX_ITEMS):
            self._drop(key)
            self._items[key] = note, descriptors
            return
        close_all(descriptors)
        if what == NOTE and key in self._items:
            self._items[key] = note, self._items[key][1]
        elif what == DROP:
            self._drop(key)
        elif what == TAKE:
            for each, (said, kept) in self._items.items():
                send_message(client, ITEM + each + said, kept)
            send_message(client, END)

    def _drop(self, key: bytes) -> None:
        _, descriptors = self._items.pop(key, (b"", []))
        close_all(descriptors)


class Held:
    """The relay's side: what it leaves with its holder. Nothing here waits long: the holder does next to nothing."""

    def __init__(self, sock: socket.socket) -> None:
        """Speak on `sock`; see `reach`."""
        self._sock = sock

    @classmethod
    def reach(cls, path: Path) -> "Held":
        """Return a connection to the holder at `path`, started where there is none. Raises OSError."""
        sock = _connect(path)
        if sock is None:
            take_away_dead(path)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with listener:
                listener.bind(str(path))
                path.chmod(0o600)
                listener.listen(1)
                _start(listener.fileno())
            sock = _connect(path)
            if sock is None:
                raise ConnectionRefusedError(f"nobody listens at {path}")
        return cls(sock)

    def put(self, key: bytes, note: bytes, descriptors: tuple[int, ...]) -> None:
        """Leave descriptors, in place of those that this key has. Raises OSError."""
        send_message(self._sock, PUT + key + note, descriptors)

    def note(self, key: bytes, note: bytes) -> None:
        """Replace the note. Raises OSError."""
        send_message(self._sock, NOTE + key + note)

    def drop(self, key: bytes) -> None:
        """Let go of one. Raises OSError."""
        send_message(self._sock, DROP + key)

    def take(self) -> list[tuple[bytes, bytes, list[int]]]:
        """Return copies of everything that is kept: key, note, descriptors. Raises OSError."""
        send_message(self._sock, TAKE)
        found: list[tuple[bytes, bytes, list[int]]] = []
        while True:
            try:
                data, descriptors = receive_message(self._sock, 1 + KEY_BYTES + MAX_NOTE, DESCRIPTORS)
            except ChannelClosedError:
                raise ConnectionResetError("the holder ended") from None
            if data[:1] == END:
                return found
            found.append((data[1 : 1 + KEY_BYTES], data[1 + KEY_BYTES :], descriptors))

    def close(self) -> None:
        """Leave it to itself."""
        self._sock.close()


def take_away_dead(path: Path) -> None:
    """Remove a socket that nobody listens at. Raises OSError: it is something else, and stays."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(
                errno.EEXIST, "there is something that is not a socket; it was left as it is", str(path)
            )
        path.unlink()


def _connect(path: Path) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(_CONNECT_SECONDS)
    limit = time.monotonic() + _CONNECT_SECONDS
    try:
        while True:
            try:
                sock.connect(str(path))
                break
            except BlockingIOError:  # the listener's backlog is full: a Unix socket with a time limit does not wait
                if time.monotonic() > limit:
                    raise
                time.sleep(_BACKLOG_FULL)
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise
    return sock


def _start(listener: int) -> None:
    """Start a holder in a session of its own, so that it outlives us."""
    os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-m", "manager.relay_holder", "0"],
        {key: value for key, value in os.environ.items() if key in ("PATH", "LANG", "LC_ALL", "TZ")},
        file_actions=[
            (os.POSIX_SPAWN_DUP2, listener, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_RDWR, 0),
        ],
        setsid=True,
    )


def main() -> int:
    """Run the process."""
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        Holder(listener).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
