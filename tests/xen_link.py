"""The agent in dom0 that a test leads (images/xen/dom0_agent.py), and the record of what was led in."""

import json
import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any


class XenError(AssertionError):
    """A command ended with another code than 0, or did not end."""


@dataclass
class Step:
    """A command, where it ran ("dom0", or a domain's name), what it answered, and the host's seconds since power on."""

    where: str
    command: str
    output: str
    code: int
    began: float
    ended: float

    def __str__(self) -> str:
        head = f"[{self.began:6.1f} +{self.ended - self.began:5.2f}] {self.where}$ {self.command}"
        return "\n".join([head, *(f"    {line}" for line in self.output.splitlines()), f"    -> {self.code}"])


@dataclass
class Transcript:
    """Every command that was led in, with its answer, in the order of the answers."""

    steps: list[Step] = field(default_factory=list)

    def of(self, where: str) -> list[Step]:
        return [step for step in self.steps if step.where == where]

    def __str__(self) -> str:
        return "\n".join(map(str, self.steps))


class Link:
    """The agent in dom0: answers by number, and what consoles say, sorted by a thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._answers: dict[int, queue.SimpleQueue[dict[str, Any]]] = {0: queue.SimpleQueue()}
        self._consoles: dict[str, Callable[[str | None], None]] = {}
        self._number = 0
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        rest = b""
        with suppress(OSError):
            while piece := self._socket.recv(1 << 20):
                *lines, rest = (rest + piece).split(b"\n")
                for line in filter(None, lines):
                    self._sort(json.loads(line))
        for waiting in list(self._answers.values()):
            waiting.put({"code": -1, "out": "QEMU has gone\n", "gone": True})
        for console in list(self._consoles.values()):
            console(None)

    def _sort(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers[message["id"]].put(message)
        elif listener := self._consoles.get(message["console"]):
            listener(None if message.get("gone") else message["out"])

    def ready(self, seconds: float) -> str:
        """Wait until dom0 has booted; its uptime then."""
        return str(self._answers[0].get(timeout=seconds)["out"])

    def post(self, **message: Any) -> int:
        """Send a request; returns the number to `take` its answer with."""
        with self._lock:
            self._number += 1
            number = self._number
            self._answers[number] = queue.SimpleQueue()
        self.send(id=number, **message)
        return number

    def take(self, number: int, patience: float) -> dict[str, Any]:
        """The answer to a request. TimeoutError if dom0 itself says nothing."""
        try:
            return self._answers[number].get(timeout=patience)
        except queue.Empty:
            raise TimeoutError(f"dom0 did not answer in {patience} s") from None

    def ask(self, patience: float, **message: Any) -> dict[str, Any]:
        """Send a request; returns the answer."""
        return self.take(self.post(**message), patience)

    def send(self, **message: Any) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            self._socket.sendall(line)

    def listen(self, console: str, listener: Callable[[str | None], None]) -> None:
        self._consoles[console] = listener

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._socket.close()
