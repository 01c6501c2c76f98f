"""One descriptor kept back for when there is none left, so that a full table never makes a loop spin."""

import os
import socket
from contextlib import suppress


class Reserve:
    """A descriptor that is given up for a moment to take a connection off a listener's queue."""

    def __init__(self) -> None:
        """Keep one back.

        Raises:
            OSError: there is none.

        """
        self._descriptor: int | None = None
        self._keep()

    def _keep(self) -> None:
        self._descriptor = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def spend_on(self, listener: socket.socket) -> None:
        """Take one connection off the non-blocking `listener`'s queue and close it; never raises."""
        self.close()
        # What cannot be had now, because the whole system has none left, is tried again at the next event.
        with suppress(OSError):
            listener.accept()[0].close()
        with suppress(OSError):
            self._keep()

    def close(self) -> None:
        """Give it up. May be repeated."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
