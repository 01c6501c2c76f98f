"""One connection to xenstore for trio tasks: requests and their answers, watches and their events; see xs_trio."""

import errno
import math
from collections.abc import Callable
from typing import Self

import trio

from frontend_backend.xs_link_trio import Link
from frontend_backend.xs_session import Answer, Changes, Session, ignore
from frontend_backend.xs_wire import (
    MAX_PAYLOAD,
    NO_TRANSACTION,
    Operation,
    XenstoreError,
    XenstoreGoneError,
    XenstoreProtocolError,
    decode_error,
)


class Watch:
    """An async iterator of changed paths, as the path was asked for; the first comes at once (that path itself).

    An event says that something changed, not what: look. Paths that changed several times come once, and where too
    many changed the watched path stands for all. Raises XenstoreGoneError once the connection is lost.
    """

    def __init__(self, path: str, unwatch: Callable[["Watch"], None]) -> None:
        self.path = path
        self.token = ""
        self._unwatch = unwatch
        self._changes = Changes(path)
        self._waiting = trio.lowlevel.ParkingLot()
        self._error: XenstoreGoneError | None = None
        self._closed = False

    def changed(self, path: str) -> None:
        """See Watching: the session's call."""
        self._changes.add(path)
        self._waiting.unpark_all()

    def lost(self, error: XenstoreGoneError) -> None:
        """See Watching: the session's call."""
        self._error = error
        self._waiting.unpark_all()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        await trio.lowlevel.checkpoint()
        while True:
            if self._closed:
                raise StopAsyncIteration
            if self._error is not None:
                raise XenstoreGoneError(str(self._error)) from self._error
            path = self._changes.take()
            if path is not None:
                return path
            await self._waiting.park()

    async def aclose(self) -> None:
        """End the watch; a waiting iteration ends. Waits for nobody, may be called twice and while cancelled."""
        if not self._closed:
            self._closed = True
            self._waiting.unpark_all()
            self._unwatch(self)


class Connection:
    """A link and the session on it; two tasks drive it: `send_requests` and `hand_out_answers`."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.session = Session()
        self._outgoing, self._to_send = trio.open_memory_channel[tuple[int, bytes]](math.inf)
        self._sent: set[int] = set()  # numbers of requests on their way, some of them answered by now
        self._received = trio.lowlevel.ParkingLot()

    async def ask(
        self,
        operation: Operation,
        payload: bytes,
        path: str,
        transaction: int = NO_TRANSACTION,
        late: Callable[[Answer], None] = ignore,
    ) -> bytes:
        """Send a request and wait for its answer; `late` gets the answer where the caller was cancelled."""
        verb = operation.name.lower()
        if len(payload) > MAX_PAYLOAD:
            raise XenstoreError("E2BIG", verb, path)
        answers: list[Answer] = []
        answered = trio.Event()

        def handle(answer: Answer) -> None:
            answers.append(answer)
            answered.set()

        request, data = self.session.ask(operation, payload, handle, transaction)
        self._outgoing.send_nowait((request, data))
        try:
            await answered.wait()
        except BaseException:
            self.session.hand_over(request, late)
            raise
        answer = answers[0]
        if isinstance(answer, XenstoreError):
            raise XenstoreError(answer.name, verb, path) from answer
        if isinstance(answer, XenstoreGoneError):
            raise XenstoreGoneError(str(answer)) from answer
        error = decode_error(answer, verb, path)
        if error is not None:
            raise error
        return answer.payload

    def post(self, operation: Operation, payload: bytes, transaction: int = NO_TRANSACTION) -> None:
        """Send a request whose answer nobody needs."""
        if self.session.gone is None:
            self._outgoing.send_nowait(self.session.ask(operation, payload, ignore, transaction))

    async def send_requests(self) -> None:
        """Send what was asked, until cancelled: alone in this, so that no cancelled caller leaves half a request."""
        async for request, data in self._to_send:
            if self.link.watches_alone:
                await self._let_answers_come(request)
            try:
                await self.link.send(data)
            except OSError as error:
                if not self.link.refuses_single_requests:
                    self._lose(error.strerror or str(error))
                    return
                name = errno.errorcode.get(error.errno or errno.EIO, "EIO")
                self.session.refuse(request, XenstoreError(name, "take", "a request"))
            except trio.BrokenResourceError as error:
                self._lose(str(error.__cause__ or error))
                return

    async def _let_answers_come(self, request: int) -> None:
        """Wait, before a WATCH or UNWATCH, until all that was sent is answered; see DeviceLink."""
        alone = self.session.awaited(request) in (Operation.WATCH, Operation.UNWATCH)
        while True:
            self._sent = {number for number in self._sent if self.session.awaited(number) is not None}
            if not alone or not self._sent:
                break
            await self._received.park()
        self._sent.add(request)

    async def hand_out_answers(self) -> None:
        """Receive answers and events until cancelled or lost."""
        try:
            while data := await self.link.receive():
                self.session.feed(data)
                self._received.unpark_all()
            self._lose("it closed the connection; has xenstored ended?")
        except (OSError, trio.BrokenResourceError) as error:
            self._lose(str(error.__cause__ or error))
        except XenstoreProtocolError as error:
            self._lose(str(error))

    def _lose(self, why: str) -> None:
        self.session.lose(XenstoreGoneError(f"the connection to xenstore ({self.link.name}) is lost: {why}"))
        self._received.unpark_all()

    def close(self) -> None:
        """Tell everyone who still waits that the connection was closed here."""
        self._lose("it was closed here")
