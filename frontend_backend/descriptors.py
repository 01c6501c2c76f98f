"""Datagrams with file descriptors over SEQPACKET Unix sockets (SCM_RIGHTS, unix(7))."""

import array
import os
import select
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from frontend_backend.errors import ChannelClosedError, MessageTruncatedError

MAX_DATAGRAM: Final = 128 * 1024  # bytes; below the kernel's default socket buffer of 212,992
MAX_DESCRIPTORS: Final = 32  # far below the kernel's 253 (SCM_MAX_FD); no message needs more

_INT_SIZE: Final = array.array("i").itemsize


@dataclass(frozen=True, slots=True)
class PeerCredentials:
    """Who is at the other end of a Unix socket, as the kernel knows it (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int
    gid: int

    CODEC: ClassVar[struct.Struct] = struct.Struct("iII")  # struct ucred

    @classmethod
    def of(cls, sock: socket.socket) -> "PeerCredentials":
        """Ask the kernel about the connected peer of `sock`."""
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, cls.CODEC.size)
        return cls(*cls.CODEC.unpack(raw))


assert PeerCredentials.CODEC.size == 12, "unix(7): struct ucred is pid, uid and gid"


def send_message(sock: socket.socket, data: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send one datagram of at most MAX_DATAGRAM bytes, with copies of `descriptors` (the caller keeps its own).

    Raises:
        ValueError: the datagram or the list of descriptors is too long.
        OSError: what sendmsg(2) says.

    """
    if not 0 < len(data) <= MAX_DATAGRAM or len(descriptors) > MAX_DESCRIPTORS:
        raise ValueError(f"a datagram of {len(data)} bytes with {len(descriptors)} descriptors is not sendable")
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def ancillary_space(max_descriptors: int) -> int:
    """Return the bytes that recvmsg(2) needs for that many descriptors, and for not one more.

    CMSG_SPACE rounds up to 8 bytes: with it, an odd number of descriptors would let one more in (cmsg(3)).
    """
    return socket.CMSG_LEN(max_descriptors * _INT_SIZE)


def receive_message(
    sock: socket.socket, max_bytes: int = MAX_DATAGRAM, max_descriptors: int = 0
) -> tuple[bytes, list[int]]:
    """Receive one datagram; the descriptors (close-on-exec) belong to the caller.

    Raises:
        ChannelClosedError: the peer has closed.
        MessageTruncatedError: the peer sent more bytes or descriptors than allowed; those that came are closed.
        OSError: what recvmsg(2) says.

    """
    data, ancillary, flags, _ = sock.recvmsg(max_bytes, ancillary_space(max_descriptors), socket.MSG_CMSG_CLOEXEC)
    return checked_message(data, ancillary, flags)


def is_readable(descriptor: int, seconds: float | None = 0.0) -> bool:
    """Wait at most `seconds` (None: for ever) until something is there, or the peer is gone; returns whether."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def descriptors_in(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors among what recvmsg(2) returned beside the bytes; they belong to the caller."""
    received = array.array("i")
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received.frombytes(payload[: len(payload) - len(payload) % _INT_SIZE])
    return list(received)


def checked_message(data: bytes, ancillary: Iterable[tuple[int, int, bytes]], flags: int) -> tuple[bytes, list[int]]:
    """Turn what recvmsg(2) returned into (data, descriptors); see receive_message."""
    descriptors = descriptors_in(ancillary)
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(descriptors)
        raise MessageTruncatedError("the peer sent more bytes or descriptors than this message may have")
    if not data:
        close_all(descriptors)
        raise ChannelClosedError
    return data, descriptors


def close_all(descriptors: Iterable[int]) -> None:
    """Close every descriptor of a list."""
    for descriptor in descriptors:
        os.close(descriptor)
