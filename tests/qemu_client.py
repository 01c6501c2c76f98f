"""What QEMU's emulator backend says on a control socket, from a test: connections, a passed data connection, INIT.

Source: reference/swtpm-libtpms-qemu.md section 2.
"""

import array
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

GET_CAPABILITY, INIT, SHUTDOWN, STOP, SET_DATAFD, SET_BUFFERSIZE, GET_INFO = 0x01, 0x02, 0x03, 0x0E, 0x10, 0x11, 0x12
STARTUP = bytes.fromhex("80010000000c000001440000")
READ_CLOCK = bytes.fromhex("80010000000a00000181")
NOT_RUNNING = bytes.fromhex("80010000000a00000101")  # of a TPM 2.0 that is switched off
SUCCESS = bytes(4)


def ask(control: socket.socket, number: int, payload: bytes = b"") -> bytes:
    """One control command and its answer."""
    control.sendall(struct.pack(">I", number) + payload)
    return control.recv(4096)


def say(data: socket.socket, command: bytes) -> bytes:
    """One TPM command and its answer."""
    data.sendall(command)
    return data.recv(4096)


def data_connection(control: socket.socket) -> socket.socket:
    """What QEMU does first: a socket pair, one end of which goes to the TPM."""
    ours, theirs = socket.socketpair()
    passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))]
    with theirs:
        control.sendmsg([struct.pack(">I", SET_DATAFD)], passed)
        assert control.recv(4) == SUCCESS
    ours.settimeout(60)
    return ours


@dataclass
class Qemu:
    """Both channels of a machine that has been switched on."""

    control: socket.socket
    data: socket.socket

    def reset(self) -> None:
        """What a reset of the machine does to its TPM; the firmware then starts it up."""
        assert ask(self.control, STOP) == SUCCESS
        assert ask(self.control, SET_BUFFERSIZE, struct.pack(">I", 3968))[:4] == SUCCESS
        assert ask(self.control, INIT, bytes(4)) == SUCCESS
        assert say(self.data, STARTUP)[6:] == SUCCESS


@contextmanager
def qemu(path: str) -> Iterator[Qemu]:
    """Connect as QEMU does, switch the TPM on and start it up; at the end the process is gone, without a word."""
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(60)
        control.connect(path)
        with data_connection(control) as data:
            assert say(data, READ_CLOCK) == NOT_RUNNING, "it is switched off"
            assert ask(control, GET_CAPABILITY)[:4] == SUCCESS
            made = Qemu(control, data)
            made.reset()
            yield made
