"""What an instance asks of the manager so that its vTPM's state can leave it, encrypted, and come back.

Messages of the conversation in `messages_instance`; instances of releases before state blobs send none of them.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Export:
    """Ask for a header and a key to encrypt state blobs with: of this generation, with these parts (state_blob.Part).

    Sent only by instances of releases that know state blobs, to a manager that may refuse it as unknown.
    """

    generation: int
    parts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExportReply:
    """Answer to Export: the header (state_blob.BlobHeader, packed) and the key, 32 bytes."""

    header: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Import:
    """Ask for the key of state blobs that begin with this header; granted only if this vTPM may start from them."""

    header: bytes


@dataclass(frozen=True, slots=True)
class ImportReply:
    """Answer to Import: the key, 32 bytes; `newest`: it is the state that the record names, and need not be saved."""

    key: bytes = field(repr=False)
    newest: bool = False
