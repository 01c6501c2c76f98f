"""How bytes reach xenstore: through xenstored's Unix socket, or through the kernel's /dev/xen/xenbus."""

import errno
import os
import socket
import stat
import threading
from typing import Final, Protocol

import trio

from frontend_backend.xen_kernel import XenDeniedError, XenMissingError

SOCKET: Final = "/run/xenstored/socket"
DEVICE: Final = "/dev/xen/xenbus"

_BACKLOG_FULL: Final = 0.01  # seconds until the next try
_READ_SIZE: Final = 1 << 16
"""Bytes asked for at once: a burst of events in one system call."""


class Link(Protocol):
    """A connection that carries whole requests out and any pieces of answers in."""

    name: str
    refuses_single_requests: bool
    """Whether an OSError of `send` is about that one request, and the connection goes on."""
    watches_alone: bool
    """Whether a WATCH or UNWATCH must not be sent before everything that was sent is answered."""

    async def send(self, request: bytes) -> None:
        """Send one whole request. Raises OSError or a trio error of a broken connection."""

    async def receive(self) -> bytes:
        """Return what came, b"" once the other side closed. Raises as `send`."""

    async def aclose(self) -> None:
        """Close."""


class SocketLink:
    """xenstored's own socket: only in the domain xenstored runs in."""

    refuses_single_requests = False
    watches_alone = False

    def __init__(self, stream: trio.SocketStream, name: str) -> None:
        self.name = name
        self._stream = stream

    async def send(self, request: bytes) -> None:
        """See Link."""
        await self._stream.send_all(request)

    async def receive(self) -> bytes:
        """See Link."""
        return bytes(await self._stream.receive_some(_READ_SIZE))

    async def aclose(self) -> None:
        """See Link."""
        await trio.aclose_forcefully(self._stream)


class DeviceLink:
    """The kernel's device, in every domain. It takes a request in one write only, and reads can be waited for.

    A write of a WATCH does not return before xenstored answered (Linux's xenbus_dev_frontend.c), so writes run in a
    thread. One that is given up may still sit in the kernel: the descriptor is closed by whoever is last.

    That write holds the file's mutex (`msgbuffer_mutex`), which the kernel's one thread that receives for the whole
    domain takes to hand out an answer to this file. So a WATCH that is written while an answer is due stops xenstore
    for the whole domain, kernel included, for good (Linux 6.1.192, seen under Xen): `watches_alone`.
    """

    refuses_single_requests = True
    watches_alone = True

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        self._descriptor = descriptor
        self._writing = threading.Lock()
        self._closing = threading.Event()

    async def send(self, request: bytes) -> None:
        """See Link."""
        await trio.to_thread.run_sync(self._write, request, abandon_on_cancel=True)

    async def receive(self) -> bytes:
        """See Link."""
        while True:
            await trio.lowlevel.wait_readable(self._descriptor)
            try:
                return os.read(self._descriptor, _READ_SIZE)
            except BlockingIOError:
                continue

    async def aclose(self) -> None:
        """See Link."""
        trio.lowlevel.notify_closing(self._descriptor)
        self._closing.set()
        self._close_if_last()

    def _write(self, request: bytes) -> None:
        with self._writing:
            if self._closing.is_set():
                raise OSError(errno.EBADF, "closed")
            os.write(self._descriptor, request)
        if self._closing.is_set():
            self._close_if_last()

    def _close_if_last(self) -> None:
        if self._writing.acquire(blocking=False):
            descriptor, self._descriptor = self._descriptor, -1
            self._writing.release()
            if descriptor >= 0:
                os.close(descriptor)


def default_path() -> str:
    """Return where xenstore is: XENSTORED_PATH, else xenstored's socket if there is one, else the kernel's device."""
    named = os.environ.get("XENSTORED_PATH")
    if named:
        return named
    return SOCKET if os.path.exists(SOCKET) else DEVICE


async def _connect_socket(path: str) -> trio.SocketStream:
    """Connect to xenstored; raises OSError.

    Its backlog holds one client. A connect(2) that finds it full says EAGAIN, and nothing tells when there is room:
    trio's own would wait for the socket to be writable, which it is at once, and take it for connected.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        while True:
            try:
                sock.connect(path)
            except BlockingIOError:
                await trio.sleep(_BACKLOG_FULL)
            else:
                return trio.SocketStream(trio.socket.from_stdlib_socket(sock))
    except BaseException:
        sock.close()
        raise


async def connect(path: str) -> Link:
    """Connect to a socket or device.

    Raises:
        XenMissingError: there is nothing; says what to start or where to run.
        XenDeniedError: this process may not use it.

    """
    try:
        if stat.S_ISCHR(os.stat(path).st_mode):
            return DeviceLink(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK), path)
        return SocketLink(await _connect_socket(path), path)
    except PermissionError as error:
        raise XenDeniedError(f"{path}: this process may not use xenstore; it needs to run as root") from error
    except FileNotFoundError as error:
        raise XenMissingError(
            f"{path}: there is no xenstore here. In dom0, start xenstored; in another domain, mount devtmpfs on /dev"
            " (its kernel makes /dev/xen/xenbus). On a machine without Xen there is none."
        ) from error
    except ConnectionRefusedError as error:
        raise XenMissingError(f"{path}: nobody answers there; xenstored has ended. Start it again.") from error
    except OSError as error:
        raise XenMissingError(f"{path}: xenstore cannot be reached: {error.strerror}") from error
