"""Off-line escrow: keys encrypted to the operator's recovery key, so that a lost or cleared TPM does not lose them.

Format, version 1: head of 40 bytes (below), then the HPKE single-shot ciphertext (RFC 9180, base mode, HKDF-SHA256,
AES-256-GCM): enc (32 bytes for X25519, 65 for P-256), ciphertext, tag of 16. The HPKE info binds the head and the
place: store UUID, purpose, group UUID. An escrow moved to another store, group or purpose does not open.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Final, Self
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import x25519

from manager.recovery_errors import EscrowMismatch, EscrowUnreadable, EscrowWrongKey
from manager.recovery_pair import EscrowPublicKey, RecoveryPrivate, RecoveryPublic

_INFO_LABEL: Final = b"vtpm-manager escrow v1\0"
MAX_SECRET_BYTES: Final = 4096  # keys have 32; generous for what a later version escrows (hierarchy passwords)


class EscrowPurpose(IntEnum):
    """What kind of key is escrowed; a wire value."""

    STORE_KEY = 1
    GROUP_KEY = 2
    HIERARCHIES = 3


class _Suite(IntEnum):
    """KEM of the recipient's key; KDF and AEAD are the same for both. A wire value."""

    X25519 = 1
    P256 = 2


_SUITES: Final = {
    _Suite.X25519: hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM),
    _Suite.P256: hpke.Suite(hpke.KEM.P256, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM),
}


@dataclass(frozen=True, slots=True)
class EscrowPlace:
    """Where an escrow belongs. `group` is None for the store key."""

    store: UUID
    purpose: EscrowPurpose
    group: UUID | None = None

    def info(self) -> bytes:
        """Return the bytes that bind an escrow to this place; fixed fields, so no two places give the same."""
        group = b"\0" * 17 if self.group is None else b"\1" + self.group.bytes
        return _INFO_LABEL + self.store.bytes + bytes([self.purpose]) + group

    def __str__(self) -> str:
        of_group = "" if self.group is None else f" of group {self.group}"
        return f"the {self.purpose.name.lower().replace('_', ' ')}{of_group} of store {self.store}"


@dataclass(frozen=True, slots=True)
class _Head:
    """First 40 bytes: magic, version, suite, two zero bytes, fingerprint of the recipient's escrow key."""

    suite: _Suite
    fingerprint: bytes  # SHA-256 of SubjectPublicKeyInfo

    CODEC: ClassVar[struct.Struct] = struct.Struct(">4sBBH32s")
    MAGIC: ClassVar[bytes] = b"VESC"
    VERSION: ClassVar[int] = 1

    def pack(self) -> bytes:
        return self.CODEC.pack(self.MAGIC, self.VERSION, self.suite, 0, self.fingerprint)

    @classmethod
    def unpack(cls, untrusted: bytes) -> Self:
        if len(untrusted) < cls.CODEC.size:
            raise EscrowUnreadable(f"{len(untrusted)} bytes are too few")
        magic, version, suite, reserved, fingerprint = cls.CODEC.unpack_from(untrusted)
        if magic != cls.MAGIC:
            raise EscrowUnreadable("it does not begin as an escrow")
        if version != cls.VERSION or reserved:
            raise EscrowUnreadable(f"it has version {version}, this program reads {cls.VERSION}")
        try:
            return cls(_Suite(suite), fingerprint)
        except ValueError:
            raise EscrowUnreadable(f"it uses suite {suite}, which this program does not know") from None


assert _Head.CODEC.size == 40, "escrow format version 1: the head has 40 bytes"


def wrap(secret: bytes, recovery: RecoveryPublic, place: EscrowPlace) -> bytes:
    """Encrypt a secret of 1..4096 bytes to the recovery key; about 88 to 121 bytes longer than the secret."""
    if not 1 <= len(secret) <= MAX_SECRET_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes cannot be escrowed, 1 to {MAX_SECRET_BYTES} can")
    suite = _suite_of(recovery.escrow)
    head = _Head(suite, bytes.fromhex(recovery.escrow_fingerprint)).pack()
    return head + _SUITES[suite].encrypt(secret, recovery.escrow, info=place.info() + head)


def unwrap(escrow: bytes, recovery: RecoveryPrivate, place: EscrowPlace) -> bytes:
    """Decrypt an escrow found at this place.

    Raises EscrowUnreadable (no escrow, newer version), EscrowWrongKey (other recovery key), EscrowMismatch (damaged, or
    made for another store, group or purpose).
    """
    head = _Head.unpack(escrow)
    own = recovery.public.escrow_fingerprint
    if head.fingerprint.hex() != own or head.suite is not _suite_of(recovery.public.escrow):
        raise EscrowWrongKey(head.fingerprint.hex(), own)
    packed, ciphertext = escrow[: _Head.CODEC.size], escrow[_Head.CODEC.size :]
    try:
        return _SUITES[head.suite].decrypt(ciphertext, recovery.escrow, info=place.info() + packed)
    except InvalidTag:
        raise EscrowMismatch(str(place)) from None


def _suite_of(key: EscrowPublicKey) -> _Suite:
    return _Suite.X25519 if isinstance(key, x25519.X25519PublicKey) else _Suite.P256
