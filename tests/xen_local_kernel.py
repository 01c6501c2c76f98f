"""Xen's event channels and grants among the tasks of one process: what `xen_kernel` promises, without Xen.

For adapters that wait on real descriptors, together with a real xenstored (`xenstored_rig`): everybody is domain 0
there. Orders that a kernel could choose between are `xen_simulation`'s business.
"""

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from frontend_backend.tpmif import PAGE_SIZE
from frontend_backend.xen_kernel import ChannelRefusedError, GrantRefusedError


@dataclass(eq=False)
class _Port:
    owner: "LocalChannels"
    number: int
    for_domain: int
    peer: "_Port | None" = None
    masked: bool = False
    pending: bool = False


@dataclass
class LocalXen:
    """What all of them share. `mapped` counts mappings that stand, `offered` pages that are offered."""

    ports: dict[int, _Port] = field(default_factory=dict)
    pages: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # by reference: domain, memfd, page in it
    mapped: int = 0
    offered: int = 0
    next_number: int = 8

    def number(self) -> int:
        self.next_number += 1
        return self.next_number


class LocalChannels:
    """One open evtchn."""

    def __init__(self, xen: LocalXen) -> None:
        self._xen = xen
        self._ports: dict[int, _Port] = {}
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def _add(self, domain: int) -> _Port:
        port = _Port(self, self._xen.number(), domain)
        self._xen.ports[port.number] = self._ports[port.number] = port
        return port

    def bind_unbound(self, domain: int) -> int:
        return self._add(domain).number

    def bind_interdomain(self, domain: int, remote_port: int) -> int:
        remote = self._xen.ports.get(remote_port)
        if remote is None or (remote.peer is not None and remote.peer.number in self._xen.ports):
            raise ChannelRefusedError(f"port {remote_port} of domain {domain} is not offered")
        port = self._add(domain)
        port.peer, remote.peer = remote, port
        self._raise(port)
        return port.number

    @staticmethod
    def _raise(port: _Port) -> None:
        port.pending = True
        if not port.masked:
            os.eventfd_write(port.owner._event, 1)

    def notify(self, port: int) -> None:
        if port not in self._ports:
            raise ChannelRefusedError(f"port {port} is not ours")
        peer = self._ports[port].peer
        if peer is not None and peer.number in self._xen.ports:
            self._raise(peer)

    def unbind(self, port: int) -> None:
        self._ports.pop(port, None)
        self._xen.ports.pop(port, None)

    def pending(self) -> list[int]:
        with suppress(BlockingIOError):
            os.eventfd_read(self._event)
        found = [port for port in self._ports.values() if port.pending and not port.masked]
        for port in found:
            port.pending, port.masked = False, True
        return [port.number for port in found]

    def unmask(self, port: int) -> None:
        if port not in self._ports:
            raise ChannelRefusedError(f"port {port} is not ours")
        self._ports[port].masked = False
        if self._ports[port].pending:
            self._raise(self._ports[port])

    def fileno(self) -> int:
        return self._event

    def close(self) -> None:
        for port in list(self._ports):
            self.unbind(port)
        if self._event >= 0:
            os.close(self._event)
            self._event = -1


class _Pages:
    """Some pages in one memory; `what` is the counter that they are in."""

    def __init__(self, maps: mmap.mmap, references: tuple[int, ...], xen: LocalXen, what: str) -> None:
        self._map, self.references, self._xen, self._what = maps, references, xen, what
        self.page = memoryview(maps)
        setattr(xen, what, getattr(xen, what) + 1)
        self._open = True

    def unmap(self) -> None:
        if self._open:
            self._open = False
            self.page.release()
            setattr(self._xen, self._what, getattr(self._xen, self._what) - 1)
            if self._what == "offered":
                for reference in self.references:
                    os.close(self._xen.pages.pop(reference)[1])

    withdraw = unmap


class LocalOffers:
    """One open gntalloc."""

    def __init__(self, xen: LocalXen) -> None:
        self._xen = xen
        self._offered: list[_Pages] = []

    def offer(self, domain: int, pages: int) -> _Pages:
        memfd = os.memfd_create("grant", os.MFD_CLOEXEC)
        os.ftruncate(memfd, pages * PAGE_SIZE)
        references = []
        for index in range(pages):
            references.append(self._xen.number())
            self._xen.pages[references[-1]] = domain, os.dup(memfd), index
        made = _Pages(mmap.mmap(memfd, pages * PAGE_SIZE), tuple(references), self._xen, "offered")
        os.close(memfd)
        self._offered.append(made)
        return made

    def close(self) -> None:
        for each in self._offered:
            each.withdraw()


class LocalGrants:
    """One open gntdev; maps one page, or pages that were offered together, from the first on or later ones."""

    def __init__(self, xen: LocalXen) -> None:
        self._xen = xen
        self._mapped: list[_Pages] = []

    def map(self, domain: int, references: Sequence[int]) -> _Pages:
        try:
            found = [self._xen.pages[reference] for reference in references]
        except KeyError as error:
            raise GrantRefusedError(f"domain {domain} grants nothing by {error}") from None
        first = found[0][2]
        whole = [index for _, _, index in found] == list(range(first, first + len(found)))
        inodes = {os.fstat(memfd).st_ino for _, memfd, _ in found}
        if not whole or len(inodes) != 1:
            raise GrantRefusedError("these were not offered together")
        mapped = mmap.mmap(found[0][1], len(found) * PAGE_SIZE, offset=first * PAGE_SIZE)
        made = _Pages(mapped, tuple(references), self._xen, "mapped")
        self._mapped.append(made)
        return made

    def close(self) -> None:
        for each in self._mapped:
            each.unmap()
