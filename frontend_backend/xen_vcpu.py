"""Whether a domain that never ran was restored from a saved one: Xen's word for it, which no guest can write.

A toolstack builds a guest from its kernel, or from what `xl save` or a migration wrote. Xenstore looks the same after
either. The first virtual processor does not: a fresh PV guest has no event callback yet, in a fresh PVH guest paging
is off; both come when the guest's kernel runs. A guest's own deeds end with its domain, so a guest
cannot make its next boot look restored.

Source: xen/include/public/domctl.h, arch-x86/xen.h (struct vcpu_guest_context, x86-64) of Xen 4.17.
"""

import errno
import struct
from typing import Final

from frontend_backend.xen_hypercalls import DomainInfo, HypercallError, Hypervisor

_GET_CONTEXT: Final = 13  # XEN_DOMCTL_getvcpucontext
_ARGUMENT: Final = struct.Struct("=I4xQ")  # struct xen_domctl_vcpucontext: vcpu, handle of the context
CONTEXT_BYTES: Final = 5168  # struct vcpu_guest_context
_CONTROL_REGISTERS: Final = 4984  # offset of ctrlreg[8], u64
_EVENT_CALLBACK: Final = 5112  # offset of event_callback_eip, u64
_PAGING: Final = 1 << 31  # CR0.PG
_NOT_BUILT: Final = (errno.ENODATA, errno.ESRCH, errno.EINVAL)  # no processor yet, or none any more


def was_restored(xen: Hypervisor, info: DomainInfo) -> bool | None:
    """Tell whether the domain continues a saved one; None where it has run already, so that nobody can tell.

    Raises:
        HypercallError, XenReleaseError: Xen does not say.

    """
    if info.has_run:
        return None
    # for a 32-bit guest Xen writes less: what another domain's processor left there is not this one's past
    xen.data[:CONTEXT_BYTES] = bytes(CONTEXT_BYTES)
    try:
        xen.domctl(_GET_CONTEXT, info.domain, _ARGUMENT.pack(0, xen.data_address))
    except HypercallError as error:
        if error.errno in _NOT_BUILT:
            return None
        raise
    return speaks_of_a_past(bytes(xen.data[:CONTEXT_BYTES]), hvm=info.hvm)


def speaks_of_a_past(context: bytes, *, hvm: bool) -> bool:
    """Tell whether a kernel has run on this virtual processor: `context` is its struct vcpu_guest_context."""
    if hvm:
        return bool(int.from_bytes(context[_CONTROL_REGISTERS : _CONTROL_REGISTERS + 8], "little") & _PAGING)
    return any(context[_EVENT_CALLBACK : _EVENT_CALLBACK + 8])
