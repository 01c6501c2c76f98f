"""Who may write the revocation index: a key derived from the store key, so that only an opened installation has it.

Its public half is part of the index's write policy and so of its Name. Whoever defines the index anew, with a password
of his own, cannot write it, or it has another Name; approvals name the index by its Name.
"""

from typing import Final, Self
from uuid import UUID

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from storage.secrets import StoreKey

_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # SEC 2, 2.4.2 secp256r1: n
# FIPS 186-5, A.2.1: 64 bits more than the order has, so that the remainder is not biased.
_SEED_BYTES: Final = 40


class RevocationWriter:
    """The key that signs writes. Does not print itself."""

    __slots__ = ("_key", "point")

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        kind = serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
        self.point = key.public_key().public_bytes(*kind)

    def __repr__(self) -> str:
        return f"<RevocationWriter {self.point.hex()[:16]}>"

    @classmethod
    def of(cls, store_key: StoreKey, store: UUID) -> Self:
        """Derive the key of an installation: the same one as long as its store key is the same."""
        hkdf = HKDF(hashes.SHA256(), _SEED_BYTES, salt=store.bytes, info=b"vtpm-manager revocation index v1")
        scalar = int.from_bytes(hkdf.derive(store_key.reveal())) % (_ORDER - 1) + 1
        return cls(ec.derive_private_key(scalar, ec.SECP256R1()))

    def sign(self, digest: bytes) -> bytes:
        """Sign a statement of TPM2_PolicySigned (SHA-256 digest, 32 bytes): ECDSA, DER."""
        return self._key.sign(digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))
