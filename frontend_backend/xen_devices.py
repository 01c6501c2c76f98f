"""Linux's device files of Xen behind the Protocols of xen_kernel: evtchn, gntdev, gntalloc.

The ioctls return numbers inside of the buffer they are given, or as their result: the buffer must be a mutable one,
for with `bytes` Python returns the buffer in the result's place.

Their "notify when unmapped" is not used. It could clear the ring's state when we die, which would take a command away
that our next life still answers; an event alone tells a peer nothing, and what ended is written in xenstore.

Source: xen/evtchn.h, xen/gntdev.h, xen/gntalloc.h (linux-libc-dev); drivers/xen/{evtchn,gntdev,gntalloc}.c.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Final, Self

from frontend_backend.xen_device_file import ioc, open_device
from frontend_backend.xen_kernel import (
    FIRST_RESERVED_DOMAIN,
    GRANT_PAGE_SIZE,
    MAX_PORT,
    MAX_REFERENCE,
    ChannelRefusedError,
    DomainId,
    GrantRefusedError,
    XenError,
)
from frontend_backend.xen_mapping import Mapping

EVENT_CHANNELS: Final = "/dev/xen/evtchn"
GRANTS: Final = "/dev/xen/gntdev"
GRANT_OFFERS: Final = "/dev/xen/gntalloc"

MAX_PAGES: Final = 256
"""Pages of one mapping: the ring's, and as many extra ones as its head can announce (a byte)."""

_PORT: Final = struct.Struct("=I")  # evtchn_port_t; ioctl_evtchn_unbind, _notify, _bind_unbound_port
_BIND_INTERDOMAIN: Final = struct.Struct("=II")  # remote_domain, remote_port
_MAP_HEAD: Final = struct.Struct("=IIQ")  # ioctl_gntdev_map_grant_ref before refs: count, pad, index (out)
_REFERENCE: Final = struct.Struct("=II")  # ioctl_gntdev_grant_ref: domid, ref
_UNMAP: Final = struct.Struct("=QII")  # ioctl_gntdev_unmap_grant_ref: index, count, pad
_ALLOC_HEAD: Final = struct.Struct(
    "=HHIQ"
)  # ioctl_gntalloc_alloc_gref before gref_ids: domid, flags, count, index (out)
_DEALLOC: Final = struct.Struct("=QI4x")  # ioctl_gntalloc_dealloc_gref: index, count, and C's padding
assert (_PORT.size, _BIND_INTERDOMAIN.size) == (4, 8)
assert (_MAP_HEAD.size + _REFERENCE.size, _UNMAP.size) == (24, 16)
assert (_ALLOC_HEAD.size + _PORT.size + 4, _DEALLOC.size) == (24, 16)  # 4: C's padding after one gref_id

_WRITABLE: Final = 1  # GNTALLOC_FLAG_WRITABLE


BIND_INTERDOMAIN: Final = ioc("E", 1, 8)
BIND_UNBOUND_PORT: Final = ioc("E", 2, 4)
UNBIND: Final = ioc("E", 3, 4)
NOTIFY: Final = ioc("E", 4, 4)
RESET: Final = ioc("E", 5, 0)
MAP_GRANT_REF: Final = ioc("G", 0, 24)
UNMAP_GRANT_REF: Final = ioc("G", 1, 16)
ALLOC_GREF: Final = ioc("G", 5, 24)
DEALLOC_GREF: Final = ioc("G", 6, 16)

_EVENTS_AT_ONCE: Final = 1024  # ports of one read


def _check_domain(domain: DomainId, refusal: Callable[[str], XenError]) -> None:
    """Refuse what the kernel would cut to 16 bits and take for another domain."""
    if not 0 <= domain < FIRST_RESERVED_DOMAIN:
        raise refusal(f"there can be no domain {domain}")


class DeviceEventChannels:
    """One open `/dev/xen/evtchn`; see xen_kernel.EventChannels."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._ports: set[int] = set()

    @classmethod
    def open(cls) -> Self:
        """Open the device.

        Raises:
            XenMissingError, XenDeniedError: see open_device.

        """
        return cls(open_device(EVENT_CHANNELS, "xen-evtchn"))

    def bind_interdomain(self, domain: DomainId, remote_port: int) -> int:
        """See EventChannels."""
        _check_domain(domain, ChannelRefusedError)
        if not 0 < remote_port <= MAX_PORT:
            raise ChannelRefusedError(f"there can be no event channel {remote_port}")
        what = f"domain {domain} offers no event channel {remote_port} to this domain"
        return self._bind(BIND_INTERDOMAIN, _BIND_INTERDOMAIN.pack(domain, remote_port), what)

    def bind_unbound(self, domain: DomainId) -> int:
        """See EventChannels."""
        _check_domain(domain, ChannelRefusedError)
        return self._bind(BIND_UNBOUND_PORT, _PORT.pack(domain), f"no event channel can be offered to domain {domain}")

    def notify(self, port: int) -> None:
        """See EventChannels."""
        self._check(port)
        self._call(NOTIFY, _PORT.pack(port), f"event channel {port} cannot be notified")

    def unbind(self, port: int) -> None:
        """See EventChannels."""
        if port in self._ports:
            self._ports.remove(port)
            self._call(UNBIND, _PORT.pack(port), f"event channel {port} cannot be given back")

    def pending(self) -> list[int]:
        """See EventChannels."""
        try:
            data = os.read(self._descriptor, _EVENTS_AT_ONCE * _PORT.size)
        except BlockingIOError:
            return []
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise ChannelRefusedError(f"{EVENT_CHANNELS}: events cannot be read: {error.strerror}") from error
            self._call(RESET, b"", "events were lost, and cannot be counted anew")
            return sorted(self._ports)
        return [port for (port,) in _PORT.iter_unpack(data) if port in self._ports]

    def unmask(self, port: int) -> None:
        """See EventChannels."""
        self._check(port)
        try:
            os.write(self._descriptor, _PORT.pack(port))
        except OSError as error:
            raise ChannelRefusedError(f"event channel {port} cannot be unmasked: {error.strerror}") from error

    def fileno(self) -> int:
        """See EventChannels."""
        return self._descriptor

    def close(self) -> None:
        """See EventChannels."""
        descriptor, self._descriptor = self._descriptor, -1
        self._ports.clear()
        if descriptor >= 0:
            os.close(descriptor)  # unbinds every port

    def _bind(self, request: int, argument: bytes, refusal: str) -> int:
        port = self._call(request, argument, refusal)
        self._ports.add(port)
        return port

    def _call(self, request: int, argument: bytes, refusal: str) -> int:
        try:
            return fcntl.ioctl(self._descriptor, request, bytearray(argument) if argument else 0)
        except OSError as error:
            raise ChannelRefusedError(f"{refusal}: {error.strerror}") from error

    def _check(self, port: int) -> None:
        if port not in self._ports:
            raise ChannelRefusedError(f"event channel {port} is not bound here")


class DevicePages:
    """Pages mapped from, or offered to, another domain; see xen_kernel.MappedPages and OfferedPages."""

    def __init__(self, mapping: Mapping, references: tuple[int, ...], end: Callable[["DevicePages"], None]) -> None:
        self._mapping = mapping
        self._end: Callable[[DevicePages], None] | None = end
        self.references = references

    @property
    def page(self) -> memoryview:
        """See MappedPages."""
        return self._mapping.page

    def unmap(self) -> None:
        """See MappedPages."""
        if self._end is None:
            return
        try:
            self._mapping.detach()  # first: both drivers keep what is still mapped
        except OSError as error:
            raise GrantRefusedError(f"a page cannot be unmapped: {error.strerror}; it stays as it was") from error
        end, self._end = self._end, None
        end(self)

    def withdraw(self) -> None:
        """See OfferedPages."""
        self.unmap()


class _PageDevice:
    """What gntdev and gntalloc have in common: pages that live until they are given back, all of them at the close."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._pages: set[DevicePages] = set()

    def close(self) -> None:
        """Give back everything and close. May be called twice."""
        with ExitStack() as ends:  # one that fails keeps none of the others
            if self._descriptor >= 0:
                ends.callback(self._close_descriptor)
            for pages in list(self._pages):
                ends.callback(pages.unmap)

    def _close_descriptor(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    def _keep(
        self, index: int, references: tuple[int, ...], give_back: Callable[[int, int], None], refusal: str
    ) -> DevicePages:
        """Map what the driver prepared at `index`; what cannot be mapped is given back at once."""
        count = len(references)
        try:
            mapping = Mapping(self._descriptor, index, count * GRANT_PAGE_SIZE)
        except OSError as error:
            give_back(index, count)
            raise GrantRefusedError(f"{refusal}: {error.strerror}") from error

        def end(pages: DevicePages) -> None:
            self._pages.discard(pages)
            give_back(index, count)

        pages = DevicePages(mapping, references, end)
        self._pages.add(pages)
        return pages

    def _call(self, request: int, argument: bytearray, refusal: str) -> None:
        try:
            fcntl.ioctl(self._descriptor, request, argument)
        except OSError as error:
            raise GrantRefusedError(f"{refusal}: {error.strerror}") from error


class DeviceGrants(_PageDevice):
    """One open `/dev/xen/gntdev`; see xen_kernel.Grants."""

    @classmethod
    def open(cls) -> Self:
        """Open the device; errors as DeviceEventChannels.open."""
        return cls(open_device(GRANTS, "xen-gntdev"))

    def map(self, domain: DomainId, references: Sequence[int]) -> DevicePages:
        """See Grants."""
        _check_domain(domain, GrantRefusedError)
        if not 0 < len(references) <= MAX_PAGES or not all(0 <= one <= MAX_REFERENCE for one in references):
            raise GrantRefusedError(f"these cannot be grants of domain {domain}: {list(references)[:MAX_PAGES]}")
        named = ", ".join(map(str, references))
        refusal = f"domain {domain} does not grant this domain its page {named} for writing, or there is no room"
        request = bytearray(_MAP_HEAD.pack(len(references), 0, 0))
        for one in references:
            request += _REFERENCE.pack(domain, one)
        self._call(MAP_GRANT_REF, request, refusal)
        _, _, index = _MAP_HEAD.unpack_from(request)
        return self._keep(index, tuple(references), self._unmap, refusal)

    def _unmap(self, index: int, count: int) -> None:
        self._call(UNMAP_GRANT_REF, bytearray(_UNMAP.pack(index, count, 0)), "a mapped page cannot be given back")


class DeviceGrantOffers(_PageDevice):
    """One open `/dev/xen/gntalloc`; see xen_kernel.GrantOffers."""

    @classmethod
    def open(cls) -> Self:
        """Open the device; errors as DeviceEventChannels.open."""
        return cls(open_device(GRANT_OFFERS, "xen-gntalloc"))

    def offer(self, domain: DomainId, pages: int) -> DevicePages:
        """See GrantOffers."""
        _check_domain(domain, GrantRefusedError)
        if not 0 < pages <= MAX_PAGES:
            raise GrantRefusedError(f"{pages} pages cannot be offered; 1 to {MAX_PAGES} can")
        refusal = f"{pages} pages cannot be offered to domain {domain} (see the parameter `limit` of xen-gntalloc)"
        request = bytearray(_ALLOC_HEAD.pack(domain, _WRITABLE, pages, 0) + bytes(max(2, pages) * _PORT.size))
        self._call(ALLOC_GREF, request, refusal)
        *_, index = _ALLOC_HEAD.unpack_from(request)
        references = struct.unpack_from(f"={pages}I", request, _ALLOC_HEAD.size)
        return self._keep(index, references, self._withdraw, refusal)

    def _withdraw(self, index: int, count: int) -> None:
        self._call(DEALLOC_GREF, bytearray(_DEALLOC.pack(index, count)), "an offered page cannot be taken back")
