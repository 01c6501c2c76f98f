"""What is kept of domains that come and go. A guest may come and go as often as it likes: what is kept is bounded."""

import logging
import time
from typing import Final
from uuid import UUID

from frontend_backend.messages_xen import Bind, Join
from manager.frequent_events import FrequentEvents
from manager.token_bucket import TokenBucket
from manager.xen_binding import Bound, Coming, Refused, shown
from storage.catalogue_rows import VtpmRow

_log = logging.getLogger("vtpm.xen")
AT_ONCE: Final = 20  # events of a vTPM, and then
A_SECOND: Final = 1 / 60
_UNKNOWN: Final = UUID(int=0)  # in place of those that nobody knows: together they have what one has

_WORDS: Final = {
    Coming.FIRST: "the first since it was attached",
    Coming.BACK: "as before",
    Coming.RESUMED: "resumed",
    Coming.POWER_CYCLE: "platform reset: another domain, or booted anew",
}


class XenEvents:
    """Events of bindings, so many of each vTPM and no more."""

    def __init__(self, events: FrequentEvents) -> None:
        """Keep them among `events`."""
        self._events = events
        self._buckets: dict[UUID, TokenBucket] = {}
        self._left_out: dict[UUID, int] = {}

    def bound(self, row: VtpmRow, request: Bind | Join, coming: Coming) -> None:
        """Keep that a domain got a vTPM, or the instance in a domain its ring."""
        kind = "bound" if isinstance(request, Bind) else "joined"
        self._note(kind, row.uuid, f"{row.name}: {_who(request)}, {_WORDS[coming]}")

    def unbound(self, vtpm: UUID, name: str, binding: Bound) -> None:
        """Keep that a binding is over."""
        self._note("unbound", vtpm, f"{name}: domain {binding.domain.number} ({binding.name}), device {binding.device}")

    def refused(self, row: VtpmRow | None, request: Bind | Join, refused: Refused) -> None:
        """Keep that a domain did not get it."""
        text = f"{_who(request)}: {refused.code}: {refused.text}"
        self._note("bind-refused", _UNKNOWN if row is None else row.uuid, text)

    def _note(self, kind: str, vtpm: UUID, text: str) -> None:
        if not self._buckets.setdefault(vtpm, TokenBucket(A_SECOND, AT_ONCE)).take(time.monotonic()):
            self._left_out[vtpm] = self._left_out.get(vtpm, 0) + 1
            _log.debug("%s: %s", kind, text)
            return
        left_out = self._left_out.pop(vtpm, 0)
        if left_out:
            text = f"{text} ({left_out} more of this vTPM were not kept)"
        _log.info("%s: %s", kind, text)
        self._events.note(kind, None if vtpm == _UNKNOWN else vtpm, text, time.time())


def _who(request: Bind | Join) -> str:
    return f"domain {request.domain} ({shown(request.name)}), device {request.device}"
