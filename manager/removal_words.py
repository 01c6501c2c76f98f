"""What the events of a removal say, and what can be read out of them again: by whom, and for which other manager."""

from typing import Final

from storage.catalogue_rows import EventRow

EVENT: Final = "removed"
MIGRATED: Final = "migrated"  # event of a vTPM that left for another manager
_BY: Final = " by user "  # in the event's text, between the name, which has no space, and the user's id
_TO: Final = " to "  # before the other manager's name and fingerprint
_MAX_UID_DIGITS: Final = 10  # of 32 bits; nothing vouches for the text of an event


def event_text(name: str, uid: int) -> str:
    """Return the text of the event of a removal."""
    return f"{name}{_BY}{uid}"


def migration_text(name: str, peer: str, fingerprint: str) -> str:
    """Return the text of the event of a vTPM that left."""
    return f"{name}{_TO}{peer} {fingerprint}".strip()


def who_removed(event: EventRow | None) -> tuple[str | None, int | None]:
    """Read name and user id out of the event; removals of earlier versions have no user in theirs."""
    if event is None:
        return None, None
    name, _, user = event.text.partition(_BY)
    return name, int(user) if user.isdecimal() and len(user) <= _MAX_UID_DIGITS else None


def where_to(event: EventRow | None) -> str | None:
    """Read out of the event which manager a vTPM left for, None for one that did not."""
    return event.text.partition(_TO)[2].partition(" ")[0] or None if event is not None else None
