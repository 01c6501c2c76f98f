"""The far side's connections to instances: each asks one thing at a time, and finds its instance again.

An instance may end and come back: its manager was restarted, it crashed, it hibernated. Before anything else is said to
the next instance it gets the data descriptor and the locality that its client believes to be set.
"""

import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from manager.relay_asking import ClosedError, NotTakenError, Places, UnknownError, ask, connected, persist
from manager.relay_cutting import SET_DATAFD, SET_LOCALITY, locality_of, number_of, set_locality, succeeded
from manager.relay_frames import NO_LOCALITY

_DATAFD: Final = SET_DATAFD.to_bytes(4, "big")
_IN_USE: Final = bytes((0, 0, 0, 0x1F))  # TPM_IOERROR: there is a data connection already
_TRIES, _IN_USE_PAUSE = 20, 0.05  # seconds between them
Find = Callable[[], Awaitable[Places]]  # raises NotTakenError where nothing is just now


@dataclass(slots=True)
class Locality:
    """The locality that the clients of one vTPM set last, shared by their lines."""

    value: int = NO_LOCALITY


class Line(Protocol):
    """One connection to an instance."""

    async def exchange(self, request: bytes) -> bytes:
        """Return the answer to a request: the instance's, or failure."""

    def close(self) -> None:
        """End it."""


class ControlLine:
    """A control connection, with the data connection that was handed over on it, if any."""

    def __init__(self, find: Find, locality: Locality, patience: float) -> None:
        """Ask the instance that `find` finds."""
        self._find, self._locality, self._patience = find, locality, patience
        self._talking = trio.Lock()
        self._closed = False
        self._at_locality = True  # whether this instance was told
        self.sock: trio.socket.SocketType | None = None
        self.presence: socket.socket | None = None  # that nothing is said on: its end would switch the TPM off
        self.passed: PassedLine | None = None

    async def exchange(self, request: bytes) -> bytes:
        """Return the answer to a control command."""
        return await persist(self._once, request, self._patience, control=True)

    async def _once(self, request: bytes) -> bytes:
        async with self._talking:
            sock = await self._ready()
            try:
                if number_of(request) == SET_DATAFD and self.passed is not None:
                    return await self._pass_patiently(sock, self.passed)
                answer = await ask(sock, request, control=True)
            except (NotTakenError, UnknownError):
                self.drop()
                raise
        if number_of(request) == SET_LOCALITY and succeeded(answer):
            self._locality.value = locality_of(request)
        return answer

    async def restore(self) -> None:
        """Have the data connection made that is wanted. Raises NotTakenError, UnknownError."""
        async with self._talking:
            await self._ready()

    async def _ready(self) -> trio.socket.SocketType:
        """Return the connection, made anew with all that was set where the last instance has gone."""
        self._check_open()
        if self.sock is None:
            made = await connected((await self._find()).control)
            try:
                self._check_open()
            except ClosedError:
                made.close()  # nobody would close it any more
                raise
            self.sock, self._at_locality = made, False
        sock, passed = self.sock, self.passed
        try:
            if not self._at_locality and self._locality.value != NO_LOCALITY:
                await ask(sock, set_locality(self._locality.value), control=True)
            self._at_locality = True
            refused = passed is not None and passed.wanted and not succeeded(await self._pass(sock, passed))
        except UnknownError:
            self.drop()
            raise NotTakenError from None  # nothing of a client's was said yet
        except BaseException:
            self.drop()
            raise
        if refused and passed is not None:
            # The one before is not closed everywhere yet. Not a reason to let go of this connection: its end would
            # switch the TPM off.
            passed.wanted = True
            raise NotTakenError("its data connection is in use")
        return sock

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError

    async def _pass_patiently(self, sock: trio.socket.SocketType, passed: "PassedLine") -> bytes:
        """Do as `_pass`; one of before may still be on its way out, with copies in the holder."""
        for _ in range(_TRIES):
            answer = await self._pass(sock, passed)
            if answer != _IN_USE:
                return answer
            await trio.sleep(_IN_USE_PAUSE)
        return _IN_USE

    @staticmethod
    async def _pass(sock: trio.socket.SocketType, passed: "PassedLine") -> bytes:
        """Hand one end of a new pair over; returns the instance's answer."""
        if passed.sock is not None:
            return bytes(4)  # as this connection was made
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                answer = await ask(sock, _DATAFD, control=True, descriptor=theirs.fileno())
            except BaseException:
                ours.close()
                raise
        passed.wanted = succeeded(answer)
        if passed.wanted:
            passed.sock = trio.socket.from_stdlib_socket(ours)
        else:
            ours.close()
        return answer

    def drop(self) -> None:
        """Let go of an instance that has gone: the next thing said is said to the next one."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        if self.passed is not None:
            self.passed.drop()

    def close(self) -> None:
        """End it; what is being asked is answered with failure."""
        self._closed = True
        self.drop()
        if self.presence is not None:
            self.presence.close()
            self.presence = None


class PassedLine:
    """The data connection that SET_DATAFD handed over on a control connection; `wanted` once it was."""

    def __init__(self, parent: ControlLine, patience: float, *, wanted: bool) -> None:
        """Belong to `parent`."""
        self._parent, self._patience = parent, patience
        self.wanted = wanted
        self.sock: trio.socket.SocketType | None = None

    async def exchange(self, request: bytes) -> bytes:
        """Return the answer to a TPM command."""
        return await persist(self._once, request, self._patience, control=False)

    async def _once(self, request: bytes) -> bytes:
        if self.sock is None:
            if not self.wanted:
                raise UnknownError
            await self._parent.restore()
        if self.sock is None:
            raise NotTakenError
        try:
            return await ask(self.sock, request, control=False)
        except (NotTakenError, UnknownError):
            self.drop()
            raise

    def drop(self) -> None:
        """Let go of an instance that has gone."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def close(self) -> None:
        """End it."""
        self.wanted = False
        self.drop()
        if self._parent.passed is self:
            self._parent.passed = None


class DataLine:
    """A connection to the data socket."""

    def __init__(self, find: Find, locality: Locality, patience: float) -> None:
        """Ask the instance that `find` finds."""
        self._find, self._locality, self._patience = find, locality, patience
        self._sock: trio.socket.SocketType | None = None
        self._lost = self._closed = False

    async def exchange(self, request: bytes) -> bytes:
        """Return the answer to a TPM command."""
        return await persist(self._once, request, self._patience, control=False)

    async def _once(self, request: bytes) -> bytes:
        if self._sock is None:
            self._sock = await self._connect()
        try:
            return await ask(self._sock, request, control=False)
        except (NotTakenError, UnknownError):
            self._drop()
            raise

    async def _connect(self) -> trio.socket.SocketType:
        if self._closed:
            raise UnknownError
        places = await self._find()
        if places.data is None:
            raise NotTakenError("it has no data socket")
        if self._lost and self._locality.value != NO_LOCALITY:
            control = await connected(places.control)
            with control:
                try:
                    await ask(control, set_locality(self._locality.value), control=True)
                except UnknownError:
                    raise NotTakenError from None
        return await connected(places.data)

    def _drop(self) -> None:
        self._lost = True
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def close(self) -> None:
        """End it."""
        self._closed = True
        self._drop()
