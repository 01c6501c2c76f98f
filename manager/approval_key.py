"""The approver's (SAA's) signing key: P-256, one PEM block a file. Needs no TPM and no manager.

Every signature is made and accepted with the lower of its two possible `s`, so that a document has one form only.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Final, Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from manager.approval_errors import SignerKeyMissing, SignerKeyUnreadable, SignerPassphraseWrong

SIGNATURE_BYTES: Final = 64  # r, then s, 32 bytes each
_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # SEC 2, 2.4.2 secp256r1: n
_MAX_FILE_BYTES: Final = 16384  # a PKCS8 key needs about 500; an operator's comments may stand beside it
_PEM: Final = re.compile(rb"-----BEGIN ([A-Z ]+)-----\r?\n.*?-----END \1-----", re.DOTALL)
_PREHASHED: Final = ec.ECDSA(utils.Prehashed(hashes.SHA256()))


@dataclass(frozen=True, slots=True)
class ApproverPublic:
    """What the manager knows of an approver."""

    key: ec.EllipticCurvePublicKey

    @classmethod
    def parse(cls, pem: bytes, name: str = "the approver's key") -> Self:
        """Read one public key from PEM; `name` is for messages.

        Raises SignerKeyUnreadable (also for a private key: the manager must not see it).
        """
        block, label = _block(pem, name)
        if not label.endswith(b"PUBLIC KEY"):
            raise SignerKeyUnreadable(name, f"it holds a {label.decode()}, wanted is the public one")
        try:
            key = serialization.load_pem_public_key(block)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise SignerKeyUnreadable(name, f"it does not parse ({error})") from error
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise SignerKeyUnreadable(name, "it is not P-256")
        return cls(key)

    @classmethod
    def load(cls, path: str) -> Self:
        """Read one from a file. Raises SignerKeyMissing, SignerKeyUnreadable."""
        return cls.parse(read_key_file(path), path)

    @classmethod
    def of_point(cls, point: bytes) -> Self:
        """From the SEC1 uncompressed point, 65 bytes. Raises SignerKeyUnreadable: it is not on the curve."""
        try:
            return cls(ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point))
        except ValueError as error:
            raise SignerKeyUnreadable("the approver's key", f"it is no point of P-256 ({error})") from error

    def to_pem(self) -> bytes:
        """Write it as SubjectPublicKeyInfo PEM."""
        return self.key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    @property
    def point(self) -> bytes:
        """The SEC1 uncompressed point, 65 bytes: `approver_point` of SealPolicy.build."""
        return self.key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 over SubjectPublicKeyInfo, 32 bytes."""
        kind = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        return hashlib.sha256(self.key.public_bytes(*kind)).digest()

    def verifies(self, digest: bytes, signature: bytes) -> bool:
        """Tell whether the signature (64 bytes, lower s) of a SHA-256 digest is by this key."""
        r, s = int.from_bytes(signature[:32]), int.from_bytes(signature[32:])
        if len(signature) != SIGNATURE_BYTES or not 0 < s <= _ORDER // 2:
            return False
        try:
            self.key.verify(utils.encode_dss_signature(r, s), digest, _PREHASHED)
        except InvalidSignature:
            return False
        return True


class ApproverPrivate:
    """The private key, while an approver uses it. Does not print itself."""

    __slots__ = ("_key", "public")

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self.public = ApproverPublic(key.public_key())

    def __repr__(self) -> str:
        return f"<ApproverPrivate {self.public.fingerprint.hex()[:16]}>"

    @classmethod
    def new(cls) -> Self:
        """Make a fresh P-256 key."""
        return cls(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def load(cls, path: str, passphrase: bytes | None = None) -> Self:
        """Read a private key. Raises SignerKeyMissing, SignerKeyUnreadable, SignerPassphraseWrong."""
        block, label = _block(read_key_file(path), path)
        if not label.endswith(b"PRIVATE KEY"):
            raise SignerKeyUnreadable(path, f"it holds a {label.decode()}, wanted is the private one")
        locked = b"ENCRYPTED" in block
        if locked and not passphrase:
            raise SignerPassphraseWrong(path, given=False)
        try:
            key = serialization.load_pem_private_key(block, passphrase if locked else None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            if locked:
                raise SignerPassphraseWrong(path, given=True) from error
            raise SignerKeyUnreadable(path, f"it does not parse ({error})") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise SignerKeyUnreadable(path, "it is not P-256")
        return cls(key)

    def to_pem(self, passphrase: bytes | None = None) -> bytes:
        """Write it as PKCS8 PEM, encrypted if there is a passphrase."""
        lock = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        return self._key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)

    def sign(self, digest: bytes) -> bytes:
        """Sign a SHA-256 digest; r and the lower s, 64 bytes."""
        r, s = utils.decode_dss_signature(self._key.sign(digest, _PREHASHED))
        return r.to_bytes(32) + min(s, _ORDER - s).to_bytes(32)


def read_key_file(path: str) -> bytes:
    """Return a key file's bytes. Raises SignerKeyMissing; a file that is too long does not parse."""
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SignerKeyMissing(path, error.strerror or str(error)) from error


def _block(pem: bytes, name: str) -> tuple[bytes, bytes]:
    """Return the one PEM block of a file, and its label. Raises SignerKeyUnreadable."""
    if len(pem) > _MAX_FILE_BYTES:
        raise SignerKeyUnreadable(name, f"it is longer than {_MAX_FILE_BYTES} bytes")
    found = list(_PEM.finditer(pem))
    if len(found) != 1:
        raise SignerKeyUnreadable(name, f"it holds {len(found)} PEM blocks, wanted is one")
    return found[0][0] + b"\n", found[0][1]
