"""TLS between relays: version 1.3 only, both sides show a certificate, and each knows the other's to the byte.

No authority vouches for anybody: a certificate is pinned, and what OpenSSL's chain building accepts is compared with
the pins once more, so that the holder of a pinned certificate cannot make others. Sessions are not resumed: every
connection shows certificates.
"""

import datetime as dt
import hashlib
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from manager.errors import ConfigurationError
from manager.new_file import PRIVATE, write_new
from manager.relay_errors import RelayDeniedError

KEY_FILE: Final = "relay.key"
CERTIFICATE_FILE: Final = "relay.crt"
_DAYS: Final = 3650  # a pin ends by being taken away; the date only keeps OpenSSL content
_MAX_NAME: Final = 64  # characters of a common name (X.520)


def make_identity(directory: Path, name: str) -> str:
    """Make a key (P-256) and its certificate in a directory; returns the certificate's fingerprint.

    Raises:
        ConflictError: there is one; it was left as it is. ManagerError: they cannot be written.

    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:_MAX_NAME])])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_new(str(directory / KEY_FILE), pem, PRIVATE)
    write_new(str(directory / CERTIFICATE_FILE), certificate.public_bytes(serialization.Encoding.PEM))
    return fingerprint(certificate.public_bytes(serialization.Encoding.DER))


def fingerprint(der: bytes) -> str:
    """Return the SHA-256 of a certificate, in hexadecimal."""
    return hashlib.sha256(der).hexdigest()


def read_certificate(path: Path) -> bytes:
    """Return the only certificate of a PEM file, as DER.

    Raises:
        ConfigurationError: it has none, or cannot be read.

    """
    try:
        (found,) = x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not one certificate in PEM: {error}") from error
    return found.public_bytes(serialization.Encoding.DER)


def context(key: Path, certificate: Path, pinned: Iterable[bytes], *, server: bool) -> ssl.SSLContext:
    """Return how this side of a connection behaves; `pinned` are the certificates (DER) of those at the other end.

    Raises:
        ConfigurationError: key or certificate cannot be used.

    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = made.maximum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False  # a pin says more than a name
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # a pinned certificate is its own anchor
    if server:
        made.num_tickets = 0
    try:
        made.load_cert_chain(certificate, key)
        for der in pinned:
            made.load_verify_locations(cadata=der)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"{certificate} with {key} cannot be used for TLS: {error}") from error
    return made


async def encrypted(
    stream: trio.abc.Stream, how: ssl.SSLContext, pins: Iterable[str], *, server: bool
) -> tuple[trio.SSLStream[trio.abc.Stream], str]:
    """Do the handshake; returns the stream and the peer's fingerprint, one of `pins`.

    Raises:
        RelayDeniedError: the peer's certificate is none of them, or there is none. trio.BrokenResourceError: it ended.

    """
    made = trio.SSLStream(stream, how, server_side=server, https_compatible=True)
    try:
        await made.do_handshake()
    except trio.BrokenResourceError as error:
        if isinstance(error.__cause__, ssl.SSLError):
            raise RelayDeniedError(f"no TLS with the peer: {error.__cause__}") from error
        raise
    der = made.getpeercert(binary_form=True)
    seen = fingerprint(der) if der else "none"
    if seen not in set(pins):
        raise RelayDeniedError(f"the peer's certificate ({seen}) is not pinned here")
    return made, seen
