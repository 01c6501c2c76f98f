"""The control channel of swtpm, sans-IO: bytes in, answers out, one declarative table.

A request is a big-endian u32 command number and a payload whose layout the table gives; an answer starts with a
big-endian u32 result. What is known but not offered is answered with TPM_BAD_ORDINAL after its payload was read, so
that the stream stays in step. The table says who may ask: the front end the vTPM is attached with, and the role of
the peer that the kernel vouches for. It only grows.

Source: swtpm's tpm_ioctl.h; reference/swtpm-libtpms-qemu.md 1.1-1.4.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final, Protocol

NUMBER: Final = struct.Struct(">I")
_WORD: Final = 4  # bytes of a command number, result or length
_PADDING: Final = 3  # bytes QEMU sends after a one-byte locality


class Command(IntEnum):
    """Command numbers (CMD_* in tpm_ioctl.h)."""

    GET_CAPABILITY = 0x01
    INIT = 0x02
    SHUTDOWN = 0x03
    GET_TPMESTABLISHED = 0x04
    SET_LOCALITY = 0x05
    HASH_START = 0x06
    HASH_DATA = 0x07
    HASH_END = 0x08
    CANCEL_TPM_CMD = 0x09
    STORE_VOLATILE = 0x0A
    RESET_TPMESTABLISHED = 0x0B
    GET_STATEBLOB = 0x0C
    SET_STATEBLOB = 0x0D
    STOP = 0x0E
    GET_CONFIG = 0x0F
    SET_DATAFD = 0x10
    SET_BUFFERSIZE = 0x11
    GET_INFO = 0x12
    LOCK_STORAGE = 0x13


class Result(IntEnum):
    """Results, TPM 1.2 numbers for both families."""

    SUCCESS = 0x00
    FAIL = 0x09
    BAD_ORDINAL = 0x0A
    BAD_LOCALITY = 0x3D


class Role(Enum):
    """Who is at the other end of a control connection."""

    OWNER = "owner"  # root, the manager's user, or the user that owns the socket
    OTHER = "other"


class FrontEnd(Enum):
    """How a vTPM is attached; the value is what Spawn carries."""

    SOCKET = "socket"
    QEMU = "qemu"
    RING = "ring"
    PROXY = "proxy"
    XEN = "xen"


class Machine(Protocol):
    """What control commands act on."""

    def set_locality(self, locality: int) -> bool:
        """Use `locality` (0 to 255) for the data channel; returns False when it is not allowed."""

    def platform_reset(self) -> bool:
        """Reset the platform of the vTPM; returns False when the vTPM did not come up."""

    def cancel(self) -> bool:
        """Have the TPM command that runs give up, if there is one; returns False where that cannot be done."""

    @property
    def busy(self) -> bool:
        """Whether a TPM command runs, so that the vTPM cannot be reset."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A payload: `fixed` bytes; then as many as the u32 at `counted_at` says, and up to 3 bytes if `padded`."""

    fixed: int = 0
    counted_at: int | None = None
    padded: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One command: its payload, what serves it, and who may ask for it by front end."""

    layout: Layout = Layout()
    handler: Callable[["ControlSession", bytes], bytes] | None = None
    allowed: frozenset[tuple[FrontEnd, Role]] = frozenset()
    capability: int = 0  # bit of the GET_CAPABILITY answer (PTM_CAP_*)
    alone: bool = False  # whether it has to wait until no TPM command runs


def _result(code: Result) -> bytes:
    return NUMBER.pack(code)


def _get_capability(session: "ControlSession", _payload: bytes) -> bytes:
    return _result(Result.SUCCESS) + NUMBER.pack(capabilities(session.front_end))


def _init(session: "ControlSession", _payload: bytes) -> bytes:
    return _result(Result.SUCCESS if session.machine.platform_reset() else Result.FAIL)


def _set_locality(session: "ControlSession", payload: bytes) -> bytes:
    return _result(Result.SUCCESS if session.machine.set_locality(payload[0]) else Result.BAD_LOCALITY)


def _cancel(session: "ControlSession", _payload: bytes) -> bytes:
    # libtpms knows no cancel for TPM 1.2, whose answer swtpm passes on
    return _result(Result.SUCCESS if session.machine.cancel() else Result.FAIL)


_OWNERS: Final = frozenset((front, Role.OWNER) for front in FrontEnd)
_ANYONE: Final = frozenset((front, role) for front in FrontEnd for role in Role)

TABLE: Final[dict[Command, Entry]] = {
    Command.GET_CAPABILITY: Entry(handler=_get_capability, allowed=_ANYONE),
    Command.INIT: Entry(Layout(4), _init, _OWNERS, capability=1 << 0, alone=True),
    Command.SHUTDOWN: Entry(),
    Command.GET_TPMESTABLISHED: Entry(),
    Command.SET_LOCALITY: Entry(Layout(1, padded=True), _set_locality, _ANYONE, capability=1 << 3),
    Command.HASH_START: Entry(),
    Command.HASH_DATA: Entry(Layout(4, counted_at=0)),
    Command.HASH_END: Entry(),
    Command.CANCEL_TPM_CMD: Entry(handler=_cancel, allowed=_ANYONE, capability=1 << 5),
    Command.STORE_VOLATILE: Entry(),
    Command.RESET_TPMESTABLISHED: Entry(Layout(1, padded=True)),
    Command.GET_STATEBLOB: Entry(Layout(12)),
    Command.SET_STATEBLOB: Entry(Layout(12, counted_at=8)),
    Command.STOP: Entry(),
    Command.GET_CONFIG: Entry(),
    Command.SET_DATAFD: Entry(),
    Command.SET_BUFFERSIZE: Entry(Layout(4)),
    Command.GET_INFO: Entry(Layout(16)),
    Command.LOCK_STORAGE: Entry(Layout(4)),
}


def capabilities(front_end: FrontEnd) -> int:
    """Return the capability bits of what the table offers a vTPM attached as `front_end`."""
    served = (entry for entry in TABLE.values() if entry.handler and (front_end, Role.OWNER) in entry.allowed)
    return sum(entry.capability for entry in served)


class ControlSession:
    """One control connection: feed bytes, take answers. A command waits until its last payload byte is there."""

    def __init__(self, front_end: FrontEnd, role: Role, machine: Machine) -> None:
        """Serve a peer in `role`, acting on `machine`."""
        self.front_end, self.role, self.machine = front_end, role, machine
        self._buffer = b""
        self._skip = 0  # bytes of a refused body that are still to come
        self._may_pad = False
        self.held = False  # a whole command waits until the vTPM is not busy

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._buffer += data

    @property
    def pending(self) -> bool:
        """Whether bytes are there that no answer was given to, or a body is still to come."""
        return bool(self._buffer or self._skip)

    @property
    def note(self) -> int:
        """What the next session on the same connection has to know, when nothing is pending: see `take_up`."""
        return int(self._may_pad)

    def take_up(self, note: int) -> None:
        """Go on where the session was that had this note."""
        self._may_pad = bool(note & 1)

    def next_answer(self) -> bytes | None:
        """Execute the next whole command and return its answer, or None until more is fed."""
        if self._skip:
            return self._skip_body()
        if not self._drop_padding():
            return None
        if len(self._buffer) < _WORD:
            return None
        number = NUMBER.unpack_from(self._buffer)[0]
        try:
            entry = TABLE[Command(number)]
        except ValueError:
            # Its payload's length is unknown: like swtpm, take what came with it.
            self._buffer = b""
            return _result(Result.BAD_ORDINAL)
        end = _WORD + entry.layout.fixed
        whole = len(self._buffer) >= end
        self.held = whole and entry.alone and self.machine.busy
        if self.held or not whole:
            return None
        return self._execute(entry, self._take(end)[_WORD:])

    def _execute(self, entry: Entry, payload: bytes) -> bytes | None:
        self._may_pad = entry.layout.padded
        if entry.layout.counted_at is not None:
            # Commands with a body are not offered yet: read it, keep nothing.
            self._skip = NUMBER.unpack_from(payload, entry.layout.counted_at)[0]
            return self._skip_body()
        if entry.handler is None or (self.front_end, self.role) not in entry.allowed:
            return _result(Result.BAD_ORDINAL)
        return entry.handler(self, payload)

    def _take(self, count: int) -> bytes:
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def _skip_body(self) -> bytes | None:
        self._skip -= len(self._take(self._skip))
        return None if self._skip else _result(Result.BAD_ORDINAL)

    def _drop_padding(self) -> bool:
        """Remove the bytes QEMU sends after a locality; returns False while more must come to tell.

        Command numbers start with three zero bytes and a fourth that is not; padding is three bytes, and those that
        come in one piece with their command may hold anything.
        """
        if not self._may_pad or not self._buffer:
            return True
        if len(self._buffer) == _PADDING and any(self._buffer):
            self._take(_PADDING)
        elif len(self._buffer) < _WORD:
            return False
        elif not any(self._buffer[:_WORD]) or any(self._buffer[:_PADDING]):
            self._take(_PADDING)
        self._may_pad = False
        return True
