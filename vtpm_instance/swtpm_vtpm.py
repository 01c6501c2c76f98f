"""A vTPM of the swtpm command: power as swtpm has it.

It differs from a managed one in that each power on reads the files again, that a backup may step in for a state that
libtpms refuses, and that what was taken out is another process's only once the lock was released.
"""

from vtpm_instance.errors import StateRefusedError
from vtpm_instance.libtpms import PERMANENT
from vtpm_instance.swtpm_blobs import SwtpmBlobs
from vtpm_instance.swtpm_keeper import SwtpmKeeper
from vtpm_instance.vtpm import Vtpm


class SwtpmVtpm(Vtpm):
    """One TPM over swtpm's files; `files` and `blobs` are set once, before it is powered on."""

    files: SwtpmKeeper
    blobs: SwtpmBlobs

    def power_on(self, *, delete_volatile: bool = True) -> None:
        """Switch on, or off and on, from what the files hold now; see `Power.power_on`."""
        self.power_off()
        self._loaded = False
        try:
            super().power_on(delete_volatile=delete_volatile)
        except StateRefusedError:
            if not self._backup_is_better() or not self.files.recover():
                raise
            super().power_on(delete_volatile=delete_volatile)

    def _backup_is_better(self) -> bool:
        """Tell whether it is the stored permanent state that libtpms refuses, and not its backup.

        What was put in, or a volatile part, may be at fault as well: then the newest state must not give way.
        """
        backup, stored = self.files.backup(), self.files.stored()
        return backup is not None and stored is not None and not self._starts(stored) and self._starts(backup)

    def _starts(self, permanent: bytes) -> bool:
        try:
            self._tpm.start(self.family, {PERMANENT: permanent})
        except StateRefusedError:
            return False
        self._tpm.terminate()
        return True

    def take_out(self, kind: int, flags: int) -> tuple[int, int, bytes]:
        """Take a state blob out; the TPM goes on as before unless its lock was released."""
        try:
            return self.blobs.take_out(kind, flags)
        finally:
            self._taken_out = self.blobs.history
            self._serving = self.running and not self._taken_out
