"""The second thread: answers control commands and obeys cancels while libtpms works on a command that takes long.

Theory of operation. libtpms runs in the main thread, with the interpreter's lock given up. Before a command that may
take long the main thread gives `_turn` away and takes it back when the command has run; only who holds `_turn` may
touch the control connections. The stand-in waits for it, does with the control ports what the server's loop would,
and keeps telling libtpms to give up once somebody asked for that. Commands that are quick (nearly all) do not come
here: no lock is handed over for them, and before the first long one there is no second thread at all.

A cancel is a flag in libtpms that the long commands look at (TPMLIB_CancelCommand, the one call another thread may
make; each command clears it first). It ends no system call and no callback, so a commit runs to its end.
"""

import _thread  # `threading` would be an import for each instance, for conveniences that are of no use here
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from vtpm_instance.connection import Connection, Port
from vtpm_instance.journal import note
from vtpm_instance.vtpm import Cancellable

_LOOK_AGAIN: Final = 10  # milliseconds between looks at the ring's page, repeated cancels, and new connections
_PAUSE: Final = 0.001  # seconds; who floods the control ports then costs the neighbours no CPU


class ServerSide(Protocol):
    """What the stand-in does of the server's work."""

    control_ports: list[Port]

    def listens_on(self, port: Port) -> bool:
        """Whether new connections of a port are taken just now."""

    def handle(self, descriptor: int, events: int) -> None:
        """Deal with what happened on a descriptor."""

    def take_busy(self, ports: list[Port]) -> list[Connection]:
        """Return the connections of `ports` that wait for their next turn, and forget that they do."""


class StandIn:
    """The main thread's side (`on_duty`, `busy`, `request_cancel`) and the thread's."""

    def __init__(self, server: ServerSide, cancel: Callable[[], bool]) -> None:
        """Act for `server`; `cancel` tells libtpms to give up. Starts no thread yet."""
        self._server, self._cancel = server, cancel
        self._turn = _thread.allocate_lock()
        self._turn.acquire()
        self._started = self._unavailable = False
        self._origin: Cancellable | None = None
        self._duty = 0  # counts them: what was awaited in one is of no interest in the next
        self._cancelling = False
        self._broken: BaseException | None = None
        self.busy = False

    @contextmanager
    def on_duty(self, origin: Cancellable | None) -> Iterator[None]:
        """Have the thread stand in while the block runs; `origin` is where its command came from.

        Raises:
            BaseException: what nobody expected in the thread; it has ended.

        """
        if not self._start():
            yield
            return
        self._origin, self._cancelling, self.busy = origin, False, True
        self._duty += 1
        self._turn.release()
        try:
            yield
        finally:
            self._turn.acquire()
            self.busy, self._origin = False, None
            self._resume()
        if self._broken is not None:
            raise self._broken

    def request_cancel(self) -> bool:
        """Have the command that runs give up, whoever sent it; returns whether libtpms can do that.

        Nothing happens when none runs, or it is a quick one.
        """
        self._cancelling = self.busy
        return self._cancel()

    def _start(self) -> bool:
        if not self._started and not self._unavailable:
            try:
                _thread.start_new_thread(self._work, ())
            except RuntimeError as error:
                note(f"control commands wait for long TPM commands: {error}")
                self._unavailable = True
            else:
                self._started = True
        return self._started and self._broken is None

    def _resume(self) -> None:
        """Let the connections go on whose next command had to wait for the TPM."""
        for port in self._server.control_ports:
            for connection in tuple(port.connections):
                if connection.held:
                    connection.go_on()

    # the thread

    def _work(self) -> None:
        try:
            while True:
                self._look_once()
        except BaseException as error:  # noqa: BLE001 - it is raised in the main thread
            self._broken = error

    def _look_once(self) -> None:
        with self._turn:
            duty, poll = self._duty, self._what_to_watch()
            self._tell_libtpms()
        events = poll.poll(_LOOK_AGAIN)
        if not events:
            return
        with self._turn:
            if duty == self._duty:
                for descriptor, event in events:
                    self._server.handle(descriptor, event)
                while waiting := self._server.take_busy(self._server.control_ports):
                    for connection in waiting:  # requests that were received already: a connection holds few
                        connection.step()
        time.sleep(_PAUSE)

    def _what_to_watch(self) -> select.poll:
        poll = select.poll()
        for port in self._server.control_ports:
            if self._server.listens_on(port):
                poll.register(port.fileno(), select.POLLIN)
            for connection in port.connections:
                if connection.wants:
                    poll.register(connection.fileno(), connection.wants)
        return poll

    def _tell_libtpms(self) -> None:
        """Pass a cancel on, again and again: one that comes before libtpms has begun is lost."""
        if self._cancelling or (self._origin is not None and self._origin.cancelled):
            self._cancel()
