"""What a relay leaves behind for its successor: descriptors that stay open, notes that are the last ones written."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_rig import wait_for

from manager.relay_holder import KEY_BYTES, Held


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rh") as made:
        yield Path(made) / "hold"


@pytest.fixture
def held(place: Path) -> Iterator[Held]:
    made = Held.reach(place)
    yield made
    made.close()
    end(place)


def end(place: Path) -> None:
    """The holder would stay two minutes: end the process that listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(str(place))
        pid = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)
    # who called listen(2) was this process: the holder is our child that has the listener as its input
    assert pid == os.getpid()
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if b"relay_holder" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)
            os.waitpid(int(child), 0)


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "big")


def test_a_descriptor_outlives_the_process_that_left_it(held: Held, place: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        held.put(key(1), b"first", (theirs.fileno(),))
        held.note(key(1), b"second")
        theirs.close()
        held.close()
        again = Held.reach(place)
        ((found, note, descriptors),) = again.take()
        assert (found, note) == (key(1), b"second")
        with socket.socket(fileno=descriptors[0]) as copy:
            ours.send(b"here")
            assert copy.recv(10) == b"here"
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(1)  # the holder's copy is open still
        again.drop(key(1))
        assert again.take() == []
        ours.setblocking(True)
        assert ours.recv(1) == b""
        again.close()


def test_what_replaces_something_ends_it(held: Held) -> None:
    first, second = socket.socketpair()
    with first:
        held.put(key(7), b"a", (second.fileno(),))
        second.close()
        held.put(key(7), b"b", ())
        assert [(found, note, descriptors) for found, note, descriptors in held.take()] == [(key(7), b"b", [])]
        assert first.recv(1) == b""


def test_a_killed_client_is_followed_by_the_next_one(place: Path, held: Held) -> None:
    held.close()
    script = (
        "import socket, sys, time; from pathlib import Path; from manager.relay_holder import Held\n"
        "a, b = socket.socketpair(); held = Held.reach(Path(sys.argv[1]))\n"
        "held.put(bytes(17) + b'x', b'left', (b.fileno(),)); print('left', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(place)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"left\n"
        process.kill()
    again = Held.reach(place)
    wait_for(lambda: [note for _, note, _ in closing(again.take())] == [b"left"], "what was left")
    again.close()


def closing(items: list[tuple[bytes, bytes, list[int]]]) -> list[tuple[bytes, bytes, list[int]]]:
    for _, _, descriptors in items:
        for descriptor in descriptors:
            os.close(descriptor)
    return items


def test_nonsense_changes_nothing(held: Held) -> None:
    held.put(key(1), b"note", ())
    held._sock.send(b"?")
    held._sock.send(b"N" + key(9) + b"nobody's")
    held.drop(key(9))
    assert held.take() == [(key(1), b"note", [])]
