"""What an approval is made for, and which of the approvals at hand opens it here and now. Pure, no TPM.

A target is public: the manager prints it (`vtpm-group-show --json`, `vtpm-manager approvals --json`), and
`vtpm-approve` reads it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Self
from uuid import UUID

from manager.approval import NAME_BYTES, SLOTS, Approval, Kind, reference_for
from manager.approval_errors import ApprovalElsewhere, ApprovalUnreadable
from manager.approval_key import ApproverPublic
from manager.hwtpm_errors import BadSetting
from manager.policy import parse_pcrs

NO_GROUP: Final = UUID(int=0)
PLATFORM_NAME: Final = "platform"
NV_INDICES: Final = range(0x01000000, 0x02000000)  # Part 2, 7.2 TPM_HT_NV_INDEX
CLOCK_SKEW: Final = 300  # seconds that the approver's clock may be ahead of ours
# A clock below this one was never set: no approval was signed before this program was written.
CLOCK_FLOOR: Final = 1_792_800_000


@dataclass(frozen=True, slots=True)
class Target:
    """One sealed object with an approver. `least`: the lowest sequence that is not known to be revoked."""

    kind: Kind
    store: UUID
    group: UUID
    name: str
    locality: int | None
    pcrs: str
    nv_index: int
    nv_name: bytes
    slot: int
    least: int
    approver: bytes

    @property
    def reference(self) -> bytes:
        """The policyRef that the object is sealed with."""
        return reference_for(self.kind, self.store, self.group, self.nv_name, self.slot)

    def to_json(self) -> dict[str, Any]:
        """Return it as flat fields; none is secret."""
        return {
            "approval_kind": self.kind.name.lower(),
            "store": str(self.store),
            "uuid": None if self.kind is Kind.PLATFORM else str(self.group),
            "name": self.name,
            "reference": self.reference.hex(),
            "locality": self.locality,
            "approved_pcrs": self.pcrs,
            "revocation_index": self.nv_index,
            "revocation_name": self.nv_name.hex(),
            "revocation_slot": self.slot,
            "sequence": self.least,
            "saa": self.approver.hex(),
        }

    @classmethod
    def from_json(cls, untrusted: Any, name: str) -> Self:
        """Read `to_json` back, other fields beside it ignored; `name` is for messages. Raises ApprovalUnreadable."""
        try:
            kind = Kind[untrusted["approval_kind"].upper()]
            found = cls(
                kind=kind,
                store=UUID(untrusted["store"]),
                group=NO_GROUP if kind is Kind.PLATFORM else UUID(untrusted["uuid"]),
                name=str(untrusted["name"]),
                locality=untrusted["locality"] or None,
                pcrs=str(untrusted["approved_pcrs"]),
                nv_index=int(untrusted["revocation_index"]),
                nv_name=bytes.fromhex(untrusted["revocation_name"]),
                slot=int(untrusted["revocation_slot"]),
                least=int(untrusted["sequence"]),
                approver=bytes.fromhex(untrusted["saa"]),
            )
            parse_pcrs(found.pcrs)
            if found.reference != bytes.fromhex(untrusted["reference"]):
                raise ApprovalUnreadable(name, "its reference is not that of its store, group, index and slot")
        except (KeyError, TypeError, ValueError, AttributeError, BadSetting) as error:
            raise ApprovalUnreadable(name, f"it does not describe a group with an approver ({error!r})") from error
        if found.locality not in (None, 2) or len(found.nv_name) != NAME_BYTES or not 0 <= found.slot < SLOTS:
            raise ApprovalUnreadable(name, "it has a locality, NV Name or slot that cannot be")
        if found.nv_index not in NV_INDICES:
            raise ApprovalUnreadable(name, "its revocation index is no NV index")
        return found

    def check(self, approval: Approval, key: ApproverPublic, name: str = "The approval") -> None:
        """Check that an approval is genuine and made for this object. Raises ApprovalForged, ApprovalElsewhere."""
        approval.verify(key, name)
        for what, said, wanted in (
            ("kind of object", approval.kind.name.lower(), self.kind.name.lower()),
            ("store", approval.store, self.store),
            ("group", approval.group, self.group),
            ("locality", approval.locality, self.locality),
            ("revocation index", f"0x{approval.nv_index:08x}", f"0x{self.nv_index:08x}"),
            ("revocation index's Name", approval.nv_name.hex(), self.nv_name.hex()),
            ("slot", approval.slot, self.slot),
        ):
            if said != wanted:
                raise ApprovalElsewhere(name, f"its {what} is {said}, here it is {wanted}")


def untimely(approval: Approval, now: float, known: Iterable[Approval] = ()) -> str | None:
    """Return why an approval with a validity cannot be used at `now` (seconds since 1970), None where it can.

    The TPM has no wall clock. Ours counts only if it is not before this program was written and not before any of
    the `known` approvals was issued: a clock that was set back must not bring an expired approval to life.
    """
    if not (approval.not_before or approval.not_after):
        return None
    floor = max([CLOCK_FLOOR, approval.issued, *(other.issued for other in known)]) - CLOCK_SKEW
    if now < floor:
        return f"it has a validity, and the clock ({moment(now)}) is wrong: it is at least {moment(floor)}"
    if now < approval.not_before:
        return f"it is valid from {moment(approval.not_before)} on"
    if approval.not_after and now > approval.not_after:
        return f"it was valid until {moment(approval.not_after)}"
    return None


@dataclass(frozen=True, slots=True)
class Choice:
    """Which approvals hold (the highest sequence first), and of the others why not, the newest first."""

    holding: tuple[Approval, ...]
    reasons: tuple[str, ...]
    differing: dict[int, tuple[bytes, bytes]]


def choose(approvals: Iterable[Approval], present: Mapping[int, bytes], now: float) -> Choice:
    """Compare approvals with the PCR values of now; `differing` is of the one that is nearest."""
    ordered = sorted(approvals, key=lambda approval: approval.sequence, reverse=True)
    holding, reasons, differences = [], [], []
    for approval in ordered:
        differing = approval.differing(present)
        why = untimely(approval, now, ordered)
        if differing:
            differences.append(differing)
            changed = ", ".join(
                f"PCR {pcr} is {new.hex()}, approved {old.hex()}" for pcr, (old, new) in differing.items()
            )
            why = changed if why is None else f"{changed}; {why}"
        if why is None:
            holding.append(approval)
        else:
            reasons.append(f"approval {approval.sequence}{_quoted(approval.comment)}: {why}")
    return Choice(tuple(holding), tuple(reasons), min(differences, key=len, default={}))


def moment(seconds: float) -> str:
    """Return a time as people and programs read it: ISO 8601, UTC, whole seconds."""
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=0).isoformat()


def _quoted(comment: str) -> str:
    return f" ({comment})" if comment else ""
