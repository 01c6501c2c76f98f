"""The keeper's side of the spawner: start it, have it make instances, start another when it dies.

An instance that the spawner made is the keeper's own child; a spawner can be lost at any moment without one of them.
"""

import importlib.util
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from frontend_backend.descriptors import close_all, receive_message, send_message
from frontend_backend.errors import ChannelClosedError, MessageError
from frontend_backend.messages_keeper import ConfinementReply, decode_keeper
from frontend_backend.release import RELEASE
from vtpm_instance.errors import SpawnerLostError, SpawnRefusedError
from vtpm_instance.journal import note
from vtpm_instance.order import STARTED, InstanceOrder

START_SECONDS: Final = 30.0  # importing and warming libtpms takes about 0.3 s; a loaded machine more
ANSWER_SECONDS: Final = 20.0  # a fork takes less than a millisecond
_CHANNEL: Final = 3  # where the spawner expects its end (vtpm_instance.spawner.CHANNEL)
_PARTS: Final = ("vtpm_instance", "_cffi_backend", "cryptography", "msgpack")  # what the spawner imports, by place
# -I and -S: no environment, no site directory; it finds its modules in the places the keeper found them in
_PROGRAM: Final = (
    "import sys; sys.path[:0] = sys.argv.pop(1).split(':'); from vtpm_instance.spawner import start; sys.exit(start())"
)


@dataclass(frozen=True, slots=True)
class SpawnSettings:
    """How instances are made: `mode` "fork" or "exec", `on_violation` "kill", "errno" or "log".

    `label` is shown by ps(1) in the command line of spawner and instances: the keeper's socket.
    """

    mode: str = "fork"
    on_violation: str = "kill"
    label: str = ""


class Spawner:
    """The one spawner of this keeper. `descriptor` is to be watched; `on_event` is called when it is readable."""

    def __init__(self, settings: SpawnSettings, changed: Callable[[int | None, int | None], None]) -> None:
        """Start nothing yet; `changed(old, new)` is told when the descriptor to watch is another one."""
        self._settings, self._changed = settings, changed
        self._sock: socket.socket | None = None
        self.pid = 0
        self.confinement: ConfinementReply | None = None
        self._ready = False

    def start(self) -> None:
        """Start a spawner, without waiting until it is ready.

        Raises:
            OSError: no more processes or descriptors.

        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.pid = os.posix_spawn(sys.executable, self._command(), {}, file_actions=_actions(theirs.fileno()))
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._sock, self._ready = ours, False
        self._changed(None, ours.fileno())

    def _command(self) -> list[str]:
        words = [self._settings.mode, self._settings.on_violation, str(os.getpid()), RELEASE, self._settings.label]
        return [sys.executable, "-I", "-S", "-c", _PROGRAM, ":".join(_places()), *words]

    def wait_ready(self) -> ConfinementReply:
        """Wait until it can make instances, starting it when there is none.

        Raises:
            SpawnerLostError: it does not start.
            OSError: no more processes or descriptors.

        """
        if self._sock is None:
            self.start()
        if not self._ready:
            self._take_greeting(self._receive(START_SECONDS)[0])
        assert self.confinement is not None
        return self.confinement

    def _take_greeting(self, data: bytes) -> None:
        try:
            greeting = decode_keeper(data)
        except MessageError as error:
            self._lose(str(error))
        if not isinstance(greeting, ConfinementReply):
            self._lose(f"it begins with {type(greeting).__name__}")
        self.confinement, self._ready = greeting, True

    def spawn(self, order: InstanceOrder) -> tuple[int, int]:
        """Have an instance made; returns its pid and pidfd. It is this process's child.

        Raises:
            SpawnRefusedError: the spawner said why not.
            SpawnerLostError: there is none, or it died over this; what it had made already is not known here.
            OSError: no more processes or descriptors.

        """
        try:
            self._send(order)
        except SpawnerLostError as error:
            note(str(error))  # it has not seen the order: another one may
            self._send(order)
        data, received = self._receive(ANSWER_SECONDS)
        pid = STARTED.unpack_from(data)[0] if len(data) >= STARTED.size else 0
        if pid and len(received) == 1:
            if self._settings.mode == "exec":
                self._become_instance()
            return pid, received[0]
        close_all(received)
        raise SpawnRefusedError(data[STARTED.size :].decode("utf-8", "replace"))

    def _send(self, order: InstanceOrder) -> None:
        self.wait_ready()
        assert self._sock is not None
        try:
            send_message(self._sock, order.pack(), order.descriptors)
        except OSError as error:
            self._lose(str(error))

    def _become_instance(self) -> None:
        """Let go of a spawner that is an instance now, and have the next one made ready."""
        self._detach()
        self._start_next()

    def _start_next(self) -> None:
        try:
            self.start()
        except OSError as error:
            note(f"the next spawner could not be started: {error}; it is tried again with the next instance")

    def on_event(self) -> None:
        """Take a greeting, or notice the end; a spawner that had worked is replaced at once."""
        was_ready = self._ready
        if self._sock is None or not _readable(self._sock, 0.0):
            return  # told late: `spawn` has taken it since, or this is another spawner under the same number
        try:
            data, received = self._receive(0.0)
            close_all(received)
            if was_ready:
                self._lose("it speaks without being asked")
            self._take_greeting(data)
        except SpawnerLostError as error:
            note(str(error))
            if was_ready:
                self._start_next()

    def _receive(self, seconds: float) -> tuple[bytes, list[int]]:
        assert self._sock is not None
        if not _readable(self._sock, seconds):
            self._lose(f"it did not answer within {seconds:g} s")
        try:
            return receive_message(self._sock, max_descriptors=1)
        except (ChannelClosedError, MessageError, OSError) as error:
            self._lose(str(error) or type(error).__name__)

    def _detach(self) -> None:
        if self._sock is not None:
            self._changed(self._sock.fileno(), None)
            self._sock.close()
            self._sock = None
        self._ready = False

    def _lose(self, why: str) -> NoReturn:
        """End the spawner, wait for its end, and raise SpawnerLostError."""
        status = self.close()
        raise SpawnerLostError(self.pid, why, status)

    def close(self) -> int | None:
        """End the spawner; returns its exit status as a shell would show it, None when there was none."""
        if self._sock is None:
            return None
        self._detach()
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def _readable(sock: socket.socket, seconds: float) -> bool:
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _places() -> list[str]:
    """Return the directories that the spawner's modules lie in."""
    origins = [spec.origin for part in _PARTS if (spec := importlib.util.find_spec(part)) is not None and spec.origin]
    folders = [Path(origin).parent for origin in origins]
    return list(dict.fromkeys(str(folder if folder.name not in _PARTS else folder.parent) for folder in folders))


def _actions(channel: int) -> list[tuple[int, ...] | tuple[int, int, str, int, int]]:
    """Give the spawner its channel, and the null device as standard input: it has no path to one later."""
    return [
        (os.POSIX_SPAWN_DUP2, channel, _CHANNEL),
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
    ]
