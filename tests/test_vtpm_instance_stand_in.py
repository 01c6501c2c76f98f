"""Control commands and cancels while a real instance makes RSA keys."""

import select
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from vtpm_instance_commands import (
    create_primary_rsa,
    flush,
    get_random,
    nv_content,
    nv_define,
    nv_read,
    nv_write,
    rc,
)
from vtpm_instance_rig import Bench, KeeperProcess, connect, receive_exactly, receive_response, running_keeper, transact

from frontend_backend.errors import RingCancelledError
from frontend_backend.front import RingFrontEnd

OK = 0
CANCELED = 0x909  # TPM_RC_CANCELED (TPM 2.0 Part 2, 6.6.3)
CAPABILITY = struct.pack(">I", 0x01)
CAPABLE = struct.pack(">II", 0, 0xE82D)  # bits 0, 2, 3, 5, 11, 13, 14, 15
INIT = struct.pack(">II", 0x02, 0)
CANCEL = struct.pack(">I", 0x09)
INDEX = 0x01500001
TRIES = 30  # a key may be found before the cancel comes, or the cancel comes before the command; not thirty times


@pytest.fixture(scope="module")
def keeper() -> Iterator[KeeperProcess]:
    with running_keeper() as process:
        yield process


@pytest.fixture
def bench(keeper: KeeperProcess) -> Iterator[Bench]:
    made = Bench(keeper)
    made.spawn()
    yield made
    made.close()


def code_of_key(response: bytes, data: socket.socket) -> int:
    """Return the code of an answer to create_primary_rsa, and make room for the next key."""
    if rc(response) == OK:
        assert rc(transact(data, flush(response[10:14]))) == OK
    return rc(response)


def has_answer(sock: socket.socket) -> bool:
    """Whether something has arrived that was not read."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def threads_of(bench: Bench) -> int:
    status = Path(f"/proc/{bench.pid}/status").read_text()
    return int(status.split("Threads:")[1].split()[0])


def test_a_cancel_on_the_control_channel_ends_the_making_of_a_key_and_the_tpm_goes_on(bench: Bench) -> None:
    with bench.data() as data, connect(bench.control_path) as control:
        for _ in range(TRIES):
            data.sendall(create_primary_rsa())
            control.sendall(CANCEL)
            assert receive_exactly(control, 4) == bytes(4)
            code = code_of_key(receive_response(data), data)
            assert rc(transact(data, get_random())) == OK, "a cancel does not reach the next command"
            if code == CANCELED:
                return
            assert code == OK
    raise AssertionError("no command was cancelled")


def test_a_cancel_on_the_ring_ends_the_making_of_a_key_and_the_tpm_goes_on(bench: Bench) -> None:
    with (
        RingFrontEnd.connect(str(bench.ring_path)) as ring,
        bench.data() as data,
        connect(bench.control_path) as control,
    ):
        for _ in range(TRIES):
            ring.begin(create_primary_rsa())
            control.sendall(CAPABILITY)  # answered once the command was taken, or before: then it is given back
            assert receive_exactly(control, 8) == CAPABLE
            ring.cancel()
            try:
                code = code_of_key(ring.wait(10), data)
            except RingCancelledError:
                continue
            assert rc(ring.transact(get_random(), timeout=10)) == OK
            if code == CANCELED:
                return
            assert code == OK
    raise AssertionError("no command was cancelled")


def test_a_cancel_on_one_ring_does_not_end_the_command_of_another(bench: Bench) -> None:
    path = str(bench.ring_path)
    with RingFrontEnd.connect(path) as one, RingFrontEnd.connect(path) as other, bench.data() as data:
        for _ in range(5):
            one.begin(create_primary_rsa())
            other.begin(get_random())
            other.cancel()
            assert code_of_key(one.wait(10), data) == OK
            try:
                assert rc(other.wait(10)) == OK  # it was taken before the cancel came
            except RingCancelledError:
                assert not other.in_flight


def test_control_commands_are_answered_while_a_key_is_made_on_old_and_new_connections(bench: Bench) -> None:
    meanwhile = 0
    with bench.data() as data, connect(bench.control_path) as old:
        for _ in range(6):
            data.sendall(create_primary_rsa())
            old.sendall(CAPABILITY)
            assert receive_exactly(old, 8) == CAPABLE
            with connect(bench.control_path) as new:
                new.sendall(CAPABILITY * 3 + struct.pack(">IB", 5, 0))
                assert receive_exactly(new, 28) == CAPABLE * 3 + bytes(4)
            meanwhile += not has_answer(data)
            assert code_of_key(receive_response(data), data) == OK
    assert meanwhile, "every answer came after the key"


def test_a_reset_waits_for_the_key_and_the_connection_stays_in_step(bench: Bench) -> None:
    with bench.data() as data, connect(bench.control_path) as control:
        for _ in range(4):
            data.sendall(create_primary_rsa())
            control.sendall(CAPABILITY)
            assert receive_exactly(control, 8) == CAPABLE
            control.sendall(INIT + CAPABILITY)
            assert receive_exactly(control, 12) == bytes(4) + CAPABLE
            assert rc(receive_response(data)) == OK, "the reset does not end the command"
            assert rc(transact(data, get_random())) == OK


def test_a_control_connection_that_is_abandoned_while_a_key_is_made_leaves_nothing_behind(bench: Bench) -> None:
    with bench.data() as data:
        data.sendall(create_primary_rsa())
        for request in (CAPABILITY, INIT + CAPABILITY, CANCEL[:2]):
            with connect(bench.control_path) as control:
                control.sendall(request)
        assert rc(receive_response(data)) in {OK, CANCELED}
        for _ in range(20):  # more than the port's connections: none of the abandoned holds its place
            assert bench.control(CAPABILITY, 8) == CAPABLE
        assert rc(transact(data, get_random())) == OK


def test_cancels_without_pause_never_break_a_commit(bench: Bench) -> None:
    bench.run(nv_define(INDEX, 8))
    stop = threading.Event()

    def cancel_always() -> None:
        with connect(bench.control_path) as control:
            while not stop.is_set():
                control.sendall(CANCEL)
                assert receive_exactly(control, 4) == bytes(4)

    thread = threading.Thread(target=cancel_always)
    thread.start()
    try:
        with bench.data() as data:
            for number in range(60):
                content = number.to_bytes(8)
                assert rc(transact(data, nv_write(INDEX, content))) == OK
                assert nv_content(transact(data, nv_read(INDEX, 8))) == content
                if number % 20 == 0:
                    assert code_of_key(transact(data, create_primary_rsa()), data) in {OK, CANCELED}
    finally:
        stop.set()
        thread.join(10)
    bench.kill()
    bench.spawn()
    assert nv_content(bench.run(nv_read(INDEX, 8))) == (59).to_bytes(8), "what was acknowledged is stored"


def test_there_is_no_second_thread_before_a_command_takes_long_and_one_afterwards(bench: Bench) -> None:
    with bench.data() as data:
        for _ in range(3):
            assert rc(transact(data, get_random())) == OK
            assert bench.control(CANCEL) == bytes(4)
        assert threads_of(bench) == 1
        for _ in range(2):
            assert code_of_key(transact(data, create_primary_rsa(1024)), data) != CANCELED
            assert threads_of(bench) == 2


def test_tpm_1_2_knows_no_cancel(keeper: KeeperProcess) -> None:
    bench = Bench(keeper, family="1.2")
    bench.spawn()
    assert bench.control(CANCEL) == struct.pack(">I", 9)
    bench.close()
