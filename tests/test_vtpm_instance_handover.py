"""Connections that are handed over: what is written is read back, and what a hostile instance writes is refused."""

import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend_backend.doorbell import PipeDoorbell
from frontend_backend.local import LocalRing
from vtpm_instance.errors import BadRequestError
from vtpm_instance.handover import MAX_BYTES, MAX_HANDED, Handed, Kind, check, count, pack, unpack

CONNECTIONS = st.one_of(
    st.lists(st.tuples(st.sampled_from([Kind.DATA, Kind.CONTROL]), st.integers(0, 255)), max_size=MAX_HANDED),
    st.just([(Kind.RING, 0)]),
)


def made_of(kinds: list[tuple[Kind, int]]) -> list[Handed]:
    numbers = iter(range(100, 200))
    return [
        Handed(kind, tuple(next(numbers) for _ in range(3 if kind is Kind.RING else 1)), note) for kind, note in kinds
    ]


@given(CONNECTIONS)
def test_what_is_packed_is_what_is_unpacked(kinds: list[tuple[Kind, int]]) -> None:
    connections = made_of(kinds)
    data, descriptors = pack(connections)
    assert unpack(data, descriptors) == connections
    assert len(data) <= MAX_BYTES
    assert count(connections) == len(descriptors) <= MAX_HANDED


@given(st.binary(max_size=40), st.lists(st.integers(0, 50), max_size=4))
def test_any_bytes_are_connections_or_refused(data: bytes, descriptors: list[int]) -> None:
    try:
        found = unpack(data, descriptors)
    except BadRequestError:
        return
    assert pack(found) == (data, descriptors)


def test_the_descriptors_must_be_those_of_the_connections() -> None:
    data, descriptors = pack(made_of([(Kind.DATA, 0), (Kind.CONTROL, 1)]))
    for wrong in (descriptors[:1], [*descriptors, 7], []):
        with pytest.raises(BadRequestError):
            unpack(data, wrong)


def test_sockets_and_rings_pass_the_check_and_nothing_else_does() -> None:
    stream = socket.socketpair()
    datagram = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    front, back = LocalRing.pair(doorbells=PipeDoorbell.pair)
    null = os.open("/dev/null", os.O_RDWR)
    unconnected = socket.socket(socket.AF_UNIX)
    listener = socket.create_server(("127.0.0.1", 0))
    tcp = socket.create_connection(listener.getsockname())
    listener_6 = socket.create_server(("::1", 0), family=socket.AF_INET6)
    tcp_6 = socket.create_connection(listener_6.getsockname()[:2])  # QEMU may pass such a data connection
    try:
        check(Handed(Kind.DATA, (tcp_6.fileno(),)))
        check(Handed(Kind.DATA, (stream[0].fileno(),)))
        check(Handed(Kind.CONTROL, (tcp.fileno(),)))
        check(Handed(Kind.RING, back.descriptors()))
        page, heard, rung = back.descriptors()
        for wrong in (
            Handed(Kind.DATA, (datagram[0].fileno(),)),
            Handed(Kind.CONTROL, (unconnected.fileno(),)),
            Handed(Kind.CONTROL, (listener.fileno(),)),
            Handed(Kind.DATA, (null,)),
            Handed(Kind.DATA, (page,)),
            Handed(Kind.RING, (page, rung, heard)),
            Handed(Kind.RING, (null, heard, rung)),
            Handed(Kind.RING, (page, null, rung)),
            Handed(Kind.RING, (stream[0].fileno(), heard, rung)),
        ):
            with pytest.raises(BadRequestError):
                check(wrong)
    finally:
        for sock in (*stream, *datagram, unconnected, listener, tcp, listener_6, tcp_6):
            sock.close()
        front.close()
        back.close()
        os.close(null)
