"""What only Xen itself knows about a domain: whether it has run, why it ended, its security label.

Through `/dev/xen/privcmd`, with arguments in memory of `/dev/xen/hypercall` (Xen reads them by address, so they may not
be paged out). Xen allows it to dom0, and to domains a security policy names; everywhere else it is refused.

Source: domctl.h, sched.h, xsm/flask_op.h and xen.h of Xen 4.17; drivers/xen/privcmd{,-buf}.c of Linux.
"""

import errno
import fcntl
import os
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Self

from frontend_backend.xen_device_file import ioc, open_device
from frontend_backend.xen_kernel import (
    FIRST_RESERVED_DOMAIN,
    GRANT_PAGE_SIZE,
    DomainId,
    XenDeniedError,
    XenError,
    XenMissingError,
)
from frontend_backend.xen_mapping import Mapping

PRIVCMD: Final = "/dev/xen/privcmd"
BUFFERS: Final = "/dev/xen/hypercall"
_MODULE: Final = "xen-privcmd"

_HYPERCALL: Final = struct.Struct("=6Q")  # struct privcmd_hypercall: op, arg[5]
assert _HYPERCALL.size == 48
_IOCTL_HYPERCALL: Final = ioc("P", 0, _HYPERCALL.size)

_OP_XSM: Final = 27  # __HYPERVISOR_xsm_op
_OP_DOMCTL: Final = 36  # __HYPERVISOR_domctl

_DOMCTL_HEAD: Final = struct.Struct("=IIH6x")  # struct xen_domctl before u: cmd, interface_version, domain
_DOMCTL_UNION: Final = 128  # bytes of u, by its member pad
_FLASK_HEAD: Final = struct.Struct("=II")  # struct xen_flask_op before u: cmd, interface_version
_FLASK_UNION: Final = 64  # bytes, more than its largest member has
_FLASK_PEER: Final = struct.Struct("=II")  # struct xen_flask_peersid: evtchn, sid (out)
_FLASK_CONTEXT: Final = struct.Struct("=IIQ")  # struct xen_flask_sid_context: sid, size (in, out), context
assert (_DOMCTL_HEAD.size, _FLASK_HEAD.size, _FLASK_PEER.size, _FLASK_CONTEXT.size) == (16, 8, 8, 16)

DOMCTL_VERSIONS: Final = (0x15, 0x14, 0x16, 0x17, 0x18, 0x13, 0x12, 0x11, 0x10)
"""XEN_DOMCTL_INTERFACE_VERSION of Xen 4.17 (tried first), and of 4.11 to 4.22: what is read here lies at the same place
in the headers of 0x10, 0x15 and 0x18, and only fields behind it changed between them. Proven on 4.17 only."""

_GETDOMAININFO: Final = 5  # XEN_DOMCTL_getdomaininfo
_INFO: Final = struct.Struct("=HHI7QIII16sI")
"""struct xen_domctl_getdomaininfo as far as cpupool: domain, pad, flags, total, max, outstanding, shared and paged
pages, shared_info frame, cpu_time, online vCPUs, highest vCPU, ssidref, handle, cpupool."""
assert _INFO.size == 96

_DYING: Final = 1 << 0  # XEN_DOMINF_*
_HVM: Final = 1 << 1
_SHUTDOWN: Final = 1 << 2
_PAUSED: Final = 1 << 3
_SHUTDOWN_SHIFT: Final = 16
_SHUTDOWN_MASK: Final = 255

_FLASK_VERSION: Final = 1  # XEN_FLASK_INTERFACE_VERSION
_FLASK_SID_TO_CONTEXT: Final = 5
_FLASK_GET_PEER_SID: Final = 23

_BUFFER_PAGES: Final = 4
"""Locked pages: one for the call itself, three for what it points to (a vCPU's registers are 5,168 bytes)."""


class HypercallError(XenError):
    """Xen refused a hypercall; `errno` says why."""

    def __init__(self, what: str, number: int) -> None:
        super().__init__(f"Xen refused to {what}: {os.strerror(number)}")
        self.errno = number


class XenReleaseError(XenError):
    """This release of Xen speaks another version of the interface than this program knows."""


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """A domain as Xen sees it: times in nanoseconds, `shutdown_code` (sched.h, SHUTDOWN_*) once it has shut down."""

    domain: DomainId
    uuid: str
    cpu_time: int
    paused: bool
    dying: bool
    shutdown_code: int | None
    hvm: bool
    ssidref: int

    @property
    def has_run(self) -> bool:
        """Whether the guest has executed anything, or may do so any moment. A toolstack builds it paused."""
        return self.cpu_time > 0 or not self.paused


class Hypervisor:
    """An open door to Xen. One call at a time: not for several threads."""

    def __init__(self, privcmd: int, buffers: Mapping) -> None:
        self._privcmd = privcmd
        self._buffers = buffers
        self._version: int | None = None

    @classmethod
    def open(cls) -> Self:
        """Open the devices.

        Raises:
            XenMissingError, XenDeniedError: there are none, or not for this process.

        """
        privcmd = open_device(PRIVCMD, _MODULE)
        try:
            descriptor = open_device(BUFFERS, _MODULE)
            try:
                buffers = Mapping(descriptor, 0, _BUFFER_PAGES * GRANT_PAGE_SIZE)
            except OSError as error:
                raise XenDeniedError(f"{BUFFERS}: no memory for hypercalls: {error.strerror}") from error
            finally:
                os.close(descriptor)
        except BaseException:
            os.close(privcmd)
            raise
        return cls(privcmd, buffers)

    @classmethod
    def open_if_allowed(cls) -> Self | None:
        """Open the devices if this domain may control others; None where it may not, or there are no devices.

        Raises:
            XenReleaseError: see domctl.

        """
        try:
            opened = cls.open()
        except (XenMissingError, XenDeniedError):
            return None
        try:
            opened.info(0)
        except HypercallError:
            opened.close()
            return None
        except BaseException:
            opened.close()
            raise
        return opened

    def close(self) -> None:
        """Close. May be called twice."""
        privcmd, self._privcmd = self._privcmd, -1
        if privcmd >= 0:
            self._buffers.detach()
            os.close(privcmd)

    @property
    def data(self) -> memoryview:
        """Three locked pages for what a call points to, at `data_address`. Overwritten by `label` and `port_label`."""
        return self._buffers.page[GRANT_PAGE_SIZE:]

    @property
    def data_address(self) -> int:
        """What a guest handle to `data` holds."""
        return self._buffers.address + GRANT_PAGE_SIZE

    def domctl(self, command: int, domain: DomainId, payload: bytes = b"") -> tuple[DomainId, bytes]:
        """Make a domctl. `payload` begins the union `u`; returns the domain Xen names, and all of `u`, 128 bytes.

        Raises:
            HypercallError: refused: EPERM (this domain may not), ESRCH (no such domain), ...
            XenReleaseError: no version of the interface that is known here.

        """
        if not 0 <= domain < FIRST_RESERVED_DOMAIN or len(payload) > _DOMCTL_UNION:
            raise HypercallError(f"control domain {domain}", errno.EINVAL)
        for version in DOMCTL_VERSIONS if self._version is None else (self._version,):
            head = _DOMCTL_HEAD.pack(command, version, domain)
            try:
                with self._call(_OP_DOMCTL, head + payload.ljust(_DOMCTL_UNION, b"\0"), "control domains") as answer:
                    self._version = version
                    union = bytes(answer[_DOMCTL_HEAD.size :])
                    return _DOMCTL_HEAD.unpack_from(answer)[2], union
            except HypercallError as error:
                if error.errno != errno.EACCES:  # what another version gets, before anything else is looked at
                    self._version = version
                    raise
        raise XenReleaseError(
            "this release of Xen speaks another version of its control interface (domctl) than"
            f" {min(DOMCTL_VERSIONS):#x} to {max(DOMCTL_VERSIONS):#x}, or its security policy (XSM) lets this domain"
            " ask nothing, which it says in the same way: what Xen knows about domains stays unknown"
        )

    def info(self, domain: DomainId) -> DomainInfo | None:
        """Return what Xen knows about a domain, None where there is none with this number.

        Raises:
            HypercallError, XenReleaseError: see domctl.

        """
        try:
            named, union = self.domctl(_GETDOMAININFO, domain)
        except HypercallError as error:
            if error.errno == errno.ESRCH:
                return None
            raise
        if named != domain:  # older releases answer with the next one there is
            return None
        _, _, flags, *_, cpu_time, _, _, ssidref, handle, _ = _INFO.unpack_from(union)
        return DomainInfo(
            domain=domain,
            uuid=str(uuid.UUID(bytes=handle)),
            cpu_time=cpu_time,
            paused=bool(flags & _PAUSED),
            dying=bool(flags & _DYING),
            shutdown_code=flags >> _SHUTDOWN_SHIFT & _SHUTDOWN_MASK if flags & _SHUTDOWN else None,
            hvm=bool(flags & _HVM),
            ssidref=ssidref,
        )

    def label(self, ssidref: int) -> str:
        """Return the security label with this number, "" where Xen runs without labels (no XSM/FLASK).

        Raises:
            HypercallError: there is no such number, or this domain may not ask.

        """
        room = len(self.data)
        argument = _FLASK_CONTEXT.pack(ssidref, room, self.data_address)
        answer = self._flask(_FLASK_SID_TO_CONTEXT, argument, "name a security label")
        if answer is None:
            return ""
        _, size, _ = _FLASK_CONTEXT.unpack_from(answer)
        return bytes(self.data[: min(size, room)]).split(b"\0")[0].decode("utf-8", "backslashreplace")

    def port_label(self, port: int) -> str:
        """Return the security label of the domain at the other end of an event channel of this domain; see label."""
        answer = self._flask(_FLASK_GET_PEER_SID, _FLASK_PEER.pack(port, 0), "name an event channel's peer")
        return "" if answer is None else self.label(_FLASK_PEER.unpack_from(answer)[1])

    def _flask(self, command: int, payload: bytes, what: str) -> bytes | None:
        head = _FLASK_HEAD.pack(command, _FLASK_VERSION)
        try:
            with self._call(_OP_XSM, head + payload.ljust(_FLASK_UNION, b"\0"), what) as answer:
                return bytes(answer[_FLASK_HEAD.size :])
        except HypercallError as error:
            if error.errno == errno.ENOSYS:
                return None
            raise

    @contextmanager
    def _call(self, operation: int, argument: bytes, what: str) -> Iterator[memoryview]:
        """Make a hypercall with one argument by address; gives the argument as Xen left it."""
        locked = self._buffers.page[: len(argument)]
        locked[:] = argument
        call = bytearray(_HYPERCALL.pack(operation, self._buffers.address, 0, 0, 0, 0))
        try:
            fcntl.ioctl(self._privcmd, _IOCTL_HYPERCALL, call)
        except OSError as error:
            raise HypercallError(what, error.errno or errno.EIO) from error
        yield locked
