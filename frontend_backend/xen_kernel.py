"""What of Xen's kernel interface this project uses, as Protocols: event channels and grants of memory pages.

`xen_devices` implements them with Linux's device files; the tests' simulation of a kernel implements them too.
Everything that is mapped, offered or bound belongs to the open device it came from and is given back with it at the
latest: `close()` of each first unmaps, withdraws or unbinds what is left.

Source: xen/evtchn.h, xen/gntdev.h and xen/gntalloc.h of Linux's headers.
"""

from collections.abc import Sequence
from typing import Final, Protocol, TypeAlias, runtime_checkable

from frontend_backend.tpmif import PAGE_SIZE

DomainId: TypeAlias = int

FIRST_RESERVED_DOMAIN: Final = 0x7FF0
"""DOMID_FIRST_RESERVED of xen.h: no real domain has this number or a higher one."""

MAX_PORT: Final = (1 << 17) - 1
"""The highest event channel Xen's FIFO table can have (EVTCHN_FIFO_NR_CHANNELS of event_channel.h)."""

MAX_REFERENCE: Final = (1 << 32) - 1
"""grant_ref_t is 32 bits wide."""

GRANT_PAGE_SIZE: Final = PAGE_SIZE
"""Bytes of one granted page (XEN_PAGE_SIZE, 4096 on every architecture)."""


class XenError(Exception):
    """Xen, or its interface in this kernel, did not do what was asked; nothing was changed."""


class XenMissingError(XenError):
    """This kernel offers no such device now. The message says which module offers it."""


class XenDeniedError(XenError):
    """The device is there, but this process may not use it."""


class GrantRefusedError(XenError):
    """A page could not be mapped or offered: no such grant, not ours, not writable, or no room."""


class ChannelRefusedError(XenError):
    """An event channel could not be bound, notified or unmasked."""


@runtime_checkable
class EventChannels(Protocol):
    """One open `/dev/xen/evtchn`. Its descriptor is readable while a port is pending."""

    def bind_interdomain(self, domain: DomainId, remote_port: int) -> int:
        """Bind a port of ours to the one `domain` offers; returns ours. It is pending at once: look at the ring.

        Raises:
            ChannelRefusedError: there is no such domain, or its port is not offered to us.

        """
        ...

    def bind_unbound(self, domain: DomainId) -> int:
        """Offer a new port which only `domain` can bind; returns it.

        Raises:
            ChannelRefusedError: there is no such domain, or no free port.

        """
        ...

    def notify(self, port: int) -> None:
        """Make the other side's port pending. Never blocks; a side that is gone is not noticed.

        Raises:
            ChannelRefusedError: the port is not bound through this device.

        """
        ...

    def unbind(self, port: int) -> None:
        """Give the port back. One that is not (or no longer) ours is left alone."""
        ...

    def pending(self) -> list[int]:
        """Return and mask the ports notified since the last call: each stays silent until `unmask`. Never blocks.

        Where the kernel had no room for events, every bound port is returned: each must be looked at and unmasked.
        """
        ...

    def unmask(self, port: int) -> None:
        """Let the port be notified again. Do this before looking at what it announces, or a wake-up is lost.

        Raises:
            ChannelRefusedError: the port is not bound through this device.

        """
        ...

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        ...

    def close(self) -> None:
        """Unbind everything and close. May be called twice."""
        ...


@runtime_checkable
class MappedPages(Protocol):
    """Pages of another domain, mapped here one after the other."""

    @property
    def page(self) -> memoryview:
        """The mapping: n * 4096 bytes, contiguous, writable, shared."""
        ...

    def unmap(self) -> None:
        """Release the mapping and the grants; `page` and views of it are void afterwards. May be called twice."""
        ...


@runtime_checkable
class Grants(Protocol):
    """One open `/dev/xen/gntdev`: maps what other domains grant."""

    def map(self, domain: DomainId, references: Sequence[int]) -> MappedPages:
        """Map the pages with these references, in this order, writable.

        Raises:
            GrantRefusedError: one of them is not granted to us, or only for reading, or there is no room. Nothing
                stays mapped.

        """
        ...

    def close(self) -> None:
        """Unmap everything and close. May be called twice."""
        ...


@runtime_checkable
class OfferedPages(Protocol):
    """Pages of ours, zeroed at first, which one other domain may map and write."""

    @property
    def page(self) -> memoryview:
        """The pages: n * 4096 bytes, contiguous, writable, shared."""
        ...

    @property
    def references(self) -> tuple[int, ...]:
        """The grant reference of each page, in order; what the other domain needs to know."""
        ...

    def withdraw(self) -> None:
        """End the offer; `page` and views of it are void afterwards. May be called twice.

        Where the other domain still has a page mapped, the kernel keeps that page (and its reference) until it lets go.
        """
        ...


@runtime_checkable
class GrantOffers(Protocol):
    """One open `/dev/xen/gntalloc`: offers pages to other domains."""

    def offer(self, domain: DomainId, pages: int) -> OfferedPages:
        """Offer `pages` new zeroed pages to `domain`, writable.

        Raises:
            GrantRefusedError: no room for them (gntalloc's `limit`), or a number of pages or domain that cannot be.

        """
        ...

    def close(self) -> None:
        """Withdraw everything and close. May be called twice."""
        ...
