"""One vTPM as its front ends see it: running, or failed until a platform reset, or stopped.

What lives here: which answer a command gets in which condition, platform reset, clean stop. What must not: sockets,
rings, files. Conditions change by one table; a command is given to libtpms at most once.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Protocol

from frontend_backend import deep_quote
from frontend_backend.deep_quote import Evidence
from frontend_backend.tpmhdr import ResponseCode, TpmFamily, error_response
from storage.errors import StorageError
from vtpm_instance import tpm_commands as tpm
from vtpm_instance.condition import TRANSITIONS, Change, Condition, without_frames
from vtpm_instance.errors import (
    CommitRefusedError,
    CrashedBeforeError,
    HardwarePcrsError,
    InstanceError,
    ManagerConfusedError,
    NotNowError,
    QuoteRefusedError,
    ResumeRefusedError,
    SaveError,
    StartupRefusedError,
    StateNotWrittenError,
    StateRefusedError,
    WrongFamilyError,
)
from vtpm_instance.evidence import gather
from vtpm_instance.hardware_pcrs import put_in
from vtpm_instance.libtpms import Tpm
from vtpm_instance.slumber import VOLATILE, Slumber
from vtpm_instance.statekeeper import StateKeeper
from vtpm_instance.tpm_commands import CODE_END, CODE_OFFSET, Startup

ENTROPY: Final = (
    32  # bytes stirred in after each start: forked or resumed TPMs must never draw alike (performance.md 2c)
)


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


class Vtpm:
    """The vTPM of this process; `announce` is told each new condition with a cause (None when it is healthy)."""

    def __init__(
        self,
        emulator: Tpm,
        keeper: StateKeeper,
        family: TpmFamily,
        after_reset: Startup,
        announce: Callable[[Condition, Exception | None], None],
    ) -> None:
        """Run `emulator` on `keeper`'s state; `after_reset` is CLEAR, or NONE where the guest's firmware starts it."""
        self._tpm, self._keeper, self.family = emulator, keeper, family
        self.commands, self._process = emulator.commands, emulator.process_placed
        self._after_reset, self._announce = after_reset, announce
        self._failure = error_response(family, _FAILURES[family])
        self._unavailable = error_response(family, _NO_ROOM[family])
        self._long = tpm.long_commands(family)
        self.beside_long: Callable[[Cancellable | None], AbstractContextManager[None]] = _nothing_beside
        self.deep_quote: Callable[[bytes], bytes] = lambda _command: self._failure
        self._shutdown_code = tpm.shutdown_code(family).to_bytes(4)
        self._condition = Condition.OFF
        self._serving = False
        self._hw_pcrs = 0
        self._cause: Exception | None = None
        self._guest_shut_down = False
        self._stirred = False
        self.locality = 0  # of the data channel, when it was hibernated

    @property
    def condition(self) -> Condition:
        """What the vTPM is doing."""
        return self._condition

    @property
    def cause(self) -> Exception | None:
        """Why the vTPM failed, None unless its condition is FAILED."""
        return self._cause

    def _change(self, change: Change, cause: Exception | None = None) -> None:
        self._condition = TRANSITIONS[self._condition, change]
        self._serving = self._condition is Condition.RUNNING
        # Without its traceback, whose frames hold the command, the blobs and the commit's key until the next change.
        self._cause = cause and without_frames(cause)
        self._announce(self._condition, cause)

    # starting

    def start(self) -> None:
        """Load the state the manager names and start up as it says.

        "state" of a hibernated vTPM is no Startup: it goes on where it was. A refused Startup(STATE) or resumption
        leaves the vTPM FAILED, never silently cleared; so does "failed", and so does a sound state that cannot be saved
        (a full disk): the next platform reset tries again.

        Raises:
            InstanceError, StorageError: the vTPM cannot be loaded; nothing was changed.

        """
        reply = self._keeper.load()
        if reply.family != self.family.value:
            raise WrongFamilyError(self.family.value, reply.family)
        try:
            kind = Startup(reply.startup)
        except ValueError as error:
            raise ManagerConfusedError("Load", str(error)) from error
        self._hw_pcrs = reply.hw_pcrs
        if kind is Startup.NONE:
            self._after_reset = Startup.NONE  # who starts it the first time does it every time
        if kind is Startup.FAILED:
            if not reply.fresh:
                self._try_out()
            self._change(Change.FAILED, CrashedBeforeError())
            return
        try:
            slumber = self._keeper.take_slumber() if kind is Startup.STATE else None
            if slumber is None:
                self._power_on(kind, fresh=reply.fresh)
            else:
                self._resume(slumber)
        except (StartupRefusedError, ResumeRefusedError, SaveError, HardwarePcrsError) as error:
            self._fail(error)
            return
        self._change(Change.STARTED)

    def _resume(self, slumber: Slumber) -> None:
        """Go on where a hibernated vTPM was, unnoticed by its guest; the manager has seen to it that this is once.

        Raises:
            ResumeRefusedError: libtpms does not take the volatile part. StateRefusedError: nor the permanent one.

        """
        blobs = self._keeper.blobs
        blobs[VOLATILE] = slumber.volatile
        try:
            self._tpm.start(self.family, blobs, self._keeper.changed)
        except StateRefusedError as error:
            del blobs[VOLATILE]
            self._try_out()
            raise ResumeRefusedError(str(error)) from error
        del blobs[VOLATILE]
        self._stir()  # or it would draw what the one before it would have drawn
        self._guest_shut_down, self.locality = slumber.shut_down, slumber.locality
        if slumber.firmware:
            self._after_reset = Startup.NONE

    def _try_out(self) -> None:
        """Check that libtpms takes the state, without changing it."""
        self._tpm.start(self.family, dict(self._keeper.blobs))
        self._tpm.terminate()

    def _power_on(self, kind: Startup, *, fresh: bool) -> None:
        """Start libtpms on the keeper's blobs, start it up, stir entropy in, and commit what that changed, once."""
        self._guest_shut_down = self._stirred = False
        with self._keeper.gather():
            self._tpm.start(self.family, self._keeper.blobs, self._keeper.changed, fresh=fresh)
            if kind is not Startup.NONE:
                code = tpm.code_of(self._tpm.process(tpm.startup(self.family, kind)))
                if code:
                    raise StartupRefusedError(kind.value, code)
                if kind is Startup.CLEAR and self._hw_pcrs:
                    put_in(self._tpm.process, self.family, self._keeper.hardware_pcrs(self._hw_pcrs))
                self._stir()
        self._keeper.commit_gathered()

    def _stir(self) -> None:
        if self.family is TpmFamily.TPM_2_0:
            self._tpm.process(tpm.stir_random(os.urandom(ENTROPY)))
        self._stirred = True

    # serving

    def execute(self, command: bytes, locality: int) -> bytes:
        """Answer one framed command (10 to 4096 bytes). Never raises for what a guest sends or a save meets."""
        size = len(command)
        self.commands[0:size] = command
        return self.execute_placed(size, locality)

    def execute_placed(self, size: int, locality: int, origin: Cancellable | None = None) -> bytes:
        """Answer the framed command that lies in the first `size` bytes of `commands`, as `execute` does.

        A command that may take long runs within `beside_long`, which is told where it came from.
        """
        if not self._serving:
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
        if not self._serving or self._guest_shut_down:
            raise QuoteRefusedError(0, 0, "the vTPM is in failure, or its guest has shut it down")
        try:
            if not self._keeper.roomy and not self._has_room_for(_DEEP_QUOTE):
                raise QuoteRefusedError(0, 0, "the disk is full, and its TPM may have to store something")
            return gather(self._tpm.process, self.family, nonce, selection, emulator)
        except QuoteRefusedError:
            raise
        except (InstanceError, StorageError) as error:
            self._fail(error)
            raise QuoteRefusedError(0, 0, f"the vTPM failed: {error}") from error

    def cancel(self) -> bool:
        """Tell a long command that runs in another thread to give up; returns False where libtpms cannot (TPM 1.2)."""
        return self._tpm.cancel() == 0

    def _has_room_for(self, code: bytes) -> bool:
        """Tell whether what a command may store surely fits, growing the state image if that can be."""
        return self._keeper.make_room() or self._keeper.fits(tpm.growth(self.family, int.from_bytes(code)))

    @staticmethod
    def _is_startup(code: bytes, response: bytes) -> bool:
        return int.from_bytes(code) in (tpm.TPM2_STARTUP, tpm.TPM12_STARTUP) and tpm.code_of(response) == 0

    def _fail(self, cause: Exception) -> None:
        self._tpm.terminate()
        self._change(Change.FAILED, cause)

    # reset and stop

    def reset(self) -> None:
        """Platform reset: power off and on, then Startup(CLEAR) where no firmware does it.

        A healthy vTPM goes on with the state it has; a failed one asks the manager which state counts.

        Raises:
            InstanceError, StorageError: the vTPM could not come up; it is FAILED then, the stored state is kept.

        """
        try:
            fresh = False
            if self._condition is Condition.RUNNING:
                if self.family is TpmFamily.TPM_2_0:  # or the TPM would count it as an attack on its lockout
                    with self._keeper.gather():
                        self._shut_down()
                self._tpm.terminate()
            else:
                fresh = self._keeper.load().fresh
            self._power_on(self._after_reset, fresh=fresh)
        except (InstanceError, StorageError) as error:
            self._fail(error)
            raise
        self._change(Change.STARTED)

    def _shut_down(self) -> bool:
        """Send what saves the volatile state unless the guest just did; returns whether it is saved."""
        if self._guest_shut_down:
            return True
        for packet in tpm.shutdowns(self.family):
            code = tpm.code_of(self._tpm.process(packet))
            if code in (0, tpm.not_started_code(self.family)):
                return True
        return False

    def hibernate(self, locality: int) -> None:
        """Save everything, the volatile part too, and power off; a guest is to notice nothing, so no Shutdown is sent.

        `locality` is the data channel's. Until the commit is acknowledged nothing has changed.

        Raises:
            NotNowError: it is failed, or not started. StateNotWrittenError, CommitRefusedError: it was not to be.
            SaveError, ManagerError: whether the state counts is not known; the vTPM is FAILED then.

        """
        if self._condition is not Condition.RUNNING:
            raise NotNowError("it answers failure until a platform reset, so there is nothing to hibernate")
        if self.family is TpmFamily.TPM_2_0 and tpm.code_of(self._tpm.process(tpm.read_clock())):
            raise NotNowError("its TPM has not been started up by its guest, or is in failure mode")
        volatile = self._tpm.volatile()
        firmware = self._after_reset is Startup.NONE
        try:
            self._keeper.commit_slumber(Slumber(volatile, self._guest_shut_down, firmware, locality))
        except (StateNotWrittenError, CommitRefusedError):
            raise
        except InstanceError as error:
            self._fail(error)
            raise
        self._tpm.terminate()
        self._change(Change.STOPPED)

    def stop(self) -> bool:
        """Clean stop: save the volatile state, one final commit, power off. Returns whether it was clean.

        A failed vTPM has nothing that may be saved: it is only powered off.

        Raises:
            InstanceError, StorageError: the final state is not acknowledged; the last acknowledged one counts.

        """
        if self._condition is not Condition.RUNNING:
            self._tpm.terminate()
            self._change(Change.STOPPED, self._cause)
            return False
        try:
            with self._keeper.gather():
                clean = self._shut_down()
            self._keeper.commit(final=clean)
        except (InstanceError, StorageError) as error:
            self._fail(error)
            raise
        self._tpm.terminate()
        self._change(Change.STOPPED)
        return clean
