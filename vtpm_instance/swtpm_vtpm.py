"""A vTPM of the swtpm command: power as swtpm has it.

It differs from a managed one in that each power on reads the files again, that a backup may step in for a state that
libtpms refuses, and that what was taken out is another process's only once the lock was released.
"""

from vtpm_instance.errors import StateRefusedError
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
            if not self.files.recover():
                raise
            super().power_on(delete_volatile=delete_volatile)

    def take_out(self, kind: int, flags: int) -> tuple[int, int, bytes]:
        """Take a state blob out; the TPM goes on as before unless its lock was released."""
        try:
            return self.blobs.take_out(kind, flags)
        finally:
            self._taken_out = self.blobs.history
            self._serving = self.running and not self._taken_out
