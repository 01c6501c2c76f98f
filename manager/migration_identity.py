"""Who a manager is for others: a P-256 key pair, a self-signed certificate, and TLS that knows pinned ones only.

Not certified by a hardware TPM: what an operator compares is the fingerprint, on both sides. What a certificate by a
group's attestation key would add, and where it would come in: docs/migration.md, "What is not there".
"""

import os
import ssl
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from manager.errors import UsageError
from manager.migration_state import Identity

_PREFIX: Final = "vtpm-manager "
_YEARS: Final = 30  # what ends is an authorisation (Peer.until); a certificate that ends by itself would only surprise
_DAY: Final = timedelta(days=1)
_ALPN: Final = "vtpm-migrate/1"


def make(store: UUID) -> Identity:
    """Make a key pair and its certificate; its subject names the store."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{_PREFIX}{store}")])
    now = datetime.now(UTC)
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + _YEARS * 365 * _DAY)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(usage, critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return Identity(private, certificate.public_bytes(Encoding.PEM).decode())


def parse_certificate(text: str) -> tuple[str, str, UUID]:
    """Return (PEM of nothing else, fingerprint, store) of a manager's certificate.

    Raises:
        UsageError: it is none.

    """
    try:
        certificate = x509.load_pem_x509_certificate(text.encode())
        certificate.verify_directly_issued_by(certificate)
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        store = UUID(str(names[0].value).removeprefix(_PREFIX))
    except Exception as error:
        raise UsageError(
            f"this is no certificate of a manager (vtpm-migrate-identity -o FILE writes one): {error}. Nothing was done"
        ) from error
    if not isinstance(certificate.public_key(), ec.EllipticCurvePublicKey):
        raise UsageError("this certificate's key is not of the kind that managers have (P-256). Nothing was done")
    return certificate.public_bytes(Encoding.PEM).decode(), certificate.fingerprint(hashes.SHA256()).hex(), store


def fingerprint_of(der: bytes) -> str:
    """Return the fingerprint (SHA-256, hex) of a certificate as the TLS connection has it."""
    return x509.load_der_x509_certificate(der).fingerprint(hashes.SHA256()).hex()


def tls_context(identity: Identity, pinned: Iterable[str], *, server: bool) -> ssl.SSLContext:
    """Return TLS 1.3 with this identity that takes the `pinned` certificates (PEM) and no others, on either side."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # who it is is the pinned certificate's business, not a name's
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.options |= ssl.OP_NO_TICKET  # a resumed session would outlive a revocation
    if server:
        context.num_tickets = 0
    context.set_alpn_protocols([_ALPN])
    for certificate in pinned:
        context.load_verify_locations(cadata=certificate)
    _load_key(context, identity)
    return context


def _load_key(context: ssl.SSLContext, identity: Identity) -> None:
    """Give the key to OpenSSL: Python's ssl reads files only, so one that lies in memory, and under no name."""
    key = load_der_private_key(identity.key, None)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    descriptor = os.memfd_create("identity", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, pem + identity.certificate.encode())
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
