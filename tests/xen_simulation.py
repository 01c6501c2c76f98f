"""Xen's grants and event channels, in memory, behind the Protocols of `frontend_backend.xen_kernel`.

A grant counts its mappings: what is still mapped or bound when everybody has ended is a leak, and `Xen.leaks` lists
it. Withdrawing a mapped page only marks it, as gntalloc's kernel does. A channel whose one end closes leaves the other
unbound again for the same domain; notifications coalesce in one pending bit, and a port that was read stays masked.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from frontend_backend.tpmif import PAGE_SIZE
from frontend_backend.xen_kernel import ChannelRefusedError, GrantRefusedError

Opened = TypeVar("Opened", bound="SimulatedEventChannels | SimulatedGrants | SimulatedOffers")


@dataclass
class Grant:
    """One page that `owner` grants to `domain`."""

    memory: bytearray
    offset: int
    owner: int
    domain: int
    mapped: int = 0
    withdrawn: bool = False


@dataclass(eq=False)
class Port:
    """One end of an event channel. `peer` None: unbound, for `domain` to bind."""

    domain: int
    peer: "tuple[int, int] | None" = None
    pending: bool = False
    masked: bool = False
    holder: "SimulatedEventChannels | None" = None


@dataclass
class Xen:
    """The hypervisor: all domains' grants and ports."""

    domains: set[int] = field(default_factory=lambda: {0})
    grants: dict[tuple[int, int], Grant] = field(default_factory=dict)
    ports: dict[tuple[int, int], Port] = field(default_factory=dict)
    mappings: list["SimulatedMapping"] = field(default_factory=list)
    devices: list[tuple[int, "SimulatedEventChannels | SimulatedGrants | SimulatedOffers"]] = field(
        default_factory=list
    )
    next_reference: int = 8  # the first ones are Xen's own

    def channels(self, domain: int) -> "SimulatedEventChannels":
        return self._opened(domain, SimulatedEventChannels(self, domain))

    def grants_of(self, domain: int) -> "SimulatedGrants":
        return self._opened(domain, SimulatedGrants(self, domain))

    def offers(self, domain: int) -> "SimulatedOffers":
        return self._opened(domain, SimulatedOffers(self, domain))

    def _opened(self, domain: int, device: Opened) -> Opened:
        self.devices.append((domain, device))
        return device

    def free_port(self, domain: int) -> int:
        port = 1
        while (domain, port) in self.ports:
            port += 1
        return port

    def close_port(self, domain: int, number: int) -> None:
        port = self.ports.pop((domain, number), None)
        if port and port.peer:
            other = self.ports.get(port.peer)
            if other:
                other.peer = None  # unbound again, for the same domain

    def notify(self, domain: int, number: int) -> None:
        port = self.ports[domain, number]
        if port.peer:
            self.ports[port.peer].pending = True
            self.wake(port.peer)

    def wake(self, place: tuple[int, int]) -> None:
        port = self.ports[place]
        if port.pending and not port.masked and port.holder:
            port.holder.on_pending()

    def destroy(self, domain: int) -> None:
        """End a domain: all its processes, and what they held."""
        for owner, device in list(self.devices):
            if owner == domain:
                device.close()
        self.domains.discard(domain)
        for grant in self.grants.values():
            if grant.owner == domain:
                grant.withdrawn = True
        self.drop_unmapped()

    def drop_unmapped(self) -> None:
        self.grants = {key: one for key, one in self.grants.items() if one.mapped or not one.withdrawn}

    def leaks(self, domain: int) -> list[str]:
        """Tell what `domain` still has mapped or bound, and what nobody can end any more."""
        left = [f"{one.owner}'s page {one.references} is mapped" for one in self.mappings if one.domain == domain]
        left += [f"port {number} of {owner} is bound" for owner, number in self.ports if owner == domain]
        open_still = [device for owner, device in self.devices if owner == domain and not device.closed]
        return left + [f"{type(device).__name__} is open" for device in open_still]


class SimulatedEventChannels:
    """See xen_kernel.EventChannels."""

    def __init__(self, xen: Xen, domain: int) -> None:
        self._xen, self._domain = xen, domain
        self._own: set[int] = set()
        self._eventfd: int | None = None
        self.closed = False

    def bind_interdomain(self, domain: int, remote_port: int) -> int:
        remote = self._xen.ports.get((domain, remote_port))
        if domain not in self._xen.domains or not remote or remote.peer or remote.domain != self._domain:
            raise ChannelRefusedError(f"port {remote_port} of domain {domain} is not offered")
        number = self._new(Port(domain, (domain, remote_port), pending=True))
        remote.peer = (self._domain, number)
        self._xen.wake((self._domain, number))
        return number

    def bind_unbound(self, domain: int) -> int:
        if domain not in self._xen.domains:
            raise ChannelRefusedError(f"there is no domain {domain}")
        return self._new(Port(domain))

    def _new(self, port: Port) -> int:
        assert not self.closed
        number = self._xen.free_port(self._domain)
        port.holder = self
        self._xen.ports[self._domain, number] = port
        self._own.add(number)
        return number

    def _port(self, number: int) -> Port:
        if number not in self._own:
            raise ChannelRefusedError(f"port {number} is not ours")
        return self._xen.ports[self._domain, number]

    def notify(self, port: int) -> None:
        self._port(port)
        self._xen.notify(self._domain, port)

    def unbind(self, port: int) -> None:
        if port in self._own:
            self._own.discard(port)
            self._xen.close_port(self._domain, port)

    def pending(self) -> list[int]:
        heard = [number for number in sorted(self._own) if self._is_heard(number)]
        for number in heard:
            port = self._port(number)
            port.pending, port.masked = False, True
        if self._eventfd is not None:
            try:
                os.eventfd_read(self._eventfd)
            except BlockingIOError:
                return heard
        return heard

    def _is_heard(self, number: int) -> bool:
        port = self._port(number)
        return port.pending and not port.masked

    def unmask(self, port: int) -> None:
        self._port(port).masked = False
        self._xen.wake((self._domain, port))

    @property
    def ready(self) -> bool:
        """Whether the descriptor would be readable."""
        return any(self._is_heard(number) for number in self._own)

    def on_pending(self) -> None:
        if self._eventfd is not None:
            os.eventfd_write(self._eventfd, 1)

    def fileno(self) -> int:
        if self._eventfd is None:
            self._eventfd = os.eventfd(int(self.ready), os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return self._eventfd

    def close(self) -> None:
        for port in list(self._own):
            self.unbind(port)
        if self._eventfd is not None:
            os.close(self._eventfd)
            self._eventfd = None
        self.closed = True


class SimulatedMapping:
    """See xen_kernel.MappedPages."""

    def __init__(self, xen: Xen, domain: int, grants: list[Grant], references: Sequence[int]) -> None:
        self._xen, self._grants = xen, grants
        self.domain, self.owner, self.references = domain, grants[0].owner, tuple(references)
        first = grants[0].offset
        self.page = memoryview(grants[0].memory)[first : first + len(grants) * PAGE_SIZE]
        for grant in grants:
            grant.mapped += 1
        xen.mappings.append(self)

    def unmap(self) -> None:
        if self not in self._xen.mappings:
            return
        self.page.release()  # refuses while somebody still has a view of it
        self._xen.mappings.remove(self)
        for grant in self._grants:
            grant.mapped -= 1
        self._xen.drop_unmapped()


class SimulatedGrants:
    """See xen_kernel.Grants."""

    def __init__(self, xen: Xen, domain: int) -> None:
        self._xen, self._domain = xen, domain
        self._mapped: list[SimulatedMapping] = []
        self.closed = False

    def map(self, domain: int, references: Sequence[int]) -> SimulatedMapping:
        grants = [self._xen.grants.get((domain, reference)) for reference in references]
        found = [one for one in grants if one and not one.withdrawn and one.domain == self._domain]
        if len(found) != len(references) or not found:
            raise GrantRefusedError(f"{list(references)} of domain {domain} are not granted")
        apart = [one.offset - at * PAGE_SIZE for at, one in enumerate(found)]
        if len(set(apart)) != 1 or any(one.memory is not found[0].memory for one in found):
            raise GrantRefusedError("this simulation maps only pages that were offered side by side")
        mapping = SimulatedMapping(self._xen, self._domain, found, references)
        self._mapped.append(mapping)
        return mapping

    def close(self) -> None:
        for mapping in self._mapped:
            mapping.unmap()
        self._mapped.clear()
        self.closed = True


class SimulatedOffer:
    """See xen_kernel.OfferedPages."""

    def __init__(self, xen: Xen, owner: int, domain: int, pages: int) -> None:
        self._xen = xen
        memory = bytearray(pages * PAGE_SIZE)
        self._grants = [Grant(memory, at * PAGE_SIZE, owner, domain) for at in range(pages)]
        self.references = tuple(range(xen.next_reference, xen.next_reference + pages))
        xen.next_reference += pages
        for reference, grant in zip(self.references, self._grants, strict=True):
            xen.grants[owner, reference] = grant
        self.page = memoryview(memory)
        self._withdrawn = False

    @property
    def mapped(self) -> bool:
        """Whether the other domain still has one of the pages."""
        return any(grant.mapped for grant in self._grants)

    def withdraw(self) -> None:
        if self._withdrawn:
            return
        self._withdrawn = True
        self.page.release()
        for grant in self._grants:
            grant.withdrawn = True
        self._xen.drop_unmapped()


class SimulatedOffers:
    """See xen_kernel.GrantOffers."""

    def __init__(self, xen: Xen, domain: int) -> None:
        self._xen, self._domain = xen, domain
        self._offered: list[SimulatedOffer] = []
        self.closed = False

    def offer(self, domain: int, pages: int) -> SimulatedOffer:
        if domain not in self._xen.domains or pages < 1:
            raise GrantRefusedError(f"{pages} pages for domain {domain}")
        offer = SimulatedOffer(self._xen, self._domain, domain, pages)
        self._offered.append(offer)
        return offer

    def close(self) -> None:
        for offer in self._offered:
            offer.withdraw()
        self._offered.clear()
        self.closed = True
