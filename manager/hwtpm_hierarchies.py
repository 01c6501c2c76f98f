"""Passwords of the TPM's hierarchies: changing them, over a session that hides both. Part 1, 13; Part 3, 24.8."""

from enum import StrEnum
from typing import Any, Final

from tpm2_pytss import ESYS_TR

from manager import hwtpm_rc as rc
from manager.hwtpm_errors import HierarchyAuthRefused
from manager.hwtpm_link import TpmLink
from manager.hwtpm_srk import Srk

# SHA-256's size: a hierarchy's password may be as long as the digest of the chip's choice (Part 3, 24.8), at least this
MAX_AUTH_BYTES: Final = 32


class Hierarchy(StrEnum):
    """The hierarchies that have a password an owner sets; the platform's is the firmware's business."""

    OWNER = "owner"
    ENDORSEMENT = "endorsement"
    LOCKOUT = "lockout"


_HANDLES: Final = {
    Hierarchy.OWNER: ESYS_TR.OWNER,
    Hierarchy.ENDORSEMENT: ESYS_TR.ENDORSEMENT,
    Hierarchy.LOCKOUT: ESYS_TR.LOCKOUT,
}


def without_tail(auth: bytes) -> bytes:
    """Return a password as a TPM keeps it: zeros at its end do not count (Part 1, 19.6.4.3)."""
    return auth.rstrip(b"\0")


def change_auth(link: TpmLink, srk: Srk, hierarchy: Hierarchy, old: bytes, new: bytes) -> None:
    """Change a hierarchy's password, at most 32 bytes; empty is none. The session is salted with the pinned SRK.

    Raises HierarchyAuthRefused: `old` is not its password (at the lockout hierarchy that locks its use for a time).
    """
    if max(len(old), len(new)) > MAX_AUTH_BYTES:
        raise ValueError(f"a hierarchy's password has at most {MAX_AUTH_BYTES} bytes")
    with link.operation(f"change the {hierarchy} password") as esapi:
        handle: Any = _HANDLES[hierarchy]
        esapi.tr_set_auth(handle, without_tail(old))

        def refused() -> HierarchyAuthRefused:
            return HierarchyAuthRefused(hierarchy)

        with (
            link.session(esapi, srk.handle(esapi)) as session,
            rc.meaning({rc.RC_BAD_AUTH: refused, rc.RC_AUTH_FAIL: refused}),
        ):
            esapi.hierarchy_change_auth(handle, without_tail(new), session1=session)
    if hierarchy is not Hierarchy.LOCKOUT:
        link.use_auth(**{str(hierarchy): without_tail(new)})
