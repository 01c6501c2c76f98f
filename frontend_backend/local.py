"""The local transport of the ring: a sealed memfd page and a doorbell.

The page cannot be shrunk under a reader, grown, or re-sealed: whoever receives the descriptors checks the seals
before mapping it. The doorbell is a SEQPACKET socket that never blocks: a full one is as good as rung, and its
end of file says that the peer is gone.
"""

import fcntl
import mmap
import os
import socket
from contextlib import suppress
from typing import Final, Self

from frontend_backend.errors import NotARingError
from frontend_backend.tpmif import PAGE_SIZE

SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # fcntl(2): size fixed for good
_DING: Final = b"\0"
_DRAIN_LIMIT: Final = 64  # rings swallowed in one go: a peer that rings without pause must not keep us in a loop


class LocalRing:
    """One end of a local ring: `page` is shared with the peer, the doorbell belongs to this end alone."""

    def __init__(self, memfd: int, doorbell: socket.socket) -> None:
        """Map a checked page; use `pair` or `adopt` to make one."""
        self._memfd: int | None = memfd
        self._map = mmap.mmap(memfd, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self.page = memoryview(self._map)
        self._doorbell = doorbell
        self._doorbell.setblocking(False)

    @classmethod
    def pair(cls) -> tuple[Self, Self]:
        """Make a fresh ring and return its (front, back) ends."""
        memfd = os.memfd_create("vtpm-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(memfd, PAGE_SIZE)
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, SEALS)
        front, back = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(memfd, front), cls(os.dup(memfd), back)

    @classmethod
    def adopt(cls, memfd: int, doorbell: int) -> Self:
        """Take over two descriptors that a peer handed us; they are closed if they are not a ring.

        Raises:
            NotARingError: no memfd, wrong size, missing seals, or no connected SEQPACKET socket.

        """
        sock = None
        try:
            cls._check_page(memfd)
            sock = socket.socket(fileno=doorbell)
            cls._check_doorbell(sock)
            return cls(memfd, sock)
        except (OSError, NotARingError) as error:
            if sock is not None:
                sock.detach()
            for descriptor in (memfd, doorbell):
                with suppress(OSError):
                    os.close(descriptor)
            if isinstance(error, NotARingError):
                raise
            raise NotARingError(f"not a ring: {error}") from error

    @staticmethod
    def _check_page(memfd: int) -> None:
        if fcntl.fcntl(memfd, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise NotARingError("the page is not sealed against shrinking, growing and further seals")
        if os.fstat(memfd).st_size != PAGE_SIZE:
            raise NotARingError(f"the page has {os.fstat(memfd).st_size} bytes, not {PAGE_SIZE}")

    @staticmethod
    def _check_doorbell(sock: socket.socket) -> None:
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            raise NotARingError("the doorbell is not a SEQPACKET Unix socket")
        sock.getpeername()  # ENOTCONN here rather than at every ring

    def ring(self) -> None:
        """Wake the peer. Never blocks; a peer that is gone is noticed by `drain`."""
        with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            # O_NONBLOCK alone would not do: whoever handed the socket over may keep a copy and clear it
            self._doorbell.send(_DING, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def drain(self) -> bool:
        """Swallow what has been rung. Returns False once the peer's end is gone.

        At most _DRAIN_LIMIT rings go in one call; what is left makes the doorbell readable again.
        """
        for _ in range(_DRAIN_LIMIT):
            try:
                if not self._doorbell.recv(len(_DING), socket.MSG_DONTWAIT):
                    return False
            except BlockingIOError:
                return True
            except ConnectionResetError:
                return False
        return True

    def fileno(self) -> int:
        """Return the doorbell's descriptor, to wait on."""
        return self._doorbell.fileno()

    def descriptors(self) -> tuple[int, int]:
        """Return (page, doorbell) to hand this end over; they stay ours.

        Raises:
            NotARingError: `forget_page_descriptor` was called before.

        """
        if self._memfd is None:
            raise NotARingError("this end gave its page descriptor up")
        return self._memfd, self._doorbell.fileno()

    def forget_page_descriptor(self) -> None:
        """Close the page's descriptor; the mapping stays. Leaves one descriptor per ring."""
        if self._memfd is not None:
            os.close(self._memfd)
            self._memfd = None

    def close(self) -> None:
        """Close both descriptors and unmap the page.

        Raises:
            BufferError: a slice of `page` is still in use; the peer is told all the same.

        """
        self._doorbell.close()
        self.forget_page_descriptor()
        self.page.release()
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
