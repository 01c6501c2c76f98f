"""What the FIFO and the CRB driver share: registers as an interface, named limits, tables of waits. No I/O, no clock.

Source: TCG PC Client Platform TPM Profile (PTP) for TPM 2.0, section 6; for the limits Linux's tpm_tis_core.h, which
takes the longer of PTP's and TIS 1.3's: chips are slower than either.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar, Final, Generic, Protocol, TypeVar

from manager.hwtpm_tis_errors import CommandCancelled, LocalityHeld, NoTpmAtPage
from manager.hwtpm_tis_place import Place

# A read that nobody answers gives ones on LPC, SPI and PCI alike.
NOBODY: Final = 0xFF
RC_CANCELED: Final = 0x909  # Part 2, 6.6.3; in bytes 6 to 9 of a response
# The same in FIFO and CRB pages (TPM_INTERFACE_ID_x): bits 3..0 tell which of the two this page has at present.
INTERFACE_ID: Final = 0x30
INTERFACE_MASK: Final = 0x0F
INTERFACE_FIFO: Final = frozenset({0x0, 0xF})  # FIFO of PTP; FIFO of TIS 1.3
INTERFACE_CRB: Final = 0x1


class Registers(Protocol):
    """The registers of one locality's page; offsets in bytes. Each call is one access of that width to each address."""

    def read8(self, offset: int) -> int:
        """Read a byte."""

    def write8(self, offset: int, value: int) -> None:
        """Write a byte."""

    def read32(self, offset: int) -> int:
        """Read an aligned word of 32 bits."""

    def write32(self, offset: int, value: int) -> None:
        """Write an aligned word of 32 bits."""

    def read_fifo(self, offset: int, count: int) -> bytes:
        """Read one address `count` times, a byte each."""

    def write_fifo(self, offset: int, content: bytes) -> None:
        """Write bytes, one after the other, to one address."""

    def read_bytes(self, offset: int, count: int) -> bytes:
        """Read consecutive bytes."""

    def write_bytes(self, offset: int, content: bytes) -> None:
        """Write consecutive bytes."""


class Limit(Enum):
    """How long a TPM may take for a step. PTP, timeouts of the interface; COMMAND is the caller's deadline."""

    A = auto()  # a locality is granted
    B = auto()  # the TPM gets ready for a command, or ends a cancelled one
    C = auto()  # status becomes valid
    D = auto()  # the FIFO has room, or has data
    COMMAND = auto()  # TPM 2.0 tells no durations

    @property
    def seconds(self) -> float:
        """The limit in seconds."""
        return _SECONDS[self]


_SECONDS: Final = {Limit.A: 0.75, Limit.B: 4.0, Limit.C: 0.75, Limit.D: 0.75}


State = TypeVar("State", bound=Enum)


@dataclass(frozen=True, slots=True)
class Wait(Generic[State]):
    """One row: in this state watch a condition; when it holds do `then`, when it comes too late `late`.

    Both are names of methods of the machine, which return the next state, or None to stay; `late` may raise.
    """

    holds: str
    limit: Limit
    then: str
    late: str


class Machine(Generic[State]):
    """Runs a table of waits over registers. `step` never sleeps: whoever calls it does, and passes the time."""

    TABLE: ClassVar[Mapping[Any, Wait[Any]]]
    FIRST: ClassVar[Any]
    DONE: ClassVar[Any]

    def __init__(
        self,
        registers: Registers,
        place: Place,
        command: bytes | None,
        *,
        command_end: float,
        command_seconds: float = 0.0,
        may_seize: bool = True,
    ) -> None:
        """Set up one use of the TPM: take the locality, run the command (None: nothing), give the locality back.

        command_end: when the command is cancelled, in the time that `step` is given; command_seconds: how long that is,
        for messages. may_seize: take the TPM from a lower locality that keeps it. SeaBIOS leaves locality 0 active for
        ever; a driver of the kernel gives it back after its command, so it is waited for.
        """
        self.registers = registers
        self.place = place
        self.state: State = self.FIRST
        self.response = b""  # whole when `step` reaches DONE
        self.seized = False
        self.cancelled = False
        self.may_seize = may_seize
        self.command = command
        self._command_end = command_end
        self._seconds = command_seconds
        self._end: float | None = None

    def step(self, now: float) -> bool:
        """Go as far as the registers allow at this moment; says True if anything moved.

        Raises the errors of hwtpm_tis_errors; the machine is over then and `abandon` gives the locality back.
        """
        moved = False
        while self.state is not self.DONE:
            row = self.TABLE[self.state]
            if self._end is None:
                self._end = self._command_end if row.limit is Limit.COMMAND else now + row.limit.seconds
            holds: Callable[[], bool] = getattr(self, row.holds)
            if holds():
                self._enter(row.then)
            elif now >= self._end:
                self._enter(row.late)
            else:
                return moved
            moved = True
        return True

    def _enter(self, action: str) -> None:
        act: Callable[[], State] = getattr(self, action)
        self.state = act()
        self._end = None

    def answering(self, value: int) -> int:
        """Return a byte of a register whose bits cannot all be set. Raises NoTpmAtPage if nobody answers."""
        if value & 0xFF == NOBODY:
            raise NoTpmAtPage(self.place)
        return value

    def held(self) -> State:
        """End the waiting for a locality that may not be seized. Raises LocalityHeld."""
        raise LocalityHeld(self.place, self._seconds, "the kernel's driver, or another user of locality 0,")

    def conclude(self, response: bytes) -> None:
        """Keep the response. Raises CommandCancelled if it says that the TPM has followed our cancel."""
        self.response = response
        if self.cancelled and int.from_bytes(response[6:10]) == RC_CANCELED:
            raise CommandCancelled(self._seconds)

    def abandon(self) -> None:
        """End what is under way and give the locality back, whatever the state; never raises for what the TPM does."""
        raise NotImplementedError
