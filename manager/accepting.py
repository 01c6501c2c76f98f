"""Accepting the clients of a listening socket, no more at once than there is room for, where there is a limit."""

import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import trio

_log = logging.getLogger("vtpm.accept")
_NO_DESCRIPTORS_SECONDS: Final = 0.2  # until the next try: who waits keeps waiting, and nobody spins


async def accept_clients(
    listener: socket.socket,
    serve: Callable[[socket.socket], Awaitable[None]],
    who: str,
    room: trio.Semaphore | None = None,
) -> None:
    """Serve each client in a task until cancelled, or trio is told that `listener` closes; then those there are.

    `serve` owns the (non-blocking) socket that it is given, and releases `room` at its end, where there is one.
    """
    async with trio.open_nursery() as nursery:
        while listener.fileno() >= 0:
            try:
                await trio.lowlevel.wait_readable(listener)
            except trio.ClosedResourceError:
                return
            if room is not None:
                await room.acquire()  # before the accept: those who wait cost no descriptor
            try:
                client, _ = listener.accept()
            except OSError as error:
                if room is not None:
                    room.release()
                if not isinstance(error, BlockingIOError):
                    _log.warning("cannot accept %s: %s", who, error)
                    await trio.sleep(_NO_DESCRIPTORS_SECONDS)
                continue
            client.setblocking(False)
            nursery.start_soon(serve, client)
