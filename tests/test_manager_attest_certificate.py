"""Certificates of attestation keys, and chains of endorsement keys, each with one thing wrong."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from attestation_rig import certified_swtpm
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fixtures_tpm import running_swtpm

from manager.attest_certificate import (
    AkCertificate,
    endorsement_problem,
    new_authority,
    read_certificates,
    read_signing_key,
)
from manager.attest_enrolment import Request, new_request
from manager.attest_errors import DocumentUnreadable
from manager.hwtpm import HardwareTpm

NOW = datetime.now(UTC)
AK_USAGE = x509.ObjectIdentifier("2.23.133.8.3")
EK_USAGE = x509.ObjectIdentifier("2.23.133.8.1")


class Issuer:
    """An authority, or a leaf, made as wanted."""

    def __init__(
        self, name: str, above: "Issuer | None" = None, *, ca: bool = True, length: int | None = None, days: int = 9
    ) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = self if above is None else above
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if above is None else above.certificate.subject)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - timedelta(days=30))
            .not_valid_after(NOW + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=length), critical=True)
        )
        if not ca:
            builder = builder.add_extension(x509.ExtendedKeyUsage([EK_USAGE]), critical=False)
        self.certificate: x509.Certificate = builder.sign(issuer.key, hashes.SHA256())


def problem(certificates: Sequence[Issuer], trusted: Sequence[Issuer]) -> str | None:
    return endorsement_problem([i.certificate for i in certificates], [i.certificate for i in trusted], NOW)


def test_a_chain_leads_to_what_is_trusted_through_what_the_tpm_or_the_verifier_has() -> None:
    root = Issuer("root")
    middle = Issuer("middle", root)
    leaf = Issuer("leaf", middle, ca=False)
    assert problem([leaf, middle], [root]) is None
    assert problem([leaf], [root, middle]) is None
    assert problem([leaf], [middle]) is None
    assert problem([leaf], [root]) is not None
    assert problem([], [root]) == "the TPM has no certificate of its endorsement key"
    assert problem([leaf, middle], [Issuer("root")]) is not None  # the same name, another key


def test_an_authority_that_may_not_issue_issues_nothing() -> None:
    root = Issuer("root")
    no_authority = Issuer("leaf that signs", root, ca=False)
    assert problem([Issuer("leaf", no_authority, ca=False), no_authority], [root]) is not None
    assert problem([Issuer("leaf", Issuer("late", root, days=-1), ca=False)], [root]) is not None
    short = Issuer("short", length=0)
    below = Issuer("below", short)
    assert problem([Issuer("leaf", short, ca=False)], [short]) is None
    assert problem([Issuer("leaf", below, ca=False), below], [short]) is not None


def test_a_leaf_out_of_date_or_for_another_use_is_refused() -> None:
    root = Issuer("root")
    assert "it is valid from" in (problem([Issuer("leaf", root, ca=False, days=-1)], [root]) or "")
    assert problem([Issuer("authority", root)], [root]) == "it is no certificate of an endorsement key"


def test_a_circle_ends() -> None:
    root, one = Issuer("root"), Issuer("one")
    two = Issuer("two", one)
    crossed = Issuer("one", two)  # named like the first, issued by the second, with another key
    leaf = Issuer("leaf", one, ca=False)
    assert problem([leaf, two, crossed, one], [root]) is not None


def test_an_issued_certificate_is_read_back_and_no_other_is_taken_for_one() -> None:
    private, certificate = new_authority("test", 3)
    authority, signing = read_certificates(certificate, "x")[0], read_signing_key(private, "x")
    key, place = ec.generate_private_key(ec.SECP256R1()).public_key(), (uuid4(), uuid4())
    made = AkCertificate.issue(key, place, authority, signing, 2)
    again = AkCertificate.read(read_certificates(made.pem(), "x")[0])
    assert (again.key, again.group, again.store) == (key, *place)
    assert again.problem([authority], datetime.now(UTC)) is None
    for other in (authority, Issuer("leaf", None, ca=False).certificate):
        with pytest.raises(DocumentUnreadable):
            AkCertificate.read(other)
    with pytest.raises(DocumentUnreadable, match="not its key's"):
        AkCertificate.issue(key, place, authority, ec.generate_private_key(ec.SECP256R1()), 2)
    with pytest.raises(DocumentUnreadable):
        AkCertificate.issue(key, place, made.certificate, signing, 2)


def odd_certificate(usage: x509.ObjectIdentifier, uris: Sequence[str] = ()) -> x509.Certificate:
    """Return a certificate whose key is on a curve that nobody knows: its DER is patched, and so is its signature."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "odd")])
    names = [x509.UniformResourceIdentifier(uri) for uri in uris or ("urn:x",)]
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, NOW - timedelta(days=1), NOW + timedelta(days=1))
    builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    made = builder.add_extension(x509.SubjectAlternativeName(names), critical=False).sign(key, hashes.SHA256())
    der = made.public_bytes(serialization.Encoding.DER)
    p256, unknown = bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a8648ce3d030102")
    return made if uris else x509.load_der_x509_certificate(der.replace(p256, unknown, 1))


def test_certificates_that_no_library_takes_are_refused_in_words() -> None:
    odd = odd_certificate(AK_USAGE)
    with pytest.raises(DocumentUnreadable):
        AkCertificate.read(odd)
    dashes = [f"urn:vtpm-manager:{what}:{'-' * 36}" for what in ("group", "store")]
    with pytest.raises(DocumentUnreadable):
        AkCertificate.read(odd_certificate(AK_USAGE, dashes))
    assert problem([Issuer("leaf", None, ca=False)], []) is not None
    assert endorsement_problem([odd_certificate(EK_USAGE)], [odd], NOW) is not None
    with pytest.raises(DocumentUnreadable):
        AkCertificate.issue(Issuer("x").key.public_key(), (uuid4(), uuid4()), odd, Issuer("y").key, 1)


def test_a_request_with_such_a_certificate_is_refused_in_words() -> None:
    with running_swtpm() as swtpm, HardwareTpm.open(swtpm.setting) as tpm:
        tpm.provision_srk()
        found, key = tpm.attester.endorsement(), tpm.attester.new_key()
    request = new_request((uuid4(), uuid4()), "default", (found.public, b"", b""), key.public)
    pem = odd_certificate(EK_USAGE).public_bytes(serialization.Encoding.PEM).decode()
    with pytest.raises(DocumentUnreadable):
        Request.from_text(replace(request, endorsement_certificates=pem).to_text())


def test_a_chain_in_the_tpm_is_given_to_the_verifier(tmp_path: Path) -> None:
    with certified_swtpm(tmp_path) as (swtpm, authorities):
        root, middle = read_certificates(authorities.read_bytes(), "x")
        der = middle.public_bytes(serialization.Encoding.DER)
        (tmp_path / "middle.der").write_bytes(der)
        attributes = "ownerwrite|ownerread|authread|no_da"
        swtpm.tool("tpm2_nvdefine", "0x01c00100", "-C", "o", "-s", str(len(der)), "-a", attributes)
        swtpm.tool("tpm2_nvwrite", "0x01c00100", "-C", "o", "-i", str(tmp_path / "middle.der"))
        with HardwareTpm.open(swtpm.setting) as tpm:
            tpm.provision_srk()
            found, key = tpm.attester.endorsement(), tpm.attester.new_key()
    parts = found.public, found.certificate, found.chain
    request = new_request((uuid4(), uuid4()), "default", parts, key.public)
    assert len(request.certificates) == 2
    assert endorsement_problem(request.certificates, [root], datetime.now(UTC)) is None
    assert endorsement_problem(request.certificates[:1], [root], datetime.now(UTC)) is not None
