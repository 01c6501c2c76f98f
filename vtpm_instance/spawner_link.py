"""The keeper's side of the spawner: start it, have it make instances, start another when it dies.

One instance-to-be stands by (`standby`), so that nobody waits for a fork: the next one is made when that one was
handed its order. In mode `exec` the spawner itself is the one that stands by. An instance that the spawner made is the
keeper's own child; a spawner can be lost at any moment without one of them.
"""

import importlib.util
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from frontend_backend.descriptors import is_readable, receive_message, send_message
from frontend_backend.errors import ChannelClosedError, MessageError
from frontend_backend.messages_keeper import ConfinementReply, decode_keeper
from frontend_backend.release import RELEASE
from vtpm_instance.errors import SpawnerLostError, SpawnRefusedError
from vtpm_instance.journal import note
from vtpm_instance.order import STARTED, WANTED, WANTED_NOW, InstanceOrder
from vtpm_instance.standby import Standby, Untaken

START_SECONDS: Final = 120.0  # importing and warming libtpms takes 0.3 s, emulated on a busy machine more than 30
_AFTER_SECONDS: Final = 0.015  # from an order until the next is made ready: about what an attach or a resume takes
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
        self._standby: Standby | None = None
        self._due: float | None = None  # when one should be asked for (time.monotonic)
        self._untaken = Untaken()
        self._made_ahead = True  # not after a spawner was lost over it, until the next order: it would be lost again
        self._asked: socket.socket | None = None  # our end of the channel of the one that is being made

    @property
    def pids(self) -> set[int]:
        """The processes that are no instances: the spawner, and what stands by."""
        return {self.pid} if self._standby is None else {self.pid, self._standby.pid}

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
            self._take_greeting(self._receive(START_SECONDS))
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
        self._due = time.monotonic() if self._made_ahead else None

    def spawn(self, order: InstanceOrder) -> tuple[int, int]:
        """Have an instance made; returns its pid and pidfd. It is this process's child.

        Raises:
            SpawnRefusedError: the spawner said why not, or what it made ended at once, twice.
            SpawnerLostError: there is none, or it died over this; what it had made already is not known here.
            OSError: no more processes or descriptors.

        """
        packed, descriptors = order.pack(), order.descriptors
        self._due, self._made_ahead = time.monotonic() + _AFTER_SECONDS, True
        self._untaken.make_room()
        standby = self._take_standby()
        try:
            pid, pidfd, sock = standby.hand(packed, descriptors)
        except OSError as error:
            standby.end()
            note(f"process {standby.pid} ended while it stood by ({error}); another one takes its place")
            standby = self._take_standby()
            try:
                pid, pidfd, sock = standby.hand(packed, descriptors)
            except OSError as again:
                standby.end()
                raise SpawnRefusedError(f"process {standby.pid} did not get its order: {again}; ask again") from again
        self._untaken.add(sock)
        return pid, pidfd

    def _take_standby(self) -> Standby:
        """Return who is handed the next order; waited for only where none stands by."""
        standby, self._standby = self._standby, None
        if standby is not None:
            return standby
        self.wait_ready()
        if self._settings.mode == "exec":
            return self._spawner_itself()
        if self._asked is None:
            try:
                self._ask_for_one(WANTED_NOW)
            except SpawnerLostError as error:
                note(str(error))  # it has not been asked: another one may be
                self._ask_for_one(WANTED_NOW)
        return self._made(self._receive(ANSWER_SECONDS))

    def _ask_for_one(self, how: bytes = WANTED) -> None:
        """Ask for an instance-to-be, without waiting until it is there. Raises SpawnerLostError, OSError."""
        self.wait_ready()
        assert self._sock is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                send_message(self._sock, how, (theirs.fileno(),))
            except OSError as error:
                ours.close()
                if isinstance(error, ConnectionError):
                    self._lose(str(error))
                raise
        self._asked = ours

    def _made(self, data: bytes) -> Standby:
        """Return what the spawner has made. Raises SpawnRefusedError: nothing."""
        assert self._asked is not None
        sock, self._asked = self._asked, None
        pid = STARTED.unpack_from(data)[0] if len(data) >= STARTED.size else 0
        if not pid:
            sock.close()
            raise SpawnRefusedError(data[STARTED.size :].decode("utf-8", "replace"))
        try:
            return Standby.of(pid, sock)
        except OSError as error:
            raise SpawnRefusedError(f"process {pid} cannot be kept: {error}") from error

    def _spawner_itself(self) -> Standby:
        """Let go of a spawner that becomes the next instance; another one is made ready in its place."""
        assert self._sock is not None
        sock, pid = self._sock, self.pid
        pidfd = os.pidfd_open(pid)
        self._changed(sock.fileno(), None)
        self._sock, self._ready = None, False
        return Standby(pid, pidfd, sock)

    def seconds_left(self) -> float:
        """Return how long until `have_one_stand_by` is to be called: while one starts, all processors are its."""
        return float("inf") if self._due is None else max(0.0, self._due - time.monotonic())

    def have_one_stand_by(self) -> None:
        """Have the next instance made, once for each that was; to be called after `seconds_left`."""
        self._due = None
        self._untaken.close()
        if self._sock is None:
            self._start_next()
        elif self._settings.mode == "fork" and self._ready and self._standby is None and self._asked is None:
            try:
                self._ask_for_one()
            except OSError as error:
                note(f"no instance stands by: {error}")
            except SpawnerLostError as error:
                note(str(error))
                self._start_next()

    def _start_next(self) -> None:
        try:
            self.start()
        except OSError as error:
            note(f"the next spawner could not be started: {error}; it is tried again with the next instance")

    def on_event(self) -> bool:
        """Take a greeting or who stands by, or notice the end; a spawner that had worked is replaced at once.

        Returns whether one was lost: what it had made without telling is to be ended.
        """
        was_ready, asked = self._ready, self._asked is not None
        if self._sock is None or not is_readable(self._sock.fileno()):
            return False  # told late: `spawn` has taken it since, or this is another spawner under the same number
        try:
            data = self._receive(0.0)
            if self._asked is not None:
                self._standby = self._made(data)
                return False
            if was_ready:
                self._lose("it speaks without being asked")
            self._take_greeting(data)
        except SpawnRefusedError as error:
            note(f"no instance stands by: {error}")
        except SpawnerLostError as error:
            note(str(error))
            self._made_ahead = not asked
            if was_ready:
                self._start_next()
            return True
        return False

    def _receive(self, seconds: float) -> bytes:
        assert self._sock is not None
        if not is_readable(self._sock.fileno(), seconds):
            self._lose(f"it did not answer within {seconds:g} s")
        try:
            return receive_message(self._sock)[0]
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
        """End the spawner, and who stands by; returns its exit status as a shell would show it, None without one."""
        self._untaken.close()
        if self._standby is not None:
            self._standby.end()
            self._standby = None
        if self._asked is not None:
            self._asked.close()
            self._asked = None
        if self._sock is None:
            return None
        self._detach()
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


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
