"""The verbs `label` and `events`: what the catalogue keeps for people."""

from collections.abc import AsyncGenerator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

import trio

from manager.errors import UsageError
from manager.labels import check_count, check_key, parse_labels
from manager.listing import READERS, describe
from manager.services import Arguments, Caller, Document, Services
from manager.verb_table import SCHEMA_VERSION
from storage.catalogue_rows import Happened

_AT_ONCE: Final = 500  # events between which others get a turn: about 5 ms


async def label(services: Services, _caller: Caller, arguments: Arguments) -> list[Document]:
    """Put labels on a vTPM, take others away.

    Raises:
        UsageError: not a label, or more than a vTPM may have; nothing was changed.

    """
    catalogue = services.registry.catalogue
    row = services.registry.find(arguments["vtpm"])
    put = parse_labels(arguments["labels"])
    remove = [check_key(key) for key in arguments["remove"]]
    both = sorted(put.keys() & set(remove))
    if both:
        raise UsageError(f"the label '{both[0]}' is put and removed at once")
    if put or remove:
        before = catalogue.labels(row.uuid)
        check_count({key: value for key, value in before.items() if key not in remove} | put)
        said = [f"{key}={value}" for key, value in put.items()] + [f"without {key}" for key in remove if key in before]
        catalogue.change_labels(row.uuid, put, remove, Happened("labelled", f"{row.name}: {', '.join(said)}"))
    return [describe(services, row)]


async def events(services: Services, _caller: Caller, arguments: Arguments) -> AsyncGenerator[Document]:
    """Tell what happened, oldest first.

    Raises:
        NotFoundError: no such vTPM. UsageError: no time, or no number.

    """
    catalogue = services.registry.catalogue
    vtpm = None if arguments["vtpm"] is None else _whose(services, arguments["vtpm"])
    since = "" if arguments["since"] is None else parse_time(arguments["since"])
    limit = arguments["limit"]
    if limit is not None and limit < 1:
        raise UsageError("--limit is 1 or more")
    after = 0
    if limit is not None:
        after = await trio.to_thread.run_sync(catalogue.before_newest_events, limit, vtpm, since, limiter=READERS)
    while page := await trio.to_thread.run_sync(catalogue.events_after, after, vtpm, since, _AT_ONCE, limiter=READERS):
        for _, row in page:
            yield {
                "schema": SCHEMA_VERSION,
                "time": row.time,
                "kind": row.kind,
                "vtpm": None if row.vtpm is None else str(row.vtpm),
                "text": row.text,
            }
        after = page[-1][0]


def _whose(services: Services, text: str) -> UUID:
    """Return the UUID of a vTPM; one that was removed has no name any more, but its events."""
    with suppress(ValueError):
        return UUID(text)
    return services.registry.find(text).uuid


def parse_time(text: str) -> str:
    """Return a time as events have it: UTC, ISO 8601 to the second; without a zone it is UTC.

    Raises:
        UsageError: it is none.

    """
    try:
        given = datetime.fromisoformat(text)
        moment = given.replace(tzinfo=UTC) if given.tzinfo is None else given.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"'{text[:80]}' is no time: write 2026-11-21 or 2026-11-21T14:00:00+01:00") from error
    return moment.isoformat(timespec="seconds")
