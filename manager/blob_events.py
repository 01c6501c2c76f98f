"""Events of state blobs: as many of one vTPM as an administrator can use, whatever its QEMU does."""

import time
from typing import Final, Protocol
from uuid import UUID

from manager.token_bucket import TokenBucket

ROUTINE_A_SECOND: Final = 1.0  # exports and restores of the newest state that have an event, by vTPM; a snapshot is one
ROUTINE_AT_ONCE: Final = 60.0
REFUSED_A_SECOND: Final = 0.2  # refusals that have an event, each a flush
REFUSED_AT_ONCE: Final = 20.0


class Notes(Protocol):
    """Where events go that come often."""

    def note(self, kind: str, vtpm: UUID, text: str, seconds: float) -> None:
        """Keep an event."""


class BlobEvents:
    """Decides which events are kept; there is an entry for each vTPM that had one."""

    def __init__(self, notes: Notes) -> None:
        """Give `notes` what is routine."""
        self._notes = notes
        self._routine: dict[UUID, TokenBucket] = {}
        self._refused: dict[UUID, TokenBucket] = {}

    def routine(self, kind: str, vtpm: UUID, text: str) -> None:
        """Keep an event of what happens every day, unless there were very many lately."""
        bucket = self._routine.setdefault(vtpm, TokenBucket(ROUTINE_A_SECOND, ROUTINE_AT_ONCE))
        if bucket.take(time.monotonic()):
            self._notes.note(kind, vtpm, text, time.time())

    def may_tell_of_refusal(self, vtpm: UUID) -> bool:
        """Tell whether one more refusal is to be kept as an event."""
        return self._refused.setdefault(vtpm, TokenBucket(REFUSED_A_SECOND, REFUSED_AT_ONCE)).take(time.monotonic())
