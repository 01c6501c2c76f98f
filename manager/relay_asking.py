"""One question to an instance, and what its end tells of a question that was not answered.

Linux tells whether an instance had taken a request when it went: closing a Unix socket with something unread resets
it, so a reset says that the request was not read, and it is asked of the next instance. An end of file says that it
was read; whether it was executed nobody knows, and the answer is failure, unless saying it twice is the same as once.
Source: unix_release_sock in linux/net/unix/af_unix.c (ECONNRESET where the receive queue is not empty).
"""

import array
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from manager.relay_cutting import MAX_BODY, answer_size, failure, form_of

_READ: Final = 64 * 1024
_MAX_ANSWER: Final = MAX_BODY + 1024
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0  # seconds between looks for an instance that is away


class NotTakenError(Exception):
    """The instance did not take the request: it is away, or went without reading it."""


class UnknownError(Exception):
    """The instance took the request and went without an answer."""


class ClosedError(Exception):
    """Nobody waits for the answer any more: the client has gone, and its line with it."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where an instance listens. `data` is None where there is no data socket."""

    control: Path
    data: Path | None


async def persist(
    once: Callable[[bytes], Awaitable[bytes]], request: bytes, patience: float, *, control: bool
) -> bytes:
    """Ask until it is known what became of the request; waits at most `patience` seconds for an instance to come."""
    deadline, pause = trio.current_time() + patience, _FIRST_PAUSE
    while True:
        try:
            return await once(request)
        except UnknownError:
            if not (control and form_of(request).repeatable):
                return failure(request, control=control)
        except ClosedError:
            return failure(request, control=control)
        except NotTakenError:
            pass
        if trio.current_time() + pause > deadline:
            return failure(request, control=control)
        await trio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


async def ask(sock: trio.socket.SocketType, request: bytes, *, control: bool, descriptor: int | None = None) -> bytes:
    """Say one thing and return the whole answer.

    Raises:
        NotTakenError, UnknownError: the instance went.

    """
    try:
        sent = 0
        if descriptor is not None:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
            sent = await sock.sendmsg([request], rights)
        while sent < len(request):
            sent += await sock.send(request[sent:])
    except (OSError, trio.ClosedResourceError):
        raise NotTakenError from None  # a part of a request is never executed
    answer = bytearray()
    while (size := answer_size(request, answer, control=control)) is None or len(answer) < size:
        if (size or 0) > _MAX_ANSWER or len(answer) > _MAX_ANSWER:
            raise UnknownError
        try:
            data = await sock.recv(_READ)
        except ConnectionResetError:
            if answer:
                raise UnknownError from None
            raise NotTakenError from None
        except (OSError, trio.ClosedResourceError):
            raise UnknownError from None
        if not data:
            raise UnknownError
        answer += data
    return bytes(answer)


async def connected(path: Path) -> trio.socket.SocketType:
    """Return a connection. Raises NotTakenError."""
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await sock.connect(str(path))
    except OSError as error:
        sock.close()
        raise NotTakenError(f"{path}: {error.strerror}") from None
    except BaseException:
        sock.close()
        raise
    return sock
