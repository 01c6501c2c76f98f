"""The approval document: one platform configuration (PCR values) that an approver allows for one sealed object.

Format, version 1, all numbers big-endian: head of 215 bytes (`_HEAD`, below), name, comment, PCR values of
32 bytes in PCR order, then two ECDSA P-256 signatures of 64 bytes (r, lower s): the first over H(approvedPolicy ||
policyRef), which the TPM checks, the second over H(label || everything before it), which this program checks. There is
one form of each document only. docs/approval.md is the description. Needs no TPM.
"""

import base64
import binascii
import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Final, Self
from uuid import UUID

from manager.approval_errors import ApprovalForged, ApprovalUnreadable
from manager.approval_key import SIGNATURE_BYTES, ApproverPrivate, ApproverPublic
from manager.hwtpm_errors import BadSetting
from manager.policy import PcrBranch, check_pcrs
from manager.policy_digests import (
    ALG_SHA256,
    LOCALITY_TWO_MASK,
    PCR_COUNT,
    ZERO_DIGEST,
    after_locality,
    after_nv,
    approval_statement,
    hashed,
)

MAGIC: Final = b"VAPR"
VERSION: Final = 1
NAME_BYTES: Final = 34  # Part 2, 10.5: algorithm, then a SHA-256 digest
SLOT_BYTES: Final = 8  # of the revocation index, one sequence
SLOTS: Final = 64  # 512 bytes: fits the NV buffer of every chip we know of (the smallest takes 768)
EO_UNSIGNED_LE: Final = 0x0009  # Part 2, 6.8 TPM_EO
MAX_SEQUENCE: Final = 2**63 - 1
MAX_DOCUMENT_BYTES: Final = 2048  # one with 20 PCRs and the longest texts has 1,247
MAX_NAME_BYTES: Final = 64
MAX_COMMENT_BYTES: Final = 200
MAX_TIME: Final = 253_402_300_799  # seconds: the end of the year 9999, the last that Python can print
_REFERENCE: Final = b"vtpm-manager policyRef v2\0"
_LABEL: Final = b"vtpm-manager approval v1\0"
# magic, version, kind, bank, slot, locality mask, PCR bitmap, NV index, NV Name, sequence, issued, not before, not
# after, store, group, reference, approver's fingerprint, approved policy, lengths of name and comment.
_HEAD: Final = struct.Struct(">4sBBHHB3sI34sQQQQ16s16s32s32s32sBH")
_ARMOUR: Final = ("-----BEGIN VTPM APPROVAL-----", "-----END VTPM APPROVAL-----")
_COLUMNS: Final = 64

assert _HEAD.size == 215, "approval format version 1: the head has 215 bytes"


class Kind(IntEnum):
    """What an approval opens; a wire value."""

    PLATFORM = 1
    GROUP = 2


def reference_for(kind: Kind, store: UUID, group: UUID, nv_name: bytes, slot: int) -> bytes:
    """Return the policyRef of an object with an approver, 32 bytes: which object, and where its sequence is kept.

    The object is sealed with it, and an approval is worth nothing under another one: whoever has an approver sign for
    another index (one that he can write) or another slot gets an approval that opens nothing.
    """
    return hashed(_REFERENCE, bytes([kind]), store.bytes, group.bytes, nv_name, slot.to_bytes(2))


@dataclass(frozen=True, slots=True)
class Approval:
    """One document. Times: whole seconds since 1970 UTC, 0 for no limit. `group`: nil for the platform object."""

    kind: Kind
    store: UUID
    group: UUID
    name: str
    locality: int | None
    nv_index: int
    nv_name: bytes
    slot: int
    sequence: int
    issued: int
    values: tuple[tuple[int, bytes], ...]
    approver: bytes
    not_before: int = 0
    not_after: int = 0
    comment: str = ""
    policy_signature: bytes = b""
    signature: bytes = b""

    @property
    def reference(self) -> bytes:
        """The policyRef that both the object and the approval carry."""
        return reference_for(self.kind, self.store, self.group, self.nv_name, self.slot)

    @property
    def selection(self) -> tuple[int, ...]:
        """The PCR numbers, ascending."""
        return tuple(pcr for pcr, _ in self.values)

    @property
    def operand(self) -> bytes:
        """What TPM2_PolicyNV compares the slot with: the sequence, 8 bytes."""
        return self.sequence.to_bytes(SLOT_BYTES)

    @property
    def offset(self) -> int:
        """Where the slot begins in the revocation index, in bytes."""
        return self.slot * SLOT_BYTES

    def approved_policy(self) -> bytes:
        """Compute the policy that is approved: PolicyPCR, PolicyNV (slot <= sequence), PolicyLocality; 32 bytes."""
        digest = PcrBranch(self.values).digest(b"")
        digest = after_nv(digest, self.nv_name, self.operand, self.offset, EO_UNSIGNED_LE)
        return digest if self.locality is None else after_locality(digest)

    def statement(self) -> bytes:
        """Return what the first signature is over: aHash of TPM2_PolicyAuthorize, 32 bytes."""
        return approval_statement(self.approved_policy(), self.reference)

    def signed(self, key: ApproverPrivate) -> Self:
        """Return it with both signatures. Raises ApprovalUnreadable: a field cannot be what it says."""
        self._check("The new approval")
        if key.public.fingerprint != self.approver:
            raise ApprovalForged("The new approval", "the key given is not the one it names, so its signature")
        with_policy = replace(self, policy_signature=key.sign(self.statement()))
        return replace(with_policy, signature=key.sign(with_policy._digest()))  # noqa: SLF001 - its own class

    def verify(self, key: ApproverPublic, name: str = "The approval") -> None:
        """Check both signatures. Raises ApprovalForged."""
        if key.fingerprint != self.approver:
            raise ApprovalForged(name, f"it names the approver {self.approver.hex()}, so its signature")
        if not key.verifies(self._digest(), self.signature):
            raise ApprovalForged(name, "the signature over the whole document")
        if not key.verifies(self.statement(), self.policy_signature):
            raise ApprovalForged(name, "the signature over the approved policy")

    def differing(self, present: Mapping[int, bytes]) -> dict[int, tuple[bytes, bytes]]:
        """Return PCR -> (approved, present) for those that are not as approved."""
        return {pcr: (value, present[pcr]) for pcr, value in self.values if present[pcr] != value}

    # --- bytes -------------------------------------------------------------------------------------

    def _body(self) -> bytes:
        name, comment = self.name.encode(), self.comment.encode()
        bitmap = sum(1 << pcr for pcr in self.selection).to_bytes(PCR_COUNT // 8, "little")
        head = _HEAD.pack(
            *(MAGIC, VERSION, self.kind, ALG_SHA256, self.slot),
            *(0 if self.locality is None else LOCALITY_TWO_MASK, bitmap, self.nv_index, self.nv_name),
            *(self.sequence, self.issued, self.not_before, self.not_after, self.store.bytes, self.group.bytes),
            *(self.reference, self.approver, self.approved_policy(), len(name), len(comment)),
        )
        return head + name + comment + b"".join(value for _, value in self.values)

    def _digest(self) -> bytes:
        return hashlib.sha256(_LABEL + self._body() + self.policy_signature).digest()

    def to_bytes(self) -> bytes:
        """Return the document; `parse` reads it back."""
        return self._body() + self.policy_signature + self.signature

    @classmethod
    def parse(cls, untrusted: bytes, name: str = "The approval") -> Self:
        """Read a document; whoever uses it calls `verify`. `name` is for messages. Raises ApprovalUnreadable."""
        if not _HEAD.size < len(untrusted) <= MAX_DOCUMENT_BYTES:
            raise ApprovalUnreadable(name, f"it has {len(untrusted)} bytes")
        (magic, version, kind, bank, slot, mask, bitmap, nv_index, nv_name, *numbers, lengths) = _head(untrusted)
        if magic != MAGIC or version != VERSION:
            raise ApprovalUnreadable(name, f"it does not begin as version {VERSION} of one")
        if bank != ALG_SHA256 or mask not in (0, LOCALITY_TWO_MASK):
            raise ApprovalUnreadable(name, "its PCR bank or locality is none that this program knows")
        sequence, issued, not_before, not_after, store, group, reference, approver, policy = numbers
        pcrs = [pcr for pcr in range(PCR_COUNT) if bitmap[pcr // 8] >> pcr % 8 & 1]
        pieces = _cut(untrusted[_HEAD.size :], [*lengths, *[32] * len(pcrs), SIGNATURE_BYTES, SIGNATURE_BYTES], name)
        named, comment, *values, policy_signature, signature = pieces
        try:
            found = cls(
                kind=Kind(kind),
                store=UUID(bytes=store),
                group=UUID(bytes=group),
                name=named.decode(),
                locality=2 if mask else None,
                nv_index=nv_index,
                nv_name=nv_name,
                slot=slot,
                sequence=sequence,
                issued=issued,
                values=tuple(zip(pcrs, values, strict=True)),
                approver=approver,
                not_before=not_before,
                not_after=not_after,
                comment=comment.decode(),
                policy_signature=policy_signature,
                signature=signature,
            )
        except ValueError as error:
            raise ApprovalUnreadable(name, str(error)) from error
        found._check(name)
        if (policy, reference) != (found.approved_policy(), found.reference):
            raise ApprovalUnreadable(name, "its approved policy or reference is not the one that its fields give")
        return found

    def _check(self, name: str) -> None:
        """Refuse fields that no approver can mean. Raises ApprovalUnreadable."""
        try:
            check_pcrs(self.selection)
        except BadSetting as error:
            raise ApprovalUnreadable(name, error.happened) from error
        times = self.issued, self.not_before, self.not_after
        try:
            words = len(self.name.encode()), len(self.comment.encode())
        except UnicodeEncodeError as error:
            raise ApprovalUnreadable(name, "its name or comment is no UTF-8") from error
        wrong = {
            "it approves no PCR values": not self.values,
            "a PCR value has not 32 bytes": any(len(value) != len(ZERO_DIGEST) for _, value in self.values),
            "its sequence is out of range": not 1 <= self.sequence <= MAX_SEQUENCE,
            "its slot is out of range": not 0 <= self.slot < SLOTS,
            "the slot is not one for its kind": (self.slot == 0) != (self.kind is Kind.PLATFORM),
            "the group is not one for its kind": (self.group.int == 0) != (self.kind is Kind.PLATFORM),
            "its NV Name is none": len(self.nv_name) != NAME_BYTES,
            "its name or comment is too long": words[0] > MAX_NAME_BYTES or words[1] > MAX_COMMENT_BYTES,
            "its name or comment has characters that cannot be printed": not (self.name + self.comment).isprintable(),
            "it ends before it begins": 0 < self.not_after < max(self.not_before, self.issued),
            "a time is out of range": not all(0 <= time <= MAX_TIME for time in times),
        }
        if problem := next((why for why, is_so in wrong.items() if is_so), None):
            raise ApprovalUnreadable(name, problem)

    # --- as a file ---------------------------------------------------------------------------------

    def armoured(self) -> str:
        """Return it as text for a file: base64 between two lines."""
        code = base64.b64encode(self.to_bytes()).decode()
        lines = [code[start : start + _COLUMNS] for start in range(0, len(code), _COLUMNS)]
        return "\n".join((_ARMOUR[0], *lines, _ARMOUR[1], ""))

    @classmethod
    def from_armoured(cls, untrusted: str, name: str = "The approval") -> Self:
        """Read `armoured` back, that very text and no other. Raises ApprovalUnreadable."""
        if not untrusted.isascii() or len(untrusted) > 2 * MAX_DOCUMENT_BYTES:
            raise ApprovalUnreadable(name, "it is no short text")
        lines = untrusted.split("\n")
        if lines[0] != _ARMOUR[0]:
            raise ApprovalUnreadable(name, f"it does not begin with {_ARMOUR[0]}")
        try:
            found = cls.parse(base64.b64decode("".join(lines[1:-2]), validate=True), name)
        except binascii.Error as error:
            raise ApprovalUnreadable(name, f"it is no base64 ({error})") from error
        if found.armoured() != untrusted:
            raise ApprovalUnreadable(name, "it is not as it was written")
        return found


def _head(untrusted: bytes) -> list[Any]:
    """Return the head's fields, the two lengths as one last list."""
    fields = _HEAD.unpack_from(untrusted)
    return [*fields[:-2], list(fields[-2:])]


def _cut(data: bytes, sizes: list[int], name: str) -> list[bytes]:
    """Cut into pieces of these sizes, nothing left over. Raises ApprovalUnreadable."""
    if sum(sizes) != len(data):
        raise ApprovalUnreadable(name, f"its parts have {len(data)} bytes, its head says {sum(sizes)}")
    pieces = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return pieces
