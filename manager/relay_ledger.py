"""Which request was executed, and who knows: what makes a relay answer each exactly once. Pure.

The near side keeps one request a channel until it is answered, and says it again after a new connection to the same
far side, with the same number; the far side keeps the last answer a channel, and tells from the number whether it has
executed a request. Is the far side another one (it was restarted), nobody knows any more whether what was sent to the
old one was executed: such a request is answered with failure, unless saying it twice is the same as once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from manager.relay_errors import RelayProtocolError

MAX_WAITING: Final = 4  # requests of one channel at the far side: one runs, and its client may have given it up
MAX_KEPT: Final = 4 * 1024 * 1024  # bytes of answers that are kept for one near side; a state blob has at most 0.5 MiB


class AfterLink(Enum):
    """What becomes of a request when there is a new connection."""

    NOTHING = "there is none"
    SEND = "it is said, or said again"
    FAIL = "nobody knows whether it was executed"


@dataclass(slots=True)
class Asked:
    """The near side of one channel."""

    repeatable: Callable[[bytes], bool]
    sequence: int = 0
    request: bytes | None = None
    sent: bool = False  # a part of it at least, on any connection

    def ask(self, request: bytes, sequence: int) -> None:
        """Begin the next request; no other request of this near side's may have had its number."""
        assert self.request is None, "one request a channel"
        self.sequence, self.request, self.sent = sequence, request, False

    def take(self, sequence: int) -> bool:
        """Take note of an answer; returns whether it is the one that is waited for."""
        if self.request is None or sequence != self.sequence:
            return False
        self.request = None
        return True

    def give_up(self) -> bytes | None:
        """Wait no longer; an answer that still comes is for nobody. Returns the request."""
        request, self.request = self.request, None
        return request

    def on_link(self, *, resumed: bool) -> AfterLink:
        """Decide what becomes of the request now that there is a connection; `resumed`: to the same far side."""
        if self.request is None:
            return AfterLink.NOTHING
        if resumed or not self.sent or self.repeatable(self.request):
            return AfterLink.SEND
        return AfterLink.FAIL


class Duty(Enum):
    """What the far side does about a request."""

    EXECUTE = "it is new"
    WAIT = "it is being executed; its answer goes out when it is there"
    ANSWER = "it was executed: the answer is there"
    FAIL = "it was executed, and its answer is not kept any more"


@dataclass(slots=True)
class Executed:
    """The far side of one channel: the last request, its answer."""

    sequence: int | None = None
    answer: bytes | None = None
    dropped: bool = False
    waiting: int = 0

    def take(self, sequence: int) -> Duty:
        """Decide about a request.

        Raises:
            RelayProtocolError: too many are waiting.

        """
        if sequence == self.sequence:
            if self.answer is not None:
                return Duty.ANSWER
            return Duty.FAIL if self.dropped else Duty.WAIT
        if self.waiting >= MAX_WAITING:
            raise RelayProtocolError("too many requests on one channel")
        self.sequence, self.answer, self.dropped = sequence, None, False
        self.waiting += 1
        return Duty.EXECUTE

    def done(self, sequence: int, answer: bytes) -> bool:
        """Keep the answer to a request; returns whether anybody waits for it: the near side may have given it up."""
        self.waiting -= 1
        if sequence != self.sequence:
            return False
        self.answer = answer
        return True


@dataclass(slots=True)
class Kept:
    """The answers that one near side's channels keep, bounded: the longest are dropped first."""

    channels: dict[int, Executed] = field(default_factory=dict)

    def trim(self) -> None:
        """Drop answers until they fit."""
        held = sorted((c for c in self.channels.values() if c.answer is not None), key=lambda c: len(c.answer or b""))
        size = sum(len(channel.answer or b"") for channel in held)
        while size > MAX_KEPT:
            longest = held.pop()
            size -= len(longest.answer or b"")
            longest.answer, longest.dropped = None, True
