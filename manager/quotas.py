"""What one vTPM may use up: kept with its attachment, so that every instance of it is held to the same."""

from typing import Final, NamedTuple

from manager.config import QuotaConfig
from manager.errors import UsageError
from storage.catalogue_rows import AttachmentRow

MOST_A_SECOND: Final = 1_000_000  # beyond what any vTPM answers; a number of 32 bits in the catalogue
MOST_NV: Final = 1 << 20  # bytes; a state image has no more


class VtpmQuota(NamedTuple):
    """Commands and saves a second, bytes of NV; 0 is no quota."""

    commands_per_second: int
    saves_per_second: int
    nv_bytes: int


NO_QUOTA: Final = VtpmQuota(0, 0, 0)
_MOST: Final = VtpmQuota(MOST_A_SECOND, MOST_A_SECOND, MOST_NV)


def quota_of(attachment: AttachmentRow) -> VtpmQuota:
    """Return the quota of an attached vTPM."""
    return VtpmQuota(attachment.commands_per_second, attachment.saves_per_second, attachment.nv_bytes)


def asked_for(asked: tuple[int | None, int | None, int | None], config: QuotaConfig) -> VtpmQuota:
    """Return the quota of a new attachment: what was `asked` for, and where nothing was, what is configured.

    Raises:
        UsageError: a number that is none, or too large.

    """
    configured = (config.commands_per_second, config.saves_per_second, config.nv_bytes)
    quota = VtpmQuota(*(default if one is None else one for one, default in zip(asked, configured, strict=True)))
    for name, value, most in zip(VtpmQuota._fields, quota, _MOST, strict=True):
        if not 0 <= value <= most:
            raise UsageError(f"a quota {name} of {value} cannot be: 0 (none) to {most}; nothing was changed")
    return quota
