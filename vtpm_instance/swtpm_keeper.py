"""The save path without a manager: what libtpms stores is in swtpm's state files before the guest is answered.

Same methods as `statekeeper`, over `storage.swtpm_files`. Better than swtpm: a new TPM is made only where nothing at
all is stored; a state that does not open is left alone; nothing is written without the lock, and what was read without
it (`--migration incoming`) is compared with what is there when the lock is taken.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from frontend_backend.tpmhdr import TpmFamily
from storage import swtpm_blob
from storage.swtpm_crypto import SwtpmKey
from storage.swtpm_errors import SwtpmBadHeader, SwtpmDamaged, SwtpmLocked, SwtpmPartMissing, SwtpmStateError
from storage.swtpm_files import NAMES, PERMANENT, SwtpmFiles
from vtpm_instance.control_machine import Result
from vtpm_instance.journal import note
from vtpm_instance.slumber import Slumber

RELEASED_RETRIES: Final = 300  # of 10 ms each: how long the lock is waited for that was released for a migration


@dataclass(frozen=True, slots=True)
class LoadedFiles:
    """What is known of a state read from files: TPM2_Startup is never our business after the first time."""

    family: str
    fresh: bool
    startup: str = "none"
    hw_pcrs: int = 0
    measured: tuple[bytes, ...] = ()
    after_reset: str = ""


class SwtpmKeeper:
    """Keeps one vTPM's blobs in swtpm's files. `blobs` is the dict that libtpms fills; `changed` is its store hook."""

    def __init__(
        self, files: SwtpmFiles, family: TpmFamily, key: SwtpmKey | None, *, encrypts_exports: bool, incoming: bool
    ) -> None:
        """Work on `files`, encrypted with `key` where there is one; nothing is locked or read yet.

        `encrypts_exports` is for GET_CONFIG; `incoming`: the state is still another process's, which has the lock.
        """
        self._files, self._family, self.key = files, family, key
        self._encrypts_exports, self._incoming = encrypts_exports, incoming
        self._stored: dict[str, bytes] = {}  # blobs that are in the files, as far as we know
        self._images: dict[str, bytes] = {}  # as read without the lock
        self._gathering = False
        self._saves = 0
        self._retries = 0
        self.blobs: dict[str, bytes] = {}
        self.roomy = False  # while the lock is not ours: then `make_room` is asked before each command

    # loading

    def load(self) -> LoadedFiles:
        """Lock, then read all there is into `blobs`. Writes nothing.

        Raises:
            SwtpmStateError: locked by another process, unreadable, not of this key, or its permanent part is missing.

        """
        if not self._incoming:
            self._take_lock()
        try:
            self._read()
        except SwtpmStateError:
            if not self._permanent_is_damaged() or self.backup() is None or not self.recover():
                raise
            self._read()
        self.roomy = self._files.locked
        return LoadedFiles(self._family.value, fresh=not self.blobs)

    def _read(self) -> None:
        images = {name: image for name in NAMES if (image := self._files.load(name)) is not None}
        blobs = {name: swtpm_blob.unpack_stored(image, self.key) for name, image in images.items()}
        if blobs and PERMANENT not in blobs:
            raise SwtpmPartMissing(self._files.where.path, " and ".join(sorted(blobs)))
        self._images = {} if self._files.locked else images
        self._stored, self.blobs = blobs, dict(blobs)

    def _permanent_is_damaged(self) -> bool:
        """Tell damage from what the caller can mend: a wrong key is no reason to go back to an older state."""
        try:
            self.stored()
        except (SwtpmBadHeader, SwtpmDamaged):
            return True
        except SwtpmStateError:
            return False
        return False

    def stored(self) -> bytes | None:
        """Return the permanent state that is in the files now. Raises SwtpmStateError."""
        image = self._files.load(PERMANENT)
        return None if image is None else swtpm_blob.unpack_stored(image, self.key)

    def backup(self) -> bytes | None:
        """Return the kept backup of the permanent state; None where there is none that opens."""
        try:
            image = self._files.backup()
            return None if image is None else swtpm_blob.unpack_stored(image, self.key)
        except SwtpmStateError as error:
            note(f"the backup cannot be used either: {error}")
            return None

    def recover(self) -> bool:
        """Put a kept backup in place of a permanent state that was refused; see `SwtpmFiles.recover`.

        It is the caller's to know that the permanent state itself is at fault, and that the backup is not.
        """
        recovered = self._files.locked and self._files.recover()
        if recovered:
            note("the permanent state was refused: its backup is in place now, and the refused one is kept beside it")
        return recovered

    # locking

    def _take_lock(self) -> None:
        """Lock; what was read without the lock must still be what is there. Raises SwtpmLocked, SwtpmDamaged."""
        if self._files.locked:
            return
        self._files.lock(self._retries)
        self._retries, self._incoming = 0, False
        if self._images and {name: self._files.load(name) for name in self._images} != self._images:
            raise SwtpmDamaged("it was changed by another process before the lock could be taken; INIT reads it again")
        self._images = {}
        self.roomy = True

    def release(self) -> None:
        """Give the lock up after the state was taken out for a migration; the next command takes it back."""
        self._files.unlock()
        self.roomy = self._files.locked
        self._retries = RELEASED_RETRIES
        self._images = {}
        if not self._files.locked:
            self._images = {name: image for name in NAMES if (image := self._files.load(name)) is not None}

    def lock(self, retries: int) -> int:
        """Take the lock (LOCK_STORAGE), with `retries` 10 ms apart; returns a `Result`."""
        self._retries = min(retries, RELEASED_RETRIES)
        try:
            self._take_lock()
        except SwtpmLocked as error:
            note(str(error))
            return Result.FAIL
        except SwtpmStateError as error:
            note(str(error))
            return error.result
        return Result.SUCCESS

    @property
    def holds_lock(self) -> bool:
        """Whether the state is ours to write."""
        return self._files.locked

    def ensure_locked(self) -> None:
        """Take the lock if it is not ours. Raises SwtpmStateError."""
        self._take_lock()

    # saving

    @property
    def config(self) -> int:
        """What GET_CONFIG answers: bit 0, stored blobs are encrypted; bit 1, blobs that are taken out are."""
        return (self.key is not None) | self._encrypts_exports << 1

    @property
    def generation(self) -> int:
        """Number of saves of this process."""
        return self._saves

    def changed(self, name: str, content: bytes | None) -> None:
        """Store or delete one blob that libtpms changed; durable on return, or gathered. Raises SwtpmStateError."""
        if self._gathering:
            return
        self._put(name, content)

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Leave changes in memory for the while; the caller commits afterwards, before any guest is answered."""
        self._gathering = True
        try:
            yield
        finally:
            self._gathering = False

    def commit_gathered(self) -> None:
        """Store and delete what the files do not have as it is in `blobs`. Raises SwtpmStateError."""
        for name in NAMES:
            if self.blobs.get(name) != self._stored.get(name):
                self._put(name, self.blobs.get(name))

    def commit(self, *, final: bool = False) -> None:  # noqa: ARG002 - there is nobody to tell that it is the last one
        """Make the files what `blobs` is, also where they were not read: a state was put in. Raises SwtpmStateError."""
        self._take_lock()
        self.commit_gathered()
        for name in self._files.sizes().keys() - self.blobs.keys():
            self._put(name, None)

    def _put(self, name: str, content: bytes | None) -> None:
        self._take_lock()
        if content is None:
            self._files.delete(name)
            self._stored.pop(name, None)
        else:
            self._files.store(name, swtpm_blob.pack_stored(content, self.key))
            self._stored[name] = content
        self._saves += 1

    # what a keeper with a manager does more

    def make_room(self) -> bool:
        """Take the lock back before a command, where it is not ours; there is no room to be made beforehand."""
        self._take_lock()
        self.roomy = True
        return True

    @staticmethod
    def fits(_growth: int) -> bool:
        """Files grow with their state."""
        return True

    @staticmethod
    def take_slumber() -> Slumber | None:
        """No vTPM without a manager hibernates."""
        return None

    def commit_slumber(self, slumber: Slumber) -> None:
        """Never asked for without a manager."""
        raise NotImplementedError

    @staticmethod
    def hardware_pcrs(_selection: int) -> dict[int, bytes]:
        """There is no manager, so no hardware TPM's either."""
        return {}

    @staticmethod
    def measurements() -> tuple[bytes, ...]:
        """There is no manager who would know of any."""
        return ()

    def close(self) -> None:
        """Let lock and files go."""
        self._files.close()
