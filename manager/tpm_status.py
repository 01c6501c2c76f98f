"""The document of `vtpm-manager tpm-status`, asked of a running manager or of the TPM itself."""

import contextlib
from typing import Any, Final

from manager.config import Config, Layout
from manager.errors import ManagerError
from manager.hwtpm_status import Place, TpmStatus
from manager.opening import locked_store, open_tpm, read_boot_area
from manager.services import Arguments, Caller, Services
from manager.verb_table import SCHEMA_VERSION

_SRK: Final = 0x81000001


def document(found: TpmStatus, tcti: str, locality: int, anchor: int | None) -> dict[str, Any]:
    """Return one flat document; times in seconds, handles in hexadecimal."""
    known, places = found.properties, found.places
    return {
        "schema": SCHEMA_VERSION,
        "tpm": tcti,
        "manufacturer": known.manufacturer,
        "vendor": known.vendor or None,
        "firmware": known.firmware,
        "self_test": found.self_test,
        "reset_count": found.clock.reset_count,
        "restart_count": found.clock.restart_count,
        "clock_safe": found.clock.safe,
        "locality": locality,
        "localities": _list(found.localities),
        "pcr_banks": ", ".join(found.banks),
        "owner_auth_set": known.owner_auth_set,
        "endorsement_auth_set": known.endorsement_auth_set,
        "lockout_auth_set": known.lockout_auth_set,
        "clear_disabled": found.clear_disabled,
        "in_lockout": known.in_lockout,
        "lockout_counter": known.lockout_counter,
        "lockout_most": known.max_auth_fail,
        "lockout_interval": known.lockout_interval,
        "lockout_recovery": known.lockout_recovery,
        "transient_objects": found.transient,
        "transient_free": places[Place.TRANSIENT_FREE],
        "loaded_sessions": found.sessions,
        "loaded_sessions_most": places[Place.LOADED_MINIMUM],
        "persistent_objects": len(found.persistent),
        "persistent_free": places[Place.PERSISTENT_FREE],
        "storage_root_key": _SRK in found.persistent,
        "nv_indices": len(found.nv),
        "nv_counters": places[Place.NV_COUNTERS],
        "nv_counters_free": places[Place.NV_COUNTERS_FREE],
        "anchor_index": None if anchor is None else f"0x{anchor:08x}",
        "anchor_defined": None if anchor is None else anchor in found.nv,
    }


def _list(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def offline(layout: Layout, config: Config) -> dict[str, Any]:
    """Ask the TPM of an installation that no manager serves, or of none at all.

    Raises:
        BusyError: a manager runs. TpmError: the TPM is not there, or is in failure mode.

    """
    with contextlib.ExitStack() as stack:
        anchor = None
        if layout.store.exists():
            descriptor = stack.enter_context(locked_store(layout))
            with contextlib.suppress(ManagerError):  # a damaged store does not keep the TPM from being looked at
                anchor = read_boot_area(descriptor)[1].anchor.index
        tpm = stack.enter_context(open_tpm(layout, config))
        return document(tpm.status(), config.tpm.tcti, tpm.locality, anchor)


async def tpm_status(services: Services, _caller: Caller, _arguments: Arguments) -> list[dict[str, Any]]:
    """Show the hardware TPM of a running manager."""
    anchoring = services.registry.anchoring
    found = await anchoring.hardware.lane.run(anchoring.hardware.tpm.status)
    tcti, locality = services.config.tpm.tcti, anchoring.hardware.tpm.locality
    return [document(found, tcti, locality, anchoring.index)]
