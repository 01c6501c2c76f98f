"""Events that come often, and that nobody waits for: written together, once a second, in one transaction.

Each transaction of the catalogue is a flush that the event loop waits for. What happened in the last second before a
crash may be missing from the events, which are no tamper-proof log.
"""

import logging
from typing import Final
from uuid import UUID

import trio

from manager.tombstones import iso
from storage.catalogue import Catalogue
from storage.catalogue_rows import EventRow
from storage.errors import CatalogueError

_log = logging.getLogger("vtpm.manager")
_PAUSE: Final = 1.0  # seconds between two transactions


class FrequentEvents:
    """Events on their way into the catalogue."""

    def __init__(self, catalogue: Catalogue) -> None:
        """Have none yet."""
        self._catalogue = catalogue
        self._waiting: list[EventRow] = []
        self._some = trio.Event()

    def note(self, kind: str, vtpm: UUID | None, text: str, seconds: float) -> None:
        """Keep an event that happened at this time (seconds since 1970), within a second or two."""
        self._waiting.append(EventRow(iso(seconds), kind, vtpm, text))
        self._some.set()

    async def run(self) -> None:
        """Write events until cancelled, and then what is left."""
        try:
            while True:
                await self._some.wait()
                self._some = trio.Event()
                await trio.sleep(_PAUSE)
                self._write()
        finally:
            self._write()

    def _write(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        try:
            self._catalogue.log_all(waiting)
        except CatalogueError as error:
            _log.warning("%d events were not kept: %s", len(waiting), error)
