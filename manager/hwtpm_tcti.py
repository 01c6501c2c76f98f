"""The TSS end of a transport: a TCTI in Python. Counts commands, waits out a busy TPM, lets no exception into C.

An exception that leaves a cffi callback is printed and becomes "success"; a BaseException gets past tpm2_pytss's own
guard. So everything is caught here, kept in `failure`, and raised by the owner once the C call returned (reference
hardware-tpm.md section 5).
"""

import os
import time
from typing import Final

from tpm2_pytss import TSS2_RC, PyTCTI, TCTILdr, TSS2_Exception

from manager.hwtpm_errors import KEPT_UNKNOWN, TpmBusy, TpmTransport, TpmUnavailable, WrongLocality
from manager.hwtpm_setting import TctiKind, TctiSetting
from manager.hwtpm_tis_transport import RegisterTransport
from manager.hwtpm_transport import HEADER, MAX_RESPONSE, Transport, check_response, connect

# Part 2, 6.6.3, warnings that mean "the same again": YIELDED, TESTING, NV_RATE, RETRY, NV_UNAVAILABLE.
AGAIN: Final = frozenset({0x908, 0x90A, 0x920, 0x922, 0x923})
FIRST_PAUSE_SECONDS: Final = 0.005
LONGEST_PAUSE_SECONDS: Final = 0.25

# The TSS prints every refused command to standard error, also those we expect; ours is the message that counts.
os.environ.setdefault("TSS2_LOG", "all+NONE")


class Tcti(PyTCTI):  # type: ignore[misc] # tpm2_pytss is untyped
    """Feeds the TSS from a Transport. Owned by one TpmLink; `failure` is what a callback could not raise."""

    def __init__(self, transport: Transport, command_seconds: float) -> None:
        super().__init__(max_size=MAX_RESPONSE, magic=b"VTPMMGR\0")
        self.transport = transport
        self.failure: BaseException | None = None
        self.commands_sent = 0
        self.command_seconds = command_seconds
        self._command = b""

    def do_transmit(self, command: bytes) -> None:
        """Keep the command; it is sent when its response is asked for, so that both share one deadline."""
        self._command = command

    def do_receive(self, timeout: int) -> bytes:  # noqa: ARG002 - the TSS asks to wait for ever (-1); our deadline rules
        """Send the kept command until the TPM takes it. Never raises anything but TSS2_Exception."""
        try:
            return self.exchange(self._command)
        except BaseException as error:  # nothing may escape into the C callback; the owner raises it
            self.failure = error
            raise TSS2_Exception(TSS2_RC.TCTI_RC_IO_ERROR) from error

    def exchange(self, command: bytes) -> bytes:
        """One raw command and its response, waiting out AGAIN. Raises TpmBusy, TpmTransport."""
        deadline = time.monotonic() + self.command_seconds
        pause = FIRST_PAUSE_SECONDS
        while True:
            self.commands_sent += 1
            response = self._submit(command, deadline)
            code = HEADER.unpack_from(response)[2]
            if code not in AGAIN:
                return response
            if time.monotonic() + pause >= deadline:
                raise TpmBusy("run a command", self.command_seconds, f"it answered 0x{code:x} to every try")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _submit(self, command: bytes, deadline: float) -> bytes:
        try:
            return check_response(self.transport.exchange(command, deadline))
        except TimeoutError:
            raise TpmBusy("run a command", self.command_seconds, "it does not answer", KEPT_UNKNOWN) from None
        except OSError as error:
            raise TpmTransport("run a command", error.strerror or str(error)) from error


class LoaderTransport:
    """Any other TCTI of tpm2-tss (`mssim:`, `tabrmd:`, ...) through its loader. Deadlines are the TCTI's own."""

    def __init__(self, setting: TctiSetting) -> None:
        self.owns_handles = False
        self.localities: tuple[int, ...] = (0, 1, 2, 3, 4)
        try:
            self._tcti = TCTILdr.parse(setting.text)
        except TSS2_Exception as error:
            raise TpmUnavailable(
                f"tpm2-tss cannot open {setting.text!r}: {error}",
                "Check the name, and that the package with this TCTI is installed (`apt install libtss2-tcti-...`).",
            ) from error

    def exchange(self, command: bytes, deadline: float) -> bytes:  # noqa: ARG002 - tpm2-tss's TCTIs only block
        """See Transport."""
        try:
            self._tcti.transmit(command)
            return bytes(self._tcti.receive(MAX_RESPONSE))
        except TSS2_Exception as error:
            raise TpmTransport("run a command", str(error)) from error

    def set_locality(self, locality: int, deadline: float) -> None:  # noqa: ARG002 - as above
        """See Transport."""
        try:
            self._tcti.set_locality(locality)
        except TSS2_Exception as error:
            # A TCTI that knows no localities is at 0, which is what the weaker mode asks for.
            if locality or int(error.rc) != TSS2_RC.TCTI_RC_NOT_IMPLEMENTED:
                raise WrongLocality(locality, f"its TCTI answered: {error}") from error

    def close(self) -> None:
        """See Transport."""
        self._tcti.close()


def open_transport(setting: TctiSetting, deadline: float) -> Transport:
    """Open the transport of any setting but `embedded`. Raises OSError, TimeoutError, TpmUnavailable, BadSetting."""
    if setting.kind is TctiKind.LOADER:
        return LoaderTransport(setting)
    if setting.kind in {TctiKind.TIS, TctiKind.CRB}:
        return RegisterTransport(setting, deadline)
    return connect(setting, deadline)
