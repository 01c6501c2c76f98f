"""What migration means for a vTPM's record: who may do what to one that is away. Pure.

AWAY and FRESH   incoming: it has no state yet, and gets it from another manager only; nobody manufactures one
AWAY             frozen: another manager claimed it; no instance gets its key, no save of an older one counts
"""

from dataclasses import replace
from typing import Final

from manager.errors import ConflictError
from storage.catalogue_rows import VtpmRow
from storage.store_records import RecordFlags, VtpmRecord

INCOMING: Final = RecordFlags.AWAY | RecordFlags.FRESH
FRONT_END: Final = "qemu"  # the one whose users can hand a state in
# of both, the first alone: the flag is HIBERNATED's. As numbers: each save asks, and an IntFlag's operations take long
_ALONE: Final = int(RecordFlags.AWAY)
_AWAY: Final = int(RecordFlags.AWAY | RecordFlags.RESUMABLE)


def is_away(flags: RecordFlags) -> bool:
    """Tell whether a vTPM's state is not here: it left, or is to come."""
    return int(flags) & _AWAY == _ALONE


def is_incoming(flags: RecordFlags) -> bool:
    """Tell whether a vTPM waits for its state from another manager."""
    return is_away(flags) and bool(flags & RecordFlags.FRESH)


def is_frozen(flags: RecordFlags) -> bool:
    """Tell whether another manager claimed a vTPM."""
    return is_away(flags) and not flags & RecordFlags.FRESH


def frozen(record: VtpmRecord) -> VtpmRecord:
    """Return the record of a vTPM that was claimed; what could be resumed once cannot be resumed here any more."""
    return replace(record, flags=RecordFlags(int(record.flags | RecordFlags.AWAY) & ~int(RecordFlags.RESUMABLE)))


def thawed(record: VtpmRecord) -> VtpmRecord:
    """Return the record of a vTPM that was taken back."""
    return replace(record, flags=RecordFlags(int(record.flags) & ~int(RecordFlags.AWAY)))


def refuse_start(row: VtpmRow, flags: RecordFlags, frontend: str) -> None:
    """Refuse to start a vTPM that is away.

    Raises:
        ConflictError: it is frozen, or incoming and its front end cannot hand a state in.

    """
    if is_frozen(flags):
        raise ConflictError(
            f"vTPM {row.name} is frozen: another manager claimed it, and may run it. Nothing was started. "
            f"'vtpm-show {row.name}' says which; 'vtpm-migrate-release' removes it here, 'vtpm-migrate-reclaim' asks "
            f"for it back"
        )
    if is_incoming(flags) and frontend != FRONT_END:
        raise ConflictError(
            f"vTPM {row.name} is incoming: its state comes through QEMU's migration. Nothing was started. Attach it "
            f"with --frontend {FRONT_END}, and start that QEMU with -incoming"
        )


def refuse_change(row: VtpmRow, flags: RecordFlags) -> None:
    """Refuse to reset or remove a frozen vTPM. Raises ConflictError."""
    if is_frozen(flags):
        raise ConflictError(
            f"vTPM {row.name} is frozen: another manager claimed it; nothing was changed. 'vtpm-migrate-release "
            f"{row.name} --yes' removes it here, 'vtpm-migrate-reclaim {row.name} --yes' asks for it back"
        )


def refuse_reset(row: VtpmRow, flags: RecordFlags) -> None:
    """Refuse to give a new TPM to a vTPM that is away. Raises ConflictError."""
    refuse_change(row, flags)
    if is_incoming(flags):
        raise ConflictError(
            f"vTPM {row.name} is incoming: its state comes from another manager, so there is none to throw away. "
            f"Nothing was changed. 'vtpm-remove {row.name} --yes' ends the waiting"
        )


def objection(flags: RecordFlags, *, claimed: bool) -> str | None:
    """Return why an instance may not commit: it is frozen, or incoming and what it has was not claimed; else None."""
    if is_frozen(flags):
        return "another manager claimed this vTPM"
    if is_incoming(flags) and not claimed:
        return "this vTPM waits for its state from another manager, and nothing else makes one"
    return None
