"""The two key pairs of a recovery file, as values and as PEM. Needs no TPM and no manager.

One pair signs statements that open sealed objects whatever the PCRs (TPM2_PolicySigned, P-256); the other decrypts the
off-line escrow of the store key and group master keys (X25519, or P-256 where an operator's own hardware offers only
that). The manager keeps the public file only; the private one belongs in a safe.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Final, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils, x25519

from manager.recovery_errors import (
    RecoveryFileMissing,
    RecoveryFileUnreadable,
    RecoveryPassphraseWrong,
)

EscrowPublicKey = x25519.X25519PublicKey | ec.EllipticCurvePublicKey
EscrowPrivateKey = x25519.X25519PrivateKey | ec.EllipticCurvePrivateKey

MAX_FILE_BYTES: Final = 16384  # two PKCS8 keys need about 1 KiB; an operator's comments may stand between them
# RFC 7468: one textual encoding; text outside of it is comment.
_PEM: Final = re.compile(rb"-----BEGIN ([A-Z ]+)-----\r?\n.*?-----END \1-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class RecoveryPublic:
    """The public halves: what the manager needs to seal and to escrow."""

    signing: ec.EllipticCurvePublicKey
    escrow: EscrowPublicKey

    @classmethod
    def load(cls, path: str) -> Self:
        """Read FILE.pub, or two PEM public keys an operator put one after the other: signing, then escrow.

        Raises RecoveryFileMissing, RecoveryFileUnreadable (also for a private file: the manager must not see it).
        """
        return cls.parse(read_recovery_file(path), path)

    @classmethod
    def parse(cls, pem: bytes, name: str = "recovery key") -> Self:
        """Read the same from bytes; `name` is for messages. Raises RecoveryFileUnreadable."""
        blocks = _blocks(pem, name, "PUBLIC KEY")
        try:
            signing, escrow = (serialization.load_pem_public_key(block) for block in blocks)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise RecoveryFileUnreadable(name, f"a public key does not parse ({error})") from error
        if not isinstance(signing, ec.EllipticCurvePublicKey) or not isinstance(signing.curve, ec.SECP256R1):
            raise RecoveryFileUnreadable(name, "the first key is not P-256")
        match escrow:
            case x25519.X25519PublicKey():
                return cls(signing, escrow)
            case ec.EllipticCurvePublicKey(curve=ec.SECP256R1()):
                if _fingerprint(signing) == _fingerprint(escrow):
                    raise RecoveryFileUnreadable(name, "both keys are the same; signing and escrow need one each")
                return cls(signing, escrow)
            case _:
                raise RecoveryFileUnreadable(name, "the second key is neither X25519 nor P-256")

    def to_pem(self) -> bytes:
        """Write both keys as SubjectPublicKeyInfo PEM; `parse` reads it back."""
        kind = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        return self.signing.public_bytes(*kind) + self.escrow.public_bytes(*kind)

    @property
    def signing_point(self) -> bytes:
        """Return the signing key as SEC1 uncompressed point, 65 bytes: `recovery_point` of SealPolicy.build."""
        kind = serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
        return self.signing.public_bytes(*kind)

    @property
    def signing_fingerprint(self) -> str:
        """Return SHA-256 over the signing key's SubjectPublicKeyInfo, 64 hex digits."""
        return _fingerprint(self.signing).hex()

    @property
    def escrow_fingerprint(self) -> str:
        """Return SHA-256 over the escrow key's SubjectPublicKeyInfo, 64 hex digits."""
        return _fingerprint(self.escrow).hex()


class RecoveryPrivate:
    """The private halves, while an operator uses them. Does not print itself."""

    __slots__ = ("_signing", "escrow", "public")

    def __init__(self, signing: ec.EllipticCurvePrivateKey, escrow: EscrowPrivateKey) -> None:
        self._signing = signing
        self.escrow = escrow
        self.public = RecoveryPublic(signing.public_key(), escrow.public_key())

    def __repr__(self) -> str:
        return f"<RecoveryPrivate {self.public.signing_fingerprint[:16]}>"

    @classmethod
    def new(cls) -> Self:
        """Make a fresh pair of key pairs: P-256 for signing, X25519 for the escrow."""
        return cls(ec.generate_private_key(ec.SECP256R1()), x25519.X25519PrivateKey.generate())

    @classmethod
    def load(cls, path: str, passphrase: bytes | None = None) -> Self:
        """Read a private recovery file.

        Raises RecoveryFileMissing, RecoveryFileUnreadable, RecoveryPassphraseWrong.
        """
        return cls.parse(read_recovery_file(path), passphrase, path)

    @classmethod
    def parse(cls, pem: bytes, passphrase: bytes | None = None, name: str = "recovery key") -> Self:
        """Read the same from bytes (a descriptor handed by the client); `name` is for messages."""
        blocks = _blocks(pem, name, "PRIVATE KEY")
        encrypted = [b"ENCRYPTED" in block for block in blocks]
        keys = []
        for block, locked in zip(blocks, encrypted, strict=True):
            if locked and not passphrase:
                raise RecoveryPassphraseWrong(name, given=False)
            try:
                keys.append(serialization.load_pem_private_key(block, passphrase if locked else None))
            except (ValueError, TypeError, UnsupportedAlgorithm) as error:
                if locked:
                    raise RecoveryPassphraseWrong(name, given=True) from error
                raise RecoveryFileUnreadable(name, f"a private key does not parse ({error})") from error
        signing, escrow = keys
        if not isinstance(signing, ec.EllipticCurvePrivateKey):
            raise RecoveryFileUnreadable(name, "the first key is not P-256")
        if not isinstance(escrow, x25519.X25519PrivateKey | ec.EllipticCurvePrivateKey):
            raise RecoveryFileUnreadable(name, "the second key is neither X25519 nor P-256")
        found = cls(signing, escrow)
        RecoveryPublic.parse(found.public.to_pem(), name)  # same rules for curves and distinctness
        return found

    def to_pem(self, passphrase: bytes | None = None) -> bytes:
        """Write both keys as PKCS8 PEM, encrypted if there is a passphrase."""
        lock = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        return self._signing.private_bytes(*kind, lock) + self.escrow.private_bytes(*kind, lock)

    def sign_statement(self, digest: bytes) -> bytes:
        """Sign a recovery statement (SHA-256 digest, 32 bytes) for the TPM: ECDSA, DER."""
        return self._signing.sign(digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))


def read_recovery_file(path: str) -> bytes:
    """Return a recovery file's bytes. Raises RecoveryFileMissing; a file that is too long fails in `parse`."""
    try:
        with open(path, "rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RecoveryFileMissing(path, error.strerror or str(error)) from error


def _blocks(pem: bytes, name: str, kind: str) -> list[bytes]:
    """Split into the two PEM blocks, each of this kind. Raises RecoveryFileUnreadable."""
    if len(pem) > MAX_FILE_BYTES:
        raise RecoveryFileUnreadable(name, f"it is longer than {MAX_FILE_BYTES} bytes")
    found = list(_PEM.finditer(pem))
    labels = [match[1].decode() for match in found]
    if len(found) != 2 or not all(label.endswith(kind) for label in labels):
        raise RecoveryFileUnreadable(name, f"it holds {labels or 'no key'}, wanted are two {kind} blocks")
    return [match[0] + b"\n" for match in found]


def _fingerprint(key: EscrowPublicKey) -> bytes:
    kind = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(*kind)).digest()
