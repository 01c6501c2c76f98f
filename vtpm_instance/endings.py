"""How the life of a vTPM in this process ends: asleep, or stopped for good.

What lives here: the last commit. What must not: connections (`rest`), the process (`instance`).
"""

from frontend_backend.tpmhdr import TpmFamily
from storage.errors import StorageError
from vtpm_instance import tpm_commands as tpm
from vtpm_instance.condition import Change, Condition
from vtpm_instance.errors import CommitRefusedError, InstanceError, NotNowError, SaveError, StateNotWrittenError
from vtpm_instance.power import Power
from vtpm_instance.slumber import Slumber
from vtpm_instance.tpm_commands import Startup


class Endings(Power):
    """A vTPM that can be put to sleep and stopped."""

    def hibernate(self, locality: int) -> None:
        """Save everything, the volatile part too, and power off; a guest is to notice nothing, so no Shutdown is sent.

        `locality` is the data channel's. Until the commit is acknowledged nothing has changed.

        Raises:
            NotNowError: it is failed, or not started. StateNotWrittenError, CommitRefusedError: it was not to be.
            SaveError, ManagerError: whether the state counts is not known; the vTPM is FAILED then.

        """
        self._check_can_sleep()
        volatile = self._tpm.volatile()
        firmware = self._after_reset is Startup.NONE
        try:
            self._keeper.commit_slumber(Slumber(volatile, self._guest_shut_down, firmware, locality, self._buffer_size))
        except (StateNotWrittenError, CommitRefusedError):
            raise
        except InstanceError as error:
            self._fail(error)
            raise
        self._tpm.terminate()
        self._change(Change.STOPPED)

    def _check_can_sleep(self) -> None:
        if self._condition is Condition.OFF:
            raise NotNowError("its guest's machine is switched off")
        if not self.running:
            raise NotNowError("it answers failure until a platform reset, so there is nothing to hibernate")
        if self._taken_out:
            raise NotNowError("its state was taken out, and its guest has not gone on since")
        try:
            refused = self.family is TpmFamily.TPM_2_0 and tpm.code_of(self._tpm.process(tpm.read_clock()))
        except (SaveError, StorageError) as error:  # libtpms stores its clock with any command
            self._fail(error)
            raise
        if refused:
            raise NotNowError("its TPM has not been started up by its guest, or is in failure mode")

    def stop(self) -> bool:
        """Clean stop: save the volatile state, one final commit, power off. Returns whether it was clean.

        A failed vTPM has nothing that may be saved: it is only powered off. Nor has one that is off, or whose state was
        taken out and that was not used since.

        Raises:
            InstanceError, StorageError: the final state is not acknowledged; the last acknowledged one counts.

        """
        clean = self._condition is Condition.OFF or self._taken_out
        if not self.running or self._taken_out:
            self._tpm.terminate()
            self._change(Change.STOPPED, self._cause)
            return clean
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
