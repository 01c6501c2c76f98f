"""Real parts for the tests of vtpm_instance: a keeper process, raw TPM clients, and a bench that joins them."""

import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import uuid4

from vtpm_instance_commands import (
    GET_TEST_RESULT,
    SHUTDOWN_CLEAR,
    SHUTDOWN_STATE,
    STARTUP_CLEAR,
    STARTUP_STATE,
    authorised,
    command12,
    extended,
    get_random,
    nv_content,
    nv_define,
    nv_read,
    nv_write,
    pcr_extend,
    pcr_read,
    rc,
    sized,
)
from vtpm_instance_manager import DEADLINE, Record, SmallManager, page_state, until

from frontend_backend.descriptors import close_all, receive_message, send_message
from frontend_backend.local import LocalRing
from frontend_backend.messages_keeper import (
    Fetch,
    Fetched,
    Forget,
    Forgotten,
    Hello,
    HelloReply,
    KeeperReply,
    KeeperRequest,
    Spawn,
    Spawned,
    decode_keeper,
    encode_keeper,
)
from storage.state_image import Family, StateImage

# --- clients --------------------------------------------------------------------------------------


# one name for all of it, for tests that want whole parts
__all__ = [
    "DEADLINE",
    "GET_TEST_RESULT",
    "SHUTDOWN_CLEAR",
    "SHUTDOWN_STATE",
    "STARTUP_CLEAR",
    "STARTUP_STATE",
    "Bench",
    "KeeperClient",
    "KeeperProcess",
    "Record",
    "SmallManager",
    "authorised",
    "command12",
    "connect",
    "extended",
    "get_random",
    "nv_content",
    "nv_define",
    "nv_read",
    "nv_write",
    "page_state",
    "pcr_extend",
    "pcr_read",
    "rc",
    "receive_exactly",
    "receive_response",
    "running_keeper",
    "short_directory",
    "sized",
    "transact",
    "until",
]


def connect(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.settimeout(DEADLINE)
    try:
        sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return sock


def receive_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise EOFError(f"the peer closed after {len(data)} of {count} bytes")
        data += part
    return data


def receive_response(sock: socket.socket) -> bytes:
    head = receive_exactly(sock, 10)
    return head + receive_exactly(sock, int.from_bytes(head[2:6]) - 10)


def transact(sock: socket.socket, packet: bytes) -> bytes:
    sock.sendall(packet)
    return receive_response(sock)


# --- the keeper -----------------------------------------------------------------------------------


class KeeperClient:
    """The manager's connection to a keeper."""

    def __init__(self, path: Path) -> None:
        self.sock = connect(path, socket.SOCK_SEQPACKET)

    def call(self, request: KeeperRequest, descriptors: list[int] | None = None) -> tuple[KeeperReply, list[int]]:
        send_message(self.sock, encode_keeper(request), descriptors or [])
        data, received = receive_message(self.sock, max_descriptors=16)
        reply = decode_keeper(data)
        return reply, received  # type: ignore[return-value]

    def close(self) -> None:
        self.sock.close()


class KeeperProcess:
    """A keeper, started as the command does."""

    def __init__(self, directory: Path, linger: float = 600.0, options: tuple[str, ...] = ()) -> None:
        self.path = directory / "keeper.sock"
        self.log = directory / "keeper.log"
        ready, tell = os.pipe()
        with self.log.open("ab") as log:
            arguments = ["--socket", str(self.path), "--ready-fd", str(tell), "--linger", str(linger), *options]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vtpm_instance.keeper", *arguments],
                pass_fds=[tell],
                stderr=log,
                cwd=Path(__file__).parent.parent,
            )
        os.close(tell)
        line = os.read(ready, 64)
        os.close(ready)
        assert line == b"ready\n", self.log.read_text()
        try:
            self.client = KeeperClient(self.path)
        except OSError:
            self.process.kill()
            self.process.wait()
            raise
        reply, _ = self.client.call(Hello(1))
        assert reply == HelloReply(1, self.process.pid)

    def reconnect(self) -> None:
        """Be the next manager."""
        self.client.close()
        self.client = KeeperClient(self.path)
        reply, _ = self.client.call(Hello(1))
        assert isinstance(reply, HelloReply)

    def close(self) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(DEADLINE)
        finally:
            self.process.kill()
            self.process.wait()


@contextmanager
def short_directory() -> Iterator[Path]:
    """A directory whose sockets' paths fit into 107 bytes, which pytest's own do not always (unix(7))."""
    with tempfile.TemporaryDirectory(prefix="vtpm-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def running_keeper(linger: float = 600.0, options: tuple[str, ...] = ()) -> Iterator[KeeperProcess]:
    with short_directory() as directory:
        keeper = KeeperProcess(directory, linger, options)
        try:
            yield keeper
        finally:
            keeper.close()


class Bench:
    """One vTPM on a keeper: its image, its record, its sockets, and whatever instance runs at the time."""

    def __init__(
        self,
        keeper: KeeperProcess,
        family: str = "2.0",
        frontend: str = "socket",
        terms: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.keeper = keeper
        self.frontend = frontend
        self.terms = terms  # what else its Spawn says
        self.record = Record(uuid4(), family)
        self.directory = keeper.path.parent / str(self.record.vtpm)
        self.directory.mkdir()
        self.image = self.directory / "state.img"
        self.data_path = self.directory / "swtpm.sock"
        self.control_path = self.directory / "swtpm.sock.ctrl"
        self.ring_path = self.directory / "swtpm.ring"
        self.uid = 0
        self.owner_uid = 0
        self.manager: SmallManager | None = None
        self.pid = 0
        self.pidfd = -1
        with self.image.open("x+b") as file:
            StateImage.create(
                file.fileno(), self.record.vtpm, uuid4(), Family.TPM20 if family == "2.0" else Family.TPM12
            )

    def _listen(self, path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, kind)
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(0o777)
        listener.listen(16)
        return listener

    def spawn(
        self,
        startup: str = "clear",
        *,
        lock: bool = True,
        before: Callable[[], None] | None = None,
        record_says: dict[str, object] | None = None,
        device: int | None = None,
    ) -> SmallManager:
        """Start an instance as a manager does, and wait for its first report; `device` is the server's end of one."""
        record = self.record
        record.startup = startup
        record.reports.clear()
        front, back = LocalRing.pair()
        page, doorbell = front.descriptors()
        _, own_doorbell = back.descriptors()
        image = os.open(self.image, os.O_RDWR | os.O_CLOEXEC)
        if before is not None:
            before()
        if lock:
            fcntl.flock(image, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with (
            self._listen(self.data_path) as data,
            self._listen(self.control_path) as control,
            self._listen(self.ring_path, socket.SOCK_SEQPACKET) as ring,
        ):
            request = Spawn(
                record.vtpm.bytes,
                record.lease,
                record.family,
                self.uid,
                self.uid,
                self.frontend,
                self.owner_uid,
                os.geteuid(),
                ("data", "control", "ring") if device is None else ("data", "control", "ring", "proxy"),
                **self.terms,
            )
            handed = [page, doorbell, own_doorbell, image, data.fileno(), control.fileno(), ring.fileno()]
            handed += [] if device is None else [device]
            reply, received = self.keeper.client.call(request, handed)
        os.close(image)
        front.close()
        assert isinstance(reply, Spawned), reply
        self.pid, (self.pidfd,) = reply.pid, received
        for name, value in (record_says or {}).items():
            setattr(record, name, value)
        self.manager = SmallManager(back, record)
        until(lambda: bool(record.reports), "the first report")
        return self.manager

    def fetch(self) -> SmallManager:
        """Take the running instance over, as the manager that comes after a dead one."""
        reply, received = self.keeper.client.call(Fetch(self.record.vtpm.bytes, self.record.lease))
        assert isinstance(reply, Fetched), reply
        page, doorbell, pidfd, *listeners = received
        close_all([pidfd, *listeners])
        self.manager = SmallManager(LocalRing.adopt(page, doorbell), self.record)
        return self.manager

    def data(self) -> socket.socket:
        return connect(self.data_path)

    def run(self, packet: bytes) -> bytes:
        """Run one command over a connection of its own, as tpm2-tss does."""
        with self.data() as sock:
            return transact(sock, packet)

    def control(self, request: bytes, answer_bytes: int = 4) -> bytes:
        with connect(self.control_path) as sock:
            sock.sendall(request)
            return receive_exactly(sock, answer_bytes)

    def reset_platform(self) -> int:
        return int.from_bytes(self.control(struct.pack(">II", 2, 0)))

    def wait_for_end(self) -> int:
        """Wait until the instance has ended, forget it, and return its exit status (negative: a signal's number)."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        assert poll.poll(DEADLINE * 1000), "the instance did not end"
        os.close(self.pidfd)
        self.pidfd = -1
        if self.manager is not None:
            self.manager.close()
            self.manager = None
        reply, _ = self.keeper.client.call(Forget(self.record.vtpm.bytes, self.record.lease))
        assert isinstance(reply, Forgotten), reply
        assert reply.status is not None
        return os.waitstatus_to_exitcode(reply.status)

    def kill(self, number: int = signal.SIGKILL) -> int:
        signal.pidfd_send_signal(self.pidfd, number)
        return self.wait_for_end()

    def close(self) -> None:
        if self.pidfd >= 0:
            self.kill()
