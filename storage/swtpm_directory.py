"""swtpm's directory backend: one file for each blob, replaced by a rename.

Better than swtpm in four things: a state is flushed, and its directory entry too, before `store` returns; with
`backup` there is no moment without a permanent state; a state that was refused is kept when its backup takes its
place; and a lock file that was deleted does not let two processes write one state. Everything happens below a
descriptor of the directory, so that it may be renamed, or the process changed root.

Source: swtpm's swtpm_nvstore_dir.c; reference/swtpm-libtpms-qemu.md 3.4.
"""

import os
import stat
from contextlib import suppress
from typing import Final

from storage.swtpm_errors import SwtpmDamaged, SwtpmDiskError, SwtpmLocked
from storage.swtpm_files import DEFAULT_MODE, MAX_IMAGE, NAMES, PERMANENT, Where, record_lock, write_all

LOCK_FILE: Final = ".lock"
_LOCK_MODE: Final = 0o660
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a fifo must not hold us up
_WRITE: Final = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


class SwtpmDirectory:
    """The state files of one TPM in a directory."""

    def __init__(self, where: Where) -> None:
        """Open the directory of `where`. Raises SwtpmDiskError."""
        self.where = where
        self._lock_descriptor = -1
        self._lock_identity: tuple[int, ...] = ()  # inode and device
        try:
            self._directory = os.open(where.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise SwtpmDiskError(f"open the state directory {where.path}", error) from error

    def file_name(self, name: str) -> str:
        """Return the file that holds the blob `name`."""
        return f"tpm{'2' if self.where.tpm2 else ''}-00.{name}"

    def _temporary_name(self, name: str) -> str:
        return f"TMP{'2' if self.where.tpm2 else ''}-00.{name}"

    # locking

    def lock(self, retries: int = 0) -> None:
        """Take the lock unless none is wanted. Raises SwtpmLocked, SwtpmDiskError."""
        if self.locked:
            return
        place = os.path.join(self.where.path, LOCK_FILE)
        try:
            descriptor = os.open(LOCK_FILE, _WRITE, _LOCK_MODE, dir_fd=self._directory)
        except OSError as error:
            raise SwtpmDiskError(f"open lockfile {place}", error) from error
        try:
            record_lock(descriptor, place, retries)
        except BaseException:
            os.close(descriptor)
            raise
        self._lock_descriptor = descriptor
        self._lock_identity = os.fstat(descriptor)[1:3]

    def _still_lock(self) -> None:
        """See to it that the lock is worth something: who finds no lock file makes a new one, and locks that.

        Raises:
            SwtpmLocked: another process did. SwtpmDiskError.

        """
        if self._lock_descriptor < 0:
            return
        try:
            status = os.stat(LOCK_FILE, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            self.unlock()
            self.lock()
            return
        if status[1:3] != self._lock_identity:
            self.unlock()
            raise SwtpmLocked(os.path.join(self.where.path, LOCK_FILE))

    def unlock(self) -> None:
        """Let the lock go."""
        if self._lock_descriptor >= 0:
            os.close(self._lock_descriptor)
            self._lock_descriptor = -1

    @property
    def locked(self) -> bool:
        """Whether the lock is ours, or none was wanted."""
        return self._lock_descriptor >= 0 or self.where.lock is False

    # blobs

    def load(self, name: str) -> bytes | None:
        """Return an image; a permanent state of which only the backup is left is put back first.

        Not without the lock: a running swtpm has none but the backup while it saves.
        """
        image = self._read(self.file_name(name))
        if image is None and name == PERMANENT and self.where.backup and self.locked:
            with suppress(FileNotFoundError):
                self._rename(self._backup_name, self.file_name(name))
                return self._read(self.file_name(name))
        return image

    def _read(self, file_name: str) -> bytes | None:
        try:
            descriptor = os.open(file_name, _READ, dir_fd=self._directory)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SwtpmDiskError(f"open {file_name}", error) from error
        with open(descriptor, "rb") as file:
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise SwtpmDamaged(f"{file_name} is no regular file")
                if self.where.mode is not None:
                    os.fchmod(descriptor, self.where.mode)
                image = file.read(MAX_IMAGE + 1)
            except OSError as error:
                raise SwtpmDiskError(f"read {file_name}", error) from error
        if len(image) > MAX_IMAGE:
            raise SwtpmDamaged(f"{file_name} has more than {MAX_IMAGE} bytes")
        return image

    def store(self, name: str, image: bytes) -> None:
        """Replace an image: write beside it, flush, rename, flush the directory."""
        temporary, final = self._temporary_name(name), self.file_name(name)
        try:
            self._still_lock()
            mode = self.where.mode
            descriptor = os.open(temporary, _WRITE, DEFAULT_MODE if mode is None else mode, dir_fd=self._directory)
            try:
                if mode is not None:
                    os.fchmod(descriptor, mode)
                write_all(descriptor, image)
                if self.where.fsync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if name == PERMANENT and self.where.backup:
                self._keep_backup(final)
            os.rename(temporary, final, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            self._flush_directory()
        except OSError as error:
            raise SwtpmDiskError(f"store {final}", error) from error

    def delete(self, name: str) -> bool:
        """Take an image away."""
        try:
            self._still_lock()
            os.unlink(self.file_name(name), dir_fd=self._directory)
            self._flush_directory()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise SwtpmDiskError(f"delete {self.file_name(name)}", error) from error
        return True

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each image there is."""
        found: dict[str, int] = {}
        for name in NAMES:
            try:
                status = os.stat(self.file_name(name), dir_fd=self._directory)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise SwtpmDiskError(f"look at {self.file_name(name)}", error) from error
            if not stat.S_ISREG(status.st_mode):
                raise SwtpmDamaged(f"{self.file_name(name)} is no regular file")
            found[name] = status.st_size
        return found

    # backup

    @property
    def _backup_name(self) -> str:
        return f"{self.file_name(PERMANENT)}.bak"

    def _keep_backup(self, final: str) -> None:
        """Make the state that is about to be replaced the backup; it stays in place meanwhile."""
        with suppress(FileNotFoundError):
            os.unlink(self._backup_name, dir_fd=self._directory)
        with suppress(FileNotFoundError):  # the first state has none before it
            os.link(final, self._backup_name, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def backup(self) -> bytes | None:
        """Return the image of the permanent state before the last one, where backups are wanted and one is there."""
        return self._read(self._backup_name) if self.where.backup else None

    def recover(self) -> bool:
        """Put the backup in place of a permanent state that was refused, which is kept as `….permall.refused-N`."""
        if self.backup() is None:
            return False
        final = self.file_name(PERMANENT)
        taken = set(os.listdir(self._directory))
        kept = next(name for number in range(len(taken) + 1) if (name := f"{final}.refused-{number}") not in taken)
        try:
            os.link(final, kept, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            self._rename(self._backup_name, final)
        except OSError as error:
            raise SwtpmDiskError(f"put the backup in place of {final}", error) from error
        return True

    def _rename(self, source: str, target: str) -> None:
        os.rename(source, target, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self._flush_directory()

    def _flush_directory(self) -> None:
        if self.where.fsync:
            os.fsync(self._directory)

    def close(self) -> None:
        """Let lock and directory go. May be repeated."""
        self.unlock()
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1
