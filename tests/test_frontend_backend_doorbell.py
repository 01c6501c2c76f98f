import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from descriptor_leaks import no_descriptor_leaks, open_descriptors
from ring_conformance import DEADLINE, check_ring, heard

from frontend_backend.descriptors import receive_message, send_message
from frontend_backend.doorbell import Doorbell, PipeDoorbell, SocketDoorbell
from frontend_backend.errors import NotARingError
from frontend_backend.front import RingFrontEnd
from frontend_backend.local import DESCRIPTORS, LocalRing

KINDS = [SocketDoorbell.pair, PipeDoorbell.pair]
MakePair = Callable[[], tuple[Doorbell, Doorbell]]


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    with no_descriptor_leaks():
        yield


def handed_over(kind: MakePair) -> tuple[LocalRing, LocalRing]:
    """Make a pair whose front end went through a socket."""
    front, back = LocalRing.pair(doorbells=kind)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        send_message(here, b"ring", front.descriptors())
        front.close()
        _, descriptors = receive_message(there, 64, DESCRIPTORS)
    return LocalRing.adopt(*descriptors), back


@pytest.mark.parametrize("kind", KINDS)
def test_a_ring_with_either_doorbell_is_a_ring(kind: MakePair) -> None:
    check_ring(lambda: LocalRing.pair(doorbells=kind))
    check_ring(lambda: handed_over(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_that_waits_sleeps_until_it_is_rung_or_alone(kind: MakePair) -> None:
    front, back = handed_over(kind)
    with front:
        woken: list[bool] = []
        thread = threading.Thread(target=lambda: [woken.append(front.wait()) for _ in range(2)], daemon=True)
        thread.start()
        deadline = time.monotonic() + DEADLINE
        back.ring()
        while not woken:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert woken == [True]
        back.close()
        thread.join(DEADLINE)
        assert woken == [True, False]
        front.ring()  # for nobody


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_that_was_made_here_can_wait_too(kind: MakePair) -> None:
    one, other = kind()
    one.ring()
    assert other.wait()
    one.close()
    assert not other.wait()
    other.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocking", [False, True])
def test_a_copy_of_an_end_cannot_make_the_other_end_block_nor_spin(kind: MakePair, blocking: bool) -> None:
    """Whoever handed an end over may have kept a copy, whose flags are the end's own."""
    front, back = handed_over(kind)
    copies = [os.dup(descriptor) for descriptor in front.descriptors()[1:]]
    for copy in copies:
        os.set_blocking(copy, blocking)
    finished = threading.Event()

    def use() -> None:
        for _ in range(100_000):  # more than a pipe holds
            back.ring()
        while heard(front, 0):
            assert front.drain()
        assert front.drain()
        back.ring()
        assert front.wait()
        finished.set()

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    came_back = finished.wait(DEADLINE)
    back.close()
    for copy in copies:
        os.close(copy)
    thread.join(DEADLINE)
    front.close()
    assert came_back


def test_who_made_the_pipes_cannot_make_a_wary_end_block() -> None:
    """As an instance that was taken over could hold vtpm-xen up, and with it all other guests."""
    front, back = LocalRing.pair(doorbells=PipeDoorbell.pair)
    kept = front.descriptors()
    with back, LocalRing.adopt(*map(os.dup, kept), patient=False, wary=True) as ring:
        for descriptor in kept[1:]:
            os.set_blocking(descriptor, True)
        assert not any(os.get_blocking(descriptor) for descriptor in ring.doorbell.descriptors())
        assert ring.drain(), "nothing is there: it must not wait"
        for _ in range(70_000):  # more than a pipe holds
            ring.ring()
        back.ring()
        assert select.select([ring.fileno()], [], [], DEADLINE)[0]
        assert ring.drain()
        front.close()
        back.close()
        assert not ring.drain()


def test_a_reader_that_finds_its_pipe_emptied_waits_for_the_next_ring() -> None:
    front, back = handed_over(PipeDoorbell.pair)
    with front, back:
        os.set_blocking(front.fileno(), False)  # as the holder of a copy could
        timer = threading.Timer(0.05, back.ring)
        timer.start()
        assert front.wait()
        timer.join()


def test_ringing_for_a_peer_that_is_gone_ends_no_process() -> None:
    program = (
        "import os, sys\n"
        "from frontend_backend.doorbell import PipeDoorbell\n"
        "one, other = PipeDoorbell.pair()\n"
        "other.close()\n"
        "one.ring()\n"
        "sys.exit(0 if not one.drain() else 3)\n"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{program}"], check=False
    )
    assert done.returncode == 0, signal.SIGPIPE


def two_pipes(first: int, second: int) -> tuple[int, int]:
    """Return one end each of two pipes, 0 for the reading end."""
    pipes = [os.pipe(), os.pipe()]
    taken = pipes[0][first], pipes[1][second]
    for descriptor in {*pipes[0], *pipes[1]} - set(taken):
        os.close(descriptor)
    return taken


def files() -> tuple[int, int]:
    return os.open("/dev/null", os.O_RDONLY), os.open("/dev/null", os.O_WRONLY)


def sockets() -> tuple[int, int]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return one.detach(), other.detach()


@pytest.mark.parametrize(
    "make", [lambda: two_pipes(1, 0), lambda: two_pipes(0, 0), lambda: two_pipes(1, 1), files, sockets, lambda: ()]
)
def test_what_is_no_doorbell_is_refused_and_closed(make: Callable[[], tuple[int, ...]]) -> None:
    page, *_ = (front_and_back := LocalRing.pair())[0].descriptors()
    copy = os.dup(page)
    with pytest.raises(NotARingError):
        LocalRing.adopt(copy, *make())
    for end in front_and_back:
        end.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_ring_that_cannot_be_made_for_want_of_descriptors_leaves_none_open(kind: MakePair) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hoard: list[int] = []
    made = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, open_descriptors())) + 24, hard))
    try:
        with suppress(OSError):
            while True:
                hoard.append(os.dup(0))
        for _ in range(14):
            try:
                ends = LocalRing.pair(doorbells=kind)
            except OSError:
                ends = ()
            made.append(bool(ends))
            for end in ends:
                end.close()
            os.close(hoard.pop())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in hoard:
            os.close(descriptor)
    needed = made.index(True)
    # two ends, each with the page, what mmap keeps of it, and the doorbell: no failed attempt kept any
    ends = LocalRing.pair(doorbells=kind)
    assert needed == 2 * (1 + len(ends[0].descriptors()))
    for end in ends:
        end.close()
    assert all(made[needed:])


def test_a_front_end_can_be_waited_on_with_others_whatever_its_doorbell() -> None:
    for kind in KINDS:
        front_ring, back = handed_over(kind)
        with RingFrontEnd(front_ring) as front, back:
            poll = select.poll()
            poll.register(front.ring.fileno(), select.POLLIN)
            assert not poll.poll(0)
            back.ring()
            assert poll.poll(DEADLINE * 1000)
            assert front.ring.drain()
            assert not poll.poll(0)
