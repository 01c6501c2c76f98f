"""The catalogue's events: what happened, for whoever asks later. Not a tamper-proof log: rows carry no MAC."""

from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa

from storage import catalogue_schema as schema
from storage.catalogue_part import ADD_EVENT, Part
from storage.catalogue_rows import EventRow, Happened

_PRUNED_AT_ONCE: Final = 500  # rows in one transaction: about 5 ms


class Events(Part):
    """Events."""

    def log(self, kind: str, vtpm: UUID | None, text: str) -> None:
        """Keep an event; `kind` is one word, `text` a sentence without any secret."""
        with self._database.change() as connection:
            self._note(connection, vtpm, Happened(kind, text))

    def log_all(self, events: Sequence[EventRow]) -> None:
        """Keep several events, with the times they say, in one transaction."""
        rows = [{"time": row.time, "kind": row.kind, "vtpm": row.vtpm, "text": row.text} for row in events]
        with self._database.change() as connection:
            connection.execute(ADD_EVENT, rows)

    def events(self, vtpm: UUID | None = None) -> list[EventRow]:
        """Return the events of a vTPM, or all, oldest first."""
        found: list[EventRow] = []
        after = 0
        while page := self.events_after(after, vtpm):
            found += [row for _, row in page]
            after = page[-1][0]
        return found

    def events_after(
        self, after: int, vtpm: UUID | None = None, since: str = "", limit: int = 1000
    ) -> list[tuple[int, EventRow]]:
        """Return at most `limit` events behind number `after`, oldest first, each with its number.

        `since`: ISO 8601 in UTC to the second, as events have it.
        """
        query = sa.select(schema.events).where(schema.events.c.id > after).order_by(schema.events.c.id).limit(limit)
        with self._database.read() as connection:
            rows = connection.execute(_chosen(query, vtpm, since))
            return [(row.id, EventRow(row.time, row.kind, row.vtpm, row.text)) for row in rows]

    def last_events(self, kind: str, vtpms: Sequence[UUID]) -> dict[UUID, EventRow]:
        """Return the newest event of a kind for each of these vTPMs that has one; a few hundred vTPMs at a time."""
        query = (
            sa.select(schema.events)
            .where(schema.events.c.kind == kind, schema.events.c.vtpm.in_(vtpms))
            .order_by(schema.events.c.id)
        )
        with self._database.read() as connection:
            rows = connection.execute(query)
            return {row.vtpm: EventRow(row.time, row.kind, row.vtpm, row.text) for row in rows}

    def before_newest_events(self, count: int, vtpm: UUID | None = None, since: str = "") -> int:
        """Return the number behind which the newest `count` events are; 0 where there are no more than that."""
        query = sa.select(schema.events.c.id).order_by(schema.events.c.id.desc()).offset(count).limit(1)
        with self._database.read() as connection:
            return connection.execute(_chosen(query, vtpm, since)).scalar_one_or_none() or 0

    def prune_events(self, keep: int, before: str) -> int:
        """Drop some of the oldest events beyond the newest `keep` ones, and of those older than `before`.

        Returns how many were dropped; call it again until that is 0.
        """
        number = self.before_newest_events(keep)
        old = sa.or_(schema.events.c.id <= number, schema.events.c.time < before)
        chosen = sa.select(schema.events.c.id).where(old).order_by(schema.events.c.id).limit(_PRUNED_AT_ONCE)
        with self._database.read() as connection:
            ids = list(connection.execute(chosen).scalars())
        if not ids:
            return 0
        with self._database.change() as connection:
            return connection.execute(schema.events.delete().where(schema.events.c.id.in_(ids))).rowcount


def _chosen(query: sa.Select[Any], vtpm: UUID | None, since: str) -> sa.Select[Any]:
    if vtpm is not None:
        query = query.where(schema.events.c.vtpm == vtpm)
    return query.where(schema.events.c.time >= since) if since else query
