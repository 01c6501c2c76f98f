"""What goes into the store and comes out of it: records, changes, statistics. No bytes of the format here."""

import secrets
from dataclasses import dataclass
from enum import IntFlag
from typing import Final
from uuid import UUID

from storage.errors import CommitRefused
from storage.secrets import GroupKey, StateKey
from storage.store_format import MAX_GROUP_BLOB

_NO_UUID: Final = UUID(int=0)
_U64: Final = 2**64
_U32: Final = 2**32
_U8: Final = 2**8


class RecordFlags(IntFlag):
    """State of a vTPM that must be as safe as its key. Unknown bits are kept; 8 bits on disk."""

    NONE = 0
    FRESH = 1  # never started: the only case in which an empty TPM is right
    TPM12 = 2  # family 1.2; 2.0 without it
    RESUMABLE = 4  # stopped cleanly: may be resumed, once (taken away, durably, before the key is handed out)
    QUARANTINED = 8  # not to be started
    TOMBSTONE = 16  # removed, kept until the retention time is over; set by BuryVtpm only
    HIBERNATED = 32  # with RESUMABLE: the state holds the volatile part too, and is kept until a command comes
    AWAY = 32  # without RESUMABLE: its state left for another manager; with FRESH: it is to come from there
    ATTACHED = 64  # the catalogue's attachment row that carries the record's epoch counts, and no other
    ANY_AGE = 128  # state blobs of an older state may be put in at any time (manager.restores)


class GroupFlags(IntFlag):
    """State of a group that must be as safe as its key; 32 bits on disk."""

    NONE = 0
    EPOCHS = 1  # its records tell which attachment rows count; without it, rows of catalogue schema 1 are adopted once


EPOCHS: Final = 2**24  # of attachments; they share 32 bits with the flags


def random_epoch() -> int:
    """Return an epoch for a new record: a UUID that was in use before must not count as before."""
    return secrets.randbelow(EPOCHS)


def next_epoch(epoch: int) -> int:
    """Return the epoch of the next attachment: after 2^24 - 1 comes 1, as 0 is what rows without an epoch have."""
    return epoch % (EPOCHS - 1) + 1


_TOMBSTONE: Final = int(RecordFlags.TOMBSTONE)  # every save makes a record: operations of IntFlag take longer


@dataclass(frozen=True, slots=True)
class VtpmRecord:
    """One vTPM: `digest` is SHA-256 of its state slot (32 bytes), `generation` counts durable states.

    `epoch` counts attachments, modulo EPOCHS: docs/architecture.md, "Attachments".

    Raises CommitRefused for values that have no place in the format, and for a tombstone, which is none.
    """

    uuid: UUID
    group: UUID
    key: StateKey
    digest: bytes = bytes(32)
    generation: int = 0
    flags: RecordFlags = RecordFlags.FRESH
    epoch: int = 0

    def __post_init__(self) -> None:
        if not self.uuid.int:
            raise CommitRefused("the zero UUID names no vTPM")
        if len(self.digest) != 32 or not 0 <= self.generation < _U64 or not 0 <= self.flags < _U8:
            raise CommitRefused(f"digest, generation or flags of vTPM {self.uuid} are out of range")
        if not 0 <= self.epoch < EPOCHS:
            raise CommitRefused(f"the epoch of vTPM {self.uuid} is out of range")
        if int(self.flags) & _TOMBSTONE:
            raise CommitRefused(f"vTPM {self.uuid} cannot be both there and removed")


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """One group: `blob` is the manager's, opaque, at most MAX_GROUP_BLOB bytes; readable while the group is closed."""

    uuid: UUID
    flags: int = 0
    blob: bytes = b""

    def __post_init__(self) -> None:
        if self.uuid == _NO_UUID:
            raise CommitRefused("the zero UUID names no group")
        if len(self.blob) > MAX_GROUP_BLOB or not 0 <= self.flags < _U32:
            raise CommitRefused(f"blob or flags of group {self.uuid} are out of range")


@dataclass(frozen=True, slots=True)
class PutVtpm:
    """Add a vTPM, or replace its record; `force` allows an older generation."""

    record: VtpmRecord
    force: bool = False


@dataclass(frozen=True, slots=True)
class RemoveVtpm:
    """Remove a vTPM; its key leaves memory at once and the live image with the next checkpoint."""

    uuid: UUID


@dataclass(frozen=True, slots=True)
class BuryVtpm:
    """Remove a vTPM as RemoveVtpm does, and leave a tombstone. `removed`: whole seconds since 1970."""

    uuid: UUID
    removed: int

    def __post_init__(self) -> None:
        if not 0 <= self.removed < _U64:
            raise CommitRefused(f"the time at which vTPM {self.uuid} was removed is out of range")


@dataclass(frozen=True, slots=True)
class ForgetVtpm:
    """Remove a tombstone; the UUID is free again."""

    uuid: UUID


@dataclass(frozen=True, slots=True)
class PutGroup:
    """Add a group, with its key, or replace its record, with the same key or None."""

    record: GroupRecord
    key: GroupKey | None = None


@dataclass(frozen=True, slots=True)
class RemoveGroup:
    """Remove a group that has no vTPMs."""

    uuid: UUID


Change = PutVtpm | RemoveVtpm | BuryVtpm | ForgetVtpm | PutGroup | RemoveGroup


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What is left of a removed vTPM: no key. `removed`: whole seconds since 1970; `generation`: its last one."""

    uuid: UUID
    group: UUID
    removed: int
    generation: int
    flags: RecordFlags


@dataclass(frozen=True, slots=True)
class Damage:
    """A sector that fails its check while the rest of the store is sound; its bytes are kept."""

    where: str
    problem: str


@dataclass(frozen=True, slots=True)
class Statistics:
    """Figures of an open store. Sectors are 4096 bytes; the log is counted in 512-byte units."""

    bytes: int
    sectors: int
    sectors_used: int
    sectors_spare: int
    log_units: int
    log_units_used: int
    vtpms: int
    tombstones: int
    groups: int
    groups_closed: int
    sequence: int
    checkpoints: int
    commits: int
    flushes: int
