"""Drops events that are older than the configuration wants them, a few at a time."""

import logging
from datetime import UTC, datetime, timedelta
from typing import Final

import trio

from manager.config import CatalogueConfig
from storage.catalogue import Catalogue
from storage.errors import CatalogueError

_log = logging.getLogger("vtpm.events")
_EVERY_SECONDS: Final = 3600.0
_PAUSE_SECONDS: Final = 0.02  # between batches of about 5 ms: others get their turn
_ALL: Final = 2**62  # rows: more than there can be
_LONGEST_DAYS: Final = 36_500  # more is for ever: there may be no such date


async def keep_events(catalogue: Catalogue, config: CatalogueConfig) -> None:
    """Prune at start and every hour until cancelled."""
    while True:
        try:
            dropped = await prune(catalogue, config)
        except CatalogueError as error:
            _log.warning("old events were not dropped: %s", error)
        else:
            if dropped:
                _log.info("%d old events were dropped", dropped)
        await trio.sleep(_EVERY_SECONDS)


async def prune(catalogue: Catalogue, config: CatalogueConfig) -> int:
    """Drop what is too old or too many; returns how many. Raises CatalogueError."""
    keep = min(config.events_kept, _ALL) if config.events_kept > 0 else _ALL
    days = timedelta(days=config.events_days) if 0 < config.events_days <= _LONGEST_DAYS else None
    before = "" if days is None else (datetime.now(UTC) - days).isoformat(timespec="seconds")
    total = 0
    while dropped := catalogue.prune_events(keep, before):
        total += dropped
        await trio.sleep(_PAUSE_SECONDS)
    return total
