# ruff: noqa: N818 - these are named for what happened; only the roots say Error
"""What can go wrong with recovery files and escrows: one tree, messages built here."""

from frontend_backend.messages_admin import ExitCode
from manager.errors import ManagerError


class RecoveryError(ManagerError):
    """A recovery file or an escrow could not be used."""


class RecoveryFileMissing(RecoveryError):
    """No such file, or we may not read it."""

    code = ExitCode.NOT_FOUND

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path} cannot be read: {why}. Nothing was changed. Check the name and the permissions.")


class RecoveryFileExists(RecoveryError):
    """A new recovery file would overwrite another file."""

    code = ExitCode.CONFLICT

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path} exists already. It was kept: a lost recovery key cannot be made again. Choose another name."
        )


class RecoveryFileUnwritten(RecoveryError):
    """The new recovery file could not be written whole."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path} could not be written: {why}. No key was made. Choose another place.")


class RecoveryFileUnreadable(RecoveryError):
    """The file is there, but is no recovery file."""

    code = ExitCode.INTEGRITY

    def __init__(self, path: str, why: str) -> None:
        super().__init__(
            f"{path} is not a recovery file: {why}. It was not changed. "
            "It must hold two PEM keys: P-256 for signing, then X25519 or another P-256 for the escrow."
        )


class RecoveryPassphraseWrong(RecoveryError):
    """The keys are encrypted, and the passphrase given is missing or another one."""

    code = ExitCode.DENIED

    def __init__(self, path: str, *, given: bool) -> None:
        what = "is not opened by this passphrase" if given else "is protected by a passphrase"
        super().__init__(f"{path} {what}. It was not changed. Give the right one with --passphrase-file.")


class EscrowError(RecoveryError):
    """An escrow does not give its secret back."""

    code = ExitCode.INTEGRITY


class EscrowUnreadable(EscrowError):
    """The bytes are no escrow, or one of a newer version."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"An escrowed key cannot be read: {why}. Its bytes were kept. Restore the store image from a backup."
        )


class EscrowWrongKey(EscrowError):
    """The escrow is for another recovery key."""

    code = ExitCode.DENIED

    def __init__(self, wanted: str, given: str) -> None:
        super().__init__(
            f"An escrowed key is for the recovery key with escrow fingerprint {wanted}, not {given}. "
            "Nothing was changed. Use the recovery file with that fingerprint (`vtpm-recovery-key show FILE`)."
        )
        self.wanted = wanted
        self.given = given


class EscrowMismatch(EscrowError):
    """Right key, but damaged bytes, or an escrow of another store, group or purpose put in this place."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"The escrowed key is damaged, or was made for something else than {what}. "
            "Its bytes were kept. Restore the store image from a backup."
        )
