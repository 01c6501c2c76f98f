"""The manager's side of the keeper: start it when there is none, ask it, one question at a time."""

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol, Self

import trio

from frontend_backend import messages_keeper as m
from frontend_backend.channel_trio import receive_message_trio, send_message_trio
from frontend_backend.descriptors import MAX_DESCRIPTORS, close_all, receive_message
from frontend_backend.errors import ChannelClosedError, MessageError, RingError
from manager.capacity import descriptor_limit_of
from manager.errors import BusyError, KeeperError, KeeperFullError, KeeperRefusedError

_log = logging.getLogger("vtpm.keeper")
_START_SECONDS: Final = 30.0  # importing and rehearsing takes about 0.6 s; a machine that boots much more
_ANSWER_SECONDS: Final = 30.0
_RETRY_SECONDS: Final = 0.01


def _nothing() -> None:
    pass


class _GoneError(KeeperError):
    """The keeper closed the connection before it answered."""


class Asks(Protocol):
    """Who answers questions to keepers: one, or all of them (manager.keepers)."""

    async def ask(
        self, message: m.KeeperRequest, descriptors: tuple[int, ...] = (), meanwhile: Callable[[], None] = _nothing
    ) -> tuple[m.KeeperReply, list[int]]:
        """Ask one question; see `Keeper.ask`."""


class Keeper:
    """A connection to the keeper. The keeper outlives it.

    `release` is that of the code it runs, None for one of before there were several; `descriptors_most` is its limit.
    """

    def __init__(self, path: Path, sock: socket.socket, options: tuple[str, ...] = ()) -> None:
        """Use a connected, non-blocking socket; see `connect`."""
        self._path, self._sock, self._options = path, sock, options
        self._turn = trio.Lock()
        self._children: list[int] = []  # keepers that this process has started, and not seen end
        self.path = path
        self.pid = 0
        self.release: str | None = None
        self.descriptors_most = 0

    @classmethod
    async def connect(cls, path: Path, options: tuple[str, ...] = ()) -> Self:
        """Connect to the keeper at `path`, starting one with `options` if nobody listens there.

        Raises:
            BusyError: the keeper serves another manager. KeeperError: it cannot be started.

        """
        children: list[int] = []
        keeper = cls(path, await _reach(path, options, children), options)
        keeper._children = children
        try:
            async with keeper._turn:
                try:
                    await keeper._greet()
                except _GoneError:  # it was just ending, as after a stop a moment ago
                    keeper._sock.close()
                    keeper._sock = await _reach(path, options, children)
                    await keeper._greet()
        except KeeperRefusedError as error:
            keeper.close()
            raise BusyError(f"the keeper at {path} serves another manager ({error})") from error
        except KeeperError:
            keeper.close()
            raise
        return keeper

    async def ask(
        self, message: m.KeeperRequest, descriptors: tuple[int, ...] = (), meanwhile: Callable[[], None] = _nothing
    ) -> tuple[m.KeeperReply, list[int]]:
        """Ask one question and return (answer, descriptors that came with it; they are the caller's).

        `meanwhile` is called while the keeper works, again if a second keeper is asked; it must not raise.
        A keeper that has died took its instances with it; another one is started and asked instead.

        Raises:
            KeeperError: it refused, or it cannot be had.

        """
        async with self._turn:
            try:
                return await self._ask_once(message, descriptors, meanwhile)
            except (OSError, ChannelClosedError):
                _log.error("the connection to the keeper at %s is lost; another is started if it has died", self.path)
                self._sock.close()
                self._sock = await _reach(self._path, self._options, self._children)
                await self._greet()
                self.reap()
            try:
                return await self._ask_once(message, descriptors, meanwhile)
            except (OSError, ChannelClosedError) as error:
                raise KeeperError(f"the keeper does not answer: {error}") from error

    def reap(self) -> None:
        """Collect keepers of ours that have ended: they would stay zombies as long as this process lives."""
        self._children = [pid for pid in self._children if not _has_ended(pid)]

    async def _greet(self) -> None:
        try:
            reply, _ = await self._ask_once(m.Hello(m.VERSION), ())
        except (OSError, ChannelClosedError) as error:
            if words := self._last_words():
                raise KeeperRefusedError(words) from error
            raise _GoneError(f"the keeper does not answer: {error}") from error
        if isinstance(reply, m.HelloReply):
            self.pid = reply.pid
            # a manager that was upgraded in place has the keepers of the one before as children, too
            self._children = [*{*self._children, reply.pid}]
            self.reap()
        await self._ask_what_it_is()

    def _last_words(self) -> str | None:
        """Return why a keeper turned us away: the kernel tells first that it closed, and then what it said before."""
        try:
            data, received = receive_message(self._sock)
            close_all(received)
            said = m.decode_keeper(data)
        except (OSError, RingError):
            return None
        return said.text if isinstance(said, m.KeeperRefusal) else None

    async def _ask_what_it_is(self) -> None:
        self.release, self.descriptors_most = None, descriptor_limit_of(self.pid) or 0
        try:
            reply, _ = await self._ask_once(m.Describe(), ())
        except KeeperRefusedError:
            return
        except (OSError, ChannelClosedError) as error:
            raise KeeperError(f"the keeper does not answer: {error}") from error
        if isinstance(reply, m.Description):
            self.release, self.descriptors_most = reply.release, reply.descriptors_most

    async def _ask_once(
        self, message: m.KeeperRequest, descriptors: tuple[int, ...], meanwhile: Callable[[], None] = _nothing
    ) -> tuple[m.KeeperReply, list[int]]:
        try:
            with trio.fail_after(_ANSWER_SECONDS):
                await send_message_trio(self._sock, m.encode_keeper(message), descriptors)
                meanwhile()
                data, received = await receive_message_trio(self._sock, max_descriptors=MAX_DESCRIPTORS)
        except trio.TooSlowError as error:
            self._sock.close()  # its answer may still come, and must not be taken for that of the next question
            raise KeeperError(self._silence()) from error
        except MessageError as error:
            self._sock.close()
            raise KeeperError(f"the keeper at {self.path} does not answer: {error}") from error
        except trio.Cancelled:
            self._sock.close()
            raise
        try:
            reply = m.decode_keeper(data)
        except MessageError as error:
            close_all(received)
            raise KeeperError(f"the keeper's answer cannot be read: {error}") from error
        match reply:
            case m.KeeperFull(text):
                close_all(received)
                raise KeeperFullError(text)
            case m.KeeperRefusal(text):
                close_all(received)
                raise KeeperRefusedError(text)
            case (
                m.Hello() | m.Spawn() | m.List() | m.Fetch() | m.Forget() | m.Stop() | m.Confinement() | m.Describe()
                | m.Park() | m.Arm() | m.Wake() | m.Watch() | m.Wanted()
            ):  # fmt: skip
                close_all(received)
                raise KeeperError("the keeper asks where it should answer")
            case _:
                return reply, received

    def _silence(self) -> str:
        who = f"the keeper at {self.path}" + (f" (process {self.pid})" if self.pid else "")
        return (
            f"{who} gave no answer within {_ANSWER_SECONDS:g} s; its running vTPMs go on. If it hangs for good, kill "
            f"its process: they stop cleanly then, and the manager starts another keeper and them again"
        )

    async def list(self) -> list[m.Kept]:
        """Return every instance the keeper has, ended ones included."""
        kept: list[m.Kept] = []
        while True:
            reply, _ = await self.ask(m.List(len(kept)))
            if not isinstance(reply, m.ListReply):
                raise KeeperError(f"unexpected answer {type(reply).__name__} to List")
            kept += reply.instances
            if len(kept) >= reply.total or not reply.instances:
                return kept

    def close(self) -> None:
        """Leave the keeper to itself."""
        self._sock.close()


async def _reach(path: Path, options: tuple[str, ...], children: list[int]) -> socket.socket:
    """Return a connection to the keeper at `path`; raises KeeperError.

    If nobody listens there one is started, and its process id added to `children`.
    """
    sock = _try_connect(path)
    if sock is None:
        children.append(_start(path, options))
        with trio.move_on_after(_START_SECONDS):
            while (sock := _try_connect(path)) is None:  # noqa: ASYNC110 - another process makes it
                await trio.sleep(_RETRY_SECONDS)
    if sock is None:
        raise KeeperError(f"the keeper did not listen at {path} within {_START_SECONDS:g} s; see the log above")
    return sock


def _try_connect(path: Path) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise KeeperError(f"cannot connect to the keeper at {path}: {error.strerror}") from error
    sock.setblocking(False)
    return sock


def _has_ended(pid: int) -> bool:
    """Tell whether a child has ended, and collect it if so."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True  # collected already: SIGCHLD may be ignored since before we were started


def _start(path: Path, options: tuple[str, ...]) -> int:
    """Start a keeper in a session of its own, so that it outlives us; returns its process id."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-m", "vtpm_instance.keeper", "--socket", str(path), *options],
        {key: value for key, value in os.environ.items() if key in ("PATH", "LANG", "LC_ALL", "TZ")},
        file_actions=[(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1)],
        setsid=True,
    )
