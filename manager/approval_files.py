"""Targets as files, to be carried to the approver: what an approval is made for, and the PCR values of now."""

import json
import logging
from collections.abc import Mapping
from typing import Any, Final
from uuid import UUID

from manager.approval_records import group_target, platform_target
from manager.approval_target import Target
from manager.config import Layout
from manager.errors import IntegrityError
from manager.hwtpm import HardwareTpm
from manager.keys import BootArea, GroupSeal
from manager.policy import parse_pcrs
from storage.store_records import GroupRecord

_log = logging.getLogger("vtpm.approval")
TARGETS: Final = "approvals"  # directory in the state directory


def targets_of(store: UUID, boot: BootArea, groups: Mapping[UUID, GroupRecord], pcrs: str) -> list[Target]:
    """Return the targets of the platform object and of the groups, as far as they have an approver."""
    found = [] if boot.platform.policy.approver_point is None else [platform_target(store, boot, pcrs)]
    for uuid, record in groups.items():
        seal = GroupSeal.unpack(record.blob)
        if seal.sealed.policy.approver_point is None:
            continue
        try:
            found.append(group_target(store, boot, uuid, seal, pcrs))
        except IntegrityError as error:  # the others can be approved all the same
            _log.warning("%s", error)
    return found


def target_document(target: Target, present: Mapping[int, bytes]) -> dict[str, Any]:
    """Return a target as one flat object, with the present values of the PCRs that are to be approved."""
    values = ",".join(f"{pcr}={present[pcr].hex()}" for pcr in parse_pcrs(target.pcrs))
    return {"schema": 1, **target.to_json(), "pcr_values": values}


def write_targets(
    layout: Layout, tpm: HardwareTpm, store: UUID, boot: BootArea, groups: Mapping[UUID, GroupRecord], pcrs: str
) -> None:
    """Write each target to a file in the state directory, NAME.json: nothing in it is secret."""
    directory = layout.state_dir / TARGETS
    directory.mkdir(mode=0o700, exist_ok=True)
    for target in targets_of(store, boot, groups, pcrs):
        document = target_document(target, tpm.pcr_read(parse_pcrs(target.pcrs)))
        (directory / f"{target.name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="ascii")
