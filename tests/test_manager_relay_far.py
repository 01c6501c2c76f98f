"""The far side's process against near sides that mean harm: they lose their connection, and nobody else anything."""

import os
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import vtpm_instance_rig as tpm
from e2e_rig import BIN, wait_for
from relay_rig import Loopback, QemuClient, Relay, relay, run, swtpm

from manager.relay_frames import MAX_PAYLOAD, ChannelKind, Frame, Hello, Kind, Opening, Welcome, frames_of
from manager.strangers import MAX_STRANGERS

CAPABILITY = bytes.fromhex("00000001")


@pytest.fixture(scope="module")
def joined() -> Iterator[Relay]:
    with (
        tempfile.TemporaryDirectory(prefix="rf") as base,
        swtpm(Path(base)) as (place, _),
        swtpm(Path(base), "other") as (another, _),  # a swtpm has one control client at a time
        swtpm(Path(base), "listening", data=True) as (third, _),
        relay([place, another, third]) as made,
    ):
        made.start_far()
        made.start_near()
        yield made


@pytest.fixture(scope="module")
def client(joined: Relay) -> Iterator[QemuClient]:
    """A guest that must not notice anything."""
    made = QemuClient(joined.control("plain"))
    made.power_on()
    yield made
    made.close()


def connected(joined: Relay) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(joined.base / "relay.sock"))  # waits where many have come at once
    sock.settimeout(30)
    return sock


class Stranger:
    """A near side of our own."""

    def __init__(self, joined: Relay, session: bytes = b"", known: bytes = bytes(16)) -> None:
        self.sock = connected(joined)
        self.say(Frame(Kind.HELLO, payload=Hello(session or os.urandom(16), known).pack()))
        self.welcome = Welcome.unpack(self.hear().payload)

    def say(self, *frames: Frame) -> None:
        self.sock.sendall(b"".join(frame.pack() for frame in frames))

    def hear(self) -> Frame:
        head = self.read(Frame.HEAD.size)
        kind, more, channel, sequence, length = Frame.HEAD.unpack(head)
        return Frame(Kind(kind), channel, sequence, self.read(length), bool(more))

    def answer(self) -> Frame:
        while (frame := self.hear()).kind in (Kind.PING, Kind.PONG):
            pass
        return frame

    def read(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            piece = self.sock.recv(size - len(found))
            if not piece:
                raise EOFError
            found += piece
        return found

    def ended(self) -> bool:
        try:
            while True:
                self.hear()
        except (EOFError, ConnectionError):
            return True
        finally:
            self.sock.close()


def opening(kind: ChannelKind = ChannelKind.CONTROL, name: str = "plain", parent: int = 0) -> bytes:
    return Opening(kind, parent, 0xFF, name).pack()


FLOOD = [Frame(Kind.OPEN, n, 1, opening(name=f"v{n // 8}")) for n in range(250)]
HARM: dict[str, list[Frame]] = {
    "a reply": [Frame(Kind.REPLY)],
    "a second greeting": [Frame(Kind.HELLO, payload=Hello(bytes(16), bytes(16)).pack())],
    "an opening that is none": [Frame(Kind.OPEN, 0, 1, b"\xff")],
    "a data connection without its control connection": [Frame(Kind.OPEN, 1, 1, opening(ChannelKind.PASSED))],
    "one handed over on another vTPM's": [
        Frame(Kind.OPEN, 0, 1, opening(name="a")),
        Frame(Kind.OPEN, 1, 2, opening(ChannelKind.PASSED, "plain", 0)),
    ],
    "too many connections to one vTPM": [Frame(Kind.OPEN, n, 1, opening()) for n in range(9)],
    "a message without end": [Frame(Kind.OPEN, 0, 1, opening())]
    + [Frame(Kind.REQUEST, 0, 1, bytes(MAX_PAYLOAD), more=True)] * 21,
    "many messages without end": [
        *FLOOD,
        *(Frame(Kind.REQUEST, n, 1, bytes(MAX_PAYLOAD), more=True) for n in range(200)),
    ],
    "many requests at once": [Frame(Kind.OPEN, 0, 1, opening(name="nobody"))]
    + [Frame(Kind.REQUEST, 0, n, CAPABILITY) for n in range(1, 9)],
    "nothing for a request": [Frame(Kind.OPEN, 0, 1, opening(name="other")), Frame(Kind.REQUEST, 0, 1)],
    "half a control command": [Frame(Kind.OPEN, 0, 1, opening(name="other")), Frame(Kind.REQUEST, 0, 1, bytes(3))],
    "two in one": [Frame(Kind.OPEN, 0, 1, opening(name="other")), Frame(Kind.REQUEST, 0, 1, CAPABILITY * 2)],
    "half a TPM command": [
        Frame(Kind.OPEN, 0, 1, opening(ChannelKind.DATA, "listening")),
        Frame(Kind.REQUEST, 0, 1, tpm.get_random(8)[:-1]),
    ],
}


@pytest.mark.parametrize("what", HARM)
def test_harm_ends_its_own_connection(joined: Relay, client: QemuClient, what: str) -> None:
    stranger = Stranger(joined)
    with suppress(BrokenPipeError, ConnectionResetError):  # it may be turned away in the middle
        stranger.say(*HARM[what])
    assert stranger.ended()
    client.good(tpm.get_random(8))


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n" * 3, bytes(64), b"\xff" * 64])
def test_what_is_no_relay_is_not_listened_to(joined: Relay, client: QemuClient, garbage: bytes) -> None:
    with connected(joined) as sock:
        sock.sendall(garbage)
        with pytest.raises((ConnectionResetError, EOFError)):
            raise EOFError if not sock.recv(100) else AssertionError
    client.good(tpm.get_random(8))


def test_who_says_nothing_keeps_nobody_out(joined: Relay, client: QemuClient) -> None:
    silent = [connected(joined) for _ in range(2 * MAX_STRANGERS)]
    try:
        stranger = Stranger(joined)
        stranger.say(Frame(Kind.OPEN, 0, 1, opening(name="other")), *frames_of(Kind.REQUEST, 0, 1, CAPABILITY))
        answer = stranger.answer()
        assert (answer.kind, len(answer.payload)) == (Kind.REPLY, 8)
        stranger.say(Frame(Kind.CLOSE, 0))
        stranger.sock.close()
        client.good(tpm.get_random(8))
    finally:
        for sock in silent:
            sock.close()


def test_a_request_said_again_is_answered_again_and_not_executed_again(joined: Relay, client: QemuClient) -> None:
    session = os.urandom(16)
    first = Stranger(joined, session)
    extend = bytes.fromhex("00000011") + bytes(4)
    first.say(Frame(Kind.OPEN, 3, 1, opening(name="other")), *frames_of(Kind.REQUEST, 3, 1, extend))
    answer = first.answer()
    first.sock.close()
    second = Stranger(joined, session, first.welcome.run)
    assert second.welcome.resumed
    second.say(Frame(Kind.OPEN, 3, 1, opening(name="other")), *frames_of(Kind.REQUEST, 3, 1, extend))
    assert second.answer() == answer
    # another client on the same number is not told what the one before was answered
    second.say(Frame(Kind.OPEN, 3, 2, opening(name="other")), *frames_of(Kind.REQUEST, 3, 1, CAPABILITY))
    assert len(second.answer().payload) == 8
    second.say(Frame(Kind.CLOSE, 3))
    second.sock.close()
    client.good(tpm.get_random(8))


def test_the_successor_of_a_killed_far_side_knows_what_was_executed(joined: Relay, client: QemuClient) -> None:
    session, opened = os.urandom(16), Frame(Kind.OPEN, 5, 1, opening(ChannelKind.DATA, "listening"))
    first = Stranger(joined, session)
    first.say(opened, *frames_of(Kind.REQUEST, 5, 1, tpm.pcr_extend(10)))
    assert tpm.rc(first.answer().payload) == 0
    joined.restart_far(signal.SIGKILL)
    first.sock.close()
    second = Stranger(joined, session, first.welcome.run)
    assert second.welcome.resumed
    second.say(opened, *frames_of(Kind.REQUEST, 5, 1, tpm.pcr_extend(10)))
    assert tpm.rc(second.answer().payload) == 0x101, "executed twice"
    second.say(*frames_of(Kind.REQUEST, 5, 2, tpm.pcr_read(10)))
    assert second.answer().payload[-32:] == tpm.extended(b"\x11" * 32)
    second.sock.close()
    client.good(tpm.get_random(8))


def test_a_session_that_is_begun_anew_has_one_connection(joined: Relay) -> None:
    """The one before would count nowhere, and go on when its client is taken out of the file."""
    session = os.urandom(16)
    first, second = Stranger(joined, session), Stranger(joined, session)
    with suppress(BrokenPipeError, ConnectionResetError):
        first.say(Frame(Kind.NAMES))
    with pytest.raises((EOFError, ConnectionError)):
        first.answer()
    for each in (first, second):
        each.sock.close()


def test_each_who_is_turned_away_is_told_and_the_file_that_counts_is_the_one_of_now() -> None:
    """A word that got lost would leave a client waiting for ever."""
    refused = [Frame(Kind.OPEN, number, number + 1, opening(name="other")) for number in range(200)]
    with (
        tempfile.TemporaryDirectory(prefix="rf") as base,
        swtpm(Path(base), data=True) as (place, _),
        relay([place], vtpms='["plain"]') as made,
    ):
        made.start_far()
        stranger, session = Stranger(made), os.urandom(16)
        stranger.say(*refused)
        told = sorted((stranger.answer() for _ in refused), key=lambda frame: frame.channel)
        assert told == [Frame(Kind.CLOSE, each.channel, each.sequence) for each in refused]
        made.reread('["other"]')
        stranger.say(Frame(Kind.NAMES))
        assert stranger.answer().payload == b"", "a name that it may not know any more"
        made.reread('["plain"]')
        stranger.say(Frame(Kind.NAMES))
        assert stranger.answer().payload == b"plain"
        with suppress(ConnectionError):  # who asks and does not read has no place for that in anybody's memory
            for _ in range(3000):
                stranger.say(*refused)
            raise AssertionError("it is listened to for ever")
        first = Stranger(made, session)
        first.say(Frame(Kind.OPEN, 0, 1, opening(ChannelKind.DATA)), Frame(Kind.REQUEST, 0, 1, tpm.get_random(8)))
        assert tpm.rc(first.answer().payload) == 0
        made.stop_far()
        made.allow('["other"]')
        made.start_far()
        second = Stranger(made, session, first.welcome.run)
        second.say(Frame(Kind.REQUEST, 0, 2, tpm.get_random(8)))
        second.sock.settimeout(0.5)
        with pytest.raises(TimeoutError):  # else: taken over, though the file says no
            second.answer()
        for each in (stranger, first, second):
            each.sock.close()


def test_a_key_that_cannot_be_read_just_now_costs_the_newcomer_and_nobody_else() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="rf") as base,
        swtpm(Path(base)) as (place, _),
        relay([place], spaces=Loopback()) as made,
    ):
        made.start_far()
        key = made.base / "far-id/relay.key"
        key.rename(key.with_suffix(".away"))
        made.start_near()
        wait_for(lambda: "cannot be used for TLS" in made.log("far"), "a word about the key")
        key.with_suffix(".away").rename(key)
        client = QemuClient(made.control("plain"))
        client.power_on()
        assert made.far is not None
        certificate = made.base / "near-id/relay.crt"
        for number, file in enumerate((certificate, key), 1):
            content = file.read_text()
            file.write_text("half of it")
            made.far.send_signal(signal.SIGHUP)
            wait_for(lambda n=number: made.log("far").count("the clients stay what they were") == n, "a word of it")
            file.write_text(content)
        client.good(tpm.get_random(8))
        client.close()


def test_a_session_is_not_resumed_by_who_does_not_know_the_far_side(joined: Relay) -> None:
    session = os.urandom(16)
    Stranger(joined, session).sock.close()
    second = Stranger(joined, session)
    second.sock.close()
    assert not second.welcome.resumed


def test_state_blobs_pass_whole(joined: Relay, client: QemuClient) -> None:
    client.good(tpm.nv_define(0x1500016, 2000))
    client.good(tpm.nv_write(0x1500016, b"\x77" * 1000))
    head = client.command(0x0C, struct.pack(">III", 1, 1, 0), 16)
    result, flags, total, length = struct.unpack(">IIII", head)
    assert (result, total) == (0, length)
    blob = client.read(client.control, length)
    assert length > 3000
    assert client.result(0x0E) == 0
    assert client.result(0x0D, struct.pack(">III", flags, 1, len(blob)) + blob) == 0
    assert client.result(0x0D, struct.pack(">III", flags, 1, len(blob)) + b"\xff" * len(blob)) != 0
    assert client.result(0x0D, struct.pack(">III", flags, 1, len(blob)) + blob) == 0
    assert client.result(0x02, bytes(4)) == 0
    client.good(tpm.STARTUP_CLEAR)
    assert tpm.nv_content(client.good(tpm.nv_read(0x1500016, 1000))) == b"\x77" * 1000


def test_on_a_unix_socket_the_kernel_says_who_it_is() -> None:
    with tempfile.TemporaryDirectory(prefix="rf") as base, swtpm(Path(base)) as (place, _), relay([place]) as made:
        made.clients.write_text(f'[[client]]\nname = "another"\nuid = {os.geteuid() + 1}\nvtpms = ["*"]\n')
        made.start_far()
        made.start_near()
        wait_for(lambda: f"user {os.geteuid()} is no client" in made.log("far"), "a refusal")
        assert "is here" not in made.log("far")
        assert not (made.directory / "plain").exists()


def test_qemu_may_come_before_the_far_side_does() -> None:
    """Its first question waits; the probe after it, for which QEMU gives a second, comes when there is an answer."""
    with tempfile.TemporaryDirectory(prefix="rf") as base, swtpm(Path(base)) as (place, _), relay([place]) as made:
        made.directory.mkdir()
        (made.directory / "assignments.json").write_text('{"plain": 0}')
        made.start_near()
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(QemuClient, made.control("plain"))
            with pytest.raises(TimeoutError):
                coming.result(0.5)
            made.start_far()
            client = coming.result(30)
        client.data.settimeout(1.0)
        client.power_on()
        client.close()


def test_a_command_line_that_cannot_be_says_why(tmp_path: Path) -> None:
    def said(*words: str) -> tuple[int, str]:
        done = subprocess.run(
            [str(BIN / "vtpm-relay"), *words], capture_output=True, text=True, timeout=30, check=False
        )
        return done.returncode, done.stderr

    clients = tmp_path / "clients.toml"
    clients.write_text("[[client]]\nname = 'a'\nuid = 0\nvtpms = ['*']\n")
    assert said("serve", "--listen", "tls:127.0.0.1:1", "--clients", str(clients)) == (
        2,
        "vtpm-relay serve: tls:127.0.0.1:1 needs --identity DIRECTORY, made by 'vtpm-relay key DIRECTORY'\n",
    )
    code, text = said("serve", "--listen", "unix:/nowhere/x", "--clients", str(clients))
    assert (code, "cannot listen on unix:/nowhere/x" in text) == (2, True)
    code, text = said("connect", "--to", "vsock:2:1", "--directory", str(tmp_path / "near"))
    assert (code, "--far-certificate" in text) == (2, True)
    run(str(BIN / "vtpm-relay"), "key", str(tmp_path))
    code, text = said("key", str(tmp_path))
    assert (code, "is there already" in text) == (4, True)
