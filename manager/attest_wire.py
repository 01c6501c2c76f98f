"""The TPM structures in a quote, read without a TPM or its libraries; strictly, nothing may be left over.

Source: TPM 2.0 Part 2: TPMS_ATTEST 10.12.12, TPMS_CLOCK_INFO 10.11.1, TPML_PCR_SELECTION 10.9.7, TPMT_SIGNATURE
11.3.4, TPMT_PUBLIC 12.2.4; Part 1, 16 (Names).
"""

import hashlib
import struct
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils

from frontend_backend.deep_quote import PCR_COUNT, SELECT_BYTES, Reader, sized
from frontend_backend.errors import MessageError
from manager import policy_digests as policy

ALG_RSA, ALG_NULL, ALG_ECDSA, ALG_ECC = 0x0001, 0x0010, 0x0018, 0x0023
ALG_AES, ALG_CFB = 0x0006, 0x0043
P256: Final = 0x0003
_MAGIC: Final = 0xFF544347  # TPM_GENERATED_VALUE
_ATTEST_QUOTE: Final = 0x8018
_NAME_BYTES: Final = 34
RH_NULL, RH_ENDORSEMENT = 0x4000_0007, 0x4000_000B  # Part 2, 7.4
# Part 2, 8.3 TPMA_OBJECT
FIXED_TPM, ST_CLEAR, FIXED_PARENT, ORIGIN, USER_WITH_AUTH, ADMIN_WITH_POLICY = (
    1 << 1,
    1 << 2,
    1 << 4,
    1 << 5,
    1 << 6,
    1 << 7,
)
NO_DA, RESTRICTED, DECRYPT, SIGN = 1 << 10, 1 << 16, 1 << 17, 1 << 18
AK_ATTRIBUTES: Final = FIXED_TPM | FIXED_PARENT | ORIGIN | ADMIN_WITH_POLICY | NO_DA | RESTRICTED | SIGN
VTPM_KEY_ATTRIBUTES: Final = FIXED_TPM | FIXED_PARENT | ORIGIN | USER_WITH_AUTH | NO_DA | RESTRICTED | SIGN
CC_ACTIVATE_CREDENTIAL, CC_CERTIFY = 0x147, 0x148


def ak_branches() -> tuple[bytes, ...]:
    """Return the policy digests by which a group's attestation key may be used: all want locality 2.

    The first is for quotes; a role that wants a policy of its own (ADMIN) gets the others.
    """
    two = policy.after_locality(policy.ZERO_DIGEST)
    return (two, *(policy.after_command_code(two, code) for code in (CC_ACTIVATE_CREDENTIAL, CC_CERTIFY)))


def ak_policy() -> bytes:
    """Return the authPolicy of every group's attestation key, 32 bytes."""
    return policy.policy_or(ak_branches())


@dataclass(frozen=True, slots=True)
class KeyPublic:
    """A TPMT_PUBLIC of a P-256 or RSA key whose Name is made with SHA-256; `area` are its bytes."""

    area: bytes
    kind: int
    attributes: int
    auth_policy: bytes
    scheme: int
    key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey

    @property
    def name(self) -> bytes:
        """The key's Name, 34 bytes."""
        return policy.ALG_SHA256.to_bytes(2) + hashlib.sha256(self.area).digest()

    @property
    def point(self) -> ec.EllipticCurvePublicKey:
        """The key, where it is a P-256 one. Raises MessageError: it is an RSA key."""
        if not isinstance(self.key, ec.EllipticCurvePublicKey):
            raise MessageError("an RSA key where a P-256 one is due")
        return self.key

    @classmethod
    def unpack(cls, untrusted: bytes) -> Self:
        """Read a TPMT_PUBLIC.

        Raises:
            MessageError: it is none, or of a kind we do not use.

        """
        reader = Reader(untrusted)
        kind, algorithm, attributes = reader.number(2), reader.number(2), reader.number(4)
        if algorithm != policy.ALG_SHA256:
            raise MessageError(f"a key named by algorithm 0x{algorithm:04x}, not SHA-256")
        auth_policy = reader.sized(64)
        if (symmetric := reader.number(2)) != ALG_NULL:
            _skip_symmetric(reader, symmetric)
        scheme = reader.number(2)
        if scheme != ALG_NULL and reader.number(2) != policy.ALG_SHA256:
            raise MessageError("a signing scheme with another hash than SHA-256")
        key = _ecc_point(reader) if kind == ALG_ECC else _rsa_key(reader, kind)
        reader.end()
        return cls(untrusted, kind, attributes, auth_policy, scheme, key)


def _skip_symmetric(reader: Reader, algorithm: int) -> None:
    """Read the rest of a TPMT_SYM_DEF_OBJECT: AES-128-CFB, as endorsement keys of the low range have it."""
    if (algorithm, reader.number(2), reader.number(2)) != (ALG_AES, 128, ALG_CFB):
        raise MessageError("a storage key that does not protect by AES-128-CFB")


def _ecc_point(reader: Reader) -> ec.EllipticCurvePublicKey:
    curve, derivation = reader.number(2), reader.number(2)
    if curve != P256 or derivation != ALG_NULL:
        raise MessageError(f"curve 0x{curve:04x}, key derivation 0x{derivation:04x}; we use P-256 and none")
    x, y = (int.from_bytes(reader.sized(32)) for _ in range(2))
    try:
        return ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    except ValueError:
        raise MessageError("a point that is not on the curve") from None


def _rsa_key(reader: Reader, kind: int) -> rsa.RSAPublicKey:
    if kind != ALG_RSA:
        raise MessageError(f"a key of algorithm 0x{kind:04x}")
    bits, exponent = reader.number(2), reader.number(4) or 65537
    modulus = int.from_bytes(reader.sized(512))
    if modulus.bit_length() != bits or bits not in (2048, 3072, 4096):
        raise MessageError(f"an RSA modulus of {modulus.bit_length()} bits that says {bits}")
    try:
        return rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except ValueError:
        raise MessageError("numbers that are no RSA key") from None


def qualified_name(hierarchy: int, name: bytes) -> bytes:
    """Return the Qualified Name of a primary key of this hierarchy (Part 1, 26.5): what its attestations name."""
    return policy.ALG_SHA256.to_bytes(2) + hashlib.sha256(hierarchy.to_bytes(4) + name).digest()


def p256_area(attributes: int, auth_policy: bytes, key: ec.EllipticCurvePublicKey) -> bytes:
    """Return the TPMT_PUBLIC that a P-256 key with these attributes has."""
    numbers = key.public_numbers()
    return ecc_area(attributes, auth_policy, numbers.x.to_bytes(32), numbers.y.to_bytes(32))


def ecc_area(attributes: int, auth_policy: bytes, x: bytes, y: bytes) -> bytes:
    """Return the TPMT_PUBLIC of a P-256 key that signs by ECDSA with SHA-256."""
    head = struct.pack(">HHI", ALG_ECC, policy.ALG_SHA256, attributes) + sized(auth_policy)
    parameters = struct.pack(">HHHHH", ALG_NULL, ALG_ECDSA, policy.ALG_SHA256, P256, ALG_NULL)
    return head + parameters + sized(x) + sized(y)


@dataclass(frozen=True, slots=True)
class QuoteAttest:
    """A TPMS_ATTEST of TPM2_Quote over PCRs of one SHA-256 bank; `selection` is a bit map."""

    signer: bytes
    extra: bytes
    clock: int  # milliseconds
    reset_count: int
    restart_count: int
    safe: bool
    firmware: int
    selection: int
    pcr_digest: bytes

    _CLOCK: ClassVar[struct.Struct] = struct.Struct(">QIIBQ")

    @classmethod
    def unpack(cls, untrusted: bytes) -> Self:
        """Read a TPMS_ATTEST.

        Raises:
            MessageError: the TPM did not make it (its magic is another), it is no quote, or of other PCR banks.

        """
        reader = Reader(untrusted)
        if reader.number(4) != _MAGIC:
            raise MessageError("not made by a TPM: its magic is not TPM_GENERATED_VALUE")
        if (kind := reader.number(2)) != _ATTEST_QUOTE:
            raise MessageError(f"an attestation of type 0x{kind:04x}, which is no quote")
        signer, extra = reader.sized(_NAME_BYTES), reader.sized(66)
        clock, resets, restarts, safe, firmware = cls._CLOCK.unpack(reader.take(cls._CLOCK.size))
        if safe not in (0, 1):
            raise MessageError("a truth value that is neither")
        if (reader.number(4), reader.number(2), reader.number(1)) != (1, policy.ALG_SHA256, SELECT_BYTES):
            raise MessageError("a selection of other PCRs than of one SHA-256 bank")
        selection = int.from_bytes(reader.take(SELECT_BYTES), "little")
        digest = reader.sized(32)
        reader.end()
        return cls(signer, extra, clock, resets, restarts, bool(safe), firmware, selection, digest)


assert QuoteAttest._CLOCK.size == 25, "Part 2, 10.11.1 and 10.12.12: clock info of 17 bytes, firmware version of 8"  # noqa: SLF001
assert PCR_COUNT == policy.PCR_COUNT, "both modules count the same PCRs"


def pcr_digest(values: tuple[bytes, ...]) -> bytes:
    """Return what a quote holds of these values, in ascending order of PCRs."""
    return hashlib.sha256(b"".join(values)).digest()


def verify(signature: bytes, signed: bytes, key: ec.EllipticCurvePublicKey) -> None:
    """Check a TPMT_SIGNATURE (ECDSA, SHA-256, P-256) over `signed`.

    Raises:
        MessageError: it is no such signature, or not by `key` over these bytes.

    """
    reader = Reader(signature)
    if (reader.number(2), reader.number(2)) != (ALG_ECDSA, policy.ALG_SHA256):
        raise MessageError("a signature that is not ECDSA with SHA-256")
    r, s = (int.from_bytes(reader.sized(32)) for _ in range(2))
    reader.end()
    try:
        key.verify(utils.encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise MessageError("the signature is not by this key over these bytes") from None
