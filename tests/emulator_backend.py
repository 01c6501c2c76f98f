"""QEMU's emulator backend, as far as it talks: the same requests in the same order (backends/tpm/tpm_emulator.c)."""

import array
import socket
import struct
from pathlib import Path

from vtpm_instance_rig import DEADLINE, connect, receive_exactly, transact

PROBE = bytes.fromhex("8001 0000000a 00000181")  # TPM2_ReadClock
PROBE12 = bytes.fromhex("00c1 0000000a 000000f1")  # TPM_GetTicks
NOT_STARTED = {"2.0": bytes.fromhex("8001 0000000a 00000101"), "1.2": bytes.fromhex("00c4 0000000a 00000009")}


_made: list["EmulatorBackend"] = []


def end_all() -> None:
    """End every one that a test made and left."""
    while _made:
        _made.pop().die()


class EmulatorBackend:
    """One QEMU: a control connection, and the data channel passed over it."""

    def __init__(self, control: Path, *, data: bool = True) -> None:
        _made.append(self)
        self.control = connect(control)
        self.data, theirs = socket.socketpair()
        self.data.settimeout(DEADLINE)
        if data:
            assert self.pass_data(theirs) == 0
        theirs.close()

    def pass_data(self, sock: socket.socket) -> int:
        """SET_DATAFD; returns the result."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sock.fileno()]))]
        self.control.sendmsg([struct.pack(">I", 0x10)], ancillary)
        return int.from_bytes(receive_exactly(self.control, 4))

    def ask(self, number: int, payload: bytes = b"", size: int = 4) -> bytes:
        """One control command and its answer, of `size` bytes whatever the result is, as QEMU up to 10.0 reads it."""
        self.control.sendall(struct.pack(">I", number) + payload)
        return receive_exactly(self.control, size)

    def result(self, number: int, payload: bytes = b"") -> int:
        """The result of a command that has no more to say."""
        return int.from_bytes(self.ask(number, payload))

    def run(self, packet: bytes) -> bytes:
        """One TPM command."""
        return transact(self.data, packet)

    def reset(self, size: int = 3968, flags: int = 0) -> int:
        """What the machine's reset does; returns INIT's result."""
        assert self.result(0x0E) == 0
        assert self.ask(0x11, bytes(4), 16)[:4] == bytes(4)
        assert self.result(0x0E) == 0
        assert self.ask(0x11, struct.pack(">I", size), 16)[:8] == struct.pack(">II", 0, size)
        return self.result(0x02, struct.pack(">I", flags))

    def set_locality(self, locality: int) -> int:
        """SET_LOCALITY, with the padding that QEMU sends."""
        return self.result(0x05, bytes([locality, 0, 0, 0]))

    def blob(self, kind: int) -> tuple[int, int, bytes]:
        """GET_STATEBLOB; returns (result, flags, blob)."""
        result, flags, total, length = struct.unpack(">IIII", self.ask(0x0C, struct.pack(">III", 1, kind, 0), 16))
        assert total == length, "QEMU takes no blob in pieces"
        return result, flags, receive_exactly(self.control, length)

    def put(self, kind: int, flags: int, blob: bytes) -> int:
        """SET_STATEBLOB, head and body in one write each."""
        self.control.sendall(struct.pack(">IIII", 0x0D, flags, kind, len(blob)))
        self.control.sendall(blob)
        return int.from_bytes(receive_exactly(self.control, 4))

    def die(self) -> None:
        """End without a word."""
        self.control.close()
        self.data.close()

    def leave(self) -> None:
        """End as QEMU does."""
        assert self.result(0x03) == 0
        self.die()
