"""The policyRef of objects without an approver: which object a recovery statement is for.

With a UUID 32 bytes: a policyRef is as long as the TPM's largest digest at most, and a chip may have SHA-256 only.
Those of objects with an approver are in `approval.reference_for`.
"""

from typing import Final
from uuid import UUID

_PLATFORM: Final = b"vtpm-mgr plt v2 "
_GROUP: Final = b"vtpm-mgr grp v2 "


def platform_reference(store: UUID) -> bytes:
    """Return the policyRef that binds recovery statements to this store's platform object."""
    return _PLATFORM + store.bytes


def group_reference(group: UUID) -> bytes:
    """Return the policyRef of a group's object."""
    return _GROUP + group.bytes
