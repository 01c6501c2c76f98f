"""X.509 for attestation: the verifier's own authority, certificates of attestation keys, chains of endorsement keys.

A certificate of an attestation key says: this P-256 key was shown to live in a genuine TPM as a restricted key for
locality 2, and its manager claims to be this group of this store. Source: RFC 5280; TCG EK Credential Profile 2.0, 3.5.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Self
from uuid import UUID

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from manager.attest_errors import DocumentUnreadable

SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
MAX_CHAIN: Final = 6  # certificates above an endorsement key's; TPM makers have two or three
_BACKDATED: Final = timedelta(minutes=5)  # the verifier's clock and a relying party's may differ
_EK_USAGE: Final = x509.ObjectIdentifier("2.23.133.8.1")  # tcg-kp-EKCertificate
_AK_USAGE: Final = x509.ObjectIdentifier("2.23.133.8.3")  # tcg-kp-AIKCertificate
_URN: Final = "urn:vtpm-manager:{}:{}"
_UUID: Final = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
# what the library raises for a certificate that it does not understand, when something of it is asked for
_ODD: Final = (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)


def read_certificates(pem: bytes, what: str) -> list[x509.Certificate]:
    """Read one or more certificates (PEM). Raises DocumentUnreadable."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise DocumentUnreadable(what, f"it holds no certificates ({error})") from error


def public_key(certificate: x509.Certificate, what: str) -> CertificatePublicKeyTypes:
    """Return the key that a certificate is for. Raises DocumentUnreadable: it is of a kind that nobody here knows."""
    try:
        return certificate.public_key()
    except _ODD as error:
        raise DocumentUnreadable(what, f"its key cannot be read ({error})") from error


def read_signing_key(pem: bytes, what: str) -> SigningKey:
    """Read an authority's private key (PEM, without passphrase). Raises DocumentUnreadable."""
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise DocumentUnreadable(what, f"it holds no private key without passphrase ({error})") from error
    if not isinstance(key, SigningKey):
        raise DocumentUnreadable(what, "its key is neither EC nor RSA")
    return key


def new_authority(name: str, days: int) -> tuple[bytes, bytes]:
    """Make an authority for attestation keys: private key (P-256, PKCS8) and self-signed certificate, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        _begun(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, certificate.public_bytes(encoding)


def _begun(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - _BACKDATED).not_valid_after(now + timedelta(days=days))


def _usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )


@dataclass(frozen=True, slots=True)
class AkCertificate:
    """What a certificate of an attestation key says."""

    key: ec.EllipticCurvePublicKey
    group: UUID
    store: UUID
    certificate: x509.Certificate

    @classmethod
    def issue(
        cls,
        subject: ec.EllipticCurvePublicKey,
        place: tuple[UUID, UUID],
        issuer: x509.Certificate,
        signing: SigningKey,
        days: int,
    ) -> Self:
        """Certify a group's attestation key; `place` is (group, store). Raises DocumentUnreadable."""
        what = "the authority's certificate"
        if public_key(issuer, what) != signing.public_key() or not _may_issue(issuer):
            raise DocumentUnreadable(what, "it is not its key's, or no authority's")
        group, store = place
        names = [x509.UniformResourceIdentifier(_URN.format(*pair)) for pair in (("group", group), ("store", store))]
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"vTPM attestation key {group}")])
        builder = _begun(name, issuer.subject, subject, days)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(certificates=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([_AK_USAGE]), critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return cls(subject, group, store, builder.sign(signing, hashes.SHA256()))

    @classmethod
    def read(cls, certificate: x509.Certificate) -> Self:
        """Read a certificate that `issue` made. Raises DocumentUnreadable."""
        what = "the attestation key's certificate"
        key = public_key(certificate, what)
        try:
            usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (x509.ExtensionNotFound, *_ODD) as error:
            raise DocumentUnreadable(what, f"it is no attestation key's ({error})") from error
        if _AK_USAGE not in usage or not isinstance(key, ec.EllipticCurvePublicKey):
            raise DocumentUnreadable(what, "it is no attestation key's")
        if not isinstance(key.curve, ec.SECP256R1):
            raise DocumentUnreadable(what, "its key is not P-256")
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        return cls(key, _named(uris, "group"), _named(uris, "store"), certificate)

    def pem(self) -> bytes:
        """Return the certificate as PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def problem(self, authorities: Sequence[x509.Certificate], moment: datetime) -> str | None:
        """Return why it does not hold at `moment`; authorities: whose certificates count, none: not looked at."""
        if late := _out_of_date(self.certificate, moment):
            return late
        if authorities and not any(_issued(self.certificate, issuer, moment) for issuer in authorities):
            return "none of the given authorities issued it"
        return None


def _named(uris: Sequence[str], what: str) -> UUID:
    found = [uri[len(_URN.format(what, "")) :] for uri in uris if re.fullmatch(_URN.format(what, _UUID), uri)]
    if len(found) != 1:
        raise DocumentUnreadable("the attestation key's certificate", f"it names {len(found)} {what}s, not one")
    return UUID(found[0])


def _out_of_date(certificate: x509.Certificate, moment: datetime) -> str | None:
    if not certificate.not_valid_before_utc <= moment <= certificate.not_valid_after_utc:
        return f"it is valid from {certificate.not_valid_before_utc} to {certificate.not_valid_after_utc}"
    return None


def _may_issue(certificate: x509.Certificate) -> bool:
    try:
        extensions = certificate.extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
    except (x509.ExtensionNotFound, *_ODD):
        return False
    try:
        return constraints.ca and extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound:
        return constraints.ca  # RFC 5280, 4.2.1.3: absent, it restricts nothing


def _issued(certificate: x509.Certificate, issuer: x509.Certificate, moment: datetime) -> bool:
    if not _may_issue(issuer) or _out_of_date(issuer, moment):
        return False
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, *_ODD):
        return False  # another issuer's, which is what was asked
    return True


def endorsement_problem(
    certificates: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate], moment: datetime
) -> str | None:
    """Return why an endorsement key's certificate does not lead to one of `authorities`, None where it does.

    certificates: the endorsement key's own first, then whatever the TPM has of those above it. Revocation lists are
    not looked at.
    """
    if not certificates:
        return "the TPM has no certificate of its endorsement key"
    leaf = certificates[0]
    if late := _out_of_date(leaf, moment):
        return late
    if _may_issue(leaf) or not _for_endorsement(leaf):
        return "it is no certificate of an endorsement key"
    above = [*certificates[1:], *(item for item in authorities if item not in certificates)]
    current, length = leaf, 0
    while not any(_issued(current, trusted, moment) and _deep_enough(trusted, length) for trusted in authorities):
        issuer = next((item for item in above if item != current and _issued(current, item, moment)), None)
        if issuer is None or not _deep_enough(issuer, length):
            return f"nobody in the chain issued {current.subject.rfc4514_string() or 'it'}"
        current, length = issuer, length + 1
        if length > MAX_CHAIN:
            return f"its chain has more than {MAX_CHAIN} certificates"
    return None


def _deep_enough(issuer: x509.Certificate, below: int) -> bool:
    """Tell whether the path length of an issuer allows so many authorities below it."""
    most = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
    return most is None or below <= most


def _for_endorsement(certificate: x509.Certificate) -> bool:
    try:
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, *_ODD):
        return False
    return _EK_USAGE in usages or ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in usages
