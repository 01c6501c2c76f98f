"""Which values PCRs may have, as a verifier writes them down. Must not import a TPM's library."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from frontend_backend.deep_quote import PCR_COUNT
from manager.attest_errors import DocumentUnreadable


@dataclass(frozen=True, slots=True)
class PcrPolicy:
    """Which values PCRs may have: hardware and vTPM, PCR -> allowed digests."""

    hardware: Mapping[int, tuple[bytes, ...]] = field(default_factory=dict)
    vtpm: Mapping[int, tuple[bytes, ...]] = field(default_factory=dict)

    @classmethod
    def from_text(cls, untrusted: bytes) -> Self:
        """Read {"hardware": {"0": ["HEX", ...]}, "vtpm": {...}}, nothing twice. Raises DocumentUnreadable."""
        try:
            return cls.from_json(json.loads(untrusted, object_pairs_hook=_once))
        except (ValueError, RecursionError) as error:
            raise DocumentUnreadable("the PCR policy", f"it is no JSON that says everything once ({error})") from error

    @classmethod
    def from_json(cls, untrusted: Any) -> Self:
        """Read what `from_text` reads, parsed. Raises DocumentUnreadable."""
        try:
            if not isinstance(untrusted, dict) or not all(isinstance(part, dict) for part in untrusted.values()):
                raise ValueError('it is not of the form {"hardware": {"0": ["HEX"]}, "vtpm": {"4": ["HEX"]}}')
            if not untrusted.keys() <= {"hardware", "vtpm"}:
                raise ValueError("it has other parts than hardware and vtpm")
            return cls(*(_allowed(untrusted.get(part, {})) for part in ("hardware", "vtpm")))
        except (AttributeError, TypeError, ValueError) as error:
            raise DocumentUnreadable("the PCR policy", str(error)) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{', '.join(sorted(twice))} stands in it twice")
    return dict(pairs)


def _allowed(untrusted: Any) -> dict[int, tuple[bytes, ...]]:
    if not all(pcr == str(int(pcr)) for pcr in untrusted):
        raise ValueError("PCRs are numbers as people write them")  # "00" would stand for what "0" stands for
    allowed = {int(pcr): tuple(map(bytes.fromhex, values)) for pcr, values in untrusted.items()}
    if not all(0 <= pcr < PCR_COUNT and values for pcr, values in allowed.items()):
        raise ValueError(f"PCRs are 0 to {PCR_COUNT - 1}, each with a list of allowed values")
    return allowed
