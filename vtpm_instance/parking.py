"""Hibernated vTPMs in the keeper: their listening sockets and open connections, watched until a guest wants something.

One epoll descriptor watches all of them, level-triggered, and nothing is ever read: what a guest has sent lies in its
socket until the next instance takes it. A vTPM that is wanted is not watched any more, so that it is told of once; the
manager has it woken, or has it watched again. A connection whose guest has gone without a word left unread is closed;
it wakes nobody.
"""

import array
import fcntl
import os
import select
import socket
import termios
from collections.abc import Iterable
from typing import Final

from frontend_backend.descriptors import close_all, receive_message, send_message
from frontend_backend.errors import ChannelClosedError, MessageTruncatedError
from frontend_backend.messages_keeper import Wanted, encode_keeper
from vtpm_instance.errors import BadRequestError
from vtpm_instance.handover import MAX_BYTES, MAX_HANDED, Handed, check, unpack
from vtpm_instance.journal import note
from vtpm_instance.kept import KeptInstance

_AT_ONCE: Final = 256  # events in one turn: other requests are served between two
# of what an ended instance left on its doorbell, connections among it: more than its socket holds. One that was taken
# over may have handed its end to somebody who goes on ringing, faster than we read.
MOST_MESSAGES: Final = 400
_GONE: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class Parking:
    """Watches what sleeps, and tells the manager of what is wanted."""

    def __init__(self) -> None:
        """Watch nothing yet."""
        self._epoll = select.epoll()
        self._watched: dict[int, KeptInstance] = {}
        self._untold: dict[KeptInstance, None] = {}  # wanted, in that order, while the manager could not be told
        self._notices: socket.socket | None = None

    def fileno(self) -> int:
        """Return the descriptor that is readable when `on_event` has something to do."""
        return self._epoll.fileno()

    # what sleeps

    def fall_asleep(self, kept: KeptInstance) -> int:
        """Take in what an instance left that has ended, and watch; returns how many connections it left."""
        kept.connections = _left_in(kept.doorbell)
        close_all((kept.page, kept.doorbell, kept.pidfd))
        kept.page = kept.doorbell = kept.pidfd = -1
        kept.asleep = True
        self.watch(kept)
        return len(kept.connections)

    def watch(self, kept: KeptInstance) -> None:
        """Watch what a sleeping one has, from now on or again."""
        self._untold.pop(kept, None)
        for descriptor in (*kept.listeners.values(), *(each.watched for each in kept.connections)):
            if descriptor not in self._watched:
                self._watched[descriptor] = kept
                self._epoll.register(descriptor, select.EPOLLIN | select.EPOLLRDHUP)

    def leave(self, kept: KeptInstance) -> None:
        """Watch it no longer: it is woken, or forgotten."""
        self._untold.pop(kept, None)
        for descriptor in (*kept.listeners.values(), *(each.watched for each in kept.connections)):
            if self._watched.pop(descriptor, None) is not None:
                self._epoll.unregister(descriptor)

    # what is wanted

    def tell(self, notices: socket.socket, asleep: Iterable[KeptInstance]) -> None:
        """Tell of what is wanted on this socket from now on.

        All that sleep are watched again: what another manager was told of and did nothing about, or could not wake, is
        told again.
        """
        self._drop_notices()
        for kept in asleep:
            self.watch(kept)
        notices.setblocking(False)
        self._notices = notices
        self._epoll.register(notices.fileno(), select.EPOLLIN)
        self._flush()

    def on_event(self) -> None:
        """Look at what has happened."""
        for descriptor, events in self._epoll.poll(0, _AT_ONCE):
            if self._notices is not None and descriptor == self._notices.fileno():
                self._on_notices(events)
                continue
            kept = self._watched.get(descriptor)
            if kept is not None:
                self._on_guest(kept, descriptor, events)
        self._flush()

    def _on_guest(self, kept: KeptInstance, descriptor: int, events: int) -> None:
        connection = next((each for each in kept.connections if each.watched == descriptor), None)
        if connection is not None and events & _GONE and not _unread(descriptor):
            del self._watched[descriptor]
            self._epoll.unregister(descriptor)
            kept.connections.remove(connection)
            close_all(connection.descriptors)
            return
        self.leave(kept)
        self._untold[kept] = None

    def _on_notices(self, events: int) -> None:
        if events & (_GONE | select.EPOLLIN):  # the manager never says anything here
            self._drop_notices()

    def _flush(self) -> None:
        """Tell of what is wanted; what does not go out now follows when there is room."""
        while self._untold and self._notices is not None:
            kept = next(iter(self._untold))
            try:
                send_message(self._notices, encode_keeper(Wanted(kept.vtpm.bytes, kept.lease)))
            except BlockingIOError:
                self._epoll.modify(self._notices.fileno(), select.EPOLLIN | select.EPOLLOUT)
                return
            except OSError:
                self._drop_notices()  # the next manager is told
                return
            del self._untold[kept]
        if self._notices is not None:
            self._epoll.modify(self._notices.fileno(), select.EPOLLIN)

    def _drop_notices(self) -> None:
        if self._notices is not None:
            self._epoll.unregister(self._notices.fileno())
            self._notices.close()
            self._notices = None

    def close(self) -> None:
        """Watch nothing any more; the descriptors of what sleeps stay open."""
        self._drop_notices()
        self._epoll.close()


def _unread(descriptor: int) -> int:
    """Return how many bytes wait to be read (ioctl_tty(2), FIONREAD), without looking at them."""
    size = array.array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, size)
    return size[0]


def _left_in(doorbell: int) -> list[Handed]:
    """Return the connections that an ended instance sent over its ring's doorbell, of which we have the other end."""
    found: list[Handed] = []
    with socket.socket(fileno=os.dup(doorbell)) as sock:
        sock.setblocking(False)
        # An instance that ended with a ring unheard has reset the socket. The kernel tells of that once, and before
        # what was sent; asking for it here takes it out of the way.
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        for _ in range(MOST_MESSAGES):
            try:
                data, descriptors = receive_message(sock, MAX_BYTES, MAX_HANDED)
            except (ChannelClosedError, BlockingIOError):
                break
            except MessageTruncatedError as error:
                note(f"connections that were handed over are lost: {error}")
                continue
            if descriptors:
                found += _checked(data, descriptors, have=bool(found))
    return found


def _checked(data: bytes, descriptors: list[int], *, have: bool) -> list[Handed]:
    """Return the connections in a datagram; what is none is closed. An instance hands over once."""
    try:
        if have:
            raise BadRequestError("connections were handed over already")
        handed = unpack(data, descriptors)
        for each in handed:
            check(each)
    except BadRequestError as error:
        note(f"what an instance handed over is dropped: {error}")
        close_all(descriptors)
        return []
    return handed
