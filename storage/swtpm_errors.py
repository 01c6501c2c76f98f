# ruff: noqa: N818 - the names say what happened, as in storage.errors; the tree says that they are errors
"""What can be wrong with swtpm's state files and keys. `result` is the code swtpm answers on its control channel.

Every message says that the files are as they were: nothing here replaces or deletes a state that cannot be read.
"""

from typing import ClassVar

from storage.errors import StorageError

_KEPT = "the state files are as they were"


class SwtpmStateError(StorageError):
    """Base: a state of swtpm's format cannot be used; `result` is a TPM 1.2 result code."""

    result: ClassVar[int] = 0x09  # TPM_FAIL


class SwtpmBadHeader(SwtpmStateError):
    """These bytes do not begin as swtpm's blobs do, or are cut short."""

    result = 0x03  # TPM_BAD_PARAMETER

    def __init__(self, what: str) -> None:
        super().__init__(f"not a state blob of swtpm's: {what}; {_KEPT}")


class SwtpmBadHeaderSize(SwtpmBadHeader):
    """The header says that it has another size than version 1 and 2 have."""

    result = 0x2B  # TPM_BAD_DATASIZE


class SwtpmTooNew(SwtpmStateError):
    """The blob needs a newer reader."""

    result = 0x2E  # TPM_BAD_VERSION

    def __init__(self, needs: int) -> None:
        super().__init__(
            f"this state is written in format {needs}, which this version cannot read; {_KEPT}; use the swtpm that "
            "wrote it"
        )


class SwtpmDamaged(SwtpmStateError):
    """A part is missing, or does not fit its own size."""

    def __init__(self, what: str) -> None:
        super().__init__(f"damaged state: {what}; {_KEPT}; restore a good copy")


class SwtpmKeyMissing(SwtpmStateError):
    """The state is encrypted and no key was given."""

    result = 0x0D  # TPM_KEYNOTFOUND

    def __init__(self, option: str) -> None:
        super().__init__(f"this state is encrypted; {_KEPT}; give its key with {option}")


class SwtpmNotEncrypted(SwtpmStateError):
    """A key was given, and the state is not encrypted: swtpm takes no plain state then, and nor do we."""

    def __init__(self) -> None:
        super().__init__(f"a key was given, but this state is not encrypted; {_KEPT}; leave the key out")


class SwtpmWrongKey(SwtpmStateError):
    """The HMAC is not the one of this key: another key, or changed bytes."""

    result = 0x21  # TPM_DECRYPT_ERROR

    def __init__(self, why: str) -> None:
        super().__init__(f"this state cannot be decrypted: {why}; {_KEPT}; is it the right key?")


class SwtpmWrongKeySize(SwtpmStateError):
    """The state was encrypted with a key of the other size."""

    result = 0x28  # TPM_BAD_KEY_PROPERTY

    def __init__(self, wanted_bits: int) -> None:
        super().__init__(f"wrong decryption key: this state needs a {wanted_bits} bit key; {_KEPT}")


class SwtpmKeyUnusable(StorageError):
    """What was given as a key is none."""


class SwtpmLocked(SwtpmStateError):
    """Another process, a running swtpm most likely, holds the lock on the state."""

    def __init__(self, place: str) -> None:
        super().__init__(
            f"Could not lock access to lockfile {place}: another swtpm uses this state; {_KEPT}; stop that one first"
        )
        self.place = place


class SwtpmForeign(SwtpmStateError):
    """A file that is named as a state and holds something else: swtpm would format it."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} is neither empty nor a state file of swtpm's; it was left as it is; name another one")


class SwtpmPartMissing(SwtpmStateError):
    """Parts of a TPM's state are there, its permanent part is not."""

    def __init__(self, place: str, found: str) -> None:
        super().__init__(
            f"{place} holds {found} but no permanent state; no new TPM was made over it, {_KEPT}; restore the missing "
            "part, or move the rest away if a new TPM is wanted"
        )


class SwtpmDiskError(SwtpmStateError):
    """The disk's fault: an operation on a state file failed."""

    def __init__(self, operation: str, cause: OSError) -> None:
        super().__init__(f"could not {operation}: {cause.strerror or cause}; the state stored before it is kept")
        self.cause = cause


class SwtpmNoRoom(SwtpmStateError):
    """The block device or file cannot hold the state."""

    result = 0x17  # TPM_SIZE

    def __init__(self, path: str, needs: int, has: int) -> None:
        super().__init__(f"{path} has {has} bytes, this state needs {needs}; the state stored before it is kept")
