"""A vTPM that is fuzzed: how steps (hostile_steps) are played, what is remembered of them, and what must survive."""

import json
import os
import socket
import struct
import time
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import commands_tpm12
import vtpm_instance_rig as tpm
from e2e_rig import Guest, Installation, alive
from hostile_steps import Step, Steps, pieces_of
from vtpm_instance_commands import command12

from frontend_backend.errors import RingError
from frontend_backend.front import RingFrontEnd
from frontend_backend.tpmhdr import command
from manager.client import request
from manager.errors import ManagerError

ANSWER_SECONDS: Final = 90.0  # an RSA key on a busy machine takes many seconds; longer is a hang
KEPT_STEPS: Final = 5000  # of each victim, for the replay file
_CANCEL: Final = struct.pack(">I", 9)
_INIT: Final = struct.pack(">II", 2, 0)
_ENDLESS: Final = 1 << 20  # bytes; no step has so many commands that their answers come to that
_MAX_HELD: Final = 6  # connections held open at a time; an instance serves eight
_MAX_RINGS: Final = 5  # hostile ones held open at a time; an instance serves eight
_SENTINEL: Final = 0x01400077
_DEACTIVATED: Final = (6, 7)  # TPM_DEACTIVATED, TPM_DISABLED (TPM 1.2 Part 2, 16)
_PLATFORM: Final = (0x4000000C).to_bytes(4)


class HungError(Exception):
    """No answer came in time from an instance that lives."""


class WrongAnswerError(Exception):
    """What came is no TPM response, or a promise about the answers does not hold."""


class Victim:
    """One vTPM under fire, with its own front end, generator and history."""

    def __init__(self, made: Installation, name: str, family: str, frontend: str, seed: str) -> None:
        """Add and attach it, and give it something that must survive."""
        self.made, self.name, self.family, self.frontend = made, name, family, frontend
        self.steps = Steps(family, frontend, seed)
        self.history: deque[Step] = deque(maxlen=KEPT_STEPS)
        self.codes: Counter[int] = Counter()
        self.commands = 0
        self._rings: list[RingFrontEnd] = []
        self._held: list[socket.socket] = []
        self._front: RingFrontEnd | None = None
        self.ask("add", name=name, tpm=family)
        self.attach()

    def ask(self, verb: str, **words: str | int | bool | None) -> list[dict[str, Any]]:
        """Ask the manager, as its command would."""
        return request(str(self.made.runtime / "admin.sock"), verb, words)

    def attach(self) -> None:
        """Attach it and look at what must be there for ever."""
        (shown,) = self.ask("attach", vtpm=self.name, guest=f"guest-of-{self.name}", frontend=self.frontend)
        self.endpoint, self.control, self.pid = shown["endpoint"], shown["control"], shown["pid"]
        self.guest = Guest(self.endpoint)
        self._make_sentinel()
        self.sentinel = self.read_sentinel()

    def reborn(self) -> None:
        """Make it a new TPM: hostile commands shut doors for good, and there is nothing behind them to test."""
        self.close()
        self.ask("detach", vtpm=self.name)
        self.ask("reset", vtpm=self.name, yes=True)
        self.attach()
        self.forget()

    def forget(self) -> None:
        """Take note that the TPM was reset."""
        self.steps.generator.forget()

    def close(self) -> None:
        """Let go of connections and rings."""
        self.guest.close()
        for held in (*self._held, *self._rings, *([self._front] if self._front else [])):
            held.close()
        self._held, self._rings, self._front = [], [], None

    # what must survive

    def _make_sentinel(self) -> None:
        """Make a state that no command of a guest can change: a locked NV index, an endorsement key."""
        if self.family == "1.2":
            self._enable_tpm12()
            self.transmit(command12(0x78, bytes(20) + commands_tpm12._KEY_PARMS))
            return
        # written and deleted only by a policy that nobody can satisfy, once it is locked
        attributes = 0x4000_0000 | 0x0200_0000 | 0x0004_0000 | 0x0001_0000 | 0x2000 | 0x400 | 0x1
        public = struct.pack(">IHI", _SENTINEL, 0xB, attributes) + tpm.sized(b"\x5a" * 32) + struct.pack(">H", 32)
        handles = _PLATFORM + _SENTINEL.to_bytes(4)
        for packet in (
            tpm.authorised(0x12A, _PLATFORM, tpm.sized(b"") + tpm.sized(public)),
            tpm.authorised(0x137, handles, tpm.sized(os.urandom(32)) + b"\0\0"),
            tpm.authorised(0x138, handles),
        ):
            answer = self.transmit(packet)
            if answer[6:10] != bytes(4):
                raise WrongAnswerError(f"{self.name}: the sentinel could not be made: {answer.hex()}")

    def _enable_tpm12(self) -> None:
        for packet in (
            command12(0x4000000A, b"\0\x20"), command12(0x4000000A, b"\0\x08"), command12(0x6F), command12(0x72, b"\0"),
        ):  # fmt: skip
            self.transmit(packet)

    def read_sentinel(self) -> bytes:
        """Return the state that must survive."""
        if self.family == "1.2":
            answer = self.transmit(command12(0x7C, bytes(20)))
            if int.from_bytes(answer[6:10]) in _DEACTIVATED:  # by a command that anybody may send; activated at a start
                self._enable_tpm12()
                self.reset_platform()
                answer = self.transmit(command12(0x7C, bytes(20)))
        else:
            handles = _SENTINEL.to_bytes(4) * 2
            answer = self.transmit(tpm.authorised(0x14E, handles, struct.pack(">HH", 32, 0)))
        if answer[6:10] != bytes(4):
            raise WrongAnswerError(f"{self.name}: the sentinel cannot be read: {answer.hex()}")
        return answer

    # playing

    def transmit(self, packet: bytes) -> bytes:
        """Send one command and return its answer, whatever it is; says whether an instance hangs or has ended."""
        try:
            if self.frontend == "socket":
                answer = self.guest.transmit(packet, ANSWER_SECONDS)
            else:
                self._front = self._front or RingFrontEnd.connect(self.endpoint)
                answer = self._front.transact(packet[:4088], timeout=ANSWER_SECONDS)
        except TimeoutError:
            self.close()
            raise HungError(f"{self.name}: no answer to {packet.hex()}") from None
        except RingError as error:
            self.close()
            raise ConnectionResetError(str(error)) from error
        self.commands += 1
        if len(answer) < 10 or int.from_bytes(answer[2:6]) != len(answer):
            raise WrongAnswerError(f"{self.name}: {packet.hex()} was answered with {answer.hex()}")
        return answer

    def play(self, step: Step) -> None:
        """Do one step. Raises OSError when the connection ends before its answer, HungError, WrongAnswerError."""
        kind, data = step
        self.history.append(step)
        match kind:
            case "command":
                answer = self.transmit(data)
                self.codes[int.from_bytes(answer[6:10])] += 1
                self.steps.generator.learn(data, answer)
            case "stream":
                self._until_closed(self.endpoint, data)
            case "hold":
                self._hold(data)
            case "control":
                self._until_closed(self.control, data)
            case "cancel":
                self._cancelled(data)
            case "page":
                self._scribble(data)
            case "flood":
                self._flood()

    def _until_closed(self, path: str, data: bytes) -> bytes:
        """Send what may make no sense, say that this was all, and read until the other side has closed."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(ANSWER_SECONDS)
            sock.connect(path)
            got = b""
            with suppress(BrokenPipeError, ConnectionResetError):  # it may close as soon as it has read a wrong size
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            try:
                while (piece := sock.recv(65536)) and len(got) < _ENDLESS:
                    got += piece
            except TimeoutError:
                raise HungError(f"{self.name}: {path} neither answered nor closed after {data.hex()}") from None
            except ConnectionResetError:
                pass  # bytes that it had not read when it closed
            if len(got) >= _ENDLESS:
                raise WrongAnswerError(f"{self.name}: {path} answers {data.hex()} without end")
            return got

    def _hold(self, data: bytes) -> None:
        """Leave a connection with something begun, perhaps with answers that nobody reads."""
        sock = socket.socket(socket.AF_UNIX)
        self._held.append(sock)
        sock.connect(self.endpoint)
        sock.setblocking(False)
        with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            sock.send(data)
        if len(self._held) > _MAX_HELD:
            self._held.pop(0).close()

    def _cancelled(self, packet: bytes) -> None:
        if self.guest.sock is None:
            self.transmit(packet)
        assert self.guest.sock is not None
        self.guest.sock.sendall(packet)
        self._until_closed(self.control, _CANCEL)
        self.transmit_rest()

    def transmit_rest(self) -> bytes:
        """Read the answer to a command that was sent already."""
        return self.transmit(b"")

    def _scribble(self, data: bytes) -> None:
        ring = RingFrontEnd.connect(self.endpoint)
        self._rings.append(ring)
        for offset, content in pieces_of(data):
            ring.ring.page[offset : offset + len(content)] = content
            ring.ring.ring()
        if len(self._rings) > _MAX_RINGS:
            self._rings.pop(0).close()

    def _flood(self) -> None:
        if not self._rings:
            self._scribble(b"")
        rung = self._rings[-1].ring.descriptors()[-1]
        with suppress(OSError):
            while True:
                os.write(rung, bytes(4096))

    # around a batch

    @property
    def lives(self) -> bool:
        """Whether the instance that was attached last is there."""
        return alive(self.pid)

    def reset_platform(self) -> None:
        """Reset the platform as its owner does, and undo what hostile commands did to the reach of the next ones."""
        if self.frontend == "socket":
            answer = self._until_closed(self.control, _INIT)
            if answer != bytes(4):
                raise WrongAnswerError(f"{self.name}: the platform reset was answered with {answer.hex()}")
        else:
            try:
                self.ask("reset-platform", vtpm=self.name)
            except ManagerError as error:
                raise ConnectionResetError(str(error)) from error
        self.forget()

    def open_doors(self) -> None:
        """Clear owner, lockout and whatever was defined: most hostile commands would be refused early without it."""
        if self.family == "1.2":
            self._enable_tpm12()
        else:
            self.transmit(tpm.authorised(0x127, _PLATFORM, b"\0"))
            self.transmit(tpm.authorised(0x126, _PLATFORM))

    def answers(self) -> None:
        """Make sure that it answers something well-formed on a connection of its own."""
        self.close()
        self.transmit(command(0x17B, b"\0\x08") if self.family == "2.0" else command12(0x46, (8).to_bytes(4)))
        if self.frontend == "socket":
            got = self._until_closed(self.control, struct.pack(">I", 1))
            if got[:4] != bytes(4):
                raise WrongAnswerError(f"{self.name}: the control port answered {got.hex()}")

    def save(self, path: Path, why: str) -> None:
        """Write what --replay reads."""
        head = {
            "family": self.family,
            "frontend": self.frontend,
            "why": why,
            "time": time.strftime("%FT%TZ", time.gmtime()),
        }
        lines = [json.dumps(head), *(json.dumps([kind, data.hex()]) for kind, data in self.history)]
        path.write_text("\n".join(lines) + "\n")
