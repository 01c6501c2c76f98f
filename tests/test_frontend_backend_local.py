import errno
import fcntl
import gc
import mmap
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from descriptor_leaks import no_descriptor_leaks, open_descriptors
from ring_conformance import DEADLINE, check_ring, heard

from frontend_backend.descriptors import receive_message, send_message
from frontend_backend.errors import NotARingError
from frontend_backend.local import SEALS, LocalRing
from frontend_backend.tpmif import PAGE_SIZE


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    with no_descriptor_leaks():
        yield


def handed_over() -> tuple[LocalRing, LocalRing]:
    """Make a pair whose front end went through a socket, as every ring does that joins two processes."""
    front, back = LocalRing.pair()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        send_message(here, b"ring", front.descriptors())
        front.close()
        _, descriptors = receive_message(there, 64, 2)
    return LocalRing.adopt(*descriptors), back


def sealed_page(size: int = PAGE_SIZE, seals: int = SEALS) -> int:
    memfd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memfd, size)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, seals)
    return memfd


def doorbell() -> int:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    there.close()
    return here.detach()


def read_only_page() -> int:
    writable = sealed_page()
    try:
        return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writable)


def pipe_end() -> int:
    end, other = os.pipe()
    os.close(other)
    return end


def stream_socket() -> int:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    there.close()
    return here.detach()


def unconnected_socket() -> int:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).detach()


def listening_socket() -> int:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("")
    listener.listen(1)
    return listener.detach()


@pytest.mark.parametrize("make_pair", [LocalRing.pair, handed_over])
def test_the_local_transport_is_a_ring(make_pair: Callable[[], tuple[LocalRing, LocalRing]]) -> None:
    check_ring(make_pair)


@pytest.mark.parametrize("make", [LocalRing.pair, handed_over])
def test_a_ring_leaves_nothing_open_when_closed_twice(make: Callable[[], tuple[LocalRing, LocalRing]]) -> None:
    for end in make():
        with end:
            pass
        end.close()


@pytest.mark.parametrize("seal", [fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL])
def test_a_page_that_lacks_one_seal_is_refused_and_closed(seal: int) -> None:
    with pytest.raises(NotARingError, match="not sealed"):
        LocalRing.adopt(sealed_page(seals=SEALS & ~seal), doorbell())


@pytest.mark.parametrize("size", [0, PAGE_SIZE - 1, PAGE_SIZE + 1, 2 * PAGE_SIZE])
def test_a_page_of_another_size_is_refused_and_closed(size: int) -> None:
    with pytest.raises(NotARingError, match=f"has {size} bytes, not 4096"):
        LocalRing.adopt(sealed_page(size), doorbell())


def test_a_regular_file_is_no_page(tmp_path: Path) -> None:
    file = os.open(tmp_path / "page", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(file, PAGE_SIZE)
    with pytest.raises(NotARingError):
        LocalRing.adopt(file, doorbell())


@pytest.mark.parametrize("make", [pipe_end, doorbell])
def test_what_is_no_file_at_all_is_no_page(make: Callable[[], int]) -> None:
    with pytest.raises(NotARingError):
        LocalRing.adopt(make(), doorbell())


def test_a_page_that_may_not_be_written_is_refused() -> None:
    with pytest.raises(NotARingError):
        LocalRing.adopt(read_only_page(), doorbell())


@pytest.mark.parametrize("extra", [0x0008, 0x0010])
def test_a_page_sealed_against_writing_is_refused(extra: int) -> None:
    """F_SEAL_WRITE and F_SEAL_FUTURE_WRITE (fcntl(2))."""
    with pytest.raises(NotARingError):
        LocalRing.adopt(sealed_page(seals=SEALS | extra), doorbell())


@pytest.mark.parametrize("make", [pipe_end, stream_socket, sealed_page, unconnected_socket, listening_socket])
def test_what_is_no_connected_seqpacket_socket_is_no_doorbell(make: Callable[[], int]) -> None:
    with pytest.raises(NotARingError) as caught:
        LocalRing.adopt(sealed_page(), make())
    assert caught.value.__cause__ is not caught.value


def test_a_network_socket_is_no_doorbell() -> None:
    with pytest.raises(NotARingError):
        LocalRing.adopt(sealed_page(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach())


def test_a_closed_descriptor_is_no_ring_and_nothing_else_is_closed_with_it() -> None:
    for position in range(2):
        descriptors = [sealed_page(), doorbell()]
        os.close(descriptors[position])
        with pytest.raises(NotARingError):
            LocalRing.adopt(*descriptors)


def test_nobody_can_change_the_size_of_a_page_or_its_seals() -> None:
    front, back = handed_over()
    with front, back:
        for end in (front, back):
            memfd, _ = end.descriptors()
            for size in (0, PAGE_SIZE - 1, PAGE_SIZE + 1):
                with pytest.raises(PermissionError):
                    os.ftruncate(memfd, size)
            with pytest.raises(PermissionError):
                fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, 0x0008)
            with pytest.raises(PermissionError):
                os.posix_fallocate(memfd, 0, 2 * PAGE_SIZE)
            assert fcntl.fcntl(memfd, fcntl.F_GET_SEALS) == SEALS


def test_the_descriptors_do_not_survive_exec() -> None:
    front, back = LocalRing.pair()
    with front, back:
        for descriptor in (*front.descriptors(), *back.descriptors()):
            assert not os.get_inheritable(descriptor)


def test_an_end_that_gave_its_page_descriptor_up_keeps_its_page() -> None:
    front, back = LocalRing.pair()
    with front, back:
        memfd, _ = front.descriptors()
        front.forget_page_descriptor()
        front.forget_page_descriptor()
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.fstat(memfd)
        front.page[0] = 7
        assert back.page[0] == 7
        with pytest.raises(NotARingError, match="gave its page descriptor up"):
            front.descriptors()


def test_a_peer_that_rings_without_pause_does_not_keep_us_draining() -> None:
    front, back = LocalRing.pair()
    with front, back:
        for _ in range(5000):
            front.ring()
        assert back.drain()
        assert heard(back, 0), "one drain swallows a bounded number; the rest wakes us again"


def test_a_peer_that_shares_our_socket_cannot_make_the_doorbell_block() -> None:
    """O_NONBLOCK belongs to the open file description, of which whoever handed it over may keep a copy."""
    front, back = LocalRing.pair()
    with front, back:
        copy = os.dup(front.fileno())
        os.set_blocking(copy, True)
        os.close(copy)
        finished = threading.Event()

        def use() -> None:
            for _ in range(5000):
                front.ring()
            assert front.drain()
            finished.set()

        thread = threading.Thread(target=use, daemon=True)
        thread.start()
        came_back = finished.wait(DEADLINE / 5)
        back.close()  # frees a thread that hangs
        thread.join(DEADLINE)
        assert came_back


def test_a_doorbell_swallows_large_datagrams_and_keeps_no_descriptors() -> None:
    front, back = LocalRing.pair()
    with front, back, closing(socket.socket(fileno=os.dup(front.fileno()))) as hostile:
        send_message(hostile, bytes(65536), [hostile.fileno()])
        before = open_descriptors()
        assert heard(back)
        assert back.drain()
        assert open_descriptors() == before
        assert not heard(back, 0)


def test_a_peer_that_dies_with_unread_rings_is_noticed() -> None:
    front, back = LocalRing.pair()
    with front, back:
        back.ring()
        front.ring()
        back.close()
        assert not all(front.drain() for _ in range(3))
        front.ring()


def test_a_page_is_private_to_its_pair() -> None:
    first, second = LocalRing.pair(), LocalRing.pair()
    first[0].page[8] = 1
    assert second[1].page[8] == 0
    assert mmap.PAGESIZE == PAGE_SIZE
    for end in (*first, *second):
        end.close()
    gc.collect()
