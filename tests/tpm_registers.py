"""The FIFO registers of a TPM as PTP 6 describes them, for property tests of our side; real ones are in the machines.

Everything takes a drawn number of looks until it shows. The model asserts what a driver must keep: no byte beyond the
burst count, no Go before all bytes are taken, nothing without the locality.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from manager import hwtpm_tis_registers as registers
from manager.hwtpm_tis_registers import ACCESS, BURST_HIGH, BURST_LOW, FIFO, STS, Access, Status
from manager.hwtpm_tis_table import INTERFACE_ID, Machine

LOOK_SECONDS = 0.002
MOST_LOOKS = 60_000
CANCELED = bytes.fromhex("80010000000a00000909")


class ByteRegisters:
    """What every model shares: wide accesses are made of bytes."""

    def read8(self, offset: int) -> int:
        raise NotImplementedError

    def write8(self, offset: int, value: int) -> None:
        raise NotImplementedError

    def read32(self, offset: int) -> int:
        return sum(self.read8(offset + index) << 8 * index for index in range(4))

    def write32(self, offset: int, value: int) -> None:
        for index in range(4):
            self.write8(offset + index, value >> 8 * index & 0xFF)

    def read_fifo(self, offset: int, count: int) -> bytes:
        return bytes(self.read8(offset) for _ in range(count))

    def write_fifo(self, offset: int, content: bytes) -> None:
        for value in content:
            self.write8(offset, value)

    def read_bytes(self, offset: int, count: int) -> bytes:
        return bytes(self.read8(offset + index) for index in range(count))

    def write_bytes(self, offset: int, content: bytes) -> None:
        for index, value in enumerate(content):
            self.write8(offset + index, value)


class Hostile(ByteRegisters):
    """Every read gives anything; now and then the same for a while, so that the machine gets further."""

    def __init__(self, random: Random, values: list[int]) -> None:
        self.random, self.values, self.kept, self.left = random, values, 0, 0

    def read8(self, _offset: int) -> int:
        if not self.left:
            self.kept, self.left = self.random.choice(self.values), self.random.choice((1, 1, 2, 3, 50))
        self.left -= 1
        return self.kept

    def write8(self, _offset: int, value: int) -> None:
        assert 0 <= value <= 0xFF


def run_to_end(machine: Machine[Any], begin: float = 0.0) -> float:
    """Step a machine to its end as the transport does; returns how long that took by its clock."""
    now = begin
    for _ in range(MOST_LOOKS):
        if machine.step(now) and machine.state is machine.DONE:
            return now - begin
        now += LOOK_SECONDS
    raise AssertionError(f"still {machine.state} after {now:.0f} s")


@dataclass
class Faults:
    """What this TPM does wrong."""

    nobody: bool = False
    invalid: bool = False
    interface: int = 0
    holder: str = ""  # "lower": gives way to a seize; "higher": does not; "brief": gives it back by itself
    ready: bool = True
    burst: bool = True
    takes: int = 1 << 16  # bytes of a command before it wants no more
    greedy: bool = False  # wants more after the last byte
    cuts: int = 0  # responses that end too early
    extra: int = 0  # bytes after the response
    seized_after: int = 1 << 30  # FIFO accesses until a higher locality takes over
    answers: bool = True
    cancels: bool = True


@dataclass
class FifoModel(ByteRegisters):
    """One locality's page."""

    answer: Callable[[bytes], bytes]
    random: Random
    faults: Faults = field(default_factory=Faults)

    def __post_init__(self) -> None:
        self.active = self.requested = False
        self.phase = "idle"
        self.command = bytearray()
        self.response = b""
        self.given = 0
        self.credit = 0
        self.wait = self.settle = self.holding = 0
        self.moved = 0
        self.been_seized = False
        self.writes = 0
        if self.faults.holder == "brief":
            self.holding = 40

    def pause(self) -> int:
        return self.random.choice((0, 0, 1, 2, 7))

    # --- reads ---

    def read8(self, offset: int) -> int:
        if self.faults.nobody:
            return 0xFF
        readers = {
            ACCESS: self._access,
            STS: self._status,
            BURST_LOW: lambda: self._burst() & 0xFF,
            BURST_HIGH: lambda: self._burst() >> 8,
            FIFO: self._give,
            INTERFACE_ID: lambda: self.faults.interface,
        }
        return readers[offset]()

    def _access(self) -> int:
        if self.faults.invalid:
            return 0x01
        if self.holding:
            self.holding -= 1
        free = self.faults.holder not in {"higher", "lower"} and not self.holding
        if self.requested and free:
            if self.wait:
                self.wait -= 1
            else:
                self.active, self.requested = True, False
        value = Access.VALID | (Access.ACTIVE if self.active else 0) | (Access.REQUEST_USE if self.requested else 0)
        return int(value | (Access.BEEN_SEIZED if self.been_seized else 0))

    def _status(self) -> int:
        if not self.active:
            return 0xFF
        if self.settle:
            self.settle -= 1
            return 0
        match self.phase:
            case "ready":
                return int(Status.COMMAND_READY)
            case "reception":
                return int(Status.VALID | (Status.EXPECT if self._expects else 0))
            case "completion":
                more = self.given < len(self.response)
                return int(Status.VALID | (Status.DATA_AVAILABLE if more else 0))
            case _:
                return int(Status.VALID)

    @property
    def _expects(self) -> bool:
        length = int.from_bytes(self.command[2:6]) if len(self.command) >= 6 else 1 << 16
        return self.faults.greedy or (len(self.command) < length and len(self.command) < self.faults.takes)

    def _burst(self) -> int:
        if not self.faults.burst or not self.active:
            return 0
        # It only grows between accesses to the FIFO; the carry between its bytes can be met half-way.
        most = len(self.response) - self.given if self.phase == "completion" else 0x1FF
        self.credit = min(self.credit + self.random.choice((0, 0, 1, 5, 64, 250)), most)
        return self.credit

    @property
    def _lost(self) -> bool:
        """A higher locality has seized the TPM: bytes of ours go nowhere."""
        return self.been_seized and not self.active

    def _use_credit(self) -> None:
        assert self.active, "an access to the FIFO without the locality"
        self.credit -= 1
        assert self.credit >= 0, "more bytes than the burst count allows"
        self.moved += 1
        if self.moved >= self.faults.seized_after:
            self.active, self.been_seized = False, True

    def _give(self) -> int:
        if self._lost:
            return 0xFF
        self._use_credit()
        assert self.phase == "completion"
        assert self.given < len(self.response), "read beyond the response"
        self.given += 1
        self.settle = self.pause()
        return self.response[self.given - 1]

    # --- writes ---

    def write8(self, offset: int, value: int) -> None:
        assert not self.faults.nobody
        assert not self.faults.invalid, "written before the registers were valid"
        self.writes += 1
        match offset, value:
            case registers.ACCESS, _:
                self._write_access(value)
            case registers.STS, Status.COMMAND_READY:
                self.phase = "ready" if self.faults.ready else "idle"
                self.command.clear()
                self.credit, self.settle = 0, self.pause()
            case registers.STS, Status.GO:
                self._execute()
            case registers.STS, Status.RESPONSE_RETRY:
                self._complete(self.answer(bytes(self.command)))
            case registers.STS_CANCEL, 1:
                assert self.phase == "execution"
                if self.faults.cancels:
                    self._complete(CANCELED)
            case registers.FIFO, _:
                self._take(value)
            case _:
                raise AssertionError(f"0x{value:x} written to 0x{offset:x}")

    def _write_access(self, value: int) -> None:
        match value:
            case Access.REQUEST_USE:
                self.requested, self.wait = True, self.pause()
            case Access.SEIZE:
                if self.faults.holder == "lower":
                    self.active, self.requested = True, False
            case Access.ACTIVE:
                self.active = self.requested = False
            case Access.BEEN_SEIZED:
                self.been_seized = False
            case _:
                raise AssertionError(f"0x{value:x} written to ACCESS")

    def _take(self, value: int) -> None:
        if self._lost:
            return
        self._use_credit()
        assert self.phase in {"ready", "reception"}
        self.phase = "reception"
        self.command.append(value)
        self.settle = self.pause()

    def _execute(self) -> None:
        assert self.active
        assert self.phase == "reception"
        assert not self._expects, "Go before the command is whole"
        self.phase = "execution"
        if self.faults.answers:
            self._complete(self.answer(bytes(self.command)))

    def _complete(self, response: bytes) -> None:
        if self.faults.cuts:
            self.faults.cuts -= 1
            response = response[: max(1, len(response) // 2)]
        self.response, self.given = response + bytes(self.faults.extra), 0
        self.phase, self.credit, self.settle = "completion", 0, self.pause() * 3
