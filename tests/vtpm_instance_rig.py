"""Real parts for the tests of vtpm_instance: a keeper process, a small manager that serves rings, raw TPM clients.

The manager here is small but no stand-in for the protocol: it serves real rings with real messages, and its store
is a dict. It can be silent, which is how a manager looks that is away.
"""

import fcntl
import hashlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid4

from frontend_backend.descriptors import close_all, receive_message, send_message
from frontend_backend.local import LocalRing
from frontend_backend.messages_instance import (
    Commit,
    CommitReply,
    InstanceState,
    Load,
    LoadReply,
    Orders,
    Refusal,
    RefusalCode,
    Reply,
    Report,
    ReportReply,
    decode_request,
    encode_reply,
    refusal_for_malformed,
)
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
from frontend_backend.ring import BackRing, Request
from frontend_backend.tpmhdr import command
from storage.state_image import Family, StateImage

DEADLINE = 15.0  # seconds after which a test gives up waiting


# --- TPM commands as bytes ------------------------------------------------------------------------

_EMPTY_AUTH = struct.pack(">IHBH", 0x40000009, 0, 0, 0)  # TPM_RS_PW, no nonce, no attributes, empty password
_OWNER = 0x40000001


def authorised(code: int, handles: bytes, parameters: bytes = b"") -> bytes:
    body = handles + struct.pack(">I", len(_EMPTY_AUTH)) + _EMPTY_AUTH + parameters
    return command(code, body, 0x8002)


def sized(content: bytes) -> bytes:
    return struct.pack(">H", len(content)) + content


STARTUP_CLEAR = command(0x144, b"\0\0")
STARTUP_STATE = command(0x144, b"\0\1")
SHUTDOWN_CLEAR = command(0x145, b"\0\0")
SHUTDOWN_STATE = command(0x145, b"\0\1")
GET_TEST_RESULT = command(0x17C)


def get_random(count: int = 32) -> bytes:
    return command(0x17B, struct.pack(">H", count))


def pcr_extend(index: int, digest: bytes = b"\x11" * 32) -> bytes:
    return authorised(0x182, struct.pack(">I", index), struct.pack(">IH", 1, 0xB) + digest)


def pcr_read(index: int) -> bytes:
    selection = (1 << index).to_bytes(3, "little")
    return command(0x17E, struct.pack(">IHB", 1, 0xB, 3) + selection)


def extended(*digests: bytes) -> bytes:
    value = bytes(32)
    for digest in digests:
        value = hashlib.sha256(value + digest).digest()
    return value


def nv_define(index: int, size: int) -> bytes:
    attributes = 0x00040004 | 0x00020002 | 0x02000000  # read and write by owner and by its own password, no lockout
    public = struct.pack(">IHIHH", index, 0xB, attributes, 0, size)
    return authorised(0x12A, struct.pack(">I", _OWNER), sized(b"") + sized(public))


def nv_write(index: int, content: bytes) -> bytes:
    return authorised(0x137, struct.pack(">II", index, index), sized(content) + b"\0\0")


def nv_read(index: int, size: int) -> bytes:
    return authorised(0x14E, struct.pack(">II", index, index), struct.pack(">HH", size, 0))


def nv_content(response: bytes) -> bytes:
    size = int.from_bytes(response[14:16])
    return response[16 : 16 + size]


def command12(code: int, body: bytes = b"") -> bytes:
    return command(code, body, 0xC1)


def rc(response: bytes) -> int:
    assert int.from_bytes(response[2:6]) == len(response)
    return int.from_bytes(response[6:10])


# --- clients --------------------------------------------------------------------------------------


def connect(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.settimeout(DEADLINE)
    sock.connect(str(path))
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


def page_state(ring: LocalRing) -> int:
    return ring.page[4]


def until(condition: Callable[[], bool], what: str) -> None:
    limit = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < limit, f"waited in vain for: {what}"
        time.sleep(0.005)


# --- the small manager ----------------------------------------------------------------------------


@dataclass
class Record:
    """What the store knows of one vTPM."""

    vtpm: UUID
    family: str = "2.0"
    lease: int = 1
    fresh: bool = True
    key: bytes = b""
    digest: bytes = b""
    generation: int = 0
    resumable: bool = False
    startup: str = "clear"
    commit_timeout: float = 90.0
    commits: int = 0
    reports: list[Report] = field(default_factory=list)

    @property
    def states(self) -> list[InstanceState]:
        return [report.state for report in self.reports]


class SmallManager:
    """Serves one ring from a thread of its own, from and into one record."""

    def __init__(self, ring: LocalRing, record: Record) -> None:
        self.ring, self.record = ring, record
        self.orders = Orders.NONE
        self.silent = False
        self.mute = False
        self._held: bytes | None = None
        self.refused = 0
        self.garbage = b""
        self.refuse: RefusalCode | None = None
        self.closed = False
        self._wake, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        back = BackRing(self.ring.page, refusal_for_malformed)
        poll = select.poll()
        poll.register(self.ring.fileno(), select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        alive = True
        while alive and not self.closed:
            if not self.silent:
                self._serve(back)
            ready = dict(poll.poll())
            if self._wake in ready:
                os.read(self._wake, 64)
            if self.ring.fileno() in ready:
                alive = self.ring.drain()

    def _serve(self, back: BackRing) -> None:
        if self._held is not None and not self.mute:
            held, self._held = self._held, None
            back.finish(held)
            self.ring.ring()
        match back.take():
            case None:
                return
            case Request(packet, _):
                reply = self._answer(packet)
                orders, self.orders = self.orders, Orders.NONE
                if self.garbage:
                    back.finish(self.garbage)
                    self.garbage = b""
                    self.ring.ring()
                    return
                if self.mute:
                    self._held = encode_reply(reply, orders)
                    return
                back.finish(encode_reply(reply, orders))
                self.ring.ring()
            case _:
                self.ring.ring()

    def _answer(self, packet: bytes) -> Reply:
        record = self.record
        match decode_request(packet):
            case Load():
                return LoadReply(
                    record.vtpm.bytes,
                    record.family,
                    record.lease,
                    record.fresh,
                    record.key,
                    record.digest,
                    record.generation,
                    record.startup,
                    record.commit_timeout,
                )
            case Commit() as commit:
                return self._commit(commit)
            case Report() as report:
                record.reports.append(report)
                return ReportReply()
            case other:
                return Refusal(RefusalCode.UNAVAILABLE, type(other).__name__)

    def _commit(self, commit: Commit) -> Reply:
        record = self.record
        if self.refuse is not None:
            self.refused += 1
            return Refusal(self.refuse, "as the test wants")
        if commit.lease != record.lease:
            return Refusal(RefusalCode.STALE_LEASE, "another lease")
        if (commit.generation, commit.key, commit.digest) != (record.generation, record.key, record.digest):
            if commit.generation != record.generation + 1:
                return Refusal(RefusalCode.STALE_GENERATION, f"{commit.generation} after {record.generation}")
            record.key, record.digest, record.generation = commit.key, commit.digest, commit.generation
            record.commits += 1
        record.fresh, record.resumable = False, commit.final
        return CommitReply(commit.generation)

    def set_mute(self, *, mute: bool) -> None:
        """Do what is asked, but answer only when no longer mute."""
        self.mute = mute
        os.write(self._waker, b"x")

    def set_silent(self, silent: bool) -> None:
        self.silent = silent
        os.write(self._waker, b"x")

    def give(self, orders: Orders) -> None:
        """Order, and ring: the instance then asks."""
        self.orders = orders
        self.ring.ring()

    def close(self) -> None:
        self.closed = True
        os.write(self._waker, b"x")
        self._thread.join(DEADLINE)
        self.ring.close()
        os.close(self._wake)
        os.close(self._waker)


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

    def __init__(self, directory: Path, linger: float = 600.0) -> None:
        self.path = directory / "keeper.sock"
        self.log = directory / "keeper.log"
        ready, tell = os.pipe()
        with self.log.open("ab") as log:
            arguments = ["--socket", str(self.path), "--ready-fd", str(tell), "--linger", str(linger)]
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
def running_keeper(linger: float = 600.0) -> Iterator[KeeperProcess]:
    with short_directory() as directory:
        keeper = KeeperProcess(directory, linger)
        try:
            yield keeper
        finally:
            keeper.close()


class Bench:
    """One vTPM on a keeper: its image, its record, its sockets, and whatever instance runs at the time."""

    def __init__(self, keeper: KeeperProcess, family: str = "2.0", frontend: str = "socket") -> None:
        self.keeper = keeper
        self.frontend = frontend
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
    ) -> SmallManager:
        """Start an instance as a manager does, and wait for its first report."""
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
                ("data", "control", "ring"),
            )
            handed = [page, doorbell, own_doorbell, image, data.fileno(), control.fileno(), ring.fileno()]
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
