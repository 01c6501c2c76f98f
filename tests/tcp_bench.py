"""A vTPM on two TCP ports in a row instead of sockets with names."""

import socket
from pathlib import Path

from vtpm_instance_rig import DEADLINE, Bench


class TcpBench(Bench):
    """One vTPM: the data channel on `port`, the control channel on the next."""

    port = 0
    _platform: socket.socket

    def _listen(self, path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        if kind is not socket.SOCK_STREAM:
            return super()._listen(path, kind)
        if path == self.control_path:
            return self._platform
        while True:
            command, self._platform = self._pair()
            if command is not None:
                return command

    def _pair(self) -> tuple[socket.socket | None, socket.socket]:
        command, platform = socket.socket(), socket.socket()
        command.bind(("127.0.0.1", 0))
        self.port = command.getsockname()[1]
        try:
            platform.bind(("127.0.0.1", self.port + 1))
        except OSError:
            command.close()
            return None, platform
        for listener in (command, platform):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            listener.listen(16)
        return command, platform

    def connect(self, offset: int = 0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port + offset), DEADLINE)
