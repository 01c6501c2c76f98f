"""The power of one vTPM: load, start up, reset, off and on, and in which condition it is.

What lives here: what becomes of the state when power comes and goes. What must not: the end (`endings`), a guest's
commands (`vtpm`), the control channel (`platform`), sockets, files. Conditions change by one table.
"""

import os
from collections.abc import Callable
from typing import Final

from frontend_backend.tpmhdr import TpmFamily
from storage.errors import StorageError
from vtpm_instance import tpm_commands as tpm
from vtpm_instance.condition import TRANSITIONS, Change, Condition, without_frames
from vtpm_instance.control_machine import StateBlobs
from vtpm_instance.errors import (
    BootNotMeasuredError,
    CrashedBeforeError,
    HardwarePcrsError,
    InstanceError,
    ManagerConfusedError,
    ResumeRefusedError,
    SaveError,
    StartupRefusedError,
    StateRefusedError,
    WrongFamilyError,
)
from vtpm_instance.hardware_pcrs import measure, put_in
from vtpm_instance.keeping import Keeper, Loaded
from vtpm_instance.libtpms import VOLATILE, Tpm
from vtpm_instance.slumber import Slumber
from vtpm_instance.tpm_commands import Startup

# Who starts it up himself the first time does so every time; and what is to be deactivated is so after each reset.
_LASTING: Final = frozenset({Startup.NONE, Startup.DEACTIVATED})
ENTROPY: Final = 32  # bytes stirred in after each start: forked or resumed TPMs never draw alike (performance.md 2c)


class Power:
    """The vTPM of this process; `announce` is told each new condition with a cause (None when it is healthy)."""

    def __init__(
        self,
        emulator: Tpm,
        keeper: Keeper,
        family: TpmFamily,
        after_reset: Startup,
        announce: Callable[[Condition, Exception | None], None],
    ) -> None:
        """Run `emulator` on `keeper`'s state; `after_reset` is CLEAR, or NONE where the guest's firmware starts it."""
        self._tpm, self._keeper, self.family = emulator, keeper, family
        self._after_reset, self._announce = after_reset, announce
        self.state_blobs: StateBlobs | None = None
        self.auto_shutdown = True  # whether power off saves what the guest did not
        self._condition = Condition.OFF
        self._serving = False
        self._taken_out = False  # a state blob was taken out, and nothing has been done with the TPM since
        self._loaded = self._fresh = False  # whether the keeper's blobs are the state that counts; that there is none
        self._hw_pcrs = 0
        self._measured: tuple[bytes, ...] | None = None  # of the boot that begins; None: the keeper is asked
        self._cause: Exception | None = None
        self._guest_shut_down = False
        self._stirred = False
        self._buffer_size = 0  # of libtpms' command buffer where the platform has set one
        self.locality = 0  # of the data channel, when it was hibernated

    @property
    def condition(self) -> Condition:
        """What the vTPM is doing."""
        return self._condition

    @property
    def running(self) -> bool:
        """Whether it is powered on and well."""
        return self._condition is Condition.RUNNING

    @property
    def cause(self) -> Exception | None:
        """Why the vTPM failed, None unless its condition is FAILED."""
        return self._cause

    def _change(self, change: Change, cause: Exception | None = None) -> None:
        self._condition = TRANSITIONS[self._condition, change]
        self._serving = self.running and not self._taken_out
        # Without its traceback, whose frames hold the command, the blobs and the commit's key until the next change.
        self._cause = cause and without_frames(cause)
        self._announce(self._condition, cause)

    def _fail(self, cause: Exception) -> None:
        self._tpm.terminate()
        self._loaded = False
        self._measured = None  # the next boot is another one
        self._change(Change.FAILED, cause)

    def _use(self) -> None:
        """See to it that what was taken out is history before anything more is done. Raises what a commit raises."""
        if self._taken_out and self.state_blobs is not None:
            self.state_blobs.used()
            self._loaded = True
        self._taken_out, self._serving = False, self.running

    # starting

    def start(self, *, power: bool = True) -> None:
        """Load the state the manager names and start up as it says; without `power` only verify it, and stay off.

        "state" of a hibernated vTPM is no Startup: it goes on where it was. A refused Startup(STATE) or resumption
        leaves the vTPM FAILED, never silently cleared; so does "failed", and so does a sound state that cannot be saved
        (a full disk): the next platform reset tries again.

        Raises:
            InstanceError, StorageError: the vTPM cannot be loaded; nothing was changed.

        """
        reply = self._load()
        try:
            kind = Startup(reply.startup)
        except ValueError as error:
            raise ManagerConfusedError("Load", str(error)) from error
        if kind is Startup.DEACTIVATED and self.family is not TpmFamily.TPM_1_2:
            raise ManagerConfusedError("Load", "only a TPM 1.2 can be started up deactivated")
        if kind in _LASTING:
            self._after_reset = kind
        elif reply.after_reset == Startup.DEACTIVATED.value:
            self._after_reset = Startup.DEACTIVATED
        self._measured = reply.measured if kind is Startup.CLEAR and power else None
        try:
            slumber = self._keeper.take_slumber() if kind is Startup.STATE else None
            if slumber is not None:
                self._resume(slumber)
            elif kind is Startup.FAILED or not power:
                self._stay_off(crashed=power)
                return
            else:
                self._power_on(kind)
        except (StartupRefusedError, ResumeRefusedError, SaveError, HardwarePcrsError, BootNotMeasuredError) as error:
            self._fail(error)
            return
        self._change(Change.STARTED)

    def _stay_off(self, *, crashed: bool) -> None:
        if not self._fresh:
            self._try_out()
        if crashed:
            self._loaded = False
            self._change(Change.FAILED, CrashedBeforeError())
        else:
            self._change(Change.POWERED_OFF)

    def _load(self) -> Loaded:
        reply = self._keeper.load()
        if reply.family != self.family.value:
            raise WrongFamilyError(self.family.value, reply.family)
        self._hw_pcrs, self._fresh, self._loaded = reply.hw_pcrs, reply.fresh, True
        return reply

    def _resume(self, slumber: Slumber) -> None:
        """Go on where a hibernated vTPM was, unnoticed by its guest; the manager has seen to it that this is once.

        Raises:
            ResumeRefusedError: libtpms does not take the volatile part. StateRefusedError: nor the permanent one.

        """
        self.set_buffer_size(slumber.buffer_size)
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

    def _power_on(self, kind: Startup, *, delete_volatile: bool = True) -> None:
        """Start libtpms on the keeper's blobs, start it up, stir entropy in, and commit what that changed, once."""
        self._guest_shut_down = self._stirred = False
        blobs = self._keeper.blobs
        with self._keeper.gather():
            self._tpm.start(self.family, blobs, self._keeper.changed, fresh=self._fresh)
            if VOLATILE in blobs:  # it has gone on from there
                self._stir()
                if delete_volatile:
                    del blobs[VOLATILE]
                    self._keeper.changed(VOLATILE, None)
            if kind is not Startup.NONE:
                code = tpm.code_of(self._tpm.process(tpm.startup(self.family, kind)))
                if code:
                    raise StartupRefusedError(kind.value, code)
                if kind is Startup.CLEAR:
                    self._fill_pcrs()
                self._stir()
        self._keeper.commit_gathered()
        self._fresh = False

    def _fill_pcrs(self) -> None:
        """Extend what the attachment asks for, before the guest can send a command.

        Raises:
            HardwarePcrsError, BootNotMeasuredError: some PCRs may be extended.

        """
        if self._hw_pcrs:
            put_in(self._tpm.process, self.family, self._keeper.hardware_pcrs(self._hw_pcrs))
        measured, self._measured = self._measured, None
        measure(self._tpm.process, self.family, self._keeper.measurements() if measured is None else measured)

    def _start_on_staged(self, staged: dict[str, bytes], *, newest: bool) -> None:
        """Start on a state that was put in instead of the stored one, and make it the one that counts.

        One that is the `newest` as it is becomes history before its first command, as after it was taken out: until
        then it can be put in once more.
        """
        self._loaded = self._guest_shut_down = self._stirred = False
        self._keeper.blobs = dict(staged)
        volatile = self._keeper.blobs.get(VOLATILE)
        with self._keeper.gather():
            self._tpm.start(self.family, self._keeper.blobs, self._keeper.changed)
            self._keeper.blobs.pop(VOLATILE, None)
            if volatile is not None:
                self._stir()
        if not newest:
            self._keeper.commit()
        # What the start changed of the newest one is not saved before it is used, so a power on loads it again.
        self._taken_out, self._loaded, self._fresh = newest, not newest, False

    def _stir(self) -> None:
        if self.family is TpmFamily.TPM_2_0:
            self._tpm.process(tpm.stir_random(os.urandom(ENTROPY)))
        self._stirred = True

    def set_buffer_size(self, wanted: int) -> tuple[int, int, int]:
        """Return (size, smallest, largest) of the command buffer; `wanted` above 0 sets it while the TPM is off."""
        sizes = self._tpm.buffer_size(self.family, wanted)
        if wanted:
            self._buffer_size = sizes[0]
        return sizes

    # reset, power and stop

    def reset(self) -> None:
        """Platform reset, and Startup(CLEAR) where no firmware does it; raises what `power_on` raises.

        A healthy vTPM goes on with the state it has; a failed one asks the manager which state counts.
        """
        self.power_on()

    def power_on(self, *, delete_volatile: bool = True) -> None:
        """Switch the TPM on, or off and on; from the state that was put in, where one was.

        Without `delete_volatile` a stored volatile state (STORE_VOLATILE) stays for the next time.

        Raises:
            InstanceError, StorageError: the vTPM could not come up; it is FAILED then, the stored state is kept.

        """
        blobs = self.state_blobs
        try:
            if self.running:
                with self._keeper.gather():  # or the TPM would count it as an attack on its lockout
                    self._shut_down_unasked()
                self._tpm.terminate()
            if blobs is not None and blobs.staged:
                newest = blobs.newest
                self._start_on_staged(blobs.take_staged(), newest=newest)
            else:
                if blobs is not None:
                    blobs.forget()
                if not self._loaded:
                    self._load()
                self._power_on(self._after_reset, delete_volatile=delete_volatile)
        except (InstanceError, StorageError) as error:
            self._fail(error)
            raise
        self._change(Change.STARTED)

    def power_off(self) -> None:
        """Switch the TPM off: what the guest did not save is, and committed. May be repeated.

        One whose state was taken out and that was not used since is only switched off: what was taken out stays the
        state that counts.

        Raises:
            InstanceError, StorageError: it is not acknowledged; the vTPM is FAILED then, the last acknowledged counts.

        """
        if self._condition is Condition.OFF:
            return
        if self.running:
            try:
                with self._keeper.gather():
                    self._shut_down_unasked()
                if not self._taken_out:
                    self._keeper.commit_gathered()
            except (InstanceError, StorageError) as error:
                self._fail(error)
                raise
        self._tpm.terminate()
        self._change(Change.POWERED_OFF)

    def _shut_down_unasked(self) -> None:
        if self.auto_shutdown and not self._taken_out and self.family is TpmFamily.TPM_2_0:
            self._shut_down()

    def _shut_down(self) -> bool:
        """Send what saves the volatile state unless the guest just did; returns whether it is saved."""
        if self._guest_shut_down:
            return True
        for packet in tpm.shutdowns(self.family):
            code = tpm.code_of(self._tpm.process(packet))
            if code in (0, tpm.not_started_code(self.family)):
                return True
        return False
