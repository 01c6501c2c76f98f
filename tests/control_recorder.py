"""A machine for control sessions that writes down what it is asked, and who may ask it by hand, beside the table."""

import os
import struct
from collections.abc import Iterable, Iterator

from frontend_backend.tpmhdr import TpmFamily
from vtpm_instance.control import Command, ControlSession, FrontEnd, Role

BLOB = bytes(range(256)) * 5
INFO = b'{"a":"' + b"x" * 5000 + b'"}\0'


class Recorder:
    """A machine that does nothing; `result` is what every command has for an answer."""

    def __init__(self, *, running: bool = True) -> None:
        self.done: list[object] = []
        self.result = 0
        self.running = running
        self.busy = False
        self.can_cancel = True

    def _note(self, *what: object) -> int:
        self.done.append(what[0] if len(what) == 1 else what)
        return self.result

    def power_on(self, flags: int) -> int:
        return self._note("power_on", flags)

    def power_off(self) -> int:
        return self._note("power_off")

    def shutdown(self) -> int:
        return self._note("shutdown")

    def set_locality(self, locality: int) -> int:
        return self._note("set_locality", locality)

    def cancel(self) -> bool:
        self._note("cancel")
        return self.can_cancel

    def established(self) -> tuple[int, int]:
        return self._note("established"), 1

    def reset_established(self, locality: int) -> int:
        return self._note("reset_established", locality)

    def hash_start(self) -> int:
        return self._note("hash_start")

    def hash_data(self, data: bytes) -> int:
        if self.done and isinstance(self.done[-1], tuple) and self.done[-1][0] == "hash_data":
            data = self.done.pop()[1] + data  # type: ignore[index] # in which pieces it comes is not said
        return self._note("hash_data", data)

    def hash_end(self) -> int:
        return self._note("hash_end")

    def store_volatile(self) -> int:
        return self._note("store_volatile")

    def get_blob(self, kind: int, flags: int) -> tuple[int, int, bytes]:
        result = self._note("get_blob", kind, flags)
        return result, 0 if result else 2, b"" if result else BLOB

    def set_blob(self, kind: int, flags: int, data: bytes) -> int:
        return self._note("set_blob", kind, flags, data)

    def config(self) -> int:
        self._note("config")
        return 3

    def info(self, flags: int) -> tuple[int, bytes]:
        return self._note("info", flags), INFO

    def buffer_size(self, wanted: int) -> tuple[int, int, int, int]:
        return self._note("buffer_size", wanted), 4096, 2808, 4096

    def take_data_descriptor(self, descriptor: int) -> int:
        os.close(descriptor)
        return self._note("take_data_descriptor")

    def lock_storage(self, retries: int) -> int:
        return self._note("lock_storage", retries)


def number(command: int, payload: bytes = b"") -> bytes:
    """Return a request."""
    return struct.pack(">I", command) + payload


def answers(session: ControlSession, *pieces: bytes) -> list[bytes]:
    """Return the answers to what comes in these pieces."""
    out = []
    for piece in pieces:
        session.feed(piece)
        while (answer := session.next_answer()) is not None:
            out.append(answer)
    return out


def session_of(
    front: FrontEnd = FrontEnd.SWTPM,
    role: Role = Role.OWNER,
    *,
    running: bool = True,
    family: TpmFamily = TpmFamily.TPM_2_0,
) -> tuple[ControlSession, Recorder]:
    """Return a session and what it acts on."""
    machine = Recorder(running=running)
    return ControlSession(front, role, machine, family), machine


def cut(stream: bytes, at: Iterable[int]) -> Iterator[bytes]:
    """Cut a stream in pieces, at these lengths in turn."""
    lengths = list(at)
    turn = 0
    while stream:
        length = lengths[turn % len(lengths)]
        yield stream[:length]
        stream = stream[length:]
        turn += 1


# The nineteen, each as one whole request that makes sense.
REQUESTS = {
    Command.GET_CAPABILITY: number(0x01),
    Command.INIT: number(0x02, bytes(4)),
    Command.SHUTDOWN: number(0x03),
    Command.GET_TPMESTABLISHED: number(0x04),
    Command.SET_LOCALITY: number(0x05, b"\0"),
    Command.HASH_START: number(0x06),
    Command.HASH_DATA: number(0x07, struct.pack(">I", 3) + b"abc"),
    Command.HASH_END: number(0x08),
    Command.CANCEL_TPM_CMD: number(0x09),
    Command.STORE_VOLATILE: number(0x0A),
    Command.RESET_TPMESTABLISHED: number(0x0B, b"\3"),
    Command.GET_STATEBLOB: number(0x0C, struct.pack(">III", 1, 1, 0)),
    Command.SET_STATEBLOB: number(0x0D, struct.pack(">III", 0, 2, 4) + b"blob"),
    Command.STOP: number(0x0E),
    Command.GET_CONFIG: number(0x0F),
    Command.SET_DATAFD: number(0x10),
    Command.SET_BUFFERSIZE: number(0x11, struct.pack(">I", 0)),
    Command.GET_INFO: number(0x12, struct.pack(">QII", 1, 0, 0)),
    Command.LOCK_STORAGE: number(0x13, struct.pack(">I", 300)),
}
