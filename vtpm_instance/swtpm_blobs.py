"""GET_STATEBLOB and SET_STATEBLOB without a manager: swtpm's own form of state blobs, under its two keys.

Source: swtpm's ctrlchannel.c and swtpm_nvstore.c; reference/swtpm-libtpms-qemu.md 1.4, 1.6, 3.5.
"""

from typing import Final

from frontend_backend.tpmhdr import TpmFamily
from storage import swtpm_blob
from storage.swtpm_crypto import SwtpmKey
from storage.swtpm_errors import SwtpmPartMissing, SwtpmStateError
from vtpm_instance.control_machine import BlobFlags, BlobKind, Result
from vtpm_instance.journal import note
from vtpm_instance.libtpms import PERMANENT, SAVED, VOLATILE, Tpm
from vtpm_instance.swtpm_keeper import SwtpmKeeper

_NAMES: Final = {BlobKind.PERMANENT: PERMANENT, BlobKind.VOLATILE: VOLATILE, BlobKind.SAVED: SAVED}


class SwtpmBlobs:
    """The state blobs of one TPM."""

    def __init__(
        self,
        tpm: Tpm,
        keeper: SwtpmKeeper,
        family: TpmFamily,
        migration_key: SwtpmKey | None,
        *,
        releases_lock: bool,
    ) -> None:
        """Take blobs of `tpm` out, and in for its next start; `releases_lock` as --migration says."""
        self._tpm, self._keeper, self._family = tpm, keeper, family
        self._migration_key, self._releases_lock = migration_key, releases_lock
        self._staged: dict[str, bytes] = {}

    @property
    def staged(self) -> bool:
        """Whether the next power on starts from what was put in, with the stored permanent part if need be."""
        return bool(self._staged)

    @property
    def history(self) -> bool:
        """Whether the TPM's state is another process's now, so that nothing may be saved to it at power off."""
        return not self._keeper.holds_lock

    def take_out(self, kind: int, flags: int) -> tuple[int, int, bytes]:
        """Return (result, reply flags, blob). With the last kind the lock is released, where that is wanted."""
        name = _NAMES[BlobKind(kind)]
        if kind == BlobKind.VOLATILE:
            blob: bytes | None = self._tpm.volatile()
            self._forget_volatile()
        else:
            blob = self._keeper.blobs.get(name)
        answer: tuple[int, int, bytes] = (Result.RETRY, 0, b"")
        if blob is not None:
            decrypted = bool(flags & BlobFlags.DECRYPTED)
            image, encrypted = swtpm_blob.pack_transfer(
                blob, self._keeper.key, self._migration_key, decrypted=decrypted
            )
            answer = (Result.SUCCESS, BlobFlags.ENCRYPTED if encrypted else 0, image)
        if kind == BlobKind.SAVED and self._releases_lock:
            self._keeper.release()
        return answer

    def _forget_volatile(self) -> None:
        """Take a stored volatile state away: what was just taken out is newer, and would be overtaken by it."""
        if self._keeper.blobs.pop(VOLATILE, None) is not None:
            self._keeper.changed(VOLATILE, None)

    def put_in(self, kind: int, flags: int, data: bytes) -> int:
        """Take a blob in for the next power on; if libtpms refuses it, all that was put in is dropped."""
        try:
            name = _NAMES[BlobKind(kind)]
        except ValueError:
            return Result.BAD_PARAMETER
        try:
            self._keeper.ensure_locked()
        except SwtpmStateError as error:
            note(str(error))
            return Result.IO_ERROR
        try:
            encrypted = bool(flags & BlobFlags.ENCRYPTED)
            blob = swtpm_blob.unpack_transfer(data, self._keeper.key, self._migration_key, encrypted=encrypted)
        except SwtpmStateError as error:
            note(f"{name} blob refused: {error}")
            return error.result
        if blob is None:
            self._staged.pop(name, None)
            return Result.SUCCESS
        staged = self._staged | {name: blob}
        try:
            code = self._judge(staged)
        except SwtpmStateError as error:
            note(f"{name} blob refused: what is stored does not go with it: {error}")
            code = error.result
        self._staged = {} if code else staged
        return code

    def _judge(self, staged: dict[str, bytes]) -> int:
        if SAVED in staged and self._family is TpmFamily.TPM_2_0:
            return Result.BAD_TYPE
        return self._tpm.judge(self._family, self._completed(staged))

    def _completed(self, staged: dict[str, bytes]) -> dict[str, bytes]:
        """Return what was put in, beside the stored permanent part where no other was. Raises SwtpmStateError."""
        if PERMANENT in staged:
            return staged
        stored = self._keeper.stored()
        return staged if stored is None else {PERMANENT: stored, **staged}

    def used(self) -> None:
        """Take the lock back before the TPM goes on. Raises SwtpmStateError: another process has it now."""
        self._keeper.ensure_locked()

    def forget(self) -> None:
        """Keep what was put in: swtpm's STOP does."""

    @property
    def newest(self) -> bool:
        """No: what was put in is saved at once, as swtpm does."""
        return False

    def take_staged(self) -> dict[str, bytes]:
        """Return what was put in by libtpms' names, and forget it.

        Raises:
            SwtpmStateError: no permanent part was put in, and the stored one is missing or cannot be used.

        """
        staged, self._staged = self._staged, {}
        completed = self._completed(staged)
        if PERMANENT not in completed:
            raise SwtpmPartMissing("what was put in", " and ".join(sorted(completed)))
        return completed
