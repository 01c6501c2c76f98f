"""Installing an approval: what is checked first, what the record is afterwards, and how it is told. Pure."""

import time
from collections.abc import Mapping
from typing import Any, TypeVar

from manager import approval_records as records
from manager.approval import Approval, Kind
from manager.approval_errors import ApprovalStale, ApprovalUntimely
from manager.approval_key import ApproverPublic
from manager.approval_target import Target, untimely
from manager.errors import ConflictError
from manager.keys import BootArea, GroupSeal
from manager.policy import SealPolicy
from manager.verb_table import SCHEMA_VERSION

Kept = TypeVar("Kept", bound=BootArea | GroupSeal)


def policy_of(record: BootArea | GroupSeal) -> SealPolicy:
    """Return the policy of the object that a record's approvals open."""
    return record.platform.policy if isinstance(record, BootArea) else record.sealed.policy


def check_installable(approval: Approval, target: Target, record: BootArea | GroupSeal, held: int) -> None:
    """Check an approval against what it is to open; `held` is what the revocation index holds in its slot.

    Raises:
        ApprovalForged, ApprovalElsewhere, ApprovalStale, ApprovalUntimely: it cannot be installed. One that is not
        valid yet can.

    """
    name = f"Approval {approval.sequence}"
    point = policy_of(record).approver_point
    assert point is not None, "a target has one"
    target.check(approval, ApproverPublic.of_point(point), name)
    least = max(record.least, held)
    if approval.sequence < least:
        raise ApprovalStale(name, approval.sequence, least)
    now = time.time()
    why = untimely(approval, now, records.approvals_in(record))
    if why is not None and (now >= approval.not_before or now < approval.issued):
        raise ApprovalUntimely(name, why)


def refuse_closing(approval: Approval, present: Mapping[int, bytes]) -> None:
    """Refuse to revoke all that holds now. Raises ConflictError."""
    if approval.differing(present) or untimely(approval, time.time()) is not None:
        raise ConflictError(
            f"approval {approval.sequence} does not hold on this platform as it is: if older ones were revoked now, "
            f"{approval.name} would be closed at the next start. Nothing was changed. Say --yes if that is wanted"
        )


def installed_in(record: Kept, approval: Approval, *, revoke_older: bool) -> Kept:
    """Return the record with the approval, and without those that it revokes. Raises ApprovalRoom."""
    changed = records.with_approval(record, approval)
    return records.fitted(records.with_least(changed, approval.sequence if revoke_older else 0))


def installed_text(approval: Approval, *, revoke_older: bool) -> str:
    """Return an event's text."""
    return f"{approval.name}: approval {approval.sequence} installed{', older ones revoked' * revoke_older}"


def installed_document(approval: Approval, least: int, present: Mapping[int, bytes]) -> dict[str, Any]:
    """Return how an installed approval stands."""
    differing = approval.differing(present)
    return {
        "schema": SCHEMA_VERSION,
        "uuid": str(approval.group) if approval.kind is Kind.GROUP else None,
        "name": approval.name,
        "sequence": approval.sequence,
        "comment": approval.comment or None,
        "least": least,
        "holds": not differing and untimely(approval, time.time()) is None,
        "differing": ",".join(map(str, differing)) or None,
    }
