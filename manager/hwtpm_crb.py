"""The command response buffer (CRB) of a TPM at one locality, as a table of waits; see hwtpm_tis_table.

Source: PTP 6, registers TPM_LOC_*_x and TPM_CRB_*_x. Only buffers inside the locality's own page are used: they are
where a TPM of its own has them; a firmware TPM may have them elsewhere, for locality 0 only.
"""

from collections.abc import Mapping
from enum import Enum, IntFlag, auto
from typing import Any, ClassVar, Final

from manager.hwtpm_errors import TpmFailureMode
from manager.hwtpm_tis_errors import (
    CommandRefused,
    LocalityHeld,
    LocalityLost,
    LocalityRefused,
    RegistersInvalid,
    ResponseCut,
    ResponseTooLong,
    TpmStuck,
    WrongInterface,
)
from manager.hwtpm_tis_place import PAGE_BYTES, Place
from manager.hwtpm_tis_table import (
    INTERFACE_CRB,
    INTERFACE_ID,
    INTERFACE_MASK,
    NOBODY,
    Limit,
    Machine,
    Registers,
    Wait,
)
from manager.hwtpm_transport import HEADER, MAX_RESPONSE

LOC_STATE: Final = 0x00
LOC_CTRL: Final = 0x08
LOC_STS: Final = 0x0C
CTRL_REQ: Final = 0x40
CTRL_STS: Final = 0x44
CTRL_CANCEL: Final = 0x48
CTRL_START: Final = 0x4C
CMD_SIZE: Final = 0x58
CMD_LOW: Final = 0x5C
CMD_HIGH: Final = 0x60
RSP_SIZE: Final = 0x64
RSP_LOW: Final = 0x68
RSP_HIGH: Final = 0x6C
SEND: Final = "send a command"
RECEIVE: Final = "receive a response"
_ALL_ONES: Final = 0xFFFFFFFF


class LocState(IntFlag):
    """TPM_LOC_STATE_x; bits 4..2 are the number of the active locality."""

    ASSIGNED = 0x02
    VALID = 0x80


class LocCtrl(IntFlag):
    """TPM_LOC_CTRL_x, written."""

    REQUEST = 0x01
    RELINQUISH = 0x02
    SEIZE = 0x04


class LocSts(IntFlag):
    """TPM_LOC_STS_x."""

    GRANTED = 0x01
    BEEN_SEIZED = 0x02


class Request(IntFlag):
    """TPM_CRB_CTRL_REQ_x: written, and cleared by the TPM when done."""

    COMMAND_READY = 0x01
    GO_IDLE = 0x02


class ControlStatus(IntFlag):
    """TPM_CRB_CTRL_STS_x."""

    FATAL = 0x01
    IDLE = 0x02


class CrbState(Enum):
    """Where one use of the TPM is."""

    APPEARING = auto()
    ASKED = auto()
    WAITING = auto()
    SEIZING = auto()
    READYING = auto()
    RUNNING = auto()
    CANCELLING = auto()
    IDLING = auto()
    DONE = auto()


class CrbExchange(Machine[CrbState]):
    """One use of a TPM through its buffers; see Machine."""

    FIRST: ClassVar = CrbState.APPEARING
    DONE: ClassVar = CrbState.DONE
    TABLE: ClassVar[Mapping[CrbState, Wait[CrbState]]] = {
        CrbState.APPEARING: Wait("_appeared", Limit.A, "_ask", "_invalid"),
        CrbState.ASKED: Wait("_granted", Limit.A, "_use", "_seize"),
        CrbState.WAITING: Wait("_granted", Limit.COMMAND, "_use", "held"),
        CrbState.SEIZING: Wait("_granted", Limit.A, "_use", "_refused"),
        CrbState.READYING: Wait("_ready", Limit.C, "_start", "_never_ready"),
        CrbState.RUNNING: Wait("_ended", Limit.COMMAND, "_receive", "_cancel"),
        CrbState.CANCELLING: Wait("_ended", Limit.B, "_receive", "_never_ends"),
        CrbState.IDLING: Wait("_idle", Limit.C, "_finish", "_finish"),
    }

    def __init__(self, registers: Registers, place: Place, command: bytes | None, **options: Any) -> None:
        super().__init__(registers, place, command, **options)
        self._received = b""

    def abandon(self) -> None:
        """See Machine."""
        if self.state is CrbState.APPEARING or self.registers.read8(LOC_STATE) == NOBODY:
            return
        if self._is_ours() and self.registers.read32(CTRL_START):
            self.registers.write32(CTRL_CANCEL, 1)
        self._relinquish()  # a request that was not granted, too

    # --- the locality ---

    def _loc_state(self) -> int:
        return self.answering(self.registers.read32(LOC_STATE))

    def _appeared(self) -> bool:
        return bool(self._loc_state() & LocState.VALID)

    def _invalid(self) -> CrbState:
        raise RegistersInvalid(self.place, self._loc_state(), Limit.A.seconds)

    def _ask(self) -> CrbState:
        kind = self.registers.read32(INTERFACE_ID) & INTERFACE_MASK
        if kind != INTERFACE_CRB:
            raise WrongInterface(self.place, kind, "tis")
        self.registers.write32(LOC_CTRL, LocCtrl.REQUEST)
        return CrbState.ASKED

    def _is_ours(self) -> bool:
        state = self.registers.read32(LOC_STATE)
        granted = self.registers.read32(LOC_STS) & (LocSts.GRANTED | LocSts.BEEN_SEIZED) == LocSts.GRANTED
        return bool(granted and state & LocState.ASSIGNED and _active(state) == self.place.locality)

    def _granted(self) -> bool:
        self._loc_state()
        return self._is_ours()

    def _seize(self) -> CrbState:
        if not self.may_seize:
            return CrbState.WAITING
        self.seized = True
        self.registers.write32(LOC_CTRL, LocCtrl.SEIZE)
        return CrbState.SEIZING

    def _refused(self) -> CrbState:
        state = self._loc_state()
        if state & LocState.ASSIGNED and _active(state) != self.place.locality:
            raise LocalityHeld(self.place, 2 * Limit.A.seconds, f"locality {_active(state)}")
        raise LocalityRefused(self.place, f"neither requested nor seized is it granted (state 0x{state:02x})")

    def _use(self) -> CrbState:
        if self.command is None:
            self._relinquish()
            return CrbState.DONE
        self.registers.write32(CTRL_REQ, Request.COMMAND_READY)
        return CrbState.READYING

    def _relinquish(self) -> None:
        self.registers.write32(LOC_CTRL, LocCtrl.RELINQUISH)

    def _check_ours(self, doing: str) -> None:
        self._loc_state()
        if not self._is_ours():
            raise LocalityLost(self.place, doing)

    # --- the command ---

    def _control(self, doing: str) -> int:
        status = self.registers.read32(CTRL_STS)
        if status == _ALL_ONES:
            self._check_ours(doing)
        elif status & ControlStatus.FATAL:
            raise TpmFailureMode(doing, f"its control status is 0x{status:x}")
        return status

    def _ready(self) -> bool:
        pending = self.registers.read32(CTRL_REQ) & Request.COMMAND_READY
        return not (pending or self._control(SEND) & ControlStatus.IDLE)

    def _never_ready(self) -> CrbState:
        self._check_ours(SEND)
        raise TpmStuck(SEND, f"it does not get ready in {Limit.C.seconds:g} s")

    def _buffer(self, low: int, high: int, size: int, doing: str) -> tuple[int, int]:
        """Return offset and size of a buffer. Raises CommandRefused unless it lies inside our page."""
        address = self.registers.read32(high) << 32 | self.registers.read32(low)
        length = self.registers.read32(size)
        offset = address - self.place.address
        if not 0 < offset < PAGE_BYTES or not HEADER.size <= length <= PAGE_BYTES - offset:
            raise CommandRefused(
                doing, f"its buffer, {length} bytes at 0x{address:x}, is not inside the page of {self.place}"
            )
        return offset, length

    def _start(self) -> CrbState:
        assert self.command is not None, "_use"
        offset, room = self._buffer(CMD_LOW, CMD_HIGH, CMD_SIZE, SEND)
        if len(self.command) > room:
            raise CommandRefused(SEND, f"its buffer takes {room} bytes, the command has {len(self.command)}")
        self.registers.write32(CTRL_CANCEL, 0)
        self.registers.write_bytes(offset, self.command)
        self.registers.write32(CTRL_START, 1)
        return CrbState.RUNNING

    def _ended(self) -> bool:
        self._control(RECEIVE)
        self._check_ours(RECEIVE)
        return self.registers.read32(CTRL_START) == 0

    def _cancel(self) -> CrbState:
        self.cancelled = True
        self.registers.write32(CTRL_CANCEL, 1)
        return CrbState.CANCELLING

    def _never_ends(self) -> CrbState:
        raise TimeoutError

    # --- the response ---

    def _receive(self) -> CrbState:
        offset, room = self._buffer(RSP_LOW, RSP_HIGH, RSP_SIZE, RECEIVE)
        head = self.registers.read_bytes(offset, HEADER.size)
        length = int(HEADER.unpack(head)[1])
        if length < HEADER.size:
            raise ResponseCut(RECEIVE, f"its header tells {length} bytes")
        if length > min(room, MAX_RESPONSE):
            raise ResponseTooLong(RECEIVE, f"its header tells {length} bytes, its buffer has {room}")
        self._received = head + self.registers.read_bytes(offset + HEADER.size, length - HEADER.size)
        self.registers.write32(CTRL_CANCEL, 0)
        self.registers.write32(CTRL_REQ, Request.GO_IDLE)
        return CrbState.IDLING

    def _idle(self) -> bool:
        return not self.registers.read32(CTRL_REQ) & Request.GO_IDLE

    def _finish(self) -> CrbState:
        # A TPM that does not get idle has answered all the same; the next command finds out if it is stuck.
        self._relinquish()
        self.conclude(self._received)
        return CrbState.DONE


def _active(state: int) -> int:
    """Return the active locality of a TPM_LOC_STATE_x, bits 4..2."""
    return state >> 2 & 0x07
