"""Under which conditions a sealed object opens: PCR selections, branches, the policy of them all. Pure, no TPM.

The arithmetic of their digests is in policy_digests.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from manager.hwtpm_errors import BadSetting, SealDamaged
from manager.policy_digests import (
    CC_UNSEAL,
    PCR_COUNT,
    ZERO_DIGEST,
    after_authorize,
    after_command_code,
    after_locality,
    after_pcr,
    after_signed,
    anchor_write_policy,
    hashed,
    nv_index_name,
    p256_key_name,
    policy_or,
    signed_statement,
)

__all__ = [
    "ZERO_DIGEST",
    "AuthorizeBranch",
    "Branch",
    "PcrBranch",
    "PlainBranch",
    "SealPolicy",
    "SignedBranch",
    "after_locality",
    "anchor_write_policy",
    "check_pcrs",
    "nv_index_name",
    "p256_key_name",
    "parse_pcrs",
    "policy_or",
    "signed_statement",
]

# Part 2, TPML_DIGEST of TPM2_PolicyOR: at least 2, at most 8 branches.
MAX_OR_BRANCHES: Final = 8
# 16 and 23 may be reset by anybody, 20 is our locality probe, 22 is our volatile anchor.
UNFIT_PCRS: Final = frozenset({16, 20, 22, 23})


def parse_pcrs(text: str) -> tuple[int, ...]:
    """Read `sha256:0,2,4-7`, `0,2,7` or `none`; sorted, unique. Raises BadSetting for anything else."""
    return () if text.strip() == "none" else check_pcrs(parse_any_pcrs(text))


def parse_any_pcrs(text: str) -> tuple[int, ...]:
    """Read `sha256:0,2,4-7` or `0,2,7`, also PCRs that nothing can be sealed to. Raises BadSetting."""
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
    return tuple(sorted(chosen))


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
        return hashed(*(value for _, value in self.values))

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


@dataclass(frozen=True, slots=True)
class AuthorizeBranch:
    """Opens under every policy that the approver (SAA) has signed for this reference. `point`: SEC1, 65 bytes."""

    point: bytes

    def digest(self, reference: bytes) -> bytes:
        """Return the policy digest of this branch before the locality is added."""
        return after_authorize(p256_key_name(self.point), reference)


Branch = PcrBranch | PlainBranch | SignedBranch | AuthorizeBranch


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
        approver_point: bytes | None = None,
        recovery_point: bytes | None = None,
        reference: bytes = b"",
        locality: int | None = 2,
    ) -> Self:
        """Make the policy of design section 5.

        pcrs: value sets (PCR -> 32 bytes): the present ones first, predicted ones after them; none of
        them means that PCRs are not bound. approver_point: signing key of the approver, which then says what PCRs
        must be: `pcrs` stays empty. recovery_point: signing key of the recovery file or None. Raises BadSetting.
        """
        bound: tuple[Branch, ...] = tuple(PcrBranch.of(values) for values in pcrs) or (PlainBranch(),)
        if approver_point is not None:
            if not reference or isinstance(bound[0], PcrBranch):
                raise BadSetting(
                    "A policy with an approver has a reference and no PCR values of its own",
                    "The approver signs the values, for one installation or group.",
                )
            bound = (AuthorizeBranch(approver_point),)
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
    def approver_point(self) -> bytes | None:
        """The approver's signing key (SEC1, 65 bytes) of the policy, if it has one."""
        return next((branch.point for branch in self.branches if isinstance(branch, AuthorizeBranch)), None)

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
        case AuthorizeBranch():
            return {"kind": "authorize", "key": branch.point.hex()}


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
        case {"kind": "authorize", "key": key, **rest} if not rest:
            point = bytes.fromhex(key)
            p256_key_name(point)
            return AuthorizeBranch(point)
        case _:
            raise SealDamaged("its policy has a branch this manager does not know")
