"""One connection to xenstore without I/O: which reply belongs to whom, and which event to which watch.

Requests are numbered; each answer is handed to the handler of its number, once. A handler whose caller gave up is
replaced by one that tidies up after it. When the connection is lost every handler and every watch is told, once.
"""

from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

from frontend_backend.xs_replies import decode_event
from frontend_backend.xs_wire import (
    MAX_ID,
    NO_TRANSACTION,
    Message,
    Operation,
    Splitter,
    XenstoreError,
    XenstoreGoneError,
    XenstoreProtocolError,
)

MAX_CHANGES: Final = 1024
"""Paths one watch remembers until they are looked at. A guest can name as many as it likes: past this number they
become one, the watched path itself, which says as much ("something below changed") and costs no memory."""

Answer: TypeAlias = Message | XenstoreError | XenstoreGoneError
Handler: TypeAlias = Callable[[Answer], None]


class Watching(Protocol):
    """Who is told about a watch's events."""

    def changed(self, path: str) -> None:
        """Something at or below the path changed."""

    def lost(self, error: XenstoreGoneError) -> None:
        """There will be no more events."""


class Changes:
    """The paths that changed and were not looked at yet: each once, in order, and never more than MAX_CHANGES."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._paths: dict[str, None] = {}

    def add(self, path: str) -> None:
        """Note a change; one that is noted already stays where it is."""
        if path not in self._paths and len(self._paths) >= MAX_CHANGES:
            self._paths = {self._path: None}
        else:
            self._paths[path] = None

    def take(self) -> str | None:
        """Return and forget the oldest one, None where there is none."""
        if not self._paths:
            return None
        oldest = next(iter(self._paths))
        del self._paths[oldest]
        return oldest


def ignore(_answer: Answer) -> None:
    """Handle the answer to a request nobody waits for."""


class Session:
    """See the module. `gone` is why the connection was lost, once it was."""

    def __init__(self) -> None:
        self.gone: XenstoreGoneError | None = None
        self._splitter = Splitter()
        self._handlers: dict[int, tuple[Operation, Handler]] = {}
        self._watches: dict[str, Watching] = {}
        self._request = 0
        self._tokens = 0

    def ask(
        self, operation: Operation, payload: bytes, handler: Handler, transaction: int = NO_TRANSACTION
    ) -> tuple[int, bytes]:
        """Return a new request's number and its bytes, to be sent whole; the handler is called with the answer.

        Raises:
            XenstoreGoneError: the connection was lost.
            ValueError: the payload is too long.

        """
        self._check()
        data = Message(operation, self._free_number(), transaction, payload).encode()
        self._handlers[self._request] = operation, handler
        return self._request, data

    def hand_over(self, request: int, handler: Handler) -> None:
        """Have another handler called with the answer, if there was none yet."""
        if request in self._handlers:
            self._handlers[request] = self._handlers[request][0], handler

    def refuse(self, request: int, error: XenstoreError) -> None:
        """Note that a request was not sent and will never be answered: the error is its answer."""
        entry = self._handlers.pop(request, None)
        if entry is not None:
            entry[1](error)

    def awaited(self, request: int) -> Operation | None:
        """Return what a request asked for that was not answered yet, None where it was."""
        entry = self._handlers.get(request)
        return None if entry is None else entry[0]

    def open_watch(self, watching: Watching) -> str:
        """Return a token, never used before on this connection; events that carry it go to `watching`.

        Raises:
            XenstoreGoneError: the connection was lost.

        """
        self._check()
        self._tokens += 1
        self._watches[str(self._tokens)] = watching
        return str(self._tokens)

    def close_watch(self, token: str) -> bool:
        """Have no more events delivered for a token. Returns whether there was such a watch."""
        return self._watches.pop(token, None) is not None

    def feed(self, data: bytes) -> None:
        """Take the next bytes that came and hand out what they hold.

        Raises:
            XenstoreProtocolError: they are not xenstore's protocol: call `lose`.

        """
        for message in self._splitter.feed(data):
            if message.operation == Operation.WATCH_EVENT:
                path, token = decode_event(message.payload)
                watching = self._watches.get(token)
                if watching is not None:  # else one that was closed while this was on its way
                    watching.changed(path)
            else:
                self._answered(message)

    def lose(self, error: XenstoreGoneError) -> None:
        """End it: whoever waits for an answer or an event is told. The first error counts."""
        if self.gone is not None:
            return
        self.gone = error
        handlers, self._handlers = self._handlers, {}
        watches, self._watches = self._watches, {}
        for _, handler in handlers.values():
            handler(error)
        for watching in watches.values():
            watching.lost(error)

    def _answered(self, message: Message) -> None:
        entry = self._handlers.get(message.request)
        if entry is None:
            raise XenstoreProtocolError(f"an answer to request {message.request}, which is not waiting for one")
        operation, handler = entry
        if message.operation not in (operation, Operation.ERROR):
            raise XenstoreProtocolError(f"an answer of kind {message.operation} to a request of kind {operation}")
        del self._handlers[message.request]  # not before: a loss must reach it
        handler(message)

    def _free_number(self) -> int:
        self._request = self._request % MAX_ID + 1
        while self._request in self._handlers:
            self._request = self._request % MAX_ID + 1
        return self._request

    def _check(self) -> None:
        if self.gone is not None:
            raise self.gone
