"""trio adapters: datagrams with descriptors, and a ring's doorbell."""

import socket

import trio

from frontend_backend.descriptors import MAX_DATAGRAM, ancillary_space, checked_message, send_message
from frontend_backend.local import LocalRing


async def send_message_trio(sock: socket.socket, data: bytes, descriptors: tuple[int, ...] = ()) -> None:
    """Send one datagram on a non-blocking socket, waiting for room; see descriptors.send_message.

    Other tasks run first, also where there is room: a peer that never pauses must not hold the loop.
    """
    await trio.lowlevel.checkpoint()
    while True:
        try:
            send_message(sock, data, descriptors)
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)
        else:
            return


async def receive_message_trio(
    sock: socket.socket, max_bytes: int = MAX_DATAGRAM, max_descriptors: int = 0
) -> tuple[bytes, list[int]]:
    """Receive one datagram on a non-blocking socket; see descriptors.receive_message.

    Other tasks run first, as in send_message_trio. Once a datagram is read, nothing can cancel: none is lost.
    """
    await trio.lowlevel.checkpoint()
    while True:
        try:
            data, ancillary, flags, _ = sock.recvmsg(
                max_bytes, ancillary_space(max_descriptors), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
        else:
            return checked_message(data, ancillary, flags)


async def wait_doorbell(ring: LocalRing) -> bool:
    """Wait until the ring's doorbell has been rung. Returns False once the peer's end is gone."""
    await trio.lowlevel.wait_readable(ring.fileno())
    return ring.drain()
