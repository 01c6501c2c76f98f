"""The model TPM's revocation index, and opening by an approval as the model does it."""

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from manager.approval import SLOTS
from manager.approval_errors import ApprovalRevoked, NotApproved, RevocationDenied, RevocationMissing
from manager.approval_target import choose
from manager.hwtpm_approval import approvals_of
from manager.hwtpm_records import AnchorInfo, SealedBlob
from manager.revocation_writer import RevocationWriter

FIRST_REVOCATION = 0x01800200


class ModelRevocations:
    """Index number -> its writer's point and the slots (None: never written)."""

    def __init__(self, call: Callable[[str], AbstractContextManager[None]]) -> None:
        self._call = call
        self.indices: dict[int, tuple[bytes, list[int] | None]] = {}
        self.writes = 0

    def plan(self, index: int, writer_point: bytes) -> AnchorInfo:
        return AnchorInfo(index, b"\x00\x0b" + hashlib.sha256(index.to_bytes(4) + writer_point).digest())

    def place(self, writer_point: bytes, prefer: int = FIRST_REVOCATION) -> AnchorInfo:
        with self._call("revocations.place"):
            known = [index for index, (point, _) in self.indices.items() if point == writer_point]
            free = (
                index
                for index in (prefer, *range(FIRST_REVOCATION, FIRST_REVOCATION + 256))
                if index not in self.indices
            )
            return self.plan(known[0] if known else next(free), writer_point)

    def ensure(self, info: AnchorInfo, writer: RevocationWriter, least: Mapping[int, int]) -> None:
        with self._call("revocations.define"):
            self.indices.setdefault(info.index, (writer.point, None))
        with self._call("revocations.ensure"):
            point, slots = self.indices[info.index]
            if point != writer.point:
                raise RevocationMissing(info.index, "another index is there")
            if slots is None:
                self.indices[info.index] = point, [least.get(slot, 0) for slot in range(SLOTS)]
        for slot, sequence in least.items():
            self.raise_to(info, writer, slot, sequence)

    def renew(self, writer: RevocationWriter, least: Mapping[int, int], prefer: int = FIRST_REVOCATION) -> AnchorInfo:
        info = self.place(writer.point, prefer)
        self.ensure(info, writer, least)
        return info

    def read(self, info: AnchorInfo) -> tuple[int, ...]:
        with self._call("revocations.read"):
            return tuple(self._slots(info))

    def raise_to(self, info: AnchorInfo, writer: RevocationWriter, slot: int, sequence: int) -> bool:
        with self._call("revocations.raise_to"):
            slots = self._slots(info)
            if self.indices[info.index][0] != writer.point:
                raise RevocationDenied(info.index, "write it")
            if sequence <= slots[slot]:
                return False
            slots[slot] = sequence
            self.writes += 1
            return True

    def undefine(self, info: AnchorInfo) -> None:
        with self._call("revocations.undefine"):
            if self.indices.get(info.index) is None or self.plan(info.index, self.indices[info.index][0]) != info:
                raise RevocationMissing(info.index, "it does not exist")
            del self.indices[info.index]

    def _slots(self, info: AnchorInfo) -> list[int]:
        point, slots = self.indices.get(info.index, (b"", None))
        if slots is None or self.plan(info.index, point) != info:
            raise RevocationMissing(info.index, "it does not exist, or was never written")
        return slots


def open_approved(blob: SealedBlob, pcrs: Mapping[int, bytes], revocations: ModelRevocations) -> None:
    """Return if an approval beside the object opens it; raises as the hardware modules do."""
    point = blob.policy.approver_point
    assert point is not None
    approvals, unusable = approvals_of(blob, point)
    choice = choose(approvals, pcrs, time.time())
    for approval in choice.holding:
        if revocations.read(AnchorInfo(approval.nv_index, approval.nv_name))[approval.slot] <= approval.sequence:
            return
    if choice.holding:
        raise ApprovalRevoked("unseal", choice.holding[0].sequence)
    raise NotApproved("unseal", choice.differing, (*choice.reasons, *unusable))
