"""State blobs as QEMU keeps them: layout, wrapping of the key, encryption. Pure: no I/O, no clock.

A vTPM's state leaves its instance in up to three blobs (permanent, volatile, savestate), which QEMU writes into its
saved state, snapshot or migration stream. They are one *export*: one header made by the manager, one key for all of
them, which is in the header, wrapped under a key that only this manager has. docs/format.md, "State blob".

    export header (160 bytes, the same in every blob of an export) | part header (20) | ciphertext | tag (16)

All numbers are big-endian. The wrapping key is HKDF-SHA256(manager's key, salt = export id): it meets one key, so its
nonce is zero; associated data: the 112 bytes before the wrapped key. Each part is AES-256-GCM under the export's key
with a random nonce of its own; associated data: all 180 bytes before the ciphertext.
"""

import hmac
import struct
from dataclasses import dataclass, field, replace
from enum import IntEnum, IntFlag
from typing import ClassVar, Final, Self
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from frontend_backend.errors import BlobDamagedError, BlobFormatError

MAGIC: Final = b"VTPMBLOB"
VERSION: Final = 1
KEY_BYTES: Final = 32
DIGEST_BYTES: Final = 32
EXPORT_ID_BYTES: Final = 16
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
MAX_PART: Final = 512 * 1024  # bytes of a blob with all around it; swtpm and so QEMU take no more (S:ctrlchannel.c)
FAMILIES: Final = {"1.2": 0x0102, "2.0": 0x0200}  # as in state images

_WRAP_INFO: Final = b"vtpm-manager state blob v1"
_ZERO_NONCE: Final = bytes(NONCE_BYTES)  # a derived key meets one message
_NAMES: Final = {number: name for name, number in FAMILIES.items()}


class PartFlags(IntFlag):
    """What is to be known of a part before it is used."""

    NONE = 0
    UNSTARTED = 1  # of a volatile part: Startup had not been sent, so that there is nothing to go on from


class Part(IntEnum):
    """Which blob; the number is that of swtpm's control channel (PTM_BLOB_TYPE_*)."""

    PERMANENT = 1
    VOLATILE = 2
    SAVED = 3


HEADER_FIELDS: Final = (  # name, struct code, meaning: docs/format.md is printed from it
    ("magic", "8s", "`VTPMBLOB`"),
    ("version", "H", "format version of the writer"),
    ("min_version", "H", "a reader below this version must refuse"),
    ("family", "H", "TPM family: 0x0102 or 0x0200"),
    ("parts", "H", "which blobs the export has: bit 1 permanent, bit 2 volatile, bit 3 savestate"),
    ("store", "16s", "UUID of the store whose manager wrapped the key"),
    ("vtpm", "16s", "UUID of the vTPM"),
    ("export", "16s", "random, one for all blobs of an export; salt of the wrapping key"),
    ("generation", "Q", "the vTPM's generation when it was exported"),
    ("made", "Q", "when, in whole seconds since 1970, by the manager's clock"),
    ("state", "32s", "digest of the slot that the vTPM's record named then"),
    ("wrapped", "48s", "the export's key, AES-256-GCM with its tag"),
)
PART_FIELDS: Final = (
    ("part", "B", "1 permanent, 2 volatile, 3 savestate"),
    ("flags", "B", "bit 0, of a volatile part: its guest's firmware had not started the TPM up"),
    ("reserved", "2s", "zero"),
    ("length", "I", "bytes of the blob in clear; the ciphertext has the same"),
    ("nonce", "12s", "random"),
)
_HEADER: Final = struct.Struct(">" + "".join(code for _, code, _ in HEADER_FIELDS))
_PART: Final = struct.Struct(">" + "".join(code for _, code, _ in PART_FIELDS))
HEADER_BYTES: Final = _HEADER.size
_BOUND_BYTES: Final = HEADER_BYTES - KEY_BYTES - TAG_BYTES  # what the wrapped key is bound to
OVERHEAD: Final = HEADER_BYTES + _PART.size + TAG_BYTES
assert (HEADER_BYTES, _PART.size, _BOUND_BYTES, OVERHEAD) == (160, 20, 112, 196)


@dataclass(frozen=True, slots=True)
class BlobHeader:
    """What the manager says of an export. `made`: whole seconds since 1970; `state`, `export`: 32 and 16 bytes."""

    family: str
    parts: frozenset[Part]
    store: UUID
    vtpm: UUID
    export: bytes
    generation: int
    made: int
    state: bytes
    wrapped: bytes = field(default=b"", repr=False)

    SIZE: ClassVar[int] = HEADER_BYTES

    def _packed(self) -> bytes:
        bits = sum(1 << part for part in self.parts)
        return _HEADER.pack(
            MAGIC,
            VERSION,
            VERSION,
            FAMILIES[self.family],
            bits,
            self.store.bytes,
            self.vtpm.bytes,
            self.export,
            self.generation,
            self.made,
            self.state,
            self.wrapped,
        )

    @property
    def bound(self) -> bytes:
        """What the wrapped key is bound to: 112 bytes."""
        return self._packed()[:_BOUND_BYTES]

    def pack(self) -> bytes:
        """Return the 160 bytes of a header whose key is wrapped."""
        assert len(self.wrapped) == KEY_BYTES + TAG_BYTES, "the key comes first"
        return self._packed()

    @classmethod
    def unpack(cls, untrusted: bytes) -> Self:
        """Read a header from the start of a blob; nothing of it is authentic before its key was unwrapped.

        Raises:
            BlobFormatError: it is none, or of a version that this code does not read.

        """
        if len(untrusted) < HEADER_BYTES or untrusted[: len(MAGIC)] != MAGIC:
            raise BlobFormatError("it is no state blob of a vTPM manager")
        _, _, min_version, family, bits, store, vtpm, export, generation, made, state, wrapped = _HEADER.unpack_from(
            untrusted
        )
        if min_version > VERSION:
            raise BlobFormatError(f"it needs a reader of version {min_version}, and this one is {VERSION}")
        parts = frozenset(part for part in Part if bits >> part & 1)
        if family not in _NAMES or sum(1 << part for part in parts) != bits or not {1, 2} <= parts:
            raise BlobFormatError(f"TPM family {family:#06x} with blobs {bits:#06b} cannot be")
        header = cls(
            _NAMES[family], parts, UUID(bytes=store), UUID(bytes=vtpm), export, generation, made, state, wrapped
        )
        if header.pack() != untrusted[:HEADER_BYTES]:
            raise BlobFormatError("its header is not as this version writes it")
        return header

    def __str__(self) -> str:
        return f"generation {self.generation} of vTPM {self.vtpm}"


def wrap(manager_key: bytes, header: BlobHeader, key: bytes) -> BlobHeader:
    """Return `header` with an export's key (32 bytes), wrapped under the manager's (32 bytes) for this header only."""
    assert len(key) == KEY_BYTES
    sealed = AESGCM(_wrapping_key(manager_key, header.export)).encrypt(
        _ZERO_NONCE, key, replace(header, wrapped=b"").bound
    )
    return replace(header, wrapped=sealed)


def unwrap(manager_key: bytes, header: BlobHeader) -> bytes:
    """Return the key of an export; from then on its header is known to be one that this manager made.

    Raises:
        BlobDamagedError: it is another manager's, or was altered.

    """
    try:
        return AESGCM(_wrapping_key(manager_key, header.export)).decrypt(_ZERO_NONCE, header.wrapped, header.bound)
    except InvalidTag:
        raise BlobDamagedError("its header was altered, or was not made by this manager") from None


def _wrapping_key(manager_key: bytes, export: bytes) -> bytes:
    assert len(manager_key) == KEY_BYTES
    assert len(export) == EXPORT_ID_BYTES
    # HKDF-SHA256 (RFC 5869) to one block, written out: each instance would have a library's HKDF in its memory
    return hmac.digest(hmac.digest(export, manager_key, "sha256"), _WRAP_INFO + b"\1", "sha256")


def seal_part(
    header: bytes,
    key: bytes | memoryview,
    part: Part,
    content: bytes,
    nonce: bytes,
    flags: PartFlags = PartFlags.NONE,
) -> bytes:
    """Return the blob that QEMU gets: `header` as packed, then `content` encrypted. `nonce`: 12 random bytes."""
    assert len(header) == HEADER_BYTES
    assert len(content) + OVERHEAD <= MAX_PART, "the largest state of a TPM has some 173 KiB"
    before = header + _PART.pack(part, flags, b"", len(content), nonce)
    return before + AESGCM(key).encrypt(nonce, content, before)


@dataclass(frozen=True, slots=True)
class SealedPart:
    """A blob taken apart: who it says it is, and what is still encrypted."""

    header: BlobHeader
    part: Part
    flags: PartFlags
    raw: bytes = field(repr=False)

    @classmethod
    def parse(cls, untrusted: bytes) -> Self:
        """Take a blob apart.

        Raises:
            BlobFormatError: it is none, or is longer or shorter than it says.

        """
        header = BlobHeader.unpack(untrusted)
        if not OVERHEAD <= len(untrusted) <= MAX_PART:
            raise BlobFormatError(f"a state blob of {len(untrusted)} bytes")
        number, flags, reserved, length, _ = _PART.unpack_from(untrusted, HEADER_BYTES)
        unknown = any(reserved) or flags & ~PartFlags.UNSTARTED
        if number not in header.parts or unknown or length != len(untrusted) - OVERHEAD:
            raise BlobFormatError("what it says of its part does not agree with its header, or with its length")
        return cls(header, Part(number), PartFlags(flags), untrusted)

    @property
    def export_header(self) -> bytes:
        """The 160 bytes that all blobs of the export begin with."""
        return self.raw[:HEADER_BYTES]

    def open(self, key: bytes | memoryview) -> bytes:
        """Return the blob in clear.

        Raises:
            BlobDamagedError: it was altered, or is of another export.

        """
        start = HEADER_BYTES + _PART.size
        nonce = self.raw[start - NONCE_BYTES : start]
        try:
            return AESGCM(key).decrypt(nonce, self.raw[start:], self.raw[:start])
        except InvalidTag:
            raise BlobDamagedError("it was altered on its way, or is a part of another export") from None
