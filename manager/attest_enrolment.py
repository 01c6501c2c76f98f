"""Enrolment of a group's attestation key: the documents that go between the manager and an off-line verifier.

request (manager) -> challenge, and a secret that the verifier keeps -> proof (manager) -> certificate. Each is a JSON
object with `kind` and `version`; bytes are hexadecimal, certificates PEM. The proof is an HMAC under the secret over
what is to be certified, so nobody can take another's group for his. docs/attestation.md has the fields.
"""

import hashlib
import hmac
import json
import os
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from typing import ClassVar, Final, Self
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from frontend_backend.errors import MessageError
from manager.attest_certificate import public_key, read_certificates
from manager.attest_credential import SECRET_BYTES, make_credential
from manager.attest_errors import DocumentUnreadable
from manager.attest_wire import (
    AK_ATTRIBUTES,
    DECRYPT,
    FIXED_TPM,
    RESTRICTED,
    SIGN,
    KeyPublic,
    ak_policy,
    p256_area,
)

MAX_DOCUMENT: Final = 16 * 1024  # bytes; a request with an RSA endorsement key and three certificates has about 6,000
_VERSION: Final = 1
_MAX_IDENTITY: Final = 68  # bytes: two sized digests of SHA-256
_MAX_SEED: Final = 512  # bytes: of an RSA-4096 endorsement key
_LABEL: Final = b"vTPM enrolment proof, version 1\0"


@dataclass(frozen=True, slots=True)
class _Document:
    """Fields of text, written as one JSON object and read back strictly."""

    KIND: ClassVar[str] = ""

    def to_text(self) -> str:
        """Return the document."""
        return json.dumps({"kind": self.KIND, "version": _VERSION} | asdict(self), indent=1) + "\n"

    @classmethod
    def from_text(cls, untrusted: str | bytes) -> Self:
        """Read a document. Raises DocumentUnreadable."""
        if len(untrusted) > MAX_DOCUMENT:
            raise DocumentUnreadable(cls.KIND, f"it is longer than {MAX_DOCUMENT} bytes")
        try:
            fields = json.loads(untrusted)
        except (ValueError, RecursionError) as error:
            raise DocumentUnreadable(cls.KIND, f"it is no JSON ({error})") from error
        if not isinstance(fields, dict) or fields.pop("kind", None) != cls.KIND:
            raise DocumentUnreadable(cls.KIND, f"it does not say that it is a {cls.KIND}")
        if fields.pop("version", None) != _VERSION:
            raise DocumentUnreadable(cls.KIND, f"it is not of version {_VERSION}")
        if fields.keys() != {field.name for field in dataclass_fields(cls)} or not all(
            type(value) is str for value in fields.values()
        ):
            raise DocumentUnreadable(cls.KIND, "its fields are not those it must have")
        document = cls(**fields)
        try:
            document.check()
        except (ValueError, MessageError) as error:
            raise DocumentUnreadable(cls.KIND, str(error)) from error
        return document

    def check(self) -> None:
        """Raise ValueError or MessageError for what cannot be in it."""


@dataclass(frozen=True, slots=True)
class Request(_Document):
    """What the manager says of itself: nothing of it is believed before the proof."""

    group: str
    store: str
    name: str
    endorsement_key: str
    endorsement_certificates: str
    attestation_key: str

    KIND: ClassVar[str] = "vtpm enrolment request"

    def check(self) -> None:
        """Raise what a field that cannot be raises."""
        _ = self.place, self.endorsement, self.attestation, self.certificates

    @property
    def place(self) -> tuple[UUID, UUID]:
        """Group and store."""
        return UUID(self.group), UUID(self.store)

    @property
    def endorsement(self) -> KeyPublic:
        """The endorsement key, which can only decrypt what TPMs make."""
        public = KeyPublic.unpack(bytes.fromhex(self.endorsement_key))
        if public.attributes & (FIXED_TPM | RESTRICTED | DECRYPT | SIGN) != FIXED_TPM | RESTRICTED | DECRYPT:
            raise MessageError("its endorsement key is no restricted decryption key of one TPM")
        return public

    @property
    def attestation(self) -> KeyPublic:
        """The attestation key, with the attributes and the policy that all of ours have."""
        public = KeyPublic.unpack(bytes.fromhex(self.attestation_key))
        if public.area != p256_area(AK_ATTRIBUTES, ak_policy(), public.point):
            raise MessageError("its attestation key is not a restricted P-256 key for locality 2 only")
        return public

    @property
    def certificates(self) -> list[x509.Certificate]:
        """The endorsement key's certificate, and those above it that the TPM has; none where it has none."""
        found = self.endorsement_certificates
        what = "the endorsement key's certificate"
        certificates = read_certificates(found.encode(), what) if found else []
        if certificates and public_key(certificates[0], what) != self.endorsement.key:
            raise MessageError("the endorsement key's certificate is another key's")
        return certificates


@dataclass(frozen=True, slots=True)
class Challenge(_Document):
    """What only the TPM with both keys can open."""

    group: str
    attestation_name: str
    identity: str
    encrypted_seed: str

    KIND: ClassVar[str] = "vtpm enrolment challenge"

    def check(self) -> None:
        """Raise what a field that cannot be raises."""
        _ = UUID(self.group)
        parts = (self.attestation_name, 34), (self.identity, _MAX_IDENTITY), (self.encrypted_seed, _MAX_SEED)
        if not all(0 < len(bytes.fromhex(text)) <= most for text, most in parts):
            raise ValueError("its parts have not the sizes that they can have")


@dataclass(frozen=True, slots=True)
class Kept(_Document):
    """What the verifier keeps until the proof comes: the secret in the challenge."""

    group: str
    attestation_name: str
    secret: str = field(repr=False)

    KIND: ClassVar[str] = "vtpm enrolment secret"

    def check(self) -> None:
        """Raise what a field that cannot be raises."""
        if len(bytes.fromhex(self.secret)) != SECRET_BYTES:
            raise ValueError(f"its secret has not {SECRET_BYTES} bytes")


@dataclass(frozen=True, slots=True)
class Proof(_Document):
    """What shows that the challenge was opened, by who claims this group of this store."""

    group: str
    attestation_name: str
    proof: str

    KIND: ClassVar[str] = "vtpm enrolment proof"

    def check(self) -> None:
        """Raise what a field that cannot be raises."""
        _ = bytes.fromhex(self.proof)


def new_request(
    place: tuple[UUID, UUID], name: str, endorsement: tuple[KeyPublic, bytes, bytes], attestation: KeyPublic
) -> Request:
    """Return a request; place: (group, store); endorsement: the key, its certificate and those above it (DER)."""
    group, store = place
    public, certificate, chain = endorsement
    pem = "".join(_to_pem(item) for item in (*_split_der(certificate)[:1], *_split_der(chain)))
    return Request(str(group), str(store), name, public.area.hex(), pem, attestation.area.hex())


def _to_pem(der: bytes) -> str:
    try:
        return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM).decode()
    except ValueError as error:
        raise DocumentUnreadable("a certificate in the hardware TPM", str(error)) from error


def _split_der(data: bytes) -> list[bytes]:
    """Split certificates that lie one behind the other (EK Credential Profile, 2.2.1.5.2); what is none ends it."""
    found = []
    while data[:2] == b"\x30\x82":
        size = 4 + int.from_bytes(data[2:4])
        found.append(data[:size])
        data = data[size:]
    return found


def new_challenge(request: Request) -> tuple[Challenge, Kept]:
    """Return what goes to the manager, and what stays here."""
    name, secret = request.attestation.name, os.urandom(SECRET_BYTES)
    identity, seed = make_credential(request.endorsement, name, secret)
    group = str(request.place[0])
    return Challenge(group, name.hex(), identity.hex(), seed.hex()), Kept(group, name.hex(), secret.hex())


def proof_of(secret: bytes, place: tuple[UUID, UUID], attestation_name: bytes) -> bytes:
    """Return the proof: HMAC-SHA256 under the secret over label, group, store and the key's Name; 32 bytes."""
    group, store = place
    return hmac.digest(secret, _LABEL + group.bytes + store.bytes + attestation_name, hashlib.sha256)


def check_proof(request: Request, kept: Kept, proof: Proof) -> None:
    """Check that the manager which made the request opened the challenge. Raises DocumentUnreadable."""
    name = request.attestation.name
    if kept.attestation_name != name.hex() or kept.group != str(request.place[0]):
        raise DocumentUnreadable(Kept.KIND, "it belongs to another request")
    expected = proof_of(bytes.fromhex(kept.secret), request.place, name)
    if not hmac.compare_digest(expected, bytes.fromhex(proof.proof)):
        raise DocumentUnreadable(Proof.KIND, "it does not prove that this request's TPM opened this challenge")
