"""The relay of the command in swtpm's place: bytes and descriptors, and what ends it. Real sockets on both sides."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from qemu_client import ask, data_connection

from manager.swtpm_relay import Channel, Endings, Relay

SET_STATEBLOB, SHUTDOWN, UNKNOWN = 0x0D, 0x03, 0x77
SUCCESS = bytes(4)
CLIENTS = 8  # that are relayed at once


class Far:
    """The vTPM's side: every connection that the relay opens."""

    def __init__(self) -> None:
        self.opened: list[socket.socket] = []
        self.refusing = False

    def connect(self, _channel: Channel) -> socket.socket:
        if self.refusing:
            raise OSError("nobody is there")
        ours, theirs = socket.socketpair()
        ours.settimeout(30)
        self.opened.append(ours)
        return theirs


class Running:
    def __init__(self, path: Path, endings: Endings) -> None:
        self.far, self.path = Far(), path
        self.wakeup, self.wake = socket.socketpair()
        self.relay = Relay(self.far.connect, endings, self.wakeup)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(16)
        self.relay.listen(Channel.CONTROL, listener)
        self.thread = threading.Thread(target=self.relay.run, daemon=True)
        self.thread.start()

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(30)
        sock.connect(str(self.path))
        return sock

    def is_over(self) -> bool:
        self.thread.join(0.2)
        return not self.thread.is_alive()

    def close(self) -> None:
        self.wake.send(b"x")
        self.thread.join(30)
        assert not self.thread.is_alive(), "SIGTERM does not end it"
        self.relay.close()
        for sock in (self.wake, self.wakeup, *self.far.opened):
            sock.close()


@contextmanager
def running(tmp_path: Path, endings: Endings) -> Iterator[Running]:
    made = Running(tmp_path / "ctrl", endings)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path, Endings()) as made:
        yield made


def answered(client: socket.socket, far: socket.socket, request: bytes) -> None:
    """Have a whole request go through, and its answer back."""
    assert far.recv(4096) == request
    far.sendall(SUCCESS)
    assert client.recv(4096) == SUCCESS


def opened(relay: Running, number: int) -> socket.socket:
    for _ in range(3000):
        if len(relay.far.opened) > number:
            return relay.far.opened[number]
        threading.Event().wait(0.01)
    raise AssertionError("the relay does not connect")


@pytest.mark.parametrize("cut", [0, 2])
def test_a_shutdown_ends_it_after_its_answer(plain: Running, cut: int) -> None:
    request = struct.pack(">I", SHUTDOWN)
    with plain.connect() as client:
        if cut:
            client.sendall(request[:cut])
            assert opened(plain, 0).recv(4096) == request[:cut]
        client.sendall(request[cut:])
        far = opened(plain, 0)
        assert far.recv(4096) == request[cut:]
        assert not plain.is_over(), "the answer is not there yet"
        far.sendall(SUCCESS)
        assert client.recv(4096) == SUCCESS
    plain.thread.join(30)
    assert plain.is_over()


def test_a_body_that_reads_like_a_shutdown_is_none(plain: Running) -> None:
    with plain.connect() as client:
        head = struct.pack(">IIII", SET_STATEBLOB, 0, 1, 4)
        client.sendall(head)
        far = opened(plain, 0)
        assert far.recv(4096) == head  # and its body comes in a piece of its own, as QEMU sends it
        client.sendall(struct.pack(">I", SHUTDOWN))
        answered(client, far, struct.pack(">I", SHUTDOWN))
        assert not plain.is_over()
        client.sendall(struct.pack(">I", UNKNOWN))
        answered(client, far, struct.pack(">I", UNKNOWN))


def test_passed_descriptors_come_through_and_are_kept_nowhere(plain: Running) -> None:
    with plain.connect() as client:
        answers = threading.Thread(target=lambda: opened(plain, 0).sendall(SUCCESS))
        answers.start()
        data = data_connection(client)
        answers.join()
        message, ancillary, _, _ = opened(plain, 0).recvmsg(64, socket.CMSG_SPACE(4))
        assert message == struct.pack(">I", 0x10)
        passed = socket.socket(fileno=struct.unpack("i", ancillary[0][2])[0])
        passed.sendall(b"from the TPM itself")
        assert data.recv(64) == b"from the TPM itself"
        passed.close()
        assert data.recv(64) == b"", "the relay has kept a copy"
        data.close()


@pytest.mark.parametrize(
    ("endings", "passes", "over"),
    [
        (Endings(), True, False),
        (Endings(with_control=True), False, True),
        (Endings(with_platform=True), True, True),
        (Endings(with_platform=True), False, False),  # swtpm_ioctl comes and goes
    ],
)
def test_what_ends_it_when_a_client_leaves(tmp_path: Path, endings: Endings, passes: bool, over: bool) -> None:
    with running(tmp_path, endings) as relay:
        with relay.connect() as client:
            if passes:
                answers = threading.Thread(target=lambda: opened(relay, 0).sendall(SUCCESS))
                answers.start()
                data_connection(client).close()
                answers.join()
            else:
                client.sendall(struct.pack(">I", UNKNOWN))
                answered(client, opened(relay, 0), struct.pack(">I", UNKNOWN))
        opened(relay, 0).recv(64)
        if over:
            relay.thread.join(30)
        assert relay.is_over() is over


def test_more_clients_than_the_vtpm_takes_wait(plain: Running) -> None:
    clients = [plain.connect() for _ in range(CLIENTS + 1)]
    for client in clients:
        client.sendall(struct.pack(">I", UNKNOWN))
    for number in range(CLIENTS):
        assert opened(plain, number).recv(64) == struct.pack(">I", UNKNOWN)
    assert len(plain.far.opened) == CLIENTS
    clients[0].close()
    assert opened(plain, CLIENTS).recv(64) == struct.pack(">I", UNKNOWN), "the one that waited"
    for client in clients[1:]:
        client.close()


@pytest.mark.parametrize("who", ["client", "vtpm"])
def test_one_that_does_not_read_holds_up_nobody_else(plain: Running, who: str) -> None:
    with plain.connect() as deaf, plain.connect() as other:
        deaf.sendall(struct.pack(">I", UNKNOWN))
        far = opened(plain, 0)
        assert far.recv(64) == struct.pack(">I", UNKNOWN)
        reader, writer = (deaf, far) if who == "client" else (far, deaf)
        much = bytes(range(256)) * 32768
        writing = threading.Thread(target=writer.sendall, args=[much])
        writing.start()
        other.sendall(struct.pack(">I", UNKNOWN))
        answered(other, opened(plain, 1), struct.pack(">I", UNKNOWN))
        received = bytearray()
        while len(received) < len(much):
            received += reader.recv(65536)
        assert received == much, "nothing is lost or mixed up"
        writing.join()


def test_it_ends_when_told_though_a_client_does_not_read(tmp_path: Path) -> None:
    with running(tmp_path, Endings()) as relay, relay.connect() as deaf:
        deaf.sendall(struct.pack(">I", UNKNOWN))
        far = opened(relay, 0)
        far.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                far.send(bytes(1 << 20))
        relay.wake.send(b"x")
        relay.thread.join(30)
        assert relay.is_over()


def test_both_ends_of_a_connection_may_go_at_once(tmp_path: Path) -> None:
    """As when a machine and its vTPM are both killed: the relay hears of both in one turn."""
    far, wakeups = Far(), socket.socketpair()
    relay, (client, near) = Relay(far.connect, Endings(), wakeups[1]), socket.socketpair()
    relay.serve(Channel.CONTROL, near)
    client.close()
    far.opened[0].close()
    relay.run()  # nobody can come any more: it ends
    relay.close()
    for sock in wakeups:
        sock.close()


def test_a_vtpm_that_is_not_there_turns_a_client_away_and_not_the_next(plain: Running) -> None:
    plain.far.refusing = True
    with plain.connect() as client:
        assert client.recv(64) == b""
    plain.far.refusing = False
    with plain.connect() as client:
        answers = threading.Thread(target=lambda: opened(plain, 0).sendall(SUCCESS))
        answers.start()
        assert ask(client, UNKNOWN) == SUCCESS
        answers.join()
