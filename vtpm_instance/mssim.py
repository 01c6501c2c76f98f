"""The two ports of the TCG's TPM simulator, for tpm2-tss' mssim TCTI and IBM's TSS. Sans-IO, as the other sessions.

The command port carries TPM commands and the handshake, the platform port switches the machine's signals. Every request
is a big-endian u32 with a fixed rest; every answer ends with a u32 zero. What makes no sense here (physical presence,
non-volatile memory, the key cache) is acknowledged: clients send it always.
Source: TPM 2.0 reference implementation, TpmTcpProtocol.h and TcpServer.c; tpm2-tss, tcti-mssim.c.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Final

from frontend_backend.tpmhdr import HEADER_SIZE, MAX_COMMAND, ResponseCode, error_response
from vtpm_instance.control_machine import InitFlags, Machine
from vtpm_instance.framing import with_prefix
from vtpm_instance.sessions import DataServer
from vtpm_instance.vtpm import wrong_size_response

_NUMBER: Final = struct.Struct(">I")
_DONE: Final = bytes(4)
_RECEIVED: Final = bytearray(16 * 1024)  # bytes received at once; one for all, as it is used at once
_SERVER_VERSION: Final = 1
_ENDPOINT: Final = 1  # tpmPlatformAvailable


class Signal(IntEnum):
    """Requests of both ports (TpmTcpProtocol.h)."""

    POWER_ON = 1
    POWER_OFF = 2
    PHYS_PRES_ON = 3
    PHYS_PRES_OFF = 4
    HASH_START = 5
    HASH_DATA = 6
    HASH_END = 7
    SEND_COMMAND = 8
    CANCEL_ON = 9
    CANCEL_OFF = 10
    NV_ON = 11
    NV_OFF = 12
    KEY_CACHE_ON = 13
    KEY_CACHE_OFF = 14
    REMOTE_HANDSHAKE = 15
    RESET = 17
    RESTART = 18
    SESSION_END = 20
    STOP = 21


@dataclass(frozen=True, slots=True)
class _Entry:
    """One request: `fixed` bytes follow, then as many as the last u32 of these says if `counted`."""

    serve: Callable[["MssimSession", bytes, bytes], bytes]  # of session, fixed part, counted part
    fixed: int = 0
    counted: bool = False
    alone: bool = False  # whether it has to wait until no TPM command runs


def _acknowledge(_session: "MssimSession", _fixed: bytes, _body: bytes) -> bytes:
    return _DONE


def _end(session: "MssimSession", _fixed: bytes, _body: bytes) -> bytes:
    return session.give_up()


def _power_on(session: "MssimSession", _fixed: bytes, _body: bytes) -> bytes:
    return _DONE if session.machine.running else _reset(session, b"", b"")


def _power_off(session: "MssimSession", _fixed: bytes, _body: bytes) -> bytes:
    return _NUMBER.pack(session.machine.power_off())


def _reset(session: "MssimSession", _fixed: bytes, _body: bytes) -> bytes:
    return _NUMBER.pack(session.machine.power_on(InitFlags.DELETE_VOLATILE))


def _cancel(session: "MssimSession", _fixed: bytes, _body: bytes) -> bytes:
    session.machine.cancel()
    return _DONE


def _handshake(_session: "MssimSession", _fixed: bytes, _body: bytes) -> bytes:
    return _NUMBER.pack(_SERVER_VERSION) + _NUMBER.pack(_ENDPOINT) + _DONE


def _hash_start(session: "MssimSession", _fixed: bytes, _body: bytes) -> bytes:
    return _NUMBER.pack(session.machine.hash_start())


def _hash_data(session: "MssimSession", _fixed: bytes, body: bytes) -> bytes:
    return _NUMBER.pack(session.machine.hash_data(body))


def _hash_end(session: "MssimSession", _fixed: bytes, _body: bytes) -> bytes:
    return _NUMBER.pack(session.machine.hash_end())


def _send_command(session: "MssimSession", fixed: bytes, command: bytes) -> bytes:
    server = session.server
    if len(command) < HEADER_SIZE:
        return with_prefix(wrong_size_response(server.vtpm.family))
    if server.set_locality(fixed[0]):
        return with_prefix(error_response(server.vtpm.family, ResponseCode.LOCALITY))
    return with_prefix(server.vtpm.execute(command, server.locality))


COMMAND_PORT: Final = {
    Signal.HASH_START: _Entry(_hash_start),
    Signal.HASH_DATA: _Entry(_hash_data, 4, counted=True),
    Signal.HASH_END: _Entry(_hash_end),
    Signal.SEND_COMMAND: _Entry(_send_command, 5, counted=True),
    Signal.REMOTE_HANDSHAKE: _Entry(_handshake, 4),
    Signal.SESSION_END: _Entry(_end),
    Signal.STOP: _Entry(_end),  # the vTPM has others to serve
}
PLATFORM_PORT: Final = {
    Signal.POWER_ON: _Entry(_power_on, alone=True),
    Signal.POWER_OFF: _Entry(_power_off, alone=True),
    **dict.fromkeys((Signal.PHYS_PRES_ON, Signal.PHYS_PRES_OFF, Signal.NV_ON, Signal.NV_OFF), _Entry(_acknowledge)),
    **dict.fromkeys((Signal.KEY_CACHE_ON, Signal.KEY_CACHE_OFF, Signal.CANCEL_OFF), _Entry(_acknowledge)),
    Signal.CANCEL_ON: _Entry(_cancel),
    Signal.RESET: _Entry(_reset, alone=True),
    Signal.RESTART: _Entry(_reset, alone=True),
    Signal.SESSION_END: _Entry(_end),
    Signal.STOP: _Entry(_end),
}


class MssimSession:
    """One connection to one of the two ports; `table` says which. What it does not know ends it."""

    note: ClassVar[int] = 0
    buffer: ClassVar[bytearray] = _RECEIVED

    def __init__(self, table: dict[Signal, _Entry], server: DataServer, machine: Machine) -> None:
        """Serve `server`'s vTPM and its `machine`."""
        self.server, self.machine, self._table = server, machine, table
        self._bytes = bytearray()
        self.closing = self.held = False

    @property
    def pending(self) -> bool:
        """Whether bytes are there that no answer was given to."""
        return bool(self._bytes)

    def take_up(self, note: int) -> None:
        """Go on where another session was; between two requests there is nothing to know."""

    def end(self) -> None:
        """Nothing is kept that would have to be given back."""

    def exchange(self, size: int) -> bytes | None:
        """Take what was received, then do as `next_answer`."""
        self._bytes += _RECEIVED[:size]
        return self.next_answer()

    def next_answer(self) -> bytes | None:
        """Serve the next whole request and return its answer, empty when it was the last; None until more is there."""
        if self.closing or len(self._bytes) < _NUMBER.size:
            return None
        entry = self._table.get(_NUMBER.unpack_from(self._bytes)[0])
        if entry is None:
            return self.give_up()
        begin = _NUMBER.size + entry.fixed
        whole = len(self._bytes) >= begin
        length = _NUMBER.unpack_from(self._bytes, begin - _NUMBER.size)[0] if entry.counted and whole else 0
        if length > MAX_COMMAND:
            return self.give_up()
        whole = whole and len(self._bytes) >= begin + length
        self.held = whole and entry.alone and self.machine.busy
        if self.held or not whole:
            return None
        fixed, body = bytes(self._bytes[_NUMBER.size : begin]), bytes(self._bytes[begin : begin + length])
        del self._bytes[: begin + length]
        return entry.serve(self, fixed, body)

    def give_up(self) -> bytes:
        """End the connection, without an answer."""
        self._bytes.clear()
        self.closing = True
        return b""
