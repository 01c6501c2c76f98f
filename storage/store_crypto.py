"""How the store's sectors and parts are sealed. Pure; the only place in the store that encrypts.

Every write has its own key, HKDF-SHA256(store or group key, 32 fresh random bytes, purpose), so that no
nonce can repeat, also after a crash or a restored backup (design section 5).
"""

import hashlib
import hmac
import os
from enum import Enum
from typing import Final
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storage import store_format as fmt
from storage.secrets import GroupKey, Secret

_NONCE: Final = bytes(12)  # each derived key meets one message


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
    """HKDF-SHA256 (RFC 5869) to one block: 32 bytes."""
    pseudo_random = hmac.digest(salt, key.view, "sha256")
    return hmac.digest(pseudo_random, purpose.value + b"\x01", "sha256")


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
    return fmt.PartContext(store, group, sequence).pack()


def seal_part(key: GroupKey, store: UUID, group: UUID, sequence: int, plaintext: bytes | bytearray) -> bytes:
    """Seal a group's part of a frame."""
    return seal(key, Purpose.PART, plaintext, part_context(store, group, sequence))


def unseal_part(key: GroupKey, store: UUID, group: UUID, sequence: int, sealed: bytes) -> bytes:
    """Undo `seal_part`. Raises InvalidTag."""
    return unseal(key, Purpose.PART, sealed, part_context(store, group, sequence))
