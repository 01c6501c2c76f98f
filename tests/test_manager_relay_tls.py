"""TLS between relays: who is pinned gets in, nobody else, whoever signed his certificate."""

import datetime as dt
from pathlib import Path

import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from manager.errors import ConfigurationError, ConflictError
from manager.relay_errors import RelayDeniedError
from manager.relay_tls import (
    CERTIFICATE_FILE,
    KEY_FILE,
    context,
    encrypted,
    fingerprint,
    make_identity,
    read_certificate,
)


def identity(directory: Path, name: str) -> tuple[Path, Path]:
    folder = directory / name
    folder.mkdir()
    make_identity(folder, name)
    return folder / KEY_FILE, folder / CERTIFICATE_FILE


def signed(directory: Path, name: str, issuer: tuple[Path, Path] | None, *, ca: bool) -> tuple[Path, Path]:
    """A certificate as we do not make them: of an authority, or signed by one."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    signer, by = key, subject
    if issuer is not None:
        loaded = serialization.load_pem_private_key(issuer[0].read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        signer, by = loaded, x509.load_pem_x509_certificate(issuer[1].read_bytes()).subject
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=10))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .sign(signer, hashes.SHA256())
    )
    places = directory / f"{name}.key", directory / f"{name}.crt"
    encoding, format_ = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    places[0].write_bytes(key.private_bytes(encoding, format_, serialization.NoEncryption()))
    places[1].write_bytes(made.public_bytes(encoding))
    return places


async def meet(
    near: tuple[Path, Path], far: tuple[Path, Path], pinned_at_far: list[bytes], pinned_at_near: bytes
) -> tuple[str | Exception, str | Exception]:
    """Both sides' outcome: the other's fingerprint, or why not."""
    here, there = trio.testing.memory_stream_pair()
    found: dict[str, str | Exception] = {}

    async def side(name: str, stream: trio.abc.Stream, own: tuple[Path, Path], pins: list[bytes], server: bool) -> None:
        how = context(*own, pins, server=server)
        try:
            made, found[name] = await encrypted(stream, how, [fingerprint(der) for der in pins], server=server)
            if server:
                await made.send_all(b"welcome")
            elif await made.receive_some() != b"welcome":
                found[name] = EOFError()
        except (RelayDeniedError, trio.BrokenResourceError) as error:
            found[name] = error
        finally:
            await trio.aclose_forcefully(stream)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side, "near", here, near, [pinned_at_near], False)
            nursery.start_soon(side, "far", there, far, pinned_at_far, True)
    return found["near"], found["far"]


async def test_two_that_know_each_other_meet(tmp_path: Path) -> None:
    near, far = identity(tmp_path, "near"), identity(tmp_path, "far")
    seen = await meet(near, far, [read_certificate(near[1])], read_certificate(far[1]))
    assert seen == (fingerprint(read_certificate(far[1])), fingerprint(read_certificate(near[1])))


async def test_a_stranger_is_refused_and_an_impostor_believed_by_nobody(tmp_path: Path) -> None:
    near, far, other = (identity(tmp_path, name) for name in ("near", "far", "other"))
    seen = await meet(other, far, [read_certificate(near[1])], read_certificate(far[1]))
    assert isinstance(seen[1], RelayDeniedError)
    seen = await meet(near, other, [read_certificate(near[1])], read_certificate(far[1]))
    assert isinstance(seen[0], RelayDeniedError)


async def test_who_has_a_pinned_authoritys_key_cannot_make_clients(tmp_path: Path) -> None:
    """OpenSSL is content with the chain; the certificate is not the one that is pinned."""
    far, authority = identity(tmp_path, "far"), signed(tmp_path, "authority", None, ca=True)
    leaf = signed(tmp_path, "leaf", authority, ca=False)
    _, outcome = await meet(leaf, far, [read_certificate(authority[1])], read_certificate(far[1]))
    assert isinstance(outcome, RelayDeniedError)
    assert "is not pinned here" in str(outcome)
    _, outcome = await meet(authority, far, [read_certificate(authority[1])], read_certificate(far[1]))
    assert outcome == fingerprint(read_certificate(authority[1]))


def test_a_key_is_private_and_not_replaced(tmp_path: Path) -> None:
    first = make_identity(tmp_path, "host")
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConflictError):
        make_identity(tmp_path, "host")
    assert fingerprint(read_certificate(tmp_path / CERTIFICATE_FILE)) == first


def test_what_is_no_certificate_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "x.crt"
    with pytest.raises(ConfigurationError, match=r"x\.crt cannot be read"):
        read_certificate(path)
    path.write_text("nothing")
    with pytest.raises(ConfigurationError, match="not one certificate"):
        read_certificate(path)
    make_identity(tmp_path, "host")
    key, certificate = tmp_path / KEY_FILE, tmp_path / CERTIFICATE_FILE
    path.write_text(certificate.read_text() * 2)
    with pytest.raises(ConfigurationError, match="not one certificate"):
        read_certificate(path)
    with pytest.raises(ConfigurationError, match="cannot be used for TLS"):
        context(certificate, key, [], server=True)
