"""What the hardware TPM layer hands out: values to keep in the store or to show. Pure; none holds a secret."""

import hashlib
from dataclasses import dataclass
from typing import Any, Self

from manager.hwtpm_errors import AnchorMissing, SealDamaged
from manager.policy import SealPolicy


@dataclass(frozen=True, slots=True)
class SealedBlob:
    """A sealed object: TPM2B_PUBLIC and TPM2B_PRIVATE as marshalled (about 80 + 160 bytes), and its policy.

    Only the TPM that made it can open it; no part of it is secret. The policy description needs no protection
    of its own: `HardwareTpm.unseal` checks it against the authPolicy, which the TPM protects. `approvals` are the
    documents (manager.approval) that may open it, where its policy has an approver; they are kept beside it.
    """

    public: bytes
    private: bytes
    policy: SealPolicy
    approvals: tuple[bytes, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able form (bytes as hex)."""
        return {"public": self.public.hex(), "private": self.private.hex(), "policy": self.policy.to_json()}

    @classmethod
    def from_json(cls, untrusted: Any) -> Self:
        """Read `to_json` back. Raises SealDamaged."""
        try:
            public, private = bytes.fromhex(untrusted["public"]), bytes.fromhex(untrusted["private"])
            policy = untrusted["policy"]
        except (KeyError, TypeError, ValueError) as error:
            raise SealDamaged(f"its record cannot be read ({error})") from error
        return cls(public, private, SealPolicy.from_json(policy))


@dataclass(frozen=True, slots=True)
class AnchorInfo:
    """A durable anchor: NV index, its Name once written (34 bytes, pinned), and the locality of its policy."""

    index: int
    name: bytes
    locality: int | None = 2

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able form."""
        return {"index": self.index, "name": self.name.hex(), "locality": self.locality}

    @classmethod
    def from_json(cls, untrusted: Any) -> Self:
        """Read `to_json` back. Raises AnchorMissing: an unreadable record is not an anchor."""
        try:
            index, name, locality = untrusted["index"], bytes.fromhex(untrusted["name"]), untrusted["locality"]
        except (KeyError, TypeError, ValueError) as error:
            raise AnchorMissing(0, f"its record cannot be read ({error})") from error
        if type(index) is not int or locality not in (None, 2) or len(name) != 2 + hashlib.sha256().digest_size:
            raise AnchorMissing(0, "its record has impossible values")
        return cls(index, name, locality)


@dataclass(frozen=True, slots=True)
class ClockState:
    """TPM2_ReadClock: how often the TPM was reset and resumed; `safe` is False after an unclean stop."""

    reset_count: int
    restart_count: int
    safe: bool


@dataclass(frozen=True, slots=True)
class LocalityReport:
    """What the PCR 20 probe showed. `refused_at_zero` is None where the transport cannot try locality 0.

    `weaker` is True for the explicitly allowed mode without locality 2: nothing then keeps the host's own
    software from unsealing what the manager sealed.
    """

    locality: int
    refused_at_zero: bool | None
    weaker: bool


@dataclass(frozen=True, slots=True)
class TpmProperties:
    """Fixed and variable properties worth showing. Times in seconds. Source: Part 2, 6.13 TPM_PT."""

    manufacturer: str
    vendor: str
    firmware: str
    owner_auth_set: bool
    endorsement_auth_set: bool
    lockout_auth_set: bool
    in_lockout: bool
    lockout_counter: int
    max_auth_fail: int
    lockout_interval: int
    lockout_recovery: int
