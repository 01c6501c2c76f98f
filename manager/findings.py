"""What a verification says, and what it looks at. How it judges: `verify`, `verify_catalogue`."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from frontend_backend.messages_admin import ExitCode
from manager.verb_table import SCHEMA_VERSION
from storage.catalogue_rows import AttachmentRow, Audit, GroupRow
from storage.store import Store
from storage.store_records import RecordFlags


class Verdict(StrEnum):
    """What verification says of one thing."""

    OK = "ok"
    DAMAGED = "damaged"
    MISSING = "missing"
    FOREIGN = "foreign"
    DISAGREES = "disagrees"
    ELSEWHERE = "elsewhere"  # it lies on the disk of a domain of Xen: its instance checks it there at each load
    UNCHECKED = "unchecked"  # its group is closed, or it changes faster than it can be read


_CODES: Final = {Verdict.OK: ExitCode.OK, Verdict.ELSEWHERE: ExitCode.OK, Verdict.UNCHECKED: ExitCode.DENIED}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a verification."""

    what: str
    verdict: Verdict
    text: str
    vtpm: UUID | None = None
    name: str | None = None

    @property
    def code(self) -> ExitCode:
        """The exit code that it asks for."""
        return _CODES.get(self.verdict, ExitCode.INTEGRITY)

    def document(self) -> dict[str, Any]:
        """Return it as a flat document."""
        return {
            "schema": SCHEMA_VERSION,
            "vtpm": None if self.vtpm is None else str(self.vtpm),
            "name": self.name,
            "what": self.what,
            "verdict": self.verdict.value,
            "text": self.text,
            "code": int(self.code),
        }


@dataclass(frozen=True, slots=True)
class Subject:
    """What is verified: an open store, an audit of the catalogue, the directory of state images without a name.

    `stored` are the vTPMs that have a record, `marked` those whose record says attached, as of the audit. `still_named`
    tells whether a row is there now, `attachment_now` which one, `changing` whether a verb is at work: vTPMs come and
    go while a manager is verified.
    """

    store: Store
    stored: list[UUID]
    marked: set[UUID]
    audit: Audit
    groups: list[GroupRow]
    state_images: Path
    still_named: Callable[[UUID], bool] = lambda _vtpm: True
    attachment_now: Callable[[UUID], AttachmentRow | None] | None = None
    changing: Callable[[UUID], bool] = lambda _vtpm: False


def stored_in(store: Store) -> tuple[list[UUID], set[UUID]]:
    """Return which vTPMs have a record, and of which it says attached."""
    stored: list[UUID] = []
    marked: set[UUID] = set()
    for record in store.vtpms():
        stored.append(record.uuid)
        if record.flags & RecordFlags.ATTACHED:
            marked.add(record.uuid)
    return stored, marked
