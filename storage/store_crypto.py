"""How the store's sectors and parts are sealed. Pure; the only place in the store that encrypts.

Every write has its own key, HKDF-SHA256(store or group key, 32 fresh random bytes, purpose), so that no
nonce can repeat, also after a crash or a restored backup (design section 5).
"""

import hashlib
import os
from enum import Enum
from typing import Final
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storage import store_format as fmt
from storage.secrets import GroupKey, Secret

_NONCE: Final = bytes(12)  # each derived key meets one message
_BLOCK: Final = 64  # bytes that SHA-256 takes at a time, to which HMAC fills its key up
_INNER: Final = bytes(byte ^ 0x36 for byte in range(256))  # RFC 2104, for bytes.translate
_OUTER: Final = bytes(byte ^ 0x5C for byte in range(256))
_pack_context: Final = fmt.SealContext.codec().pack  # every save waits for these: no dataclass in between
_pack_part_context: Final = fmt.PartContext.codec().pack


class Purpose(Enum):
    """HKDF info: a ciphertext of one purpose never opens as another."""

    ROOT = b"vtpm-store/1 root"
    MAP = b"vtpm-store/1 map"
    LEAF = b"vtpm-store/1 leaf"
    GROUP = b"vtpm-store/1 group"
    CARRY = b"vtpm-store/1 carry"
    FRAME = b"vtpm-store/1 frame"
    PART = b"vtpm-store/1 part"
    CHECK = b"vtpm-store/1 check"


def derive(key: Secret, salt: bytes, purpose: Purpose) -> bytes:
    """HKDF-SHA256 (RFC 5869) to one block: 32 bytes. `salt` has at most 64.

    Nothing of it can be kept from one write to the next: the salt, which is new each time, keys its first step.
    The two HMACs are written out over hashlib because every save waits for them just after the process slept in a
    flush: the caches are cold then, and the way through a library's HKDF or HMAC takes twice as long (ADR 0003).
    """
    assert len(salt) <= _BLOCK, "a longer key of an HMAC would have to be hashed first"
    block = salt.ljust(_BLOCK, b"\0")
    extract = hashlib.sha256(block.translate(_INNER))
    extract.update(key.view)
    block = hashlib.sha256(block.translate(_OUTER) + extract.digest()).digest().ljust(_BLOCK, b"\0")
    expand = hashlib.sha256(block.translate(_INNER) + purpose.value + b"\1")
    return hashlib.sha256(block.translate(_OUTER) + expand.digest()).digest()


def key_check(key: Secret, owner: UUID) -> bytes:
    """16 public bytes by which a wrong key is told from damage; they say nothing about the key."""
    return derive(key, owner.bytes, Purpose.CHECK)[:16]


def seal(key: Secret, purpose: Purpose, plaintext: bytes | bytearray, context: bytes) -> bytes:
    """Salt, ciphertext and tag: 48 bytes more than the plaintext."""
    salt = os.urandom(fmt.SALT_BYTES)
    return salt + AESGCM(derive(key, salt, purpose)).encrypt(_NONCE, plaintext, context)


def unseal(key: Secret, purpose: Purpose, sealed: bytes, context: bytes) -> bytes:
    """Undo `seal`. Raises InvalidTag."""
    if len(sealed) < fmt.SALT_BYTES + fmt.TAG_BYTES:
        raise InvalidTag
    salt = sealed[: fmt.SALT_BYTES]
    return AESGCM(derive(key, salt, purpose)).decrypt(_NONCE, sealed[fmt.SALT_BYTES :], context)


def sector_digest(sector: bytes) -> bytes:
    """Digest that a reference keeps of a sector: 18 bytes."""
    return hashlib.sha256(sector).digest()[: fmt.REF_DIGEST_BYTES]


def part_context(store: UUID, group: UUID, sequence: int) -> bytes:
    """Associated data of a part."""
    return _pack_part_context(store.bytes, group.bytes, sequence)


def sector_context(store: UUID, place: int, sequence: int) -> bytes:
    """Associated data of a sector at `place`, or of a frame at that unit of the log."""
    return _pack_context(store.bytes, place, sequence)


def seal_part(key: GroupKey, store: UUID, group: UUID, sequence: int, plaintext: bytes | bytearray) -> bytes:
    """Seal a group's part of a frame."""
    return seal(key, Purpose.PART, plaintext, part_context(store, group, sequence))


def unseal_part(key: GroupKey, store: UUID, group: UUID, sequence: int, sealed: bytes) -> bytes:
    """Undo `seal_part`. Raises InvalidTag."""
    return unseal(key, Purpose.PART, sealed, part_context(store, group, sequence))
