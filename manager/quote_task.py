"""What an instance is asked for by the order QUOTE, and what became of it."""

import secrets
from dataclasses import dataclass, field

import trio

from frontend_backend import messages_instance as m


@dataclass(eq=False, slots=True)
class QuoteTask:
    """What an instance is asked for by the order QUOTE, and what became of it."""

    nonce: bytes
    selection: int
    ticket: int = field(default_factory=lambda: secrets.randbits(62) + 1)
    evidence: bytes = b""
    problem: str = ""
    done: trio.Event = field(default_factory=trio.Event)

    def taken(self) -> m.QuoteTaskReply:
        """Return what the instance is told."""
        return m.QuoteTaskReply(self.ticket, self.nonce, self.selection)

    def made(self, answer: m.QuoteMade) -> None:
        """Take what the instance sends; what is for another task changes nothing."""
        if answer.ticket == self.ticket and not self.done.is_set():
            self.evidence, self.problem = answer.evidence, answer.problem
            self.done.set()
