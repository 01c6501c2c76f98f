"""Keys of swtpm's state files and what is done with them: AES-CBC, then HMAC-SHA256 under the same key.

swtpm's construction, byte for byte, because its files have to be read and written. It is weaker than our own images
(one key for cipher and MAC, no binding to a vTPM or a generation); `vtpm-import` leads away from it.

Source: swtpm's swtpm_aes.c, swtpm_nvstore.c, key.c; reference/swtpm-libtpms-qemu.md 3.5.
"""

import hashlib
import hmac
import os
from enum import StrEnum
from typing import Final

from storage.secrets import Secret
from storage.swtpm_errors import SwtpmKeyUnusable, SwtpmWrongKey

_BLOCK: Final = 16  # bytes of an AES block; CBC uses that much of the longer IV that is stored with a 256 bit key
_HEX_FILE: Final = 66  # bytes that are looked at: 0x and 64 digits
_ITERATIONS: Final = 1000
_SALT: Final = b"swtpm"
_DIGEST: Final = 32  # bytes of SHA-256


class Kdf(StrEnum):
    """How a password becomes a key."""

    PBKDF2 = "pbkdf2"
    SHA512 = "sha512"


class KeyFormat(StrEnum):
    """How a key file is read."""

    HEX = "hex"
    BINARY = "binary"


class SwtpmKey128(Secret):
    """128-bit key of a swtpm state (mode aes-cbc or aes-128-cbc)."""

    size = 16
    __slots__ = ()


class SwtpmKey256(Secret):
    """256-bit key of a swtpm state (mode aes-256-cbc)."""

    __slots__ = ()


SwtpmKey = SwtpmKey128 | SwtpmKey256
MODES: Final = {"aes-cbc": 16, "aes-128-cbc": 16, "aes-256-cbc": 32}  # bytes of the key


def _key(content: bytes) -> SwtpmKey:
    return SwtpmKey128(content) if len(content) == SwtpmKey128.size else SwtpmKey256(content)


def key_of_file(content: bytes, key_format: KeyFormat, size: int) -> SwtpmKey:
    """Return the key in a key file's content; `size` is what the mode asks for, 16 or 32 bytes.

    Raises:
        SwtpmKeyUnusable: it is no key, or one of another size.

    """
    if key_format is KeyFormat.BINARY:
        raw = content
    else:
        text = content.removeprefix(b"0x")[:_HEX_FILE].split()
        digits = text[0] if text and not content.removeprefix(b"0x")[:1].isspace() else b""
        try:
            raw = bytes.fromhex(digits.decode("ascii"))
        except ValueError:
            raise SwtpmKeyUnusable("Could not parse key hex string: it is not made of hexadecimal digits") from None
    if len(raw) != size:
        raise SwtpmKeyUnusable(f"the key has {8 * len(raw)} bits, the encryption mode needs {8 * size}")
    return _key(raw)


def key_of_password(password: bytes, kdf: Kdf, size: int) -> SwtpmKey:
    """Return the key that a password's bytes give, a trailing line break counting as one of them."""
    if kdf is Kdf.SHA512:
        return _key(hashlib.sha512(password).digest()[:size])
    return _key(hashlib.pbkdf2_hmac("sha512", password, _SALT, _ITERATIONS, size))


def encrypt(key: SwtpmKey, plain: bytes) -> tuple[bytes, bytes, bytes]:
    """Return (ciphertext, HMAC, IV). The IV is as long as the key; the padding goes up to a multiple of the key."""
    from cryptography.hazmat.primitives.ciphers import (  # noqa: PLC0415 - 30 ms, and most states have no key
        Cipher,
        algorithms,
        modes,
    )

    padding = key.size - len(plain) % key.size
    vector = os.urandom(key.size)
    encryptor = Cipher(algorithms.AES(key.view), modes.CBC(vector[:_BLOCK])).encryptor()
    encrypted = encryptor.update(plain + bytes([padding]) * padding) + encryptor.finalize()
    return encrypted, _mac(key, encrypted, vector), vector


def decrypt(key: SwtpmKey, encrypted: bytes, mac: bytes, vector: bytes | None) -> bytes:
    """Return what `encrypt` was given; without an IV (as the first versions wrote) it is zero.

    Raises:
        SwtpmWrongKey: MAC, IV or padding are not of this key.

    """
    if len(mac) < _DIGEST or not hmac.compare_digest(mac[:_DIGEST], _mac(key, encrypted, vector or b"")):
        raise SwtpmWrongKey("its HMAC is of another key, or its bytes were changed")
    return _decrypt(key, encrypted, vector)


def decrypt_version_1(key: SwtpmKey, encrypted: bytes) -> bytes:
    """Return the content of an image of version 1: no IV, and SHA-256 of the data before the data.

    Raises:
        SwtpmWrongKey: padding or hash are not of this key.

    """
    plain = _decrypt(key, encrypted, None)
    if not hmac.compare_digest(plain[:_DIGEST], hashlib.sha256(plain[_DIGEST:]).digest()):
        raise SwtpmWrongKey("its hash does not fit, so it was of another key, or its bytes were changed")
    return plain[_DIGEST:]


def _mac(key: SwtpmKey, encrypted: bytes, vector: bytes) -> bytes:
    return hmac.digest(key.reveal(), encrypted + vector, "sha256")


def _decrypt(key: SwtpmKey, encrypted: bytes, vector: bytes | None) -> bytes:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes  # noqa: PLC0415 - see encrypt

    if vector is not None and len(vector) != key.size:
        raise SwtpmWrongKey(f"its IV has {len(vector)} bytes, this key goes with {key.size}")
    if len(encrypted) < key.size or len(encrypted) % _BLOCK:
        raise SwtpmWrongKey(f"{len(encrypted)} bytes are no ciphertext of this key")
    decryptor = Cipher(algorithms.AES(key.view), modes.CBC((vector or bytes(_BLOCK))[:_BLOCK])).decryptor()
    plain = decryptor.update(encrypted) + decryptor.finalize()
    padding = plain[-1]
    if not 1 <= padding <= key.size or plain[-padding:] != bytes([padding]) * padding:
        raise SwtpmWrongKey("its padding is not right")
    return plain[:-padding]
