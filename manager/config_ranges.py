"""What a number in the configuration can be. A safeguard that is set to nonsense must not be silently absent."""

import math
from collections.abc import Mapping
from typing import Any, Final

_SHORTEST: Final = 0.001  # seconds: a deadline of nothing lets nothing through
_LONGEST: Final = 10 * 365 * 86_400.0  # seconds: longer than any host stays up
_EVER: Final = math.inf  # where trio waits, which takes it for no deadline
_MOST: Final = 2**31 - 1
_ANY: Final = 2**63 - 1
_MOST_UID: Final = 2**32 - 2  # the last one means "unchanged" (chown(2))
_INSTANCE_UIDS: Final = 65_536  # as docs/configuration.md says of uid_base
_MOST_A_SECOND: Final = 1_000_000  # as manager.quotas
_MOST_NV: Final = 1024 * 1024

RANGES: Final[Mapping[tuple[str, str], tuple[float, float]]] = {
    ("tpm", "busy_seconds"): (0, _LONGEST),
    ("anchor", "interval_seconds"): (_SHORTEST, _EVER),
    ("store", "size"): (0, _ANY),
    ("instance", "uid_base"): (0, _MOST_UID - _INSTANCE_UIDS),
    ("instance", "commit_timeout"): (_SHORTEST, _LONGEST),
    ("instance", "start_timeout"): (_SHORTEST, _EVER),
    ("instance", "stop_timeout"): (0, _EVER),
    ("instance", "restarts"): (0, _MOST),
    ("instance", "restart_seconds"): (0, _EVER),
    ("instance", "per_keeper"): (0, _MOST),
    ("instance", "hibernate_after"): (-_LONGEST, _LONGEST),  # below zero as 0, never; of events likewise all
    ("quota", "vtpms_per_group"): (0, _MOST),
    ("quota", "running"): (0, _MOST),
    ("quota", "commands_per_second"): (0, _MOST_A_SECOND),
    ("quota", "saves_per_second"): (0, _MOST_A_SECOND),
    ("quota", "nv_bytes"): (0, _MOST_NV),
    ("admin", "operator_uids"): (0, _MOST_UID),
    ("admin", "auditor_uids"): (0, _MOST_UID),
    ("catalogue", "events_kept"): (-_ANY, _ANY),
    ("catalogue", "events_days"): (-_ANY, _ANY),
}
"""Lowest and highest number of a key, both allowed; of a list each one's. Who checks more narrowly says so itself."""


def out_of_range(section: str, key: str, value: Any) -> str | None:
    """Return what is wrong with a value, None for nothing. NaN is in no range."""
    if (section, key) not in RANGES:
        return None
    low, high = RANGES[section, key]
    numbers = value if isinstance(value, tuple) else (value,)
    wrong = next((number for number in numbers if not low <= number <= high), None)
    return None if wrong is None else f"{wrong} cannot be: {_shown(low)} to {_shown(high)}"


def _shown(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:.10g}"
