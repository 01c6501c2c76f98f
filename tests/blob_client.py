"""A machine with a TPM as QEMU's emulator backend drives one: control channel, passed data socket, state blobs.

Source: QEMU backends/tpm/tpm_emulator.c; reference/swtpm-libtpms-qemu.md section 2.
"""

import array
import socket
import struct
from typing import ClassVar, Final

import vtpm_instance_rig as tpm

GET_CAPABILITY, INIT, SHUTDOWN = 1, 2, 3
SET_LOCALITY, GET_STATEBLOB, SET_STATEBLOB, STOP, SET_DATAFD, SET_BUFFERSIZE = 5, 12, 13, 14, 16, 17
PERMANENT, VOLATILE, SAVED = 1, 2, 3
DELETE_VOLATILE: Final = 1
RETRY: Final = 0x800
PROBE: Final = bytes.fromhex("80010000000a00000181")

Saved = dict[int, tuple[int, bytes]]  # what QEMU keeps: by type the reply's flags and the blob


class RefusedError(Exception):
    """A control command failed: what QEMU ends with."""

    def __init__(self, command: int, result: int) -> None:
        super().__init__(f"control command {command} failed with 0x{result:x}")
        self.result = result


class Machine:
    """One QEMU. `control` is the path of the control socket."""

    open: ClassVar[list["Machine"]] = []  # for tests that fail with one

    def __init__(self, control: str, timeout: float = 60.0) -> None:
        self.control = socket.socket(socket.AF_UNIX)
        Machine.open.append(self)
        self.data, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.data.settimeout(timeout)
        with theirs:
            self.control.settimeout(timeout)
            self.control.connect(control)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))]
            self.control.sendmsg([struct.pack(">I", SET_DATAFD)], rights)
            self._result(SET_DATAFD, self._receive(4))
        self.tag = self.transmit(PROBE)[:2]  # before INIT: QEMU learns the family
        self.call(GET_CAPABILITY, answer=8)

    # the control channel

    def _receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.control.recv(count - len(data))
            if not piece:
                raise ConnectionResetError("the instance went away")
            data += piece
        return data

    @staticmethod
    def _result(command: int, answer: bytes) -> bytes:
        result = int.from_bytes(answer[:4])
        if result:
            raise RefusedError(command, result)
        return answer

    def call(self, command: int, payload: bytes = b"", answer: int = 4) -> bytes:
        self.control.sendall(struct.pack(">I", command) + payload)
        return self._result(command, self._receive(answer))

    def reset(self, *, incoming: bool = False) -> None:
        """What QEMU does when the machine starts or is reset; one that waits for a state stops before INIT."""
        self.call(STOP)
        size = self.call(SET_BUFFERSIZE, bytes(4), 16)[4:8]
        self.call(STOP)
        self.call(SET_BUFFERSIZE, size, 16)
        if not incoming:
            self.call(INIT, bytes(4))

    def get(self, kind: int, offset: int = 0) -> tuple[int, bytes]:
        self.control.sendall(struct.pack(">IIII", GET_STATEBLOB, 1, kind, offset))
        result, flags, total, length = struct.unpack(">IIII", self._receive(16))
        if result and not result & RETRY:
            raise RefusedError(GET_STATEBLOB, result)
        assert total == length, "QEMU refuses a reply in pieces"
        return flags, self._receive(length)

    def save(self) -> Saved:
        """What QEMU does once its machine is stopped: it may go on afterwards, or end."""
        return {kind: self.get(kind) for kind in (PERMANENT, VOLATILE, SAVED)}

    def put(self, kind: int, flags: int, blob: bytes) -> None:
        self.control.sendall(struct.pack(">IIII", SET_STATEBLOB, flags, kind, len(blob)))
        self.control.sendall(blob)
        self._result(SET_STATEBLOB, self._receive(4))

    def restore(self, saved: Saved) -> None:
        self.call(STOP)
        for kind, (flags, blob) in sorted(saved.items()):
            if blob:
                self.put(kind, flags, blob)
        self.call(INIT, struct.pack(">I", DELETE_VOLATILE))

    def end(self, *, politely: bool = True) -> None:
        """QEMU ends: by its own SHUTDOWN, or killed."""
        if politely:
            self.call(SHUTDOWN)
        self.close()
        Machine.open.remove(self)

    def close(self) -> None:
        self.control.close()
        self.data.close()

    # the guest

    def transmit(self, command: bytes) -> bytes:
        self.data.sendall(command)
        answer = b""
        while len(answer) < 10 or len(answer) < int.from_bytes(answer[2:6]):
            piece = self.data.recv(4096)
            if not piece:
                raise ConnectionResetError("the instance went away")
            answer += piece
        return answer

    def code(self, command: bytes) -> int:
        return int.from_bytes(self.transmit(command)[6:10])

    def good(self, command: bytes) -> bytes:
        for _ in range(5):
            answer = self.transmit(command)
            if (code := int.from_bytes(answer[6:10])) != 0x922:
                break
        assert code == 0, f"response code {code:#x}"
        return answer

    def boot(self) -> None:
        """Firmware: start the TPM up."""
        self.reset()
        self.good(tpm.STARTUP_CLEAR)

    def extend(self, pcr: int, digest: bytes) -> None:
        self.good(tpm.pcr_extend(pcr, digest))

    def pcr(self, index: int) -> bytes:
        return self.good(tpm.pcr_read(index))[-32:]
