import array
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from descriptor_leaks import no_descriptor_leaks, open_descriptors

from frontend_backend.descriptors import (
    MAX_DATAGRAM,
    MAX_DESCRIPTORS,
    PeerCredentials,
    checked_message,
    close_all,
    receive_message,
    send_message,
)
from frontend_backend.errors import ChannelClosedError, MessageTruncatedError

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    with no_descriptor_leaks():
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with here, there:
            yield here, there


@pytest.fixture
def null() -> Iterator[int]:
    descriptor = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("count", [0, 1, 2, 3, MAX_DESCRIPTORS])
def test_a_message_arrives_with_copies_of_its_descriptors(count: int, null: int, pair: Pair) -> None:
    here, there = pair
    send_message(here, b"hello", [null] * count)
    data, descriptors = receive_message(there, max_descriptors=count)
    assert (data, len(descriptors)) == (b"hello", count)
    assert null not in descriptors
    assert all(os.fstat(descriptor).st_rdev == os.fstat(null).st_rdev for descriptor in descriptors)
    assert all(fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for descriptor in descriptors)
    close_all(descriptors)


@pytest.mark.parametrize("allowed", range(6))
def test_one_descriptor_too_many_is_refused_and_all_that_came_are_closed(allowed: int, null: int, pair: Pair) -> None:
    here, there = pair
    send_message(here, b"hello", [null] * (allowed + 1))
    before = open_descriptors()
    with pytest.raises(MessageTruncatedError):
        receive_message(there, max_descriptors=allowed)
    assert open_descriptors() == before


def test_a_datagram_that_is_too_long_is_refused_and_its_descriptors_are_closed(null: int, pair: Pair) -> None:
    here, there = pair
    send_message(here, bytes(65), [null, null])
    before = open_descriptors()
    with pytest.raises(MessageTruncatedError):
        receive_message(there, max_bytes=64, max_descriptors=2)
    assert open_descriptors() == before
    send_message(here, bytes(64))
    assert receive_message(there, max_bytes=64) == (bytes(64), [])


def test_descriptors_without_data_are_closed(null: int, pair: Pair) -> None:
    here, there = pair
    here.sendmsg([b""], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null, null]))])
    before = open_descriptors()
    with pytest.raises(ChannelClosedError):
        receive_message(there, max_descriptors=2)
    assert open_descriptors() == before


def test_the_longest_datagram_arrives_whole_and_a_longer_one_is_not_sent(pair: Pair) -> None:
    here, there = pair
    longest = os.urandom(1024) * (MAX_DATAGRAM // 1024)
    send_message(here, longest)
    assert receive_message(there) == (longest, [])
    for data, descriptors in ((longest + b"x", []), (b"", []), (b"x", [0] * (MAX_DESCRIPTORS + 1))):
        with pytest.raises(ValueError, match="not sendable"):
            send_message(here, data, descriptors)
    there.setblocking(False)
    with pytest.raises(BlockingIOError):
        receive_message(there)


def test_a_closed_peer_is_said_to_be_closed(pair: Pair) -> None:
    here, there = pair
    here.close()
    with pytest.raises(ChannelClosedError):
        receive_message(there)
    with pytest.raises(BrokenPipeError):
        send_message(there, b"anyone?")


def test_the_last_words_of_a_closed_peer_are_heard(pair: Pair) -> None:
    here, there = pair
    send_message(here, b"last words")
    here.close()
    assert receive_message(there) == (b"last words", [])


def test_other_ancillary_data_and_a_broken_tail_are_passed_over(null: int) -> None:
    copy = os.dup(null)
    rights = array.array("i", [copy]).tobytes() + b"\x01\x02"
    other = (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, bytes(12))
    assert checked_message(b"x", [other, (socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], 0) == (b"x", [copy])
    os.close(copy)


def test_the_peer_is_who_the_kernel_says(pair: Pair) -> None:
    here, _ = pair
    assert PeerCredentials.of(here) == PeerCredentials(os.getpid(), os.getuid(), os.getgid())
    assert PeerCredentials.CODEC.size == 12  # struct ucred: pid, uid, gid (unix(7))


def test_a_peer_in_another_process_keeps_its_credentials_after_its_death() -> None:
    program = "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect({!r})"
    with no_descriptor_leaks(), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("")  # an address of the kernel's choice, in the abstract name space
        listener.listen(1)
        child = subprocess.Popen([sys.executable, "-I", "-S", "-c", program.format(listener.getsockname())])
        assert child.wait() == 0
        connection, _ = listener.accept()
        with connection:
            assert PeerCredentials.of(connection) == PeerCredentials(child.pid, os.getuid(), os.getgid())
