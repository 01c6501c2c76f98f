"""The front end `ring`: rings handed out by a real instance."""

import fcntl
import socket
import struct
import termios
from collections.abc import Iterator

import pytest
from vtpm_instance_commands import command12, extended, get_random, nv_define, pcr_extend, pcr_read, rc
from vtpm_instance_manager import until
from vtpm_instance_rig import Bench, connect, running_keeper

from frontend_backend.front import RingFrontEnd

OK = 0
INDEX = 0x01500001


@pytest.fixture
def bench() -> Iterator[Bench]:
    with running_keeper() as keeper:
        made = Bench(keeper, frontend="ring")
        made.spawn()
        yield made
        made.close()


def ring_of(bench: Bench) -> RingFrontEnd:
    return RingFrontEnd.connect(str(bench.ring_path))


def test_two_programs_share_one_tpm_over_rings_of_their_own(bench: Bench) -> None:
    with ring_of(bench) as one, ring_of(bench) as other:
        assert rc(one.transact(pcr_extend(7), timeout=10)) == OK
        assert rc(one.transact(nv_define(INDEX, 8), timeout=10)) == OK
        assert other.transact(pcr_read(7), timeout=10)[-32:] == extended(b"\x11" * 32)
    assert rc(bench.run(get_random())) == OK


def test_the_rings_of_many_commands_do_not_fill_the_pipe_they_are_rung_through(bench: Bench) -> None:
    with ring_of(bench) as ring:
        _, _, rung = ring.ring.descriptors()
        most = 0
        for _ in range(300):
            assert rc(ring.transact(get_random(4), timeout=10)) == OK
            most = max(most, struct.unpack("i", fcntl.ioctl(rung, termios.FIONREAD, bytes(4)))[0])
        assert most <= 66, "64 and what was rung just now"
        for _ in range(70_000):
            ring.ring.ring()  # more than a pipe holds
        assert rc(ring.transact(get_random(), timeout=10)) == OK


def test_malformed_requests_are_answered_with_an_error(bench: Bench) -> None:
    with ring_of(bench) as ring:
        assert rc(ring.transact(b"short", timeout=10)) == 0x142
        assert rc(ring.transact(get_random() + b"more", timeout=10)) == 0x142
        assert rc(ring.transact(get_random(), locality=2, timeout=10)) == 0x107
        assert rc(ring.transact(get_random(), timeout=10)) == OK


def test_a_page_that_is_scribbled_on_harms_its_own_ring_only(bench: Bench) -> None:
    with ring_of(bench) as evil, ring_of(bench) as good:
        evil.ring.page[:8] = b"\xff" * 8
        evil.ring.ring()
        assert rc(good.transact(get_random(), timeout=10)) == OK
        evil.ring.page[:8] = b"\xff\xff\0\0\1\0\0\xff"
        evil.ring.ring()
        assert rc(good.transact(get_random(), timeout=10)) == OK


def test_a_ninth_ring_comes_when_another_is_given_back(bench: Bench) -> None:
    rings = [ring_of(bench) for _ in range(8)]
    rings.pop().close()
    until(lambda: _one_more(bench, rings), "a ring for the next program")
    for ring in rings:
        assert rc(ring.transact(get_random(), timeout=10)) == OK
        ring.close()


def _one_more(bench: Bench, rings: list[RingFrontEnd]) -> bool:
    rings.append(ring_of(bench))
    return True


def test_programs_that_ask_for_a_ring_and_leave_at_once_write_nothing_into_the_log(bench: Bench) -> None:
    before = bench.keeper.log.read_bytes()
    for _ in range(10):  # fewer than the listener's backlog
        connect(bench.ring_path, socket.SOCK_SEQPACKET).close()
    with ring_of(bench) as ring:
        assert rc(ring.transact(get_random(), timeout=10)) == OK
    assert bench.keeper.log.read_bytes() == before


def test_an_answer_that_does_not_fit_a_page_is_an_error_and_not_the_end_of_the_vtpm() -> None:
    with running_keeper() as keeper:
        bench = Bench(keeper, family="1.2", frontend="ring")
        bench.spawn()
        # TPM_NV_DATA_PUBLIC (TPM 1.2 Part 2, 19.3) of an index that everybody may read and write
        pcrs = struct.pack(">H3sB20s", 3, bytes(3), 0x1F, bytes(20))
        public = struct.pack(">HI", 0x18, 0x1234) + pcrs * 2 + struct.pack(">HI3sI", 0x17, 2, bytes(3), 4080)
        assert rc(bench.run(command12(0xCC, public + bytes(20)))) == OK
        with ring_of(bench) as ring:
            for size, code in ((4074, OK), (4075, 0x17), (4080, 0x17)):
                packet = command12(0xCF, struct.pack(">III", 0x1234, 0, size))
                assert rc(ring.transact(packet, timeout=10)) == code
            assert rc(ring.transact(command12(0x15, struct.pack(">I", 10)), timeout=10)) == OK
        bench.close()
