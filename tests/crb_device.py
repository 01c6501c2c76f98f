"""A TPM with command and response buffers in a file that both sides map: registers of PTP 6, a real swtpm behind them.

A thread plays the TPM's side. Plain memory is enough for that: unlike a FIFO, a CRB has no register that changes when
it is read. Each locality has a page; the active one is what swtpm is told.
"""

import mmap
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fixtures_tpm import SwtpmProcess

from manager.hwtpm_crb import (
    CMD_HIGH,
    CMD_LOW,
    CMD_SIZE,
    CTRL_CANCEL,
    CTRL_REQ,
    CTRL_START,
    CTRL_STS,
    LOC_CTRL,
    LOC_STATE,
    LOC_STS,
    RSP_HIGH,
    RSP_LOW,
    RSP_SIZE,
)
from manager.hwtpm_setting import TctiSetting
from manager.hwtpm_transport import SwtpmTransport

BASE = 1 << 20
PAGE = 0x1000
BUFFER = 0x80
WORD = struct.Struct("<I")
CANCELED = bytes.fromhex("80010000000a00000909")


@dataclass
class Quirks:
    """How this TPM differs from a good one."""

    localities: tuple[int, ...] = (0, 1, 2, 3)
    interface: int = 1
    buffer: int = BUFFER  # where the buffers are, counted from the page
    room: int = PAGE - BUFFER
    holder: int | None = None  # a locality that has the TPM and keeps it, until seized
    seizable: bool = True
    gets_ready: bool = True
    fatal: bool = False
    silent: bool = False  # starts, and never ends
    cancels: bool = True
    answers: list[bytes] = field(default_factory=list)  # instead of swtpm's
    steal: bool = False  # a higher locality takes over while a command runs


class CrbDevice:
    """The TPM's side."""

    def __init__(self, path: Path, swtpm: SwtpmProcess, quirks: Quirks) -> None:
        self.path, self.quirks = path, quirks
        with path.open("wb") as file:
            file.truncate(BASE + 5 * PAGE)
        with path.open("r+b") as file:
            self.map = mmap.mmap(file.fileno(), 5 * PAGE, offset=BASE)
        self.tpm = SwtpmTransport(swtpm.setting, time.monotonic() + 10)
        self.active = quirks.holder
        self.commands: list[bytes] = []
        self.error: BaseException | None = None
        self._running: int | None = None
        for locality in quirks.localities:
            self._set_up(locality)
        self._show()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def setting(self, locality: int) -> TctiSetting:
        return TctiSetting.parse(f"crb:base=0x{BASE:x},locality={locality},path={self.path}")

    def close(self) -> None:
        self._stop.set()
        self._thread.join(10)
        self.tpm.close()
        assert self.error is None, self.error

    def get(self, locality: int, offset: int) -> int:
        return int(WORD.unpack_from(self.map, locality * PAGE + offset)[0])

    def put(self, locality: int, offset: int, value: int) -> None:
        WORD.pack_into(self.map, locality * PAGE + offset, value)

    def _set_up(self, locality: int) -> None:
        address = BASE + locality * PAGE + self.quirks.buffer
        self.put(locality, 0x30, self.quirks.interface)
        self.put(locality, CTRL_STS, 3 if self.quirks.fatal else 2)
        for low, high, size in ((CMD_LOW, CMD_HIGH, CMD_SIZE), (RSP_LOW, RSP_HIGH, RSP_SIZE)):
            self.put(locality, low, address & 0xFFFFFFFF)
            self.put(locality, high, address >> 32)
            self.put(locality, size, self.quirks.room)

    def _show(self) -> None:
        for locality in self.quirks.localities:
            self.put(locality, LOC_STS, 1 if self.active == locality else 0)
            assigned = 0 if self.active is None else 2 | self.active << 2
            self.put(locality, LOC_STATE, 0x80 | assigned)

    def _serve(self) -> None:
        try:
            while not self._stop.is_set():
                for locality in self.quirks.localities:
                    self._localities(locality)
                    if self.active == locality:
                        self._control(locality)
                time.sleep(0.0002)
        except BaseException as error:  # noqa: BLE001 - told when the device is closed
            self.error = error

    def _localities(self, locality: int) -> None:
        wanted = self.get(locality, LOC_CTRL)
        if not wanted:
            return
        self.put(locality, LOC_CTRL, 0)
        if wanted & 2 and self.active == locality:
            self.active = None
        if wanted & 1 and self.active is None:
            self.active = locality
        if wanted & 4 and self.quirks.seizable:
            self.active = locality
        self._show()

    def _control(self, locality: int) -> None:
        request = self.get(locality, CTRL_REQ)
        if request and self.quirks.gets_ready:
            self.put(locality, CTRL_STS, int(self.quirks.fatal) | (0 if request & 1 else 2))
            self.put(locality, CTRL_REQ, 0)
        if not self.get(locality, CTRL_START):
            return
        if self.quirks.steal:
            self.active = 3
            self._show()
            return
        if self.quirks.silent:
            if self.quirks.cancels and self.get(locality, CTRL_CANCEL):
                self._finish(locality, CANCELED)
            return
        begin = locality * PAGE + self.quirks.buffer
        length = int.from_bytes(self.map[begin + 2 : begin + 6])
        self.commands.append(self.map[begin : begin + length])
        self._finish(locality, self.quirks.answers.pop(0) if self.quirks.answers else self._ask(locality))

    def _ask(self, locality: int) -> bytes:
        deadline = time.monotonic() + 30
        self.tpm.set_locality(locality, deadline)
        return self.tpm.exchange(self.commands[-1], deadline)

    def _finish(self, locality: int, response: bytes) -> None:
        begin = locality * PAGE + self.quirks.buffer
        self.map[begin : begin + len(response)] = response
        self.put(locality, CTRL_START, 0)


@contextmanager
def crb_device(directory: Path, swtpm: SwtpmProcess, quirks: Quirks | None = None) -> Iterator[CrbDevice]:
    device = CrbDevice(directory / "mem", swtpm, quirks or Quirks())
    try:
        yield device
    finally:
        device.close()
