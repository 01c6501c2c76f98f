"""TPM2_MakeCredential in software: what only the TPM with this endorsement key and this attestation key can open.

Source: TPM 2.0 Part 1, 24 (credential protection), 11.4.10 (KDFa, KDFe), B.4 (RSA OAEP), C.6.1 (ECC secrets).
"""

import hashlib
import hmac
import os
from collections.abc import Callable
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from frontend_backend.deep_quote import sized
from manager.attest_wire import KeyPublic

SECRET_BYTES: Final = 32  # at most the digest size of the endorsement key's name algorithm
_SEED_BYTES: Final = 32
_AES_BYTES: Final = 16


def kdfa(key: bytes, label: bytes, context: bytes, size: int) -> bytes:
    """Return `size` bytes: SP 800-108 in counter mode with HMAC-SHA256; `label` without its terminating zero."""
    return _counted(lambda i: hmac.digest(key, i + label + b"\0" + context + (8 * size).to_bytes(4), "sha256"), size)


def _kdfe(z: bytes, label: bytes, party_u: bytes, party_v: bytes, size: int) -> bytes:
    """Return `size` bytes: SP 800-56A with SHA-256, from the x coordinate of a shared point."""
    return _counted(lambda i: hashlib.sha256(i + z + label + b"\0" + party_u + party_v).digest(), size)


def _counted(block: Callable[[bytes], bytes], size: int) -> bytes:
    return b"".join(block(i.to_bytes(4)) for i in range(1, -(-size // 32) + 1))[:size]


def _aes_cfb(key: bytes, data: bytes) -> bytes:
    """Encrypt by AES-128 in CFB mode from a zero IV (the library's own mode of that name is about to go)."""
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305 - the block cipher below CFB
    last, out = bytes(_AES_BYTES), b""
    for start in range(0, len(data), _AES_BYTES):
        stream = encryptor.update(last)
        last = bytes(a ^ b for a, b in zip(data[start : start + _AES_BYTES], stream, strict=False))
        out += last
    return out


def _share(key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> tuple[bytes, bytes]:
    """Return a fresh seed and it encrypted to the endorsement key, as TPM2B_ENCRYPTED_SECRET holds it."""
    if isinstance(key, rsa.RSAPublicKey):
        seed = os.urandom(_SEED_BYTES)
        oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), b"IDENTITY\0")
        return seed, key.encrypt(seed, oaep)
    ephemeral = ec.generate_private_key(ec.SECP256R1())
    mine, theirs = ephemeral.public_key().public_numbers(), key.public_numbers()
    z = ephemeral.exchange(ec.ECDH(), key)
    seed = _kdfe(z, b"IDENTITY", mine.x.to_bytes(32), theirs.x.to_bytes(32), _SEED_BYTES)
    return seed, sized(mine.x.to_bytes(32)) + sized(mine.y.to_bytes(32))


def make_credential(endorsement: KeyPublic, name: bytes, secret: bytes) -> tuple[bytes, bytes]:
    """Return (TPMS_ID_OBJECT, encrypted seed): with both the TPM that has both keys gives `secret` back.

    endorsement: the endorsement key, P-256 or RSA. name: the attestation key's Name. secret: 1 to 32 bytes.
    """
    if not 1 <= len(secret) <= SECRET_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes; 1 to {SECRET_BYTES} can be")
    seed, encrypted_seed = _share(endorsement.key)
    identity = _aes_cfb(kdfa(seed, b"STORAGE", name, _AES_BYTES), sized(secret))
    integrity = hmac.digest(kdfa(seed, b"INTEGRITY", b"", 32), identity + name, "sha256")
    return sized(integrity) + identity, encrypted_seed
