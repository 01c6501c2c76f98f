"""The control channel's table: every command's payload, what serves it, who may ask, and how it fails. No I/O.

A request is a big-endian u32 command number and a payload; an answer starts with a big-endian u32 result. The table
only grows. Source: swtpm's tpm_ioctl.h; reference/swtpm-libtpms-qemu.md 1.2-1.4; docs/control-channel.md has the part
"who may ask what", generated from here.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, reduce
from operator import or_
from typing import Final, Protocol

from frontend_backend.tpmhdr import TpmFamily
from vtpm_instance.control_machine import Machine, Result
from vtpm_instance.front_ends import FrontEnd, Role

NUMBER: Final = struct.Struct(">I")
MAX_BLOB: Final = 512 * 1024  # bytes of a state blob that is put in; swtpm takes as many
_MAX_INFO: Final = 3072  # characters of one GET_INFO answer; swtpm gives as many
_TWO: Final = struct.Struct(">II")
_THREE: Final = struct.Struct(">III")
_FOUR: Final = struct.Struct(">IIII")
_ESTABLISHED: Final = struct.Struct(">IB3x")
_INFO_REQUEST: Final = struct.Struct(">QI4x")
_PREFIX_CAPABILITY: Final = 1 << 15  # PTM_CAP_SEND_COMMAND_HEADER: the TCG prefix on the data channel, TPM 2.0 only


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


class Conversation(Protocol):
    """What a handler needs of its session."""

    front_end: FrontEnd
    family: TpmFamily
    machine: Machine
    is_platform: bool  # whether SET_DATAFD came from here: when this one ends, the TPM's platform is gone

    def take_descriptor(self) -> int | None:
        """Return the one descriptor that came along, which is the caller's then; None if there are none or more."""

    def blob(self, kind: int, flags: int, offset: int) -> tuple[int, int, bytes]:
        """Return what `Machine.get_blob` does; from an offset, pieces of one and the same blob."""


@dataclass(slots=True)
class Body:
    """A body on its way: `left` bytes are to come; `take` is given each piece, `finish` returns the answer.

    `alone`: it has to wait while a TPM command runs.
    """

    left: int
    take: Callable[[bytes], None]
    finish: Callable[[], bytes]
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """A payload: `fixed` bytes; then as many as the u32 at `counted_at` says, and up to 3 bytes if `padded`."""

    fixed: int = 0
    counted_at: int | None = None
    padded: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One command: its payload, what serves it, and who may ask for it by front end.

    One with a counted payload has `begin` in place of `handler`. `running`: it is refused while the TPM is off.
    `failure`: bytes of an answer that says it failed; QEMU reads the whole head of a blob whatever the result is.
    """

    layout: Layout = Layout()
    handler: Callable[[Conversation, bytes], bytes] | None = None
    begin: Callable[[Conversation, bytes, int], Body] | None = None
    allowed: frozenset[tuple[FrontEnd, Role]] = frozenset()
    capability: int = 0  # bit of the GET_CAPABILITY answer (PTM_CAP_*)
    alone: bool = False  # whether it has to wait until no TPM command runs
    running: bool = False
    failure: int = NUMBER.size

    def refusal(self, code: int) -> bytes:
        """Return the answer that says it failed with `code`."""
        return NUMBER.pack(code).ljust(self.failure, b"\0")


def refused_body(entry: Entry, left: int, code: int = Result.BAD_ORDINAL) -> Body:
    """Return the body of a command that is not served: read it, keep nothing, so that the stream stays in step."""
    return Body(left, lambda _piece: None, lambda: entry.refusal(code))


def _get_capability(session: Conversation, _payload: bytes) -> bytes:
    return _TWO.pack(Result.SUCCESS, capabilities(session.front_end, session.family))


def _init(session: Conversation, payload: bytes) -> bytes:
    return NUMBER.pack(session.machine.power_on(NUMBER.unpack(payload)[0]))


def _get_established(session: Conversation, _payload: bytes) -> bytes:
    result, bit = session.machine.established()
    return NUMBER.pack(result) if result else _ESTABLISHED.pack(result, bit)


def _set_locality(session: Conversation, payload: bytes) -> bytes:
    return NUMBER.pack(session.machine.set_locality(payload[0]))


def _cancel(session: Conversation, _payload: bytes) -> bytes:
    # libtpms knows no cancel for TPM 1.2, whose answer swtpm passes on
    return NUMBER.pack(Result.SUCCESS if session.machine.cancel() else Result.FAIL)


def _reset_established(session: Conversation, payload: bytes) -> bytes:
    return NUMBER.pack(session.machine.reset_established(payload[0]))


def _plain(name: str) -> Callable[[Conversation, bytes], bytes]:
    """Serve a command that has no payload and nothing to answer but its result."""

    def serve(session: Conversation, _payload: bytes) -> bytes:
        act: Callable[[], int] = getattr(session.machine, name)
        return NUMBER.pack(act())

    return serve


def _hash_data(session: Conversation, _payload: bytes, left: int) -> Body:
    machine, results = session.machine, [int(Result.SUCCESS)]

    def take(piece: bytes) -> None:
        results.append(results[-1] or machine.hash_data(piece))

    return Body(left, take, lambda: NUMBER.pack(results[-1]), alone=True)


def _get_stateblob(session: Conversation, payload: bytes) -> bytes:
    flags, kind, offset = _THREE.unpack(payload)
    result, reply_flags, content = session.blob(kind, flags, offset)
    if result:
        return _FOUR.pack(result, 0, 0, 0)
    piece = memoryview(content)[offset:]  # never in pieces: QEMU refuses a blob that does not come as a whole
    return b"".join((_FOUR.pack(result, reply_flags, len(piece), len(piece)), piece))


def _set_stateblob(session: Conversation, payload: bytes, left: int) -> Body:
    flags, kind, _ = _THREE.unpack(payload)
    machine, content = session.machine, bytearray()
    if machine.running:
        return refused_body(TABLE[Command.SET_STATEBLOB], left)
    if left > MAX_BLOB:
        return refused_body(TABLE[Command.SET_STATEBLOB], left, Result.FAIL)
    return Body(left, content.extend, lambda: NUMBER.pack(machine.set_blob(kind, flags, bytes(content))), alone=True)


def _get_config(session: Conversation, _payload: bytes) -> bytes:
    return _TWO.pack(Result.SUCCESS, session.machine.config())


def _set_datafd(session: Conversation, _payload: bytes) -> bytes:
    descriptor = session.take_descriptor()
    if descriptor is None:
        return NUMBER.pack(Result.BAD_PARAMETER)
    result = session.machine.take_data_descriptor(descriptor)
    session.is_platform = session.is_platform or not result
    return NUMBER.pack(result)


def _set_buffersize(session: Conversation, payload: bytes) -> bytes:
    result, *sizes = session.machine.buffer_size(NUMBER.unpack(payload)[0])
    return NUMBER.pack(result) if result else _FOUR.pack(result, *sizes)


def _get_info(session: Conversation, payload: bytes) -> bytes:
    flags, offset = _INFO_REQUEST.unpack(payload)
    result, text = session.machine.info(flags)
    if result or offset >= len(text) - 1:
        return NUMBER.pack(result or Result.BAD_PARAMETER)
    piece = text[offset : offset + _MAX_INFO]
    return _THREE.pack(result, len(text), len(piece)) + piece


def _lock_storage(session: Conversation, payload: bytes) -> bytes:
    return NUMBER.pack(session.machine.lock_storage(NUMBER.unpack(payload)[0]))


_ANYONE: Final = frozenset((front, role) for front in FrontEnd for role in Role)
_SWTPM: Final = frozenset((FrontEnd.SWTPM, role) for role in Role)  # whoever can connect, as with swtpm
_OWNERS: Final = _SWTPM | {(front, Role.OWNER) for front in FrontEnd}
_PLATFORM: Final = _SWTPM | {(FrontEnd.QEMU, Role.OWNER)}
_GUESTS: Final = _ANYONE - {(FrontEnd.QEMU, Role.OTHER)}  # the user of the socket; QEMU's belong to QEMU alone

TABLE: Final[dict[Command, Entry]] = {
    Command.GET_CAPABILITY: Entry(handler=_get_capability, allowed=_ANYONE),
    Command.INIT: Entry(Layout(4), _init, allowed=_OWNERS, capability=1 << 0, alone=True),
    Command.SHUTDOWN: Entry(handler=_plain("shutdown"), allowed=_PLATFORM, capability=1 << 1, alone=True),
    Command.GET_TPMESTABLISHED: Entry(handler=_get_established, allowed=_GUESTS, capability=1 << 2, alone=True),
    Command.SET_LOCALITY: Entry(Layout(1, padded=True), _set_locality, allowed=_GUESTS, capability=1 << 3),
    Command.HASH_START: Entry(
        handler=_plain("hash_start"), allowed=_PLATFORM, capability=1 << 4, alone=True, running=True
    ),
    Command.HASH_DATA: Entry(
        Layout(4, counted_at=0), begin=_hash_data, allowed=_PLATFORM, capability=1 << 4, alone=True, running=True
    ),
    Command.HASH_END: Entry(handler=_plain("hash_end"), allowed=_PLATFORM, capability=1 << 4, alone=True, running=True),
    Command.CANCEL_TPM_CMD: Entry(handler=_cancel, allowed=_GUESTS, capability=1 << 5, running=True),
    Command.STORE_VOLATILE: Entry(
        handler=_plain("store_volatile"), allowed=_SWTPM, capability=1 << 6, alone=True, running=True
    ),
    Command.RESET_TPMESTABLISHED: Entry(
        Layout(1, padded=True), _reset_established, allowed=_PLATFORM, capability=1 << 7, alone=True, running=True
    ),
    Command.GET_STATEBLOB: Entry(
        Layout(12), _get_stateblob, allowed=_PLATFORM, capability=1 << 8, alone=True, running=True, failure=_FOUR.size
    ),
    Command.SET_STATEBLOB: Entry(
        Layout(12, counted_at=8), begin=_set_stateblob, allowed=_PLATFORM, capability=1 << 9, alone=True
    ),
    Command.STOP: Entry(handler=_plain("power_off"), allowed=_PLATFORM, capability=1 << 10, alone=True),
    Command.GET_CONFIG: Entry(handler=_get_config, allowed=_ANYONE, capability=1 << 11),
    Command.SET_DATAFD: Entry(handler=_set_datafd, allowed=_PLATFORM, capability=1 << 12, alone=True),
    Command.SET_BUFFERSIZE: Entry(Layout(4), _set_buffersize, allowed=_GUESTS, capability=1 << 13, alone=True),
    Command.GET_INFO: Entry(Layout(16), _get_info, allowed=_ANYONE, capability=1 << 14, alone=True),
    Command.LOCK_STORAGE: Entry(Layout(4), _lock_storage, allowed=_PLATFORM, capability=1 << 16, alone=True),
}


# By the number as it stands in a request: those whose length is known beforehand.
FIXED: Final = {NUMBER.pack(command): entry for command, entry in TABLE.items() if entry.layout.counted_at is None}


@cache
def capabilities(front_end: FrontEnd, family: TpmFamily = TpmFamily.TPM_2_0) -> int:
    """Return the capability bits of what the table offers the owner of a vTPM attached as `front_end`."""
    served = [entry.capability for entry in TABLE.values() if (front_end, Role.OWNER) in entry.allowed]
    return reduce(or_, served, _PREFIX_CAPABILITY if family is TpmFamily.TPM_2_0 else 0)
