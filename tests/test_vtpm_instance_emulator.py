"""A vTPM attached as `qemu`, by what QEMU's emulator backend says to it: power, channels, hibernation, the end."""

import array
import hashlib
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from emulator_backend import NOT_STARTED, PROBE, PROBE12, EmulatorBackend, end_all
from test_vtpm_instance_stand_in import CANCELED, code_of_key, has_answer
from vtpm_instance_commands import create_primary_rsa
from vtpm_instance_manager import SmallManager
from vtpm_instance_rig import (
    STARTUP_CLEAR,
    Bench,
    KeeperProcess,
    command12,
    connect,
    extended,
    get_random,
    nv_content,
    nv_define,
    nv_read,
    nv_write,
    pcr_extend,
    pcr_read,
    rc,
    receive_exactly,
    receive_response,
    running_keeper,
    transact,
    until,
)

from frontend_backend.descriptors import close_all
from frontend_backend.local import LocalRing
from frontend_backend.messages_instance import InstanceState, RefusalCode
from frontend_backend.messages_keeper import Park, Parked, Spawn, Spawned, Wake
from frontend_backend.orders import Orders
from storage.secrets import StateKey
from storage.state_image import StateImage

INDEX = 0x01500001
STARTUP12 = command12(0x99, b"\0\1")
STOP, INIT = 0x0E, 0x02

MakeBench = Callable[..., Bench]


@pytest.fixture(scope="module")
def keeper() -> Iterator[KeeperProcess]:
    with running_keeper() as process:
        yield process


@pytest.fixture
def make_bench(keeper: KeeperProcess) -> Iterator[MakeBench]:
    made: list[Bench] = []

    def make(family: str = "2.0") -> Bench:
        bench = Bench(keeper, family, "qemu")
        made.append(bench)
        bench.spawn("none")
        return bench

    yield make
    end_all()
    for bench in made:
        bench.close()


def started(bench: Bench) -> EmulatorBackend:
    """A QEMU whose guest's firmware has started the TPM."""
    qemu = EmulatorBackend(bench.control_path)
    assert qemu.reset() == 0
    assert qemu.set_locality(0) == 0
    assert rc(qemu.run(STARTUP_CLEAR if bench.record.family == "2.0" else STARTUP12)) == 0
    return qemu


# the start


@pytest.mark.parametrize("family", ["2.0", "1.2"])
def test_qemus_start_in_its_order(make_bench: MakeBench, family: str) -> None:
    bench = make_bench(family)
    assert (bench.record.states, bench.record.generation) == ([InstanceState.READY], 0)
    qemu = EmulatorBackend(bench.control_path)
    assert qemu.run(PROBE) == NOT_STARTED[family]  # by its tag it knows the family
    assert qemu.run(PROBE12) == NOT_STARTED[family]
    needed = 0x348F if family == "2.0" else 0x340F
    capabilities = int.from_bytes(qemu.ask(1, size=8))
    assert capabilities >> 32 == 0
    assert capabilities & needed == needed
    assert qemu.reset() == 0
    assert bench.record.generation == 1, "it is manufactured by the first INIT"
    assert qemu.ask(0x04, size=8) == bytes(8)
    assert qemu.set_locality(0) == 0
    if family == "2.0":
        assert rc(qemu.run(PROBE)) == 0x100, "its firmware starts it, nobody else"
        assert rc(qemu.run(STARTUP_CLEAR)) == 0
        assert rc(qemu.run(get_random())) == 0
    else:
        assert rc(qemu.run(STARTUP12)) == 0
    qemu.leave()


def test_a_state_that_cannot_be_read_is_found_when_it_is_attached_and_not_by_qemu(make_bench: MakeBench) -> None:
    bench = make_bench()
    started(bench).leave()
    bench.kill()
    with bench.image.open("r+b") as file:
        for slot in range(0, bench.image.stat().st_size, 512):
            file.seek(slot + 400)
            file.write(b"damage")
    bench.spawn("none")
    assert bench.record.states[0] is InstanceState.FAILED
    assert bench.wait_for_end() == 6


# power


def test_stop_saves_what_the_guest_did_not_once_and_init_goes_on_from_it(make_bench: MakeBench) -> None:
    bench = make_bench()
    qemu = started(bench)
    assert rc(qemu.run(nv_define(INDEX, 4))) == 0
    assert rc(qemu.run(nv_write(INDEX, b"kept"))) == 0
    assert rc(qemu.run(pcr_extend(7))) == 0
    before = bench.record.generation
    assert [qemu.result(STOP) for _ in range(3)] == [0, 0, 0]
    assert bench.record.generation == before + 1
    assert qemu.run(get_random()) == NOT_STARTED["2.0"]
    assert qemu.reset() == 0
    assert rc(qemu.run(STARTUP_CLEAR)) == 0
    assert qemu.run(pcr_read(7))[-32:] == bytes(32)
    assert nv_content(qemu.run(nv_read(INDEX, 4))) == b"kept"
    assert rc(qemu.run(pcr_extend(7))) == 0
    assert qemu.result(INIT, bytes(4)) == 0, "INIT while it runs is a reset"
    assert rc(qemu.run(STARTUP_CLEAR)) == 0
    assert qemu.run(pcr_read(7))[-32:] == bytes(32)


def test_the_buffers_size_is_the_machines_and_changes_only_while_the_tpm_is_off(make_bench: MakeBench) -> None:
    qemu = EmulatorBackend(make_bench().control_path)
    assert qemu.reset(3000) == 0
    assert qemu.ask(0x11, bytes(4), 16) == struct.pack(">IIII", 0, 3000, 2808, 4096)
    assert qemu.result(0x11, struct.pack(">I", 4096)) == 0xA
    assert qemu.result(STOP) == 0
    assert qemu.ask(0x11, struct.pack(">I", 1), 16)[4:8] == struct.pack(">I", 2808)


def test_qemu_that_ends_without_a_word_has_its_tpm_switched_off_and_saved_and_the_next_one_takes_it(
    make_bench: MakeBench,
) -> None:
    bench = make_bench()
    for number in range(3):
        qemu = started(bench)
        if number:
            assert nv_content(qemu.run(nv_read(INDEX, 4))) == number.to_bytes(4)
        else:
            assert rc(qemu.run(nv_define(INDEX, 4))) == 0
        assert rc(qemu.run(nv_write(INDEX, (number + 1).to_bytes(4)))) == 0
        assert qemu.set_locality(3) == 0
        before = bench.record.generation
        qemu.die()
        until(lambda seen=before: bench.record.generation == seen + 1, "the commit")  # type: ignore[misc]
        with connect(bench.data_path) as data:
            assert transact(data, get_random()) == NOT_STARTED["2.0"]


def test_shutdown_switches_off_and_the_instance_stays(make_bench: MakeBench) -> None:
    bench = make_bench()
    for _ in range(2):
        started(bench).leave()
    assert bench.pidfd >= 0
    assert EmulatorBackend(bench.control_path).run(PROBE) == NOT_STARTED["2.0"]


def test_a_copy_of_the_data_channels_end_that_outlives_qemu_keeps_nobody_out(make_bench: MakeBench) -> None:
    bench = make_bench()
    qemu = started(bench)
    with qemu.data.dup() as copy:
        before = bench.record.generation
        qemu.die()
        until(lambda: bench.record.generation == before + 1, "the power off")
        again = started(bench)
        assert rc(again.run(get_random())) == 0
        assert copy.recv(1) == b""


def test_qemu_may_go_in_the_middle_of_many_commands(make_bench: MakeBench) -> None:
    bench = make_bench()
    for _ in range(12):
        qemu = started(bench)
        for channel in (qemu.data, qemu.control):
            channel.sendall((get_random() if channel is qemu.data else struct.pack(">I", 0x0F)) * 100)
        qemu.control.close()
        assert rc(receive_response(qemu.data)) == 0
        qemu.data.close()
    assert started(bench).result(STOP) == 0


def test_a_new_data_channel_may_take_the_place_of_one_with_commands_left(make_bench: MakeBench) -> None:
    bench = make_bench()
    qemu = started(bench)
    for turns in range(8):
        mine, theirs = socket.socketpair()
        many = struct.pack(">I", 0x0F) * (3 + turns)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))]
        os.kill(bench.pid, signal.SIGSTOP)  # so that all of it is there at once
        qemu.control.sendall(many)
        qemu.control.sendmsg([struct.pack(">I", 0x10)], rights)
        qemu.data.sendall(get_random() * 100)
        qemu.data.close()
        os.kill(bench.pid, signal.SIGCONT)
        assert receive_exactly(qemu.control, 2 * len(many))[:4] == bytes(4)
        assert receive_exactly(qemu.control, 4) == bytes(4)
        theirs.close()
        qemu.data = mine
        assert rc(qemu.run(get_random())) == 0


def test_a_visitor_on_the_control_channel_may_go_without_an_effect(make_bench: MakeBench) -> None:
    bench = make_bench()
    qemu = started(bench)
    visitor = EmulatorBackend(bench.control_path, data=False)
    assert visitor.ask(1, size=8)[:4] == bytes(4)
    visitor.die()
    assert rc(qemu.run(get_random())) == 0


def test_there_is_one_data_channel_until_its_peer_hangs_up(make_bench: MakeBench) -> None:
    bench = make_bench()
    qemu = started(bench)
    other = EmulatorBackend(bench.control_path, data=False)
    spare, end = socket.socketpair()
    with spare, end:
        assert other.pass_data(spare) == 0x1F
    assert rc(qemu.run(get_random())) == 0
    qemu.data.close()
    mine, theirs = socket.socketpair()
    assert qemu.pass_data(theirs) == 0
    theirs.close()
    qemu.data = mine
    assert rc(qemu.run(get_random())) == 0


@pytest.mark.parametrize("kind", ["file", "datagram", "pipe"])
def test_what_is_no_stream_socket_is_no_data_channel(make_bench: MakeBench, kind: str) -> None:
    qemu = EmulatorBackend(make_bench().control_path, data=False)
    read, write = os.pipe()
    made = {
        "file": lambda: os.open("/dev/null", os.O_RDWR),
        "datagram": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach(),
        "pipe": lambda: os.dup(read),
    }[kind]()
    with socket.socket(fileno=os.dup(made)) if kind == "datagram" else os.fdopen(os.dup(made)) as passed:
        assert qemu.pass_data(passed) == 3  # type: ignore[arg-type]
    close_all([made, read, write])


# beside commands


def test_a_measurement_of_the_hardware_goes_to_pcr_17_and_before_startup_to_pcr_0(make_bench: MakeBench) -> None:
    qemu = EmulatorBackend(make_bench().control_path)
    assert qemu.reset() == 0
    data = os.urandom(10_000)
    digest = hashlib.sha256(data).digest()

    def measure() -> None:
        assert qemu.result(0x06) == 0
        qemu.control.sendall(struct.pack(">II", 0x07, len(data)) + data[:3000])
        qemu.control.sendall(data[3000:])
        assert receive_exactly(qemu.control, 4) == bytes(4)
        assert qemu.result(0x08) == 0

    measure()
    assert rc(qemu.run(STARTUP_CLEAR)) == 0
    core = hashlib.sha256(bytes(31) + b"\4" + digest).digest()  # TPM 2.0 Part 1, 34.3: H-CRTM begins with 4
    assert qemu.run(pcr_read(0))[-32:] == core
    assert [qemu.ask(0x04, size=8)[4], qemu.result(0x0B, b"\4\0\0\0"), qemu.ask(0x04, size=8)[4]] == [1, 0, 0]
    measure()
    assert qemu.run(pcr_read(17))[-32:] == extended(digest)
    assert qemu.ask(0x04, size=8)[4] == 1
    assert [qemu.result(0x0B, bytes([locality, 0, 0, 0])) for locality in (0, 5, 3)] == [0x3D, 0x3D, 0]
    assert qemu.ask(0x04, size=8)[4] == 0
    assert rc(qemu.run(get_random())) == 0


def test_localities_up_to_3_are_the_guests_and_4_is_the_hardwares(make_bench: MakeBench) -> None:
    qemu = started(make_bench())
    assert [qemu.set_locality(locality) for locality in (0, 1, 2, 3, 4, 255)] == [0, 0, 0, 0, 0x3D, 0x3D]
    assert rc(qemu.run(pcr_extend(20))) == 0, "at locality 3"
    assert qemu.set_locality(0) == 0
    assert rc(qemu.run(pcr_extend(20))) == 0x907
    prefixed = struct.pack(">IBI", 8, 2, len(pcr_extend(20))) + pcr_extend(20)
    qemu.data.sendall(prefixed)
    size = int.from_bytes(receive_exactly(qemu.data, 4))
    assert (rc(receive_exactly(qemu.data, size)), receive_exactly(qemu.data, 4)) == (0, bytes(4))
    qemu.data.sendall(struct.pack(">IBI", 8, 4, len(pcr_extend(20))) + pcr_extend(20))
    assert receive_exactly(qemu.data, 18) == struct.pack(">I", 10) + bytes.fromhex("80010000000a00000907") + bytes(4)


def test_flags_that_nobody_knows_are_asked_for_without_harm(make_bench: MakeBench) -> None:
    qemu = EmulatorBackend(make_bench().control_path)
    known = qemu.ask(0x12, struct.pack(">QII", 1, 0, 0), 12 + 63)
    for flags in (1 | 1 << 63, 1 | 1 << 31, 1 | 1 << 32):
        assert qemu.ask(0x12, struct.pack(">QII", flags, 0, 0), 12 + 63) == known
    assert qemu.result(0x11, b"\xff" * 4) == 0
    assert receive_exactly(qemu.control, 12) == struct.pack(">III", 4096, 2808, 4096)


def test_cancel_is_answered_while_a_key_is_made_and_stop_waits_for_it(make_bench: MakeBench) -> None:
    qemu = started(make_bench())
    cancelled = early = 0
    for _ in range(30):
        qemu.data.sendall(create_primary_rsa())
        assert qemu.result(0x09) == 0
        early += not has_answer(qemu.data)
        code = code_of_key(receive_response(qemu.data), qemu.data)
        cancelled += code == CANCELED
        if cancelled and early:
            break
    assert cancelled
    assert early, "the guest's processor waits for the answer to CANCEL"
    qemu.data.sendall(create_primary_rsa(1024))
    assert qemu.ask(1, size=8)[:4] == bytes(4)
    assert qemu.result(STOP) == 0
    assert len(receive_response(qemu.data)) >= 10


# failures


def test_a_power_off_that_cannot_be_saved_says_so_and_the_last_state_counts(make_bench: MakeBench) -> None:
    bench = make_bench()
    qemu = started(bench)
    assert rc(qemu.run(nv_define(INDEX, 4))) == 0
    assert bench.manager is not None
    before = bench.record.generation
    bench.manager.refuse = RefusalCode.STORE_FAILED
    assert qemu.result(STOP) == 9
    until(lambda: bench.record.states[-1] is InstanceState.NEEDS_RESET, "the report")
    assert qemu.ask(0x04, size=8) == bytes(8), "a failure here would hang QEMU"
    bench.manager.refuse = None
    assert qemu.result(STOP) == 0
    assert bench.record.generation == before
    assert qemu.reset() == 0
    assert rc(qemu.run(STARTUP_CLEAR)) == 0
    assert rc(qemu.run(nv_write(INDEX, b"good"))) == 0


def test_after_a_crash_the_next_machine_starts_from_the_last_state(make_bench: MakeBench) -> None:
    bench = make_bench()
    qemu = started(bench)
    assert rc(qemu.run(nv_define(INDEX, 4))) == 0
    assert rc(qemu.run(nv_write(INDEX, b"last"))) == 0
    bench.kill()
    qemu.die()
    bench.spawn("failed")
    assert bench.record.states == [InstanceState.READY], "it was switched off by the crash, and answers nothing so far"
    again = EmulatorBackend(bench.control_path)
    assert again.run(get_random()) == NOT_STARTED["2.0"]
    again.die()
    again = started(bench)
    assert nv_content(again.run(nv_read(INDEX, 4))) == b"last"


def test_a_reset_by_the_manager_resets_what_runs_and_leaves_off_what_is_off(make_bench: MakeBench) -> None:
    bench = make_bench()
    qemu = started(bench)
    assert bench.manager is not None
    assert rc(qemu.run(pcr_extend(7))) == 0
    count = len(bench.record.reports)
    bench.manager.give(Orders.RESET)
    until(lambda: len(bench.record.reports) > count, "the report of the reset")
    assert rc(qemu.run(STARTUP_CLEAR)) == 0
    assert qemu.run(pcr_read(7))[-32:] == bytes(32)
    assert qemu.result(STOP) == 0
    count = len(bench.record.reports)
    bench.manager.give(Orders.RESET)
    until(lambda: len(bench.record.reports) > count + 1, "the answers to the ring and to the order")
    assert qemu.ask(0x0F, size=8) == struct.pack(">II", 0, 3)
    assert qemu.run(get_random()) == NOT_STARTED["2.0"]


def test_a_stopped_instance_leaves_a_state_that_is_saved(make_bench: MakeBench) -> None:
    bench = make_bench()
    qemu = started(bench)
    assert bench.manager is not None
    bench.manager.give(Orders.STOP)
    assert bench.wait_for_end() == 0
    assert bench.record.resumable
    qemu.die()
    bench.spawn("none")
    assert bench.manager is not None
    bench.manager.give(Orders.STOP)
    assert bench.wait_for_end() == 0, "one that is off has nothing to save"


# hibernation


def wake(bench: Bench) -> SmallManager:
    """Start the next instance of a hibernated vTPM, as a manager does."""
    record = bench.record
    record.startup = "state"
    record.reports.clear()
    front, back = LocalRing.pair()
    (page, doorbell), (_, own_doorbell) = front.descriptors(), back.descriptors()
    image = os.open(bench.image, os.O_RDWR | os.O_CLOEXEC)
    spawn = Spawn(record.vtpm.bytes, record.lease, record.family, 0, 0, "qemu", 0, os.geteuid(), (), **bench.terms)
    reply, received = bench.keeper.client.call(Wake(spawn), [page, doorbell, own_doorbell, image])
    os.close(image)
    front.close()
    assert isinstance(reply, Spawned), reply
    bench.pid, (bench.pidfd,) = reply.pid, received
    bench.manager = SmallManager(back, record)
    until(lambda: bool(record.reports), "the first report")
    return bench.manager


def refusals(bench: Bench) -> list[str]:
    """Why it said it would not hibernate."""
    return [report.text for report in bench.record.reports if report.reason == "awake"]


def send_to_sleep(bench: Bench) -> int:
    """Have it hibernate; returns with how many connections."""
    manager = bench.manager
    assert manager is not None
    manager.keeps_ring = True
    manager.give(Orders.HIBERNATE)
    until(lambda: manager.asleep or bool(refusals(bench)), "an answer to the order")
    assert manager.asleep, refusals(bench)
    manager.close()
    os.close(bench.pidfd)
    bench.pidfd = -1
    replies: list[object] = []

    def parked() -> bool:
        replies.append(bench.keeper.client.call(Park(bench.record.vtpm.bytes, bench.record.lease))[0])
        return isinstance(replies[-1], Parked)

    until(parked, "the end of the process")
    assert isinstance(replies[-1], Parked)
    return replies[-1].connections


def test_both_channels_survive_hibernation_with_what_the_machine_has_set(make_bench: MakeBench) -> None:
    bench = make_bench()
    qemu = started(bench)
    assert qemu.reset(3000) == 0
    assert rc(qemu.run(STARTUP_CLEAR)) == 0
    assert rc(qemu.run(pcr_extend(7))) == 0
    assert qemu.set_locality(2) == 0
    for _ in range(2):
        assert send_to_sleep(bench) == 2
        wake(bench)
        assert qemu.run(pcr_read(7))[-32:] == extended(b"\x11" * 32)
        assert rc(qemu.run(pcr_extend(20))) == 0, "still at locality 2"
        assert qemu.ask(0x11, bytes(4), 16) == struct.pack(">IIII", 0, 3000, 2808, 4096)
    other = EmulatorBackend(bench.control_path, data=False)
    spare, end = socket.socketpair()
    with spare, end:
        assert other.pass_data(spare) == 0x1F, "the data channel is still QEMU's"
    assert qemu.result(STOP) == 0
    assert qemu.reset() == 0
    assert qemu.set_locality(0) == 0
    assert rc(qemu.run(STARTUP_CLEAR)) == 0
    before = bench.record.generation
    qemu.die()
    until(lambda: bench.record.generation == before + 1, "the power off, as the machine is gone")


def test_a_command_sent_to_one_that_sleeps_is_answered_when_it_wakes(make_bench: MakeBench) -> None:
    bench = make_bench()
    qemu = started(bench)
    assert send_to_sleep(bench) == 2
    qemu.control.sendall(struct.pack(">IB3x", 5, 1))
    qemu.data.sendall(get_random())
    wake(bench)
    assert receive_exactly(qemu.control, 4) == bytes(4)
    assert rc(receive_response(qemu.data)) == 0


@pytest.mark.parametrize("state", ["off", "not started"])
def test_one_that_is_switched_off_or_not_started_does_not_hibernate(make_bench: MakeBench, state: str) -> None:
    bench = make_bench()
    qemu = started(bench)
    assert qemu.reset() == 0
    if state == "off":
        assert qemu.result(STOP) == 0
    assert bench.manager is not None
    bench.manager.give(Orders.HIBERNATE)
    until(lambda: bool(refusals(bench)), "the refusal")
    assert ("switched off" in refusals(bench)[0]) == (state == "off")
    assert qemu.reset() == 0


def test_the_state_of_the_last_instance_is_the_recorded_one(make_bench: MakeBench) -> None:
    """What INIT and STOP commit is in the image under the record's generation, and opens."""
    bench = make_bench()
    started(bench).leave()
    with bench.image.open("rb") as file:
        image = StateImage.open(file.fileno(), bench.record.vtpm)
        blobs = image.load(StateKey(bench.record.key), bench.record.digest, bench.record.generation)
    assert set(blobs) == {"permall"}
