"""One device's bridge in a process of its own, between a page that the test holds and a vTPM's ring: no xenstore.

Page and channel are a memfd and two eventfds that both processes have, in place of a grant and an event channel.
"""

import logging
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import trio

from frontend_backend.ring import FrontRing
from frontend_backend.tpmif import PAGE_SIZE
from frontend_backend.xen_connection_trio import Link
from frontend_backend.xen_ledger import Connection, Ledgers
from frontend_backend.xen_pace import Voice
from frontend_backend.xen_terms import Place, Terms
from manager.xen_backend_bindings import take_ring


class SharedPages:
    """A page of the test's, mapped again. See xen_kernel.MappedPages."""

    def __init__(self, memfd: int) -> None:
        self.page = memoryview(mmap.mmap(memfd, PAGE_SIZE))

    def unmap(self) -> None:
        self.page.release()


class SharedGrants:
    """See xen_kernel.Grants: whatever is asked for, it is the one page there is."""

    def __init__(self, memfd: int) -> None:
        self._memfd = memfd

    def map(self, domain: int, references: Sequence[int]) -> SharedPages:
        del domain, references
        return SharedPages(self._memfd)

    def close(self) -> None:
        """The page ends with its process."""


class SharedChannel:
    """See xen_kernel.EventChannels: one channel, `heard` here and `rung` there."""

    def __init__(self, heard: int, rung: int) -> None:
        self._heard, self._rung = heard, rung

    def bind_interdomain(self, domain: int, remote_port: int) -> int:
        del domain
        return remote_port

    def bind_unbound(self, domain: int) -> int:
        raise NotImplementedError(domain)

    def notify(self, port: int) -> None:
        del port
        os.eventfd_write(self._rung, 1)

    def unbind(self, port: int) -> None:
        """The channel ends with its process."""

    def pending(self) -> list[int]:
        try:
            os.eventfd_read(self._heard)
        except BlockingIOError:
            return []
        return [1]

    def unmask(self, port: int) -> None:
        """An eventfd is never masked."""

    def fileno(self) -> int:
        return self._heard

    def close(self) -> None:
        """The descriptors are the test's."""


class BridgedGuest:
    """Whoever submits commands on the page, and sleeps until he is rung."""

    def __init__(self, memfd: int, heard: int, rung: int) -> None:
        self._page = memoryview(mmap.mmap(memfd, PAGE_SIZE))
        self._front = FrontRing(self._page)
        self._heard, self._rung = heard, rung

    def transact(self, packet: bytes) -> bytes:
        self._front.submit(packet)
        os.eventfd_write(self._rung, 1)
        while (answer := self._front.poll()) is None:
            os.eventfd_read(self._heard)
        return answer


async def _bridge(endpoint: Path, marks: Path, memfd: int, heard: int, rung: int) -> None:
    link = Link(
        Place(0, 1, 0),
        Connection(1, 0, 1, 1),
        lambda: Terms(compat=True),
        lambda: SharedChannel(heard, rung),
        lambda: SharedGrants(memfd),
        Ledgers(marks),
        Voice(logging.getLogger("vtpm.xen"), "1/0"),
    )
    await link.run(lambda: take_ring(endpoint))


@contextmanager
def bridged(endpoint: Path) -> Iterator[tuple[BridgedGuest, int]]:
    """A guest of the vTPM whose ring listener is `endpoint`, and the pid of its bridge."""
    with tempfile.TemporaryDirectory(prefix="xb") as marks:
        memfd = os.memfd_create("guest")
        os.ftruncate(memfd, PAGE_SIZE)
        to_bridge, to_guest = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0)
        child = os.fork()
        if not child:
            try:
                trio.run(_bridge, endpoint, Path(marks), memfd, to_bridge, to_guest)
            finally:
                os._exit(1)
        try:
            yield BridgedGuest(memfd, to_guest, to_bridge), child
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)
            for descriptor in (memfd, to_bridge, to_guest):
                os.close(descriptor)
