"""What a hardware TPM says of itself: maker, clock, self-test, lockout, passwords, what is in use of its few places."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from tpm2_pytss import TPM2_CAP

from manager import hwtpm_pcr
from manager.hwtpm_link import LOADED_SESSION_FIRST, TRANSIENT_FIRST, TpmLink
from manager.hwtpm_rc import RC_NEEDS_TEST, RC_TESTING
from manager.hwtpm_records import ClockState, TpmProperties

_PERSISTENT_FIRST: Final = 0x81000000
_NV_FIRST: Final = 0x01000000
_BANK_NAMES: Final = {0x0004: "sha1", 0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512", 0x0012: "sm3_256"}
_DISABLE_CLEAR: Final = 1 << 8  # Part 2, 8.6 TPMA_PERMANENT


class Place(IntEnum):
    """Properties that count places. Source: Part 2, 6.13 TPM_PT; those a chip lacks are shown as unknown."""

    TRANSIENT_MINIMUM = 0x10E
    PERSISTENT_MINIMUM = 0x10F
    LOADED_MINIMUM = 0x110
    ACTIVE_SESSIONS_MAXIMUM = 0x111
    NV_COUNTERS_MAXIMUM = 0x116
    NV_INDEX_BYTES_MAXIMUM = 0x117
    TRANSIENT_FREE = 0x207
    PERSISTENT_FREE = 0x209
    NV_COUNTERS = 0x20A
    NV_COUNTERS_FREE = 0x20B
    PERMANENT = 0x200


@dataclass(frozen=True, slots=True)
class TpmStatus:
    """Everything `vtpm-manager tpm-status` shows. Handles as numbers; places that a chip does not tell are None."""

    properties: TpmProperties
    clock: ClockState
    self_test: str
    banks: tuple[str, ...]
    transient: int
    sessions: int
    persistent: tuple[int, ...]
    nv: tuple[int, ...]
    localities: tuple[int, ...]
    clear_disabled: bool
    places: dict[Place, int | None]


def status(link: TpmLink) -> TpmStatus:
    """Ask the TPM for all of it; changes nothing. About 40 commands."""
    properties, clock = hwtpm_pcr.properties(link), hwtpm_pcr.clock(link)
    with link.operation("read its status") as esapi:
        places = {place: _place(esapi, place) for place in Place}
        return TpmStatus(
            properties=properties,
            clock=clock,
            self_test=_self_test(esapi),
            banks=_banks(esapi),
            transient=len(link.handles(esapi, TRANSIENT_FIRST)),
            sessions=len(link.handles(esapi, LOADED_SESSION_FIRST)),
            persistent=link.handles(esapi, _PERSISTENT_FIRST),
            nv=link.handles(esapi, _NV_FIRST),
            localities=link.localities,
            clear_disabled=bool((places[Place.PERMANENT] or 0) & _DISABLE_CLEAR),
            places=places,
        )


def _self_test(esapi: Any) -> str:
    """Say how the self-test stands. Part 3, 10.4 TPM2_GetTestResult."""
    _, result = esapi.get_test_result()
    match int(result):
        case 0:
            return "passed"
        case code if code == RC_NEEDS_TEST:
            return "not everything is tested yet"
        case code if code == RC_TESTING:
            return "running"
        case code:
            return f"failed (0x{code:x})"


def _banks(esapi: Any) -> tuple[str, ...]:
    """Return the PCR banks that are active: those with a PCR selected. Part 2, 10.9.7."""
    _, data = esapi.get_capability(TPM2_CAP.PCRS, 0, 1)
    found = [selection for selection in data.data.assignedPCR if any(bytes(selection.pcrSelect))]
    return tuple(_BANK_NAMES.get(int(selection.hash), f"0x{int(selection.hash):04x}") for selection in found)


def _place(esapi: Any, place: Place) -> int | None:
    _, data = esapi.get_capability(TPM2_CAP.TPM_PROPERTIES, int(place), 1)
    found = {int(item.property): int(item.value) for item in data.data.tpmProperties}
    return found.get(int(place))
