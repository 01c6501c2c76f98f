"""Runs in dom0 and is led by tests/xen_rig.py over a virtio port: commands of the shell, and consoles of domains.

Lines of JSON both ways:
    {"id": 1, "run": "xl list", "seconds": 60}   ->  {"id": 1, "code": 0, "out": "..."}; code -9 after its time
    {"id": 2, "open": "/dev/pts/1"}              ->  {"id": 2, "code": 0, "out": ""}, then what it says, in lines
                                                     {"console": "/dev/pts/1", "out": "..."}
    {"console": "/dev/pts/1", "in": "..."}
    {"id": 3, "close": "/dev/pts/1"}             ->  {"id": 3, "code": 0, "out": ""}
Bytes that are no UTF-8 come as Latin-1: what a console says is never lost. Few imports: Python starts under emulation.
"""

import json
import os
import select
import signal
import sys
import time
from typing import Any

_PORT = "/dev/vport0p1"
_SHELL = "/bin/sh"
_TICK_MS = 500


class Agent:
    """What runs, and which consoles are open."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._poll = select.poll()
        self._poll.register(port, select.POLLIN)
        self._running: dict[int, tuple[int, int, int, float]] = {}  # pidfd -> number, pid, output, when it must end
        self._consoles: dict[int, str] = {}
        self._rest = b""

    def serve(self) -> None:
        """Serve until the host hangs up for good."""
        self._say({"id": 0, "code": 0, "out": open("/proc/uptime").read().split()[0]})
        while True:
            for descriptor, _ in self._poll.poll(_TICK_MS if self._running else None):
                if descriptor == self._port:
                    self._read_port()
                elif descriptor in self._running:
                    self._ended(descriptor)
                elif descriptor in self._consoles:
                    self._read_console(descriptor)
            now = time.monotonic()
            for _, pid, _, deadline in list(self._running.values()):
                if now > deadline:
                    os.killpg(pid, signal.SIGKILL)

    def _say(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._port, data) :]

    def _read_port(self) -> None:
        piece = os.read(self._port, 65536)
        if not piece:  # nobody is connected on the host's side
            time.sleep(0.05)
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            message = json.loads(line)
            try:
                self._obey(message)
            except OSError as error:
                if "id" in message:
                    self._say({"id": message["id"], "code": 126, "out": f"{error}\n"})

    def _obey(self, message: dict[str, Any]) -> None:
        if "run" in message:
            self._run(message["id"], message["run"], message["seconds"])
        elif "open" in message:
            console = os.open(message["open"], os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
            self._consoles[console] = message["open"]
            self._poll.register(console, select.POLLIN)
            self._say({"id": message["id"], "code": 0, "out": ""})
        elif "close" in message:
            for console in [number for number, path in self._consoles.items() if path == message["close"]]:
                self._drop(console)
            self._say({"id": message["id"], "code": 0, "out": ""})
        else:
            for console in [number for number, path in self._consoles.items() if path == message["console"]]:
                os.write(console, message["in"].encode())

    def _run(self, number: int, command: str, seconds: float) -> None:
        path = f"/run/said-{number}"
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        # not fork: this process is large, and each of its pages would cost a call of the hypervisor
        pid = os.posix_spawn(_SHELL, [_SHELL, "-c", command], os.environ, file_actions=actions, setsid=True)
        output = os.open(path, os.O_RDONLY)
        os.unlink(path)
        descriptor = os.pidfd_open(pid)
        self._running[descriptor] = (number, pid, output, time.monotonic() + seconds)
        self._poll.register(descriptor, select.POLLIN)

    def _ended(self, descriptor: int) -> None:
        number, pid, output, _ = self._running.pop(descriptor)
        self._poll.unregister(descriptor)
        os.close(descriptor)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said = b""
        while piece := os.read(output, 1 << 20):
            said += piece
        os.close(output)
        self._say({"id": number, "code": code, "out": _text(said)})

    def _read_console(self, console: int) -> None:
        try:
            piece = os.read(console, 65536)
        except OSError:  # the domain has gone, and its console with it
            piece = b""
        if piece:
            self._say({"console": self._consoles[console], "out": _text(piece)})
        else:
            self._drop(console)

    def _drop(self, console: int) -> None:
        self._poll.unregister(console)
        os.close(console)
        path = self._consoles.pop(console)
        self._say({"console": path, "gone": True})


def _text(said: bytes) -> str:
    try:
        return said.decode()
    except UnicodeDecodeError:
        return said.decode("latin-1")


def main() -> int:
    """Run until the port cannot be read."""
    deadline = time.monotonic() + 10
    while not os.path.exists(_PORT):
        if time.monotonic() > deadline:
            print(f"there is no {_PORT}")
            return 1
        time.sleep(0.02)
    Agent(os.open(_PORT, os.O_RDWR)).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
