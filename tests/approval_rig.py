"""Approvals for tests: an approver, targets, and a real swtpm whose PCRs are moved as an upgrade would."""

import hashlib
import time
from typing import Any
from uuid import UUID, uuid4

from fixtures_tpm import extend_command

from manager.approval import Approval, Kind
from manager.approval_key import ApproverPrivate
from manager.approval_target import NO_GROUP, Target
from manager.hwtpm import HardwareTpm
from manager.hwtpm_records import AnchorInfo

MEASURED = b"\x5a" * 32  # what extend_command extends by


def extend(tpm: HardwareTpm, pcr: int) -> None:
    with tpm._link.operation("extend a PCR in a test") as esapi:
        assert esapi._tcti.exchange(extend_command(pcr))[6:10] == bytes(4)


def after_extend(value: bytes) -> bytes:
    return hashlib.sha256(value + MEASURED).digest()


def target(approver: ApproverPrivate, index: AnchorInfo, **changes: Any) -> Target:
    fields: dict[str, Any] = {
        "kind": Kind.GROUP,
        "store": uuid4(),
        "group": uuid4(),
        "name": "acme",
        "locality": index.locality,
        "pcrs": "sha256:0,7",
        "nv_index": index.index,
        "nv_name": index.name,
        "slot": 3,
        "least": 0,
        "approver": approver.public.fingerprint,
    }
    return Target(**fields | changes)


def approve(
    key: ApproverPrivate, what: Target, values: dict[int, bytes], sequence: int = 1, **changes: Any
) -> Approval:
    fields: dict[str, Any] = {
        "kind": what.kind,
        "store": what.store,
        "group": what.group,
        "name": what.name,
        "locality": what.locality,
        "nv_index": what.nv_index,
        "nv_name": what.nv_name,
        "slot": what.slot,
        "sequence": sequence,
        "issued": int(time.time()),
        "values": tuple(sorted(values.items())),
        "approver": key.public.fingerprint,
    }
    return Approval(**fields | changes).signed(key)


__all__ = ["NO_GROUP", "UUID", "after_extend", "approve", "extend", "target"]
