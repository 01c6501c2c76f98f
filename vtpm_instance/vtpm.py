"""One vTPM as its front ends see it: running, or failed until a platform reset, or off, or stopped.

What lives here: which answer a command gets in which condition. What must not: the coming and going of power (`power`,
`endings`), sockets, rings, files. A command is given to libtpms at most once.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Protocol

from frontend_backend import deep_quote
from frontend_backend.deep_quote import Evidence
from frontend_backend.tpmhdr import ResponseCode, TpmFamily, error_response
from storage.errors import StorageError
from vtpm_instance import tpm_commands as tpm
from vtpm_instance.condition import Condition
from vtpm_instance.control_machine import Result
from vtpm_instance.endings import Endings
from vtpm_instance.errors import InstanceError, QuoteRefusedError, SaveError
from vtpm_instance.evidence import gather
from vtpm_instance.keeping import Keeper
from vtpm_instance.libtpms import VOLATILE, Tpm
from vtpm_instance.power import ENTROPY
from vtpm_instance.tpm_commands import CODE_END, CODE_OFFSET, Startup

__all__ = ["ENTROPY", "Cancellable", "Vtpm", "failure_response", "wrong_size_response"]

_FAILURES: Final = {TpmFamily.TPM_2_0: ResponseCode.FAILURE, TpmFamily.TPM_1_2: ResponseCode.TPM12_FAIL}
_NO_ROOM: Final = {TpmFamily.TPM_2_0: ResponseCode.NV_UNAVAILABLE, TpmFamily.TPM_1_2: ResponseCode.TPM12_RETRY}
_BAD_SIZES: Final = {
    TpmFamily.TPM_2_0: ResponseCode.COMMAND_SIZE,
    TpmFamily.TPM_1_2: ResponseCode.TPM12_BAD_PARAM_SIZE,
}


class Cancellable(Protocol):
    """Where a command came from, if its sender can ask there to give it up."""

    @property
    def cancelled(self) -> bool:
        """Whether the sender asks to give the command up that is being executed."""


_DEEP_QUOTE: Final = deep_quote.CODE.to_bytes(4)


def _nothing_beside(_origin: Cancellable | None) -> AbstractContextManager[None]:
    return nullcontext()


def wrong_size_response(family: TpmFamily) -> bytes:
    """Return the answer to a command whose size cannot be."""
    return error_response(family, _BAD_SIZES[family])


def failure_response(family: TpmFamily) -> bytes:
    """Return the answer of a TPM in failure; swtpm's while its TPM is off, too: QEMU learns the family from it."""
    return error_response(family, _FAILURES[family])


class Vtpm(Endings):
    """The vTPM of this process, and the commands of its guest."""

    def __init__(
        self,
        emulator: Tpm,
        keeper: Keeper,
        family: TpmFamily,
        after_reset: Startup,
        announce: Callable[[Condition, Exception | None], None],
    ) -> None:
        """Run as `power.Power` does."""
        super().__init__(emulator, keeper, family, after_reset, announce)
        self.commands, self._process = emulator.commands, emulator.process_placed
        self._failure = failure_response(family)
        self._unavailable = error_response(family, _NO_ROOM[family])
        self._long = tpm.long_commands(family)
        self.beside_long: Callable[[Cancellable | None], AbstractContextManager[None]] = _nothing_beside
        self.deep_quote: Callable[[bytes], bytes] = lambda _command: self._failure
        self._shutdown_code = tpm.shutdown_code(family).to_bytes(4)

    def execute(self, command: bytes, locality: int) -> bytes:
        """Answer one framed command (10 to 4096 bytes). Never raises for what a guest sends or a save meets."""
        size = len(command)
        self.commands[0:size] = command
        return self.execute_placed(size, locality)

    def execute_placed(self, size: int, locality: int, origin: Cancellable | None = None) -> bytes:
        """Answer the framed command that lies in the first `size` bytes of `commands`, as `execute` does.

        A command that may take long runs within `beside_long`, which is told where it came from.
        """
        if not self._serving and not self._ready():
            return self._failure
        code = self.commands[CODE_OFFSET:CODE_END]
        try:
            if not self._keeper.roomy and not self._has_room_for(code):
                return self._unavailable
            if code in self._long:
                with self.beside_long(origin):
                    ours = code == _DEEP_QUOTE
                    response = self.deep_quote(self.commands[0:size]) if ours else self._process(size, locality)
            else:
                response = self._process(size, locality)
            if not self._stirred and self._is_startup(code, response):
                self._stir()
        except (InstanceError, StorageError) as error:
            self._fail(error)
            return self._failure
        if code != _DEEP_QUOTE:  # which a TPM that was shut down has not seen
            self._guest_shut_down = code == self._shutdown_code and tpm.code_of(response) == 0
        return response

    def attest(self, nonce: bytes, selection: int, emulator: str) -> Evidence:
        """Return the evidence for a quote, made between two commands of the guest; `emulator` names ours.

        Raises:
            QuoteRefusedError: there is none; a TPM that its guest has shut down is left alone: it would wake.

        """
        if self._guest_shut_down or not self._ready():
            raise QuoteRefusedError(0, 0, "the vTPM is off or in failure, or its guest has shut it down")
        try:
            if not self._keeper.roomy and not self._has_room_for(_DEEP_QUOTE):
                raise QuoteRefusedError(0, 0, "the disk is full, and its TPM may have to store something")
            return gather(self._tpm.process, self.family, nonce, selection, emulator)
        except QuoteRefusedError:
            raise
        except (InstanceError, StorageError) as error:
            self._fail(error)
            raise QuoteRefusedError(0, 0, f"the vTPM failed: {error}") from error

    def _ready(self) -> bool:
        """Tell whether a command may run now; what was taken out of the vTPM is history then."""
        if not self.running:
            return False
        try:
            self._use()
        except (InstanceError, StorageError) as error:
            self._fail(error)
            return False
        return True

    def act(self, call: Callable[[Tpm], int]) -> int:
        """Have the platform do something with the running TPM; returns the result of its control command.

        Never raises for what a save meets.
        """
        if not self.running:
            return Result.BAD_ORDINAL
        if not self._ready():
            return Result.FAIL
        try:
            return call(self._tpm)
        except (InstanceError, StorageError) as error:
            self._fail(error)
            return Result.FAIL

    def take_out(self, kind: int, flags: int) -> tuple[int, int, bytes]:
        """Take a state blob out of the running TPM: see `StateBlobs.take_out`, whose the result is."""
        if self.state_blobs is None:
            return Result.BAD_ORDINAL, 0, b""
        try:
            found = self.state_blobs.take_out(kind, flags)
        except (SaveError, StorageError) as error:  # of what libtpms had to store first
            self._fail(error)
            raise
        if not found[0]:
            self._taken_out, self._serving = True, False
        return found

    @property
    def config(self) -> int:
        """Which blobs are encrypted: `Keeper.config`."""
        return self._keeper.config

    def info(self, flags: int) -> bytes:
        """Return what libtpms says of itself; raises what `Tpm.info` raises."""
        return self._tpm.info(self.family, flags)

    def lock_storage(self, retries: int) -> int:
        """Take the lock on the stored state back: `Keeper.lock`."""
        return self._keeper.lock(retries)

    def store_volatile(self) -> int:
        """Store the volatile state, for the next power on to go on from; returns a result as `act` does."""

        def store(emulator: Tpm) -> int:
            content = emulator.volatile()
            self._keeper.blobs[VOLATILE] = content
            self._keeper.changed(VOLATILE, content)
            return Result.SUCCESS

        return self.act(store)

    def cancel(self) -> bool:
        """Tell a long command that runs in another thread to give up; returns False where libtpms cannot (TPM 1.2)."""
        return self._tpm.cancel() == 0

    def _has_room_for(self, code: bytes) -> bool:
        """Tell whether what a command may store surely fits, growing the state image if that can be."""
        return self._keeper.make_room() or self._keeper.fits(tpm.growth(self.family, int.from_bytes(code)))

    @staticmethod
    def _is_startup(code: bytes, response: bytes) -> bool:
        return int.from_bytes(code) in (tpm.TPM2_STARTUP, tpm.TPM12_STARTUP) and tpm.code_of(response) == 0
