"""Load on one vTPM, and a memory of what was acknowledged: the witness against lost and repeated writes."""

import hashlib
import os
import struct
import threading
from contextlib import suppress
from typing import Final

import vtpm_instance_rig as tpm
from e2e_rig import Guest, Installation

from manager.client import request
from manager.errors import ManagerError

NUMBER, COUNTER, PCR = 0x1500016, 0x1500017, 4
_RETRY, _FAILURE = 0x922, 0x101
_ANSWER_SECONDS: Final = 120.0  # a write waits for the next manager, up to instance.commit_timeout (90 s)
_PAUSE: Final = 0.05  # seconds between tries while an instance is away
_AWAY_SECONDS: Final = 120.0
_COUNTER_ATTRIBUTES: Final = 0x02060006 | 0x10  # as tpm.nv_define, of the type counter


class PromiseBrokenError(AssertionError):
    """What was acknowledged is not there, or what was not is there twice."""


class Writer:
    """Writes numbers into an NV index and increments a counter, one command at a time, in a thread of its own.

    A number tells whether a write was lost; a counter also whether one was executed twice.
    """

    def __init__(self, made: Installation, name: str) -> None:
        """Add and attach the vTPM, and make the indexes and a PCR value."""
        self._made, self.name = made, name
        made.add(name)
        self._guest = Guest(made.attach(name)["endpoint"])
        self._guest.define(NUMBER, 8)
        self._guest.write(NUMBER, bytes(8))
        public = struct.pack(">IHIHH", COUNTER, 0xB, _COUNTER_ATTRIBUTES, 0, 8)
        self._guest.good(tpm.authorised(0x12A, (0x40000001).to_bytes(4), tpm.sized(b"") + tpm.sized(public)))
        self._increment = tpm.authorised(0x134, COUNTER.to_bytes(4) * 2)
        self._guest.good(self._increment)
        self._number, self._count = 0, int.from_bytes(self._guest.read(COUNTER, 8))
        self._pending = ""  # "number" or "count": a command that got no answer
        self._pcrs = {bytes(32)}  # values that the PCR may have
        self._mark()
        self.begun = self.acknowledged = self.resets = 0
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def check(self) -> None:
        """Raise what the thread has met."""
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Stop writing, after the command under way."""
        self._stopping.set()
        self._thread.join(2 * _ANSWER_SECONDS)
        assert not self._thread.is_alive(), f"{self.name}: a command hangs"

    def abandon(self) -> None:
        """Stop writing without waiting, and without judging."""
        self._stopping.set()

    def close(self) -> None:
        """Let go of the connection."""
        self._guest.close()

    # the thread

    def _work(self) -> None:
        try:
            while not self._stopping.is_set():
                if self._pending:
                    self.recover()
                self._write()
        except BaseException as error:  # noqa: BLE001 - raised by `check` in the thread that runs the test
            self._failure = error

    def _write(self) -> None:
        """Do one durable command; one without an answer stays pending."""
        kind = "count" if self.begun % 2 else "number"
        self._pending = kind
        self.begun += 1
        packet = self._increment if kind == "count" else tpm.nv_write(NUMBER, (self._number + 1).to_bytes(8))
        try:
            code = int.from_bytes(self._guest.transmit(packet, _ANSWER_SECONDS)[6:10])
        except TimeoutError:
            raise PromiseBrokenError(f"{self.name}: a write got no answer in {_ANSWER_SECONDS:g} s") from None
        except OSError:
            return
        if code == _FAILURE:
            return
        if code not in (0, _RETRY):
            raise PromiseBrokenError(f"{self.name}: a write was answered with {code:#x}")
        if code == 0:
            self._count += kind == "count"
            self._number += kind == "number"
        self._pending = ""
        self.acknowledged += 1

    # after a death

    def recover(self) -> None:
        """Get to a vTPM that answers, resetting its platform where it asks for that, and look at what it has."""
        for _ in range(int(_AWAY_SECONDS / _PAUSE)):
            try:
                value = self._guest.transmit(tpm.pcr_read(PCR), _ANSWER_SECONDS)
                code = int.from_bytes(value[6:10])
                if code == 0:
                    self._examine(value[-32:])
                    self._mark()
                    return
                if code != _FAILURE:
                    raise PromiseBrokenError(f"{self.name}: PCR_Read was answered with {code:#x}")
                self._reset_platform()
            except OSError:
                self._guest.close()
                # a vTPM that crashed too often is left down, until its platform is reset
                if self._is_down():
                    self._reset_platform()
            if self._stopping.wait(_PAUSE) and self._thread is threading.current_thread():
                return
        raise PromiseBrokenError(f"{self.name} does not come back; {self._made.tail()}")

    def _examine(self, pcr: bytes) -> None:
        if pcr not in self._pcrs:
            known = [value.hex() for value in self._pcrs]
            raise PromiseBrokenError(f"{self.name}: PCR {PCR} is {pcr.hex()}, it may be {known}")
        self._pcrs = {pcr}
        number = int.from_bytes(self._guest.read(NUMBER, 8))
        count = int.from_bytes(self._guest.read(COUNTER, 8))
        for kind, there, acknowledged in (("number", number, self._number), ("count", count, self._count)):
            if not acknowledged <= there <= acknowledged + (self._pending == kind):
                raise PromiseBrokenError(
                    f"{self.name}: {kind} {acknowledged} was acknowledged, pending '{self._pending}', {there} is there"
                )
        self._number, self._count, self._pending = number, count, ""

    def _mark(self) -> None:
        """Give the PCR another value, so that going back to an earlier one, or to none, is seen."""
        digest = os.urandom(32)
        (old,) = self._pcrs
        self._pcrs = {old, hashlib.sha256(old + digest).digest()}
        self._guest.extend(PCR, digest)
        self._pcrs.discard(old)

    def _ask(self, verb: str) -> list[dict[str, object]]:
        return request(str(self._made.runtime / "admin.sock"), verb, {"vtpm": self.name})

    def _is_down(self) -> bool:
        with suppress(ManagerError):
            return self._ask("show")[0]["state"] == "down"
        return False

    def _reset_platform(self) -> None:
        self._pcrs.add(bytes(32))  # a manager that dies over this may have done it
        with suppress(ManagerError):
            self._ask("reset-platform")
            self._pcrs = {bytes(32)}
            self.resets += 1
