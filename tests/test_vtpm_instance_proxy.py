"""An instance on a device: the driver's locality, messages that are none, what outlives the instance.

A SEQPACKET socket stands where the kernel's descriptor does: one read is one command, one write its answer. What the
kernel itself does is tested where there is one (tests/e2e/test_e2e_proxy.py).
"""

import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import vtpm_instance_rig as tpm
from vtpm_instance_commands import command12

from frontend_backend.messages_instance import InstanceState
from frontend_backend.messages_keeper import Fetch, Fetched
from frontend_backend.tpmhdr import command
from vtpm_instance.driver_locality import SET_LOCALITY

FAILURE, WRONG_LOCALITY = 0x101, 0x907


class Device:
    """The kernel's side of a device, and the bench whose instance answers it."""

    def __init__(self, bench: tpm.Bench) -> None:
        self.bench = bench
        self.kernel, self.server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.settimeout(tpm.DEADLINE)

    def spawn(self, startup: str = "clear") -> None:
        self.bench.spawn(startup, device=self.server.fileno())
        # what an instance before may have left unanswered; the kernel refuses this answer where it waits for none
        assert tpm.rc(self.kernel.recv(4096)) in (FAILURE, 9)

    def say(self, message: bytes) -> bytes:
        self.kernel.send(message)
        return self.kernel.recv(4096)

    def locality(self, number: int) -> int:
        return tpm.rc(self.say(command(SET_LOCALITY, bytes([number]))))

    def close(self) -> None:
        self.kernel.close()
        self.server.close()
        self.bench.close()


@pytest.fixture(scope="module")
def keeper() -> Iterator[tpm.KeeperProcess]:
    with tpm.running_keeper() as made:
        yield made


@pytest.fixture
def device(keeper: tpm.KeeperProcess) -> Iterator[Device]:
    made = Device(tpm.Bench(keeper, frontend="proxy"))
    yield made
    made.close()


def test_the_drivers_locality_is_that_of_the_next_command(device: Device) -> None:
    device.spawn()
    assert device.say(command(SET_LOCALITY, b"\0")) == struct.pack(">HII", 0x8001, 10, 0)
    assert tpm.rc(device.say(tpm.pcr_extend(20))) == WRONG_LOCALITY
    assert device.locality(2) == 0
    assert tpm.rc(device.say(tpm.pcr_extend(20))) == 0
    assert device.locality(5) == 0x107
    assert tpm.rc(device.say(command(SET_LOCALITY))) == 0x9A
    assert tpm.rc(device.say(tpm.pcr_extend(20))) == 0, "a locality that was refused has changed something"


def test_a_tpm_1_2_is_told_its_locality_in_its_own_words(keeper: tpm.KeeperProcess) -> None:
    device = Device(tpm.Bench(keeper, "1.2", frontend="proxy"))
    try:
        device.spawn()
        assert device.say(command(SET_LOCALITY, b"\0", 0xC1)) == struct.pack(">HII", 0xC4, 10, 0)
        assert device.locality(9) == 0x3D
        assert tpm.rc(device.say(command(SET_LOCALITY, b"", 0xC1))) == 0x19
        assert tpm.rc(device.say(command12(0x46, struct.pack(">I", 8)))) == 0
    finally:
        device.close()


@pytest.mark.parametrize("message", [b"\x80\x01", tpm.get_random(4)[:-1], tpm.get_random(4) + b"\0", b"\xff" * 4000])
def test_what_is_no_command_is_refused_and_the_next_one_served(device: Device, message: bytes) -> None:
    device.spawn()
    assert tpm.rc(device.say(message)) != 0
    assert tpm.rc(device.say(tpm.get_random(4))) == 0


def test_the_keeper_has_the_device_for_the_next_instance(device: Device) -> None:
    device.spawn()
    device.server.close()  # as a manager that died
    client, record = device.bench.keeper.client, device.bench.record
    reply, received = client.call(Fetch(record.vtpm.bytes, record.lease))
    assert isinstance(reply, Fetched)
    assert reply.kept.listeners[-1] == "proxy"
    device.server = socket.socket(fileno=received.pop())
    for descriptor in received:
        socket.close(descriptor)
    device.bench.kill()
    record.lease += 1
    device.kernel.send(tpm.get_random(4))  # while nobody is there
    device.spawn("failed")
    assert tpm.rc(device.kernel.recv(4096)) == FAILURE, "a fresh TPM in place of the one that crashed"
    assert record.states[-1] is InstanceState.NEEDS_RESET


def test_a_device_that_ends_does_not_keep_its_instance_awake(device: Device) -> None:
    device.spawn()
    device.kernel.close()
    device.server.close()
    with device.bench.data() as sock:
        assert tpm.rc(tpm.transact(sock, tpm.get_random(4))) == 0
    states = []
    for _ in range(20):
        time.sleep(0.02)
        states.append(Path(f"/proc/{device.bench.pid}/stat").read_text().rsplit(")", 1)[1].split()[0])
    assert states == ["S"] * 20, "it turns round and round over a device that has gone"
    assert tpm.rc(device.bench.run(tpm.get_random(4))) == 0
