import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from descriptor_leaks import no_descriptor_leaks, open_descriptors
from ring_conformance import DEADLINE, SIZES, heard, refuse

from frontend_backend.descriptors import send_message
from frontend_backend.errors import (
    ChannelClosedError,
    IllegalTransitionError,
    MessageTruncatedError,
    NotARingError,
    PageError,
    RingCancelledError,
    RingClosedError,
    RingTimeoutError,
)
from frontend_backend.front import RingFrontEnd
from frontend_backend.local import LocalRing
from frontend_backend.ring import BackRing, Request
from frontend_backend.tpmif import MAX_PACKET, RingState, SharedPage

Answer = Callable[[Request], bytes]


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    with no_descriptor_leaks():
        yield


def echo(request: Request) -> bytes:
    return bytes([request.locality]) + request.packet[::-1][: MAX_PACKET - 1]


def await_cancel(front: RingFrontEnd) -> None:
    """Poll the page until its front end has given up."""
    deadline = time.monotonic() + DEADLINE
    while front.ring.page[SharedPage.STATE_OFFSET] != RingState.CANCEL:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def serve(ring: LocalRing, answer: Answer, limit: int | None = None) -> None:
    """Answer requests until the front end goes away, or until `limit` of them are answered."""
    back = BackRing(ring.page, refuse)
    answered = 0
    while limit is None or answered < limit:
        taken = back.take()
        if isinstance(taken, Request):
            back.finish(answer(taken))
            answered += 1
        if taken is not None:
            ring.ring()
        elif heard(ring) and not ring.drain():
            return


@contextmanager
def served(answer: Answer = echo) -> Iterator[RingFrontEnd]:
    front, back = LocalRing.pair()
    thread = threading.Thread(target=serve, args=(back, answer))
    thread.start()
    try:
        with RingFrontEnd(front) as ring:
            yield ring
    finally:
        thread.join(DEADLINE)
        back.close()
        assert not thread.is_alive()


def test_many_commands_get_their_own_answers() -> None:
    with served() as front:
        for number in range(2000):
            packet = number.to_bytes(4, "big")
            assert front.transact(packet, locality=number % 5) == bytes([number % 5]) + packet[::-1]
            assert not front.in_flight


def test_packets_of_every_size_cross_the_ring() -> None:
    with served(lambda request: request.packet) as front:
        for size in (*SIZES, *range(1, MAX_PACKET, 97)):
            packet = os.urandom(size)
            assert front.transact(packet, timeout=DEADLINE) == packet


@pytest.mark.parametrize("size", [0, MAX_PACKET + 1])
def test_a_packet_that_does_not_fit_is_refused_and_the_ring_stays_usable(size: int) -> None:
    with served() as front:
        with pytest.raises(ValueError, match="1 to 4088 bytes"):
            front.transact(bytes(size))
        assert front.transact(b"ab") == b"\0ba"


def test_the_page_holds_no_answer_once_it_is_returned() -> None:
    with served(lambda _: b"the secret") as front:
        assert front.transact(b"load") == b"the secret"
        assert bytes(front.ring.page[SharedPage.SIZE :]) == bytes(MAX_PACKET)


def test_begin_and_finish_work_without_waiting() -> None:
    front_ring, back_ring = LocalRing.pair()
    with RingFrontEnd(front_ring) as front, back_ring:
        front.begin(b"question", locality=2)
        assert (front.in_flight, front.finish()) == (True, None)
        back = BackRing(back_ring.page, refuse)
        assert back.take() == Request(b"question", 2)
        back.finish(b"answer")
        assert not front.in_flight
        assert front.finish() == b"answer"


def test_a_timeout_cancels_and_the_next_command_gets_its_own_answer() -> None:
    taken = threading.Event()

    def slow(request: Request) -> bytes:
        if request.packet == b"slow":
            taken.set()
            await_cancel(front)
        return request.packet

    with served(slow) as front:
        front.begin(b"slow")
        assert taken.wait(DEADLINE)
        with pytest.raises(RingTimeoutError, match=r"no answer from the back end within 0\.01 s") as caught:
            front.wait(0.01)
        assert caught.value.seconds == 0.01
        assert front.transact(b"next", timeout=DEADLINE) == b"next"


def test_an_answer_that_comes_after_the_timeout_does_not_stay_on_the_page() -> None:
    def slow(_: Request) -> bytes:
        await_cancel(front)
        return b"a key that nobody waits for any more"

    with served(slow) as front:
        with pytest.raises(RingTimeoutError):
            front.transact(b"load", timeout=0.01)
        assert not front.in_flight
        assert bytes(front.ring.page[SharedPage.SIZE :]) == bytes(MAX_PACKET)


def test_a_back_end_that_never_answers_leaves_the_command_cancelled_and_in_flight() -> None:
    front_ring, back_ring = LocalRing.pair()
    with RingFrontEnd(front_ring) as front, back_ring:
        with pytest.raises(RingTimeoutError):
            front.transact(b"anyone?", timeout=0)
        assert back_ring.page[SharedPage.STATE_OFFSET] == RingState.CANCEL
        with pytest.raises(IllegalTransitionError):
            front.begin(b"second")


def test_an_aborted_command_is_said_to_be_cancelled() -> None:
    front_ring, back_ring = LocalRing.pair()
    with RingFrontEnd(front_ring) as front, back_ring:
        front.begin(b"question")
        BackRing(back_ring.page, refuse).abort()
        with pytest.raises(RingCancelledError):
            front.wait(DEADLINE)


def test_a_cancel_of_a_command_nobody_took_is_granted() -> None:
    front_ring, back_ring = LocalRing.pair()
    with RingFrontEnd(front_ring) as front:
        front.begin(b"question")
        front.cancel()
        thread = threading.Thread(target=serve, args=(back_ring, echo))
        thread.start()
        with pytest.raises(RingCancelledError):
            front.wait(DEADLINE)
    thread.join(DEADLINE)
    back_ring.close()


def test_a_peer_that_is_gone_is_noticed_at_once() -> None:
    front_ring, back_ring = LocalRing.pair()
    with RingFrontEnd(front_ring) as front:
        back_ring.close()
        with pytest.raises(RingClosedError):
            front.transact(b"anyone?")


def test_a_peer_that_answers_and_dies_has_answered() -> None:
    front_ring, back_ring = LocalRing.pair()
    with RingFrontEnd(front_ring) as front:
        front.begin(b"question")
        serve(back_ring, echo, limit=1)
        back_ring.close()
        assert front.wait() == b"\0noitseuq"


def test_a_peer_that_dies_with_the_command_in_hand_is_noticed() -> None:
    front_ring, back_ring = LocalRing.pair()
    with RingFrontEnd(front_ring) as front:
        front.begin(b"question")
        assert BackRing(back_ring.page, refuse).take() == Request(b"question", 0)
        back_ring.close()
        with pytest.raises(RingClosedError):
            front.wait()


def test_a_new_back_end_on_the_same_page_finds_the_command_of_the_dead_one() -> None:
    front_ring, kept = LocalRing.pair()
    with RingFrontEnd(front_ring) as front:
        first = LocalRing.adopt(*(os.dup(descriptor) for descriptor in kept.descriptors()))
        front.begin(b"commit")
        assert BackRing(first.page, refuse).take() == Request(b"commit", 0)
        first.close()
        thread = threading.Thread(target=serve, args=(kept, echo))
        thread.start()
        assert front.wait(DEADLINE) == b"\0timmoc"
    thread.join(DEADLINE)
    kept.close()


def test_a_back_end_process_killed_with_the_command_in_hand_is_replaced_without_loss() -> None:
    program = (
        "import os, signal, sys\n"
        "from frontend_backend.local import LocalRing\n"
        "from frontend_backend.ring import BackRing\n"
        "ring = LocalRing.adopt(int(sys.argv[1]), int(sys.argv[2]))\n"
        "assert BackRing(ring.page, lambda reason: b'').take().packet == b'commit'\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    front_ring, kept = LocalRing.pair()
    with RingFrontEnd(front_ring) as front:
        front.begin(b"commit")
        handed = kept.descriptors()
        arguments = [sys.executable, "-c", program, *map(str, handed)]
        root = Path(__file__).resolve().parent.parent
        process = subprocess.run(arguments, pass_fds=handed, cwd=root, check=False, timeout=DEADLINE * 3)
        assert process.returncode == -signal.SIGKILL
        assert (front.in_flight, front.finish()) == (True, None)
        thread = threading.Thread(target=serve, args=(kept, echo))
        thread.start()
        assert front.wait(DEADLINE) == b"\0timmoc"
    thread.join(DEADLINE)
    kept.close()


def test_a_page_that_the_back_end_scribbled_on_is_a_page_error() -> None:
    front_ring, back_ring = LocalRing.pair()
    with RingFrontEnd(front_ring) as front, back_ring:
        front.begin(b"question")
        back_ring.page[SharedPage.STATE_OFFSET] = 99
        back_ring.ring()
        with pytest.raises(PageError):
            front.wait(DEADLINE)


@contextmanager
def listening(path: Path, data: bytes, descriptors: tuple[int, ...]) -> Iterator[None]:
    """Hand `descriptors` to whoever connects, once."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(DEADLINE)

        def hand_over() -> None:
            connection, _ = listener.accept()
            with connection:
                if data:
                    send_message(connection, data, descriptors)

        thread = threading.Thread(target=hand_over)
        thread.start()
        yield
        thread.join(DEADLINE)
        assert not thread.is_alive()


def test_connect_takes_a_ring_over_from_a_socket(tmp_path: Path) -> None:
    front_ring, back_ring = LocalRing.pair()
    thread = threading.Thread(target=serve, args=(back_ring, echo))
    with listening(tmp_path / "ring.sock", b"ring", front_ring.descriptors()):
        front = RingFrontEnd.connect(str(tmp_path / "ring.sock"))
    front_ring.close()
    thread.start()
    with front:
        assert front.transact(b"ab", timeout=DEADLINE) == b"\0ba"
    thread.join(DEADLINE)
    back_ring.close()


@pytest.mark.parametrize(
    ("data", "count", "error"),
    [
        (b"ring", 0, NotARingError),
        (b"ring", 1, NotARingError),
        (b"ring", 2, NotARingError),
        (b"ring", 3, NotARingError),
        (b"ring", 4, MessageTruncatedError),
        (bytes(65), 2, MessageTruncatedError),
        (b"", 0, ChannelClosedError),
    ],
)
def test_connect_refuses_what_is_no_ring_and_keeps_nothing_open(
    data: bytes, count: int, error: type[Exception], tmp_path: Path
) -> None:
    null = os.open("/dev/null", os.O_RDONLY)
    before = open_descriptors()
    with listening(tmp_path / "ring.sock", data, (null,) * count), pytest.raises(error):
        RingFrontEnd.connect(str(tmp_path / "ring.sock"))
    assert open_descriptors() == before
    os.close(null)


def test_connect_to_nobody_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RingFrontEnd.connect(str(tmp_path / "ring.sock"))


def test_the_ring_can_be_waited_on_with_others() -> None:
    with served() as front:
        front.begin(b"ab")
        poll = select.poll()
        poll.register(front.ring.fileno(), select.POLLIN)
        assert poll.poll(DEADLINE * 1000)
        assert front.ring.drain()
        assert front.finish() == b"\0ba"
