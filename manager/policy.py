"""Policy digests, object Names and NV Names, computed in software: pure, no TPM, no I/O.

The TPM computes the same digests step by step inside a policy session; sealing needs them beforehand.
Source: TPM 2.0 Library Part 3, section 23 (enhanced authorisation); Part 1, section 16 (Names).
"""

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from manager.hwtpm_errors import BadSetting, SealDamaged

ZERO_DIGEST: Final = bytes(32)
ALG_SHA256: Final = 0x000B
PCR_COUNT: Final = 24
# Part 2, TPML_DIGEST of TPM2_PolicyOR: at least 2, at most 8 branches.
MAX_OR_BRANCHES: Final = 8
# 16 and 23 may be reset by anybody, 20 is our locality probe, 22 is our volatile anchor.
UNFIT_PCRS: Final = frozenset({16, 20, 22, 23})
# Part 2, TPMA_LOCALITY: one bit per locality 0..4.
LOCALITY_TWO_MASK: Final = 1 << 2
# Part 2, TPM_CC.
CC_UNSEAL: Final = 0x015E
CC_POLICY_SIGNED: Final = 0x0160
CC_POLICY_AUTH_VALUE: Final = 0x016B
CC_POLICY_COMMAND_CODE: Final = 0x016C
CC_POLICY_LOCALITY: Final = 0x016F
CC_POLICY_OR: Final = 0x0171
CC_POLICY_PCR: Final = 0x017F


def _hash(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def _command(code: int) -> bytes:
    return struct.pack(">I", code)


def after_locality(digest: bytes, mask: int = LOCALITY_TWO_MASK) -> bytes:
    """Extend a policy digest by TPM2_PolicyLocality; mask is a TPMA_LOCALITY, not a number. Part 3, 23.8."""
    return _hash(digest, _command(CC_POLICY_LOCALITY), bytes([mask]))


def after_auth_value(digest: bytes) -> bytes:
    """Extend a policy digest by TPM2_PolicyAuthValue. Part 3, 23.17."""
    return _hash(digest, _command(CC_POLICY_AUTH_VALUE))


def after_command_code(digest: bytes, code: int) -> bytes:
    """Extend a policy digest by TPM2_PolicyCommandCode. Part 3, 23.11."""
    return _hash(digest, _command(CC_POLICY_COMMAND_CODE), _command(code))


def after_pcr(digest: bytes, selection: Iterable[int], pcr_digest: bytes) -> bytes:
    """Extend a policy digest by TPM2_PolicyPCR over the SHA-256 bank. Part 3, 23.7."""
    return _hash(digest, _command(CC_POLICY_PCR), pcr_selection_bytes(selection), pcr_digest)


def after_signed(digest: bytes, key_name: bytes, reference: bytes) -> bytes:
    """Extend a policy digest by TPM2_PolicySigned of the key with this Name. Part 3, 23.3 and 23.2.3."""
    return _hash(_hash(digest, _command(CC_POLICY_SIGNED), key_name), reference)


def policy_or(branches: Iterable[bytes]) -> bytes:
    """TPM2_PolicyOR over the digests of 2..8 branches. Part 3, 23.6."""
    return _hash(ZERO_DIGEST, _command(CC_POLICY_OR), *branches)


def signed_statement(nonce_tpm: bytes, reference: bytes, expiration: int = 0) -> bytes:
    """Return the digest (aHash) a recovery key signs for TPM2_PolicySigned, without a cpHash. Part 3, 23.2.2.

    nonce_tpm must not be empty: a statement without it could be replayed for ever.
    """
    assert nonce_tpm, "a recovery statement always carries nonceTPM"
    return _hash(nonce_tpm, struct.pack(">i", expiration), reference)


def pcr_selection_bytes(selection: Iterable[int]) -> bytes:
    """TPML_PCR_SELECTION of one SHA-256 bank with 24 PCRs. Part 2, 10.9.7."""
    bitmap = bytearray(PCR_COUNT // 8)
    for pcr in selection:
        bitmap[pcr // 8] |= 1 << (pcr % 8)
    return struct.pack(">IHB", 1, ALG_SHA256, len(bitmap)) + bytes(bitmap)


def p256_key_name(point: bytes) -> bytes:
    """Compute the Name of an external P-256 verification key (sign only, no scheme) as our hwtpm modules load it.

    point: SEC1 uncompressed, 65 bytes. Result: 34 bytes. Source: Part 2, 12.2.4 TPMT_PUBLIC; Part 1, 16.
    """
    if len(point) != 65 or point[0] != 4:
        raise SealDamaged("its recovery key is not an uncompressed P-256 point of 65 bytes")
    # type ECC, nameAlg SHA256, userWithAuth|noDA|sign, no policy, symmetric NULL, scheme NULL, P-256, kdf NULL.
    head = struct.pack(">HHIHHHHH", 0x0023, ALG_SHA256, 0x0004_0440, 0, 0x0010, 0x0010, 0x0003, 0x0010)
    unique = b"".join(struct.pack(">H", 32) + half for half in (point[1:33], point[33:]))
    return struct.pack(">H", ALG_SHA256) + _hash(head, unique)


def nv_index_name(index: int, attributes: int, auth_policy: bytes, size: int) -> bytes:
    """Compute the Name of an NV index with these public values, 34 bytes. Source: Part 2, 13.5 TPMS_NV_PUBLIC."""
    public = struct.pack(">IHIH", index, ALG_SHA256, attributes, len(auth_policy)) + auth_policy
    return struct.pack(">H", ALG_SHA256) + _hash(public, struct.pack(">H", size))


def anchor_write_policy(locality: int | None) -> bytes:
    """Compute the write policy of the durable anchor: PolicyLocality(2) where we have it, then PolicyAuthValue."""
    start = ZERO_DIGEST if locality is None else after_locality(ZERO_DIGEST)
    return after_auth_value(start)


def parse_pcrs(text: str) -> tuple[int, ...]:
    """Read `sha256:0,2,4-7`, `0,2,7` or `none`; sorted, unique. Raises BadSetting for anything else."""
    if text.strip() == "none":
        return ()
    bank, separator, numbers = text.strip().rpartition(":")
    if separator and bank != "sha256":
        raise BadSetting(f"The PCR bank {bank!r} cannot be used", "Only sha256 is: for example `sha256:0,2,7`.")
    chosen: set[int] = set()
    for part in numbers.split(","):
        low, dash, high = part.strip().partition("-")
        if not (low.isascii() and low.isdecimal() and (not dash or (high.isascii() and high.isdecimal()))):
            raise BadSetting(f"{text!r} is not a PCR selection", "Write for example `sha256:0,2,4-7` or `none`.")
        first, last = int(low), int(high or low)
        if first > last or last >= PCR_COUNT:
            raise BadSetting(f"PCR {part.strip()} does not exist", f"PCRs are numbered 0 to {PCR_COUNT - 1}.")
        chosen.update(range(first, last + 1))
    return check_pcrs(chosen)


def check_pcrs(selection: Iterable[int]) -> tuple[int, ...]:
    """Return the sorted selection; raises BadSetting for PCRs that anybody (or we ourselves) may reset or extend."""
    chosen = tuple(sorted(set(selection)))
    if unfit := sorted(UNFIT_PCRS.intersection(chosen)):
        names = ", ".join(map(str, unfit))
        raise BadSetting(
            f"Nothing can be sealed to PCR {names}",
            "16 and 23 can be reset by anybody, 20 and 22 are used by the manager itself: leave them out.",
        )
    if chosen and not 0 <= chosen[0] <= chosen[-1] < PCR_COUNT:
        raise BadSetting("There is no such PCR", f"PCRs are numbered 0 to {PCR_COUNT - 1}.")
    return chosen


@dataclass(frozen=True, slots=True)
class PcrBranch:
    """Opens while the selected PCRs of the SHA-256 bank have these values (32 bytes each)."""

    values: tuple[tuple[int, bytes], ...]

    @classmethod
    def of(cls, values: Mapping[int, bytes]) -> Self:
        """From a mapping PCR -> value. Raises BadSetting for unfit PCRs, none at all or other digest sizes."""
        if not values or any(len(value) != len(ZERO_DIGEST) for value in values.values()):
            raise BadSetting("A PCR branch needs values of 32 bytes", "Read them from the SHA-256 bank.")
        return cls(tuple((pcr, bytes(values[pcr])) for pcr in check_pcrs(values)))

    @property
    def selection(self) -> tuple[int, ...]:
        """The PCR numbers, ascending."""
        return tuple(pcr for pcr, _ in self.values)

    @property
    def pcr_digest(self) -> bytes:
        """SHA-256 over the values in PCR order, as TPM2_PolicyPCR takes it."""
        return _hash(*(value for _, value in self.values))

    def digest(self, reference: bytes) -> bytes:  # noqa: ARG002 - PolicyPCR takes no policyRef; all branches share this signature
        """Return the policy digest of this branch before the locality is added."""
        return after_pcr(ZERO_DIGEST, self.selection, self.pcr_digest)


@dataclass(frozen=True, slots=True)
class PlainBranch:
    """Opens at the policy's locality, whatever the PCRs (`--pcrs none`); for TPM2_Unseal only."""

    def digest(self, reference: bytes) -> bytes:  # noqa: ARG002 - as above
        """Return the policy digest of this branch before the locality is added; never empty."""
        return after_command_code(ZERO_DIGEST, CC_UNSEAL)


@dataclass(frozen=True, slots=True)
class SignedBranch:
    """Opens with a fresh signature (nonceTPM) of the recovery signing key. `point`: SEC1, 65 bytes."""

    point: bytes

    def digest(self, reference: bytes) -> bytes:
        """Return the policy digest of this branch before the locality is added."""
        return after_signed(ZERO_DIGEST, p256_key_name(self.point), reference)


# The approver's PolicyAuthorize joins here as one more kind of branch.
Branch = PcrBranch | PlainBranch | SignedBranch


@dataclass(frozen=True, slots=True)
class SealPolicy:
    """Under which conditions the TPM gives a secret back: any one of the branches, each at the locality.

    locality: 2, or None in the explicitly allowed mode without one. reference: policyRef, which binds a
    recovery statement to this store or group. Source: design section 5.
    """

    branches: tuple[Branch, ...]
    reference: bytes = field(default=b"")
    locality: int | None = 2

    def __post_init__(self) -> None:
        if not 1 <= len(self.branches) <= MAX_OR_BRANCHES:
            raise BadSetting(
                f"A seal policy with {len(self.branches)} branches is not possible",
                f"Give one to {MAX_OR_BRANCHES}, predicted PCR values and the recovery key included.",
            )
        if self.locality not in {None, 2}:
            raise BadSetting(f"Nothing can be sealed to locality {self.locality}", "Use 2, or none.")

    @classmethod
    def build(
        cls,
        *,
        pcrs: Iterable[Mapping[int, bytes]] = (),
        recovery_point: bytes | None = None,
        reference: bytes = b"",
        locality: int | None = 2,
    ) -> Self:
        """Make the policy of design section 5 without an approver.

        pcrs: value sets (PCR -> 32 bytes): the present ones first, predicted ones after them; none of
        them means that PCRs are not bound. recovery_point: signing key of the recovery file or None.
        Raises BadSetting.
        """
        bound: tuple[Branch, ...] = tuple(PcrBranch.of(values) for values in pcrs) or (PlainBranch(),)
        recovery: tuple[Branch, ...] = () if recovery_point is None else (SignedBranch(recovery_point),)
        return cls(bound + recovery, reference, locality)

    def branch_digests(self) -> tuple[bytes, ...]:
        """Return the policy digest of each branch with its locality, 32 bytes each, in order."""
        plain = (branch.digest(self.reference) for branch in self.branches)
        return tuple(digest if self.locality is None else after_locality(digest) for digest in plain)

    def digest(self) -> bytes:
        """Return the authPolicy of the sealed object, 32 bytes: the branch itself, or their PolicyOR."""
        digests = self.branch_digests()
        return digests[0] if len(digests) == 1 else policy_or(digests)

    @property
    def recovery_point(self) -> bytes | None:
        """The recovery signing key (SEC1, 65 bytes) of the policy, if it has one."""
        return next((branch.point for branch in self.branches if isinstance(branch, SignedBranch)), None)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able description; holds no secret (PCR values and public keys only)."""
        return {
            "version": 1,
            "locality": self.locality,
            "reference": self.reference.hex(),
            "branches": [_branch_to_json(branch) for branch in self.branches],
        }

    @classmethod
    def from_json(cls, untrusted: Any) -> Self:
        """Read a description back. Raises SealDamaged for anything `to_json` cannot have written."""
        try:
            if untrusted["version"] != 1:
                raise SealDamaged(f"its policy has version {untrusted['version']!r}, this manager reads 1")
            branches = tuple(_branch_from_json(item) for item in untrusted["branches"])
            return cls(branches, bytes.fromhex(untrusted["reference"]), untrusted["locality"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, BadSetting) as error:
            raise SealDamaged(f"its policy cannot be read ({type(error).__name__}: {error})") from error


def _branch_to_json(branch: Branch) -> dict[str, Any]:
    match branch:
        case PcrBranch():
            return {"kind": "pcr", "bank": "sha256", "values": {str(p): v.hex() for p, v in branch.values}}
        case PlainBranch():
            return {"kind": "plain"}
        case SignedBranch():
            return {"kind": "signed", "key": branch.point.hex()}


def _branch_from_json(untrusted: Any) -> Branch:
    match untrusted:
        case {"kind": "pcr", "bank": "sha256", "values": values, **rest} if not rest:
            return PcrBranch.of({int(pcr): bytes.fromhex(value) for pcr, value in values.items()})
        case {"kind": "plain", **rest} if not rest:
            return PlainBranch()
        case {"kind": "signed", "key": key, **rest} if not rest:
            point = bytes.fromhex(key)
            p256_key_name(point)
            return SignedBranch(point)
        case _:
            raise SealDamaged("its policy has a branch this manager does not know")
