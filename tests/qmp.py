"""QEMU's monitor: commands one after another over its Unix socket, events kept for whoever asks.

Source: QEMU, docs/interop/qmp-spec.txt. A client of our own because a test wants no event loop.
"""

import json
import select
import socket
import time
from typing import Any

ANSWER_SECONDS = 120.0  # savevm writes the guest's memory


class QmpError(Exception):
    """QEMU refused a command; the text is QEMU's."""


class Monitor:
    """A connection to one QEMU."""

    def __init__(self, sock: socket.socket) -> None:
        self.events: list[dict[str, Any]] = []
        self._socket = sock
        self._rest = b""
        try:
            assert "QMP" in self._message(time.monotonic() + ANSWER_SECONDS)
            self.execute("qmp_capabilities")
        except BaseException:
            sock.close()
            raise

    def execute(self, command: str, **arguments: Any) -> Any:
        """Return what a command returns. Underscores in names of arguments become hyphens. Raises QmpError."""
        renamed = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": renamed}).encode() + b"\n")
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            message = self._message(deadline)
            if "error" in message:
                raise QmpError(message["error"]["desc"])
            if "return" in message:
                return message["return"]

    def human(self, line: str) -> str:
        """Run a command of the human monitor and return what it printed, which tells failures too."""
        return str(self.execute("human-monitor-command", command_line=line)).strip()

    def wait_for(self, event: str, seconds: float) -> dict[str, Any]:
        """Return the next event of this name that nobody has taken yet."""
        deadline = time.monotonic() + seconds
        while True:
            for number, kept in enumerate(self.events):
                if kept["event"] == event:
                    return self.events.pop(number)
            message = self._message(deadline)
            assert "event" in message, message

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("QEMU's monitor does not answer")
            piece = self._socket.recv(65536)
            if not piece:
                raise ConnectionResetError("QEMU has gone")
            self._rest += piece
        line, self._rest = self._rest.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self.events.append(message)
        return message

    def close(self) -> None:
        self._socket.close()
