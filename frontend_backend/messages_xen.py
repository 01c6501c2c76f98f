"""What vtpm-xen and the manager say: SEQPACKET datagrams on RUNTIME/xen.sock, one device a connection.

vtpm-xen asks once, by Bind for a guest's device or by Join for that of an instance's domain. Granted, the connection
stays open as long as the binding lasts: whoever ends it ends the binding. The manager ends it when the vTPM is detached
or removed; vtpm-xen when the device or the domain is gone. Nothing else travels on a granted connection.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from frontend_backend.messages import Protocol, later

VERSION: Final = 1
MOST_TEXT: Final = 4096  # bytes of a name, label or command line: xenstore has no longer values (XENSTORE_PAYLOAD_MAX)
XEN_DATAGRAM: Final = 32 * 1024  # bytes of the largest message: a Bind with its texts
DESCRIPTORS: Final = 2  # that come with Joined: the page of the manager's ring, and the instance's doorbell


class XenCode(StrEnum):
    """Why a device is not bound; what vtpm-xen does about each is in `manager.xen_backend`."""

    UNKNOWN = "unknown"  # no vTPM of this manager, or not attached: asking again later may help
    DENIED = "denied"  # attached, but not to this domain or label
    TAKEN = "taken"  # another domain that lives has it
    WRONG_FRONTEND = "wrong-frontend"  # not attached with `--frontend xen`, or the other kind of domain is due
    FAILED = "failed"  # it may have it, but the vTPM does not run, or the manager is busy: ask again


@dataclass(frozen=True, slots=True)
class Bind:
    """May this domain have this vTPM? `uuid`: its 16 bytes; `domain`, `device`: Xen's numbers of the guest's device.

    `name`, `domain_uuid`: the domain's as xenstore tells them to nobody else; empty where this domain may not read
    them. `domain_uuid` as text with hyphens. `label`: its XSM label, empty where the hypervisor has none.
    `ran_before`: whether the guest ran before it got this device, None where that cannot be known.
    `resumed`: the domain continues one that was saved or migrated, with what its TPM held.
    `kernel`, `cmdline`, `initrd`: what the toolstack booted it with, paths and text; empty where not known.
    `others`: the other domains that live and have a device for this vTPM.
    """

    uuid: bytes
    domain: int
    device: int
    name: str
    domain_uuid: str
    label: str
    ran_before: bool | None = None
    resumed: bool = False
    kernel: str = ""
    cmdline: str = ""
    initrd: str = ""
    others: tuple[int, ...] = later(())


@dataclass(frozen=True, slots=True)
class Bound:
    """It may. `endpoint`: the ring listener of its instance, empty where the instance lives in a domain of its own.

    `family`: "2.0" or "1.2"; `compat`: the driver's TPM 1.2 probes are answered for a TPM 2.0; `localities`: those that
    the guest may claim, bit 0 for locality 0; `extra_pages`: how many more than one a request may have.
    """

    endpoint: str
    family: str
    compat: bool
    localities: int
    extra_pages: int


@dataclass(frozen=True, slots=True)
class Join:
    """A domain with an instance for this vTPM wants its ring to the manager; fields as in Bind."""

    uuid: bytes
    domain: int
    device: int
    name: str
    domain_uuid: str
    label: str
    others: tuple[int, ...] = later(())


@dataclass(frozen=True, slots=True)
class Joined:
    """It gets it: with DESCRIPTORS descriptors, the instance's end of a ring whose other end the manager serves."""


@dataclass(frozen=True, slots=True)
class XenRefusal:
    """It does not. `text` says what happened and what to do; the connection is closed after it."""

    code: XenCode
    text: str


XenRequest = Bind | Join
XenReply = Bound | Joined | XenRefusal

_PROTOCOL = Protocol(VERSION, (Bind, Bound, Join, Joined, XenRefusal))


def encode_xen(message: XenRequest | XenReply) -> bytes:
    """Return the datagram of a message."""
    return _PROTOCOL.encode(message)


def decode_xen(untrusted: bytes) -> XenRequest | XenReply:
    """Return the message in a datagram.

    Raises:
        MessageError: it is none.

    """
    message: XenRequest | XenReply = _PROTOCOL.decode(untrusted)
    return message
