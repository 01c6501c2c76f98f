"""What the catalogue's rows say; how they are kept is in `catalogue`."""

from dataclasses import dataclass
from uuid import UUID

from storage.errors import RowTampered


@dataclass(frozen=True, slots=True)
class VtpmRow:
    """A vTPM's name and place. `state_image` is empty for one in the state directory; `created` is UTC, ISO 8601."""

    uuid: UUID
    name: str
    group: UUID
    family: str
    state_image: str = ""
    created: str = ""


@dataclass(frozen=True, slots=True)
class AttachmentRow:
    """Which guest a vTPM runs for, and how. `lease` grows with each start of an instance."""

    vtpm: UUID
    guest: str
    frontend: str
    owner: str
    mode: str
    startup: str
    lease: int
    created: str = ""


@dataclass(frozen=True, slots=True)
class GroupRow:
    """A group's name; everything else about it is in the store."""

    uuid: UUID
    name: str


@dataclass(frozen=True, slots=True)
class EventRow:
    """Something that happened."""

    time: str
    kind: str
    vtpm: UUID | None
    text: str


@dataclass(frozen=True, slots=True)
class Audit:
    """Every row that carries a MAC: those that hold, and what is to be said of the others."""

    vtpms: list[VtpmRow]
    attachments: list[AttachmentRow]
    tampered: list[RowTampered]


@dataclass(frozen=True, slots=True)
class Filter:
    """Which vTPMs a listing shows; None: all. `guest` also means that they are attached."""

    group: UUID | None = None
    family: str | None = None
    guest: str | None = None
