"""The verbs `approve`, `group-update GROUP APPROVAL` and `group-predict`: what approves this platform, or would."""

import time
from collections.abc import Mapping
from typing import Final
from uuid import UUID

from manager.approval_install import installed_document, policy_of
from manager.approval_records import approvals_in
from manager.approval_target import PLATFORM_NAME, choose, untimely
from manager.errors import ManagerError, UsageError
from manager.keys import BootArea, GroupSeal
from manager.policy import PcrBranch, check_pcrs, parse_pcrs
from manager.predicted import parse_predicted
from manager.services import Arguments, Caller, Document, Services
from manager.verb_table import SCHEMA_VERSION

_NONE: Final = "none"
_TARGET_FIELDS: Final = (
    *("approval_kind", "reference", "approved_pcrs", "revocation_index", "revocation_name", "revocation_slot"),
    "sequence",
)


async def approve(services: Services, _caller: Caller, arguments: Arguments) -> list[Document]:
    """Install an approval of the platform object, or of the group that it names."""
    return [await install(services, arguments, None)]


async def install(services: Services, arguments: Arguments, group: UUID | None) -> Document:
    """Install an approval for a group (None: for whatever it is made for) and say how it stands."""
    approval = await services.approvals.install(
        arguments["approval"], group, revoke_older=arguments["revoke_older"], confirmed=arguments["yes"]
    )
    place = approval.group if approval.group.int else None
    record = services.approvals.record(place)
    present = await services.approvals.present(set(approval.selection))
    return installed_document(approval, record.least, present)


async def predict(services: Services, _caller: Caller, arguments: Arguments) -> list[Document]:
    """Compare what opens a group with the PCRs of now, or as they are expected to become."""
    name = arguments["group"]
    group = None if name == PLATFORM_NAME else services.groups.find(name).uuid
    record = services.approvals.record(group)
    predicted = parse_predicted(list(arguments["pcr"]))
    values = _wanted(record)
    chosen = {pcr for wanted in values for pcr in wanted} | _selection(services, record) | set(check_pcrs(predicted))
    present = await services.approvals.present(chosen) | predicted
    return predictions(name, record, present)


def _selection(services: Services, record: BootArea | GroupSeal) -> set[int]:
    """Return the PCRs that an approver is asked to approve."""
    pcrs = (record.pcrs if isinstance(record, GroupSeal) else "") or services.config.tpm.pcrs
    return set() if pcrs == _NONE else set(parse_pcrs(pcrs))


def _wanted(record: BootArea | GroupSeal) -> list[dict[int, bytes]]:
    policy = policy_of(record)
    sealed = [dict(branch.values) for branch in policy.branches if isinstance(branch, PcrBranch)]
    return sealed + [dict(approval.values) for approval in approvals_in(record)]


def predictions(name: str, record: BootArea | GroupSeal, present: Mapping[int, bytes]) -> list[Document]:
    """Return a row for each PCR of each approval (or sealed set of values), and of the values of now.

    `by` is "approval", "seal", or "present" for PCRs that are only told; `opens` whether the whole of it holds.
    """
    policy = policy_of(record)
    rows: list[Document] = []
    now = time.time()
    approvals = approvals_in(record) if policy.approver_point is not None else ()
    holding = choose(approvals, present, now).holding
    for approval in sorted(approvals, key=lambda one: one.sequence, reverse=True):
        revoked = "it is revoked" if approval.sequence < record.least else None
        why = revoked or untimely(approval, now, approvals)
        about = ("approval", approval.sequence, approval.comment or None, approval in holding and not revoked, why)
        rows += _rows(name, about, dict(approval.values), present)
    for branch in policy.branches:
        if isinstance(branch, PcrBranch):
            values = dict(branch.values)
            opens = all(present[pcr] == value for pcr, value in values.items())
            rows += _rows(name, ("seal", None, None, opens, None), values, present)
    told = {row["pcr"] for row in rows}
    return rows + _rows(name, ("present", None, None, None, None), dict.fromkeys(sorted(set(present) - told)), present)


def _rows(
    name: str,
    about: tuple[str, int | None, str | None, bool | None, str | None],
    values: Mapping[int, bytes | None],
    present: Mapping[int, bytes],
) -> list[Document]:
    by, sequence, comment, opens, why = about
    return [
        {
            "schema": SCHEMA_VERSION,
            "name": name,
            "by": by,
            "sequence": sequence,
            "comment": comment,
            "opens": opens,
            "reason": why,
            "pcr": pcr,
            "same": None if value is None else value == present[pcr],
            "approved": None if value is None else value.hex(),
            "present": present[pcr].hex(),
        }
        for pcr, value in sorted(values.items())
    ]


def unapproved(name: str) -> str:
    """Return what has to be said of a group that has an approver from now on."""
    return (
        f"group {name} is open now, and will be CLOSED after the next start unless an approval is installed: take "
        f"'vtpm-group-show {name} --json' to 'vtpm-approve sign', then 'vtpm-group-update {name} APPROVAL'"
    )


def target_fields(services: Services, group: UUID) -> Document:
    """Return what an approver has to know of a group beside its name and UUID, null where it has no approver."""
    fields = dict.fromkeys(_TARGET_FIELDS)
    try:
        told = services.approvals.target(group).to_json()
    except ManagerError:  # no approver; or sealed for an index that this TPM does not have, which its opening says
        return dict(fields)
    return {name: told[name] for name in fields}


def refuse_mixed(arguments: Arguments) -> None:
    """Raise UsageError for an approval together with changes that seal anew, or for its options without one."""
    others = [name for name in ("name", "pcrs", "recovery", "saa", "quota") if arguments[name] is not None]
    if arguments["approval"] is None and (arguments["revoke_older"] or arguments["yes"]):
        raise UsageError("--revoke-older and --yes belong to an approval: name one. Nothing was changed")
    if arguments["approval"] is not None and others:
        raise UsageError(f"install the approval by itself, without --{others[0]}. Nothing was changed")
