"""A descriptor kept back for the moment when there is no other."""

import os
import socket


class Reserve:
    """One descriptor kept back for when there is none left."""

    def __init__(self) -> None:
        """Take it."""
        self._descriptor = self._open()

    @staticmethod
    def _open() -> int:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def spend_on(self, listener: socket.socket) -> None:
        """Take one connection off the queue and close it."""
        os.close(self._descriptor)
        try:
            listener.accept()[0].close()
        finally:
            self._descriptor = self._open()

    def close(self) -> None:
        """Give it up."""
        os.close(self._descriptor)
