"""The keeper's side of an instance-to-be: a process of the spawner's that waits for its order on a channel of its own.

It serves one vTPM or none. One that is gone has not seen the order, so that another may be handed it.
"""

import os
import signal
import socket
from collections import deque
from collections.abc import Sequence
from typing import Final, Self

from frontend_backend.descriptors import is_readable, send_message

# The kernel counts the descriptors that are on their way to somebody, for all processes of a user together, and lets
# nobody send one while there are more than its own RLIMIT_NOFILE (ETOOMANYREFS): 64 in an instance. An order has at
# most 9 (spawn). Without root instances are of the keeper's user.
UNTAKEN: Final = 4  # orders on their way at once
_TAKEN_SECONDS: Final = 5.0  # waited for one that does not take its order: is it stopped? Others go on then


class Standby:
    """A process, child of this one, that waits for its order. `pid` and `pidfd` are the instance's later."""

    def __init__(self, pid: int, pidfd: int, sock: socket.socket) -> None:
        """Take over the pidfd and our end of its channel."""
        self.pid, self._pidfd, self._sock = pid, pidfd, sock

    @classmethod
    def of(cls, pid: int, sock: socket.socket) -> Self:
        """Keep a child of this process (so nobody else gets its number) and the channel to it; both end on an error.

        Raises:
            OSError: no more descriptors.

        """
        try:
            return cls(pid, os.pidfd_open(pid), sock)
        except OSError:
            sock.close()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    def hand(self, order: bytes, descriptors: Sequence[int]) -> tuple[int, int, socket.socket]:
        """Hand it its order; returns its pid, its pidfd and our end of the channel, which are the caller's.

        It is an instance now. It closes its end when it has taken the order.

        Raises:
            OSError: it has not got the order, and is still this object's: `end` it.

        """
        send_message(self._sock, order, descriptors)
        return self.pid, self._pidfd, self._sock

    def end(self) -> None:
        """End it, and wait for its end."""
        self._sock.close()
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        os.close(self._pidfd)


class Untaken:
    """The channels of orders that were handed over and may not have been taken yet: UNTAKEN at most."""

    def __init__(self) -> None:
        """Know of none."""
        self._socks: deque[socket.socket] = deque()

    def add(self, sock: socket.socket) -> None:
        """Take over the channel of an order."""
        self._socks.append(sock)

    def make_room(self) -> None:
        """Wait until one more order may be on its way."""
        while len(self._socks) >= UNTAKEN:
            with self._socks.popleft() as sock:
                is_readable(sock.fileno(), _TAKEN_SECONDS)  # it says nothing, and closes its end

    def close(self) -> None:
        """Forget them; an order that is on its way arrives all the same."""
        for sock in self._socks:
            sock.close()
        self._socks.clear()
