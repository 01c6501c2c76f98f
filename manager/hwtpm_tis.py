"""The FIFO interface (TIS) of a TPM at one locality, as a table of waits. No I/O, no clock: see hwtpm_tis_table.

Source: PTP 6, registers TPM_ACCESS_x, TPM_STS_x, TPM_DATA_FIFO_x; the order of steps as Linux's tpm_tis_core.c and
Mini-OS's tpm_tis.c have it. All accesses are a byte wide.
"""

from collections.abc import Mapping
from enum import Enum, auto
from typing import Any, ClassVar, Final

from manager.hwtpm_tis_errors import (
    CommandRefused,
    LocalityHeld,
    LocalityLost,
    LocalityRefused,
    NoTpmAtPage,
    RegistersInvalid,
    ResponseCut,
    ResponseTooLong,
    TpmStuck,
    WrongInterface,
)
from manager.hwtpm_tis_place import Place
from manager.hwtpm_tis_registers import (
    ACCESS,
    BURST_HIGH,
    BURST_LOW,
    COMMAND_CANCEL,
    FIFO,
    STS,
    STS_CANCEL,
    Access,
    Status,
)
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

SEND: Final = "send a command"
RECEIVE: Final = "receive a response"


class FifoState(Enum):
    """Where one use of the TPM is."""

    APPEARING = auto()
    ASKED = auto()
    WAITING = auto()
    SEIZING = auto()
    READYING = auto()
    READYING_AGAIN = auto()
    SENDING = auto()
    SENT = auto()
    RUNNING = auto()
    CANCELLING = auto()
    RECEIVING = auto()
    RETRYING = auto()
    RECEIVED = auto()
    DONE = auto()


class FifoExchange(Machine[FifoState]):
    """One use of a TPM through its FIFO; see Machine."""

    FIRST: ClassVar = FifoState.APPEARING
    DONE: ClassVar = FifoState.DONE
    TABLE: ClassVar[Mapping[FifoState, Wait[FifoState]]] = {
        FifoState.APPEARING: Wait("_appeared", Limit.A, "_ask", "_invalid"),
        FifoState.ASKED: Wait("_granted", Limit.A, "_use", "_seize"),
        FifoState.WAITING: Wait("_granted", Limit.COMMAND, "_use", "held"),
        FifoState.SEIZING: Wait("_granted", Limit.A, "_use", "_refused"),
        FifoState.READYING: Wait("_ready", Limit.B, "_begin", "_ready_again"),
        FifoState.READYING_AGAIN: Wait("_ready", Limit.B, "_begin", "_never_ready"),
        FifoState.SENDING: Wait("_has_room", Limit.D, "_send", "_no_room"),
        FifoState.SENT: Wait("_taken", Limit.C, "_go", "_wants_more"),
        FifoState.RUNNING: Wait("_has_data", Limit.COMMAND, "_answered", "_cancel"),
        FifoState.CANCELLING: Wait("_has_data", Limit.B, "_answered", "_never_ends"),
        FifoState.RECEIVING: Wait("_has_data_or_end", Limit.D, "_receive", "_no_data"),
        FifoState.RETRYING: Wait("_has_data", Limit.D, "_answered", "_cut"),
        FifoState.RECEIVED: Wait("_is_empty", Limit.C, "_finish", "_says_more"),
    }

    def __init__(self, registers: Registers, place: Place, command: bytes | None, **options: Any) -> None:
        super().__init__(registers, place, command, **options)
        self._sent = 0
        self._room = 0  # bytes that may be moved now
        self._received = bytearray()
        self._retried = False

    def abandon(self) -> None:
        """See Machine."""
        access = self.registers.read8(ACCESS)
        if access == NOBODY or not access & Access.VALID:
            return
        if access & Access.ACTIVE:
            self._relinquish()
        elif access & Access.REQUEST_USE:
            self.registers.write8(ACCESS, Access.ACTIVE)  # or it would be granted later, to nobody

    # --- the locality ---

    def _access(self) -> int:
        return self.answering(self.registers.read8(ACCESS))

    def _appeared(self) -> bool:
        return bool(self._access() & Access.VALID)

    def _invalid(self) -> FifoState:
        raise RegistersInvalid(self.place, self._access(), Limit.A.seconds)

    def _ask(self) -> FifoState:
        kind = self.registers.read8(INTERFACE_ID) & INTERFACE_MASK
        if kind == INTERFACE_CRB:
            raise WrongInterface(self.place, kind, "crb")
        if self._access() & Access.BEEN_SEIZED:
            self.registers.write8(ACCESS, Access.BEEN_SEIZED)
        if not self._granted():  # it is ours if its last owner died with it
            self.registers.write8(ACCESS, Access.REQUEST_USE)
        return FifoState.ASKED

    def _granted(self) -> bool:
        ours = Access.ACTIVE | Access.VALID
        return self._access() & ours == ours

    def _seize(self) -> FifoState:
        if not self.may_seize:
            return FifoState.WAITING
        self.seized = True
        self.registers.write8(ACCESS, Access.SEIZE)
        return FifoState.SEIZING

    def _refused(self) -> FifoState:
        access = self._access()
        if access & Access.REQUEST_USE:
            raise LocalityHeld(self.place, 2 * Limit.A.seconds, "a higher locality, or one that cannot be seized,")
        raise LocalityRefused(self.place, f"neither requested nor seized is it granted (access 0x{access:02x})")

    def _use(self) -> FifoState:
        if self.command is None:
            self._relinquish()
            return FifoState.DONE
        self.registers.write8(STS, Status.COMMAND_READY)
        return FifoState.READYING

    def _relinquish(self) -> None:
        self.registers.write8(STS, Status.COMMAND_READY)
        self.registers.write8(ACCESS, Access.ACTIVE)

    # --- the command ---

    def _status(self, doing: str) -> int:
        status = self.registers.read8(STS)
        if status == NOBODY:
            self._check_ours(doing)
        return status

    def _check_ours(self, doing: str) -> None:
        access = self.registers.read8(ACCESS)
        if access == NOBODY:
            raise NoTpmAtPage(self.place)
        if not access & Access.ACTIVE:
            raise LocalityLost(self.place, doing)

    def _is(self, doing: str, want: int, among: int) -> bool:
        status = self._status(doing)
        return status != NOBODY and status & among == want

    def _burst(self) -> int:
        """Bytes that may be moved now; 0 while the two halves of the count change under our eyes."""
        high = self.registers.read8(BURST_HIGH)
        low = self.registers.read8(BURST_LOW)
        return high << 8 | low if high == self.registers.read8(BURST_HIGH) else 0

    def _ready(self) -> bool:
        return self._is(SEND, Status.COMMAND_READY, Status.COMMAND_READY)

    def _ready_again(self) -> FifoState:
        # The first write may only have ended what the owner before us left unfinished.
        self.registers.write8(STS, Status.COMMAND_READY)
        return FifoState.READYING_AGAIN

    def _never_ready(self) -> FifoState:
        self._check_ours(SEND)
        raise TpmStuck(SEND, f"it does not get ready in {2 * Limit.B.seconds:g} s")

    def _begin(self) -> FifoState:
        return FifoState.SENDING

    def _has_room(self) -> bool:
        assert self.command is not None, "_use"
        if self._sent and not self._is(SEND, Status.VALID, Status.VALID):
            return False
        if self._sent and not self._status(SEND) & Status.EXPECT:
            raise CommandRefused(SEND, f"it wants no more after {self._sent} of {len(self.command)} bytes")
        self._room = self._burst()
        return self._room > 0

    def _send(self) -> FifoState:
        assert self.command is not None, "_use"
        # The last byte goes alone: before it the TPM must expect more, after it no more.
        end = min(self._sent + self._room, max(len(self.command) - 1, self._sent + 1))
        self.registers.write_fifo(FIFO, self.command[self._sent : end])
        self._sent = end
        return FifoState.SENT if self._sent == len(self.command) else FifoState.SENDING

    def _no_room(self) -> FifoState:
        self._check_ours(SEND)
        raise TpmStuck(SEND, f"its burst count stays 0 for {Limit.D.seconds:g} s after {self._sent} bytes")

    def _taken(self) -> bool:
        return self._is(SEND, Status.VALID, Status.VALID | Status.EXPECT)

    def _wants_more(self) -> FifoState:
        self._check_ours(SEND)
        raise CommandRefused(SEND, f"it wants more than the {self._sent} bytes of the command")

    def _go(self) -> FifoState:
        self.registers.write8(STS, Status.GO)
        return FifoState.RUNNING

    def _cancel(self) -> FifoState:
        self.cancelled = True
        self.registers.write8(STS_CANCEL, COMMAND_CANCEL)
        return FifoState.CANCELLING

    def _never_ends(self) -> FifoState:
        self._check_ours(RECEIVE)
        raise TimeoutError

    # --- the response ---

    def _has_data(self) -> bool:
        both = Status.VALID | Status.DATA_AVAILABLE
        return self._is(RECEIVE, both, both)

    def _answered(self) -> FifoState:
        return FifoState.RECEIVING

    @property
    def _wanted(self) -> int:
        """How long the response is, as far as is known: its header, then what that tells."""
        if len(self._received) < HEADER.size:
            return HEADER.size
        length = int(HEADER.unpack_from(self._received)[1])
        if not HEADER.size <= length <= MAX_RESPONSE:
            raise ResponseTooLong(RECEIVE, f"its header tells {length} bytes, {MAX_RESPONSE} are possible")
        return length

    def _has_data_or_end(self) -> bool:
        """Hold when bytes can be read, or when there will be none any more: valid without data."""
        if not self._is(RECEIVE, Status.VALID, Status.VALID):
            return False
        self._room = self._burst() if self._has_data() else 0
        return self._room > 0 or self._is(RECEIVE, Status.VALID, Status.VALID | Status.DATA_AVAILABLE)

    def _receive(self) -> FifoState:
        if not self._room:
            return self._again()
        count = min(self._room, self._wanted - len(self._received))
        self._received += self.registers.read_fifo(FIFO, count)
        return FifoState.RECEIVING if len(self._received) < self._wanted else FifoState.RECEIVED

    def _again(self) -> FifoState:
        if self._retried:
            return self._cut()
        self._retried = True
        self._received.clear()
        self.registers.write8(STS, Status.RESPONSE_RETRY)
        return FifoState.RETRYING

    def _cut(self) -> FifoState:
        raise ResponseCut(RECEIVE, f"it ended too early, and when asked again after {len(self._received)} bytes")

    def _no_data(self) -> FifoState:
        self._check_ours(RECEIVE)
        raise TpmStuck(RECEIVE, f"no byte in {Limit.D.seconds:g} s after {len(self._received)} of {self._wanted}")

    def _is_empty(self) -> bool:
        return self._is(RECEIVE, Status.VALID, Status.VALID | Status.DATA_AVAILABLE)

    def _says_more(self) -> FifoState:
        self._check_ours(RECEIVE)
        raise ResponseTooLong(RECEIVE, f"more bytes follow the {len(self._received)} that its header tells")

    def _finish(self) -> FifoState:
        self._relinquish()
        self.conclude(bytes(self._received))
        return FifoState.DONE
