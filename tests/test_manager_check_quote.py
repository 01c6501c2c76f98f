"""The verifier's command: documents that are not what they should be, files that are there, and what it imports."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from fixtures_tpm import running_swtpm

from manager.attest_credential import make_credential
from manager.attest_enrolment import Challenge, Kept, Proof, Request, check_proof, new_challenge, new_request, proof_of
from manager.attest_errors import DocumentUnreadable
from manager.check_quote import main
from manager.hwtpm import HardwareTpm
from manager.hwtpm_quote import AttestationKey


@pytest.fixture(scope="module")
def parts() -> Iterator[tuple[HardwareTpm, AttestationKey, Request]]:
    with running_swtpm() as swtpm, HardwareTpm.open(swtpm.setting) as tpm:
        tpm.provision_srk()
        key, endorsement = tpm.attester.new_key(), tpm.attester.endorsement()
        given = endorsement.public, endorsement.certificate, endorsement.chain
        yield tpm, key, new_request((uuid4(), uuid4()), "tenant", given, key.public)


def test_nothing_of_the_verifiers_command_needs_a_tpms_library() -> None:
    for module in ("manager.check_quote", "frontend_backend.guest_quote"):
        names = "[name for name in sys.modules if 'tpm2' in name or name in ('cffi', 'trio')]"
        code = f"import sys, {module}; print({names})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


def test_the_guests_tool_runs_alone(tmp_path: Path) -> None:
    from frontend_backend import guest_quote

    alone = tmp_path / "guest_quote.py"
    alone.write_bytes(Path(guest_quote.__file__).read_bytes())
    words = [sys.executable, "-I", str(alone), "--device", str(tmp_path / "no-tpm"), "--nonce", "00"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, "No such file" in done.stderr) == (3, True), done.stderr


def test_a_challenge_is_opened_and_the_proof_is_for_one_group_only(
    parts: tuple[HardwareTpm, AttestationKey, Request],
) -> None:
    tpm, key, request = parts
    challenge, kept = new_challenge(request)
    again = Challenge.from_text(challenge.to_text())
    secret = tpm.attester.activate(key, bytes.fromhex(again.identity), bytes.fromhex(again.encrypted_seed))
    group, store = request.place
    name = request.attestation.name

    def proof(place: tuple[object, object]) -> Proof:
        return Proof(str(group), name.hex(), proof_of(secret, place, name).hex())  # type: ignore[arg-type]

    check_proof(request, kept, proof((group, store)))
    for place in ((uuid4(), store), (group, uuid4())):
        with pytest.raises(DocumentUnreadable, match="does not prove"):
            check_proof(request, kept, proof(place))
    other = Kept(kept.group, "000b" + "00" * 32, kept.secret)
    with pytest.raises(DocumentUnreadable, match="another request"):
        check_proof(request, other, proof((group, store)))
    assert kept.secret not in repr(kept)


def altered(request: Request, **changes: object) -> str:
    return json.dumps(json.loads(request.to_text()) | changes)


def test_a_request_that_says_what_cannot_be_is_refused(parts: tuple[HardwareTpm, AttestationKey, Request]) -> None:
    _, key, request = parts
    assert Request.from_text(request.to_text()) == request
    weaker = bytearray(key.public.area)
    weaker[7] |= 0x40  # userWithAuth
    srk_like = bytearray.fromhex(request.endorsement_key)
    srk_like[5] &= 0xFE  # not restricted
    for text in (
        "",
        "[]",
        "{}",
        "{" * 5000,
        "x" * 20000,
        altered(request, version=2),
        altered(request, kind="something"),
        altered(request, more="x"),
        altered(request, group="not a uuid"),
        altered(request, group=7),
        altered(request, attestation_key=weaker.hex()),
        altered(request, attestation_key=request.endorsement_key),
        altered(request, endorsement_key=request.attestation_key),
        altered(request, endorsement_key=srk_like.hex()),
        altered(request, endorsement_certificates="-----BEGIN CERTIFICATE-----"),
    ):
        with pytest.raises(DocumentUnreadable):
            Request.from_text(text)


def test_every_hexadecimal_digit_of_the_keys_in_a_request_matters(
    parts: tuple[HardwareTpm, AttestationKey, Request],
) -> None:
    _, _, request = parts
    for field in ("attestation_key", "endorsement_key"):
        text = getattr(request, field)
        for position in range(0, len(text), 2):
            turned = text[:position] + f"{int(text[position : position + 2], 16) ^ 1:02x}" + text[position + 2 :]
            try:
                changed = Request.from_text(altered(request, **{field: turned}))
            except DocumentUnreadable:
                continue
            # another key, or an attribute that a verifier need not mind: its Name is another one then
            assert changed.endorsement.name != request.endorsement.name
            assert field == "endorsement_key"


def test_files_that_are_there_are_left_alone_and_half_a_pair_goes(tmp_path: Path) -> None:
    key, certificate = tmp_path / "ca.key", tmp_path / "ca.crt"
    certificate.write_text("mine")
    assert main(["new-ca", str(key), str(certificate)]) == 4
    assert certificate.read_text() == "mine"
    assert not key.exists()
    assert main(["new-ca", str(key), str(tmp_path / "other.crt")]) == 0
    assert key.stat().st_mode & 0o777 == 0o600


def test_a_challenge_wants_to_know_whom_to_trust(
    tmp_path: Path, parts: tuple[HardwareTpm, AttestationKey, Request], capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, request = parts
    path = tmp_path / "request"
    path.write_text(request.to_text())
    out = ["-o", str(tmp_path / "challenge"), "--keep", str(tmp_path / "kept")]
    with pytest.raises(SystemExit) as refused:
        main(["challenge", str(path), *out])
    assert refused.value.code == 2
    assert main(["new-ca", str(tmp_path / "ca.key"), str(tmp_path / "ca.crt")]) == 0
    assert main(["challenge", str(path), "--ca", str(tmp_path / "ca.crt"), *out]) == 6
    assert "no certificate of its endorsement key" in capsys.readouterr().err
    assert main(["challenge", str(path), "--ek-name", "00", *out]) == 6
    assert not (tmp_path / "challenge").exists()
    assert main(["challenge", str(path), "--ek-name", request.endorsement.name.hex().upper(), *out]) == 0
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o600
    assert main(["challenge", str(path), "--unchecked-ek", *out]) == 4


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["no-such-file", "--ak", "none", "--nonce", "00"], 3),
        ([], 2),
        (["bundle", "--nonce", "00"], 2),
        (["bundle", "--ak", "x"], 2),
        (["bundle", "--ak", "x", "--nonce", "zz"], 2),
        (["certify", "a", "b", "c", "--ca-key", "k", "--ca-cert", "c", "-o", "o"], 3),
    ],
)
def test_wrong_usage_and_missing_files_have_their_exit_codes(words: list[str], code: int) -> None:
    try:
        left = main(words)
    except SystemExit as ended:  # argparse's own way out
        left = int(str(ended.code))
    assert left == code


def test_what_is_no_bundle_does_not_hold(
    tmp_path: Path, parts: tuple[HardwareTpm, AttestationKey, Request], capsys: pytest.CaptureFixture[str]
) -> None:
    from cryptography.hazmat.primitives import serialization

    _, key, _ = parts
    ak, bundle = tmp_path / "ak.pem", tmp_path / "bundle"
    kind = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ak.write_bytes(key.public.point.public_bytes(*kind))
    bundle.write_bytes(b"vTPMdeep\0\2")
    assert main([str(bundle), "--ak", str(ak), "--nonce", "00"]) == 6
    assert "a bundle of version 2" in capsys.readouterr().out
    ak.write_text("nothing")
    assert main([str(bundle), "--ak", str(ak), "--nonce", "00", "--json"]) == 6
    assert json.loads(capsys.readouterr().out)["code"] == 6


@pytest.mark.parametrize(
    "text",
    [
        '{"hardware": {"0": ["00"]}, "hardware": {}}',
        '{"vtpm": {"0": ["00"], "0": ["ff"]}}',
        '{"vtpm": {"0": ["00"], "00": ["ff"]}}',
        "[" * 100_000,
    ],
)
def test_a_pcr_policy_that_says_something_twice_is_refused(
    tmp_path: Path,
    parts: tuple[HardwareTpm, AttestationKey, Request],
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from cryptography.hazmat.primitives import serialization

    ak, policy = tmp_path / "ak.pem", tmp_path / "policy"
    kind = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ak.write_bytes(parts[1].public.point.public_bytes(*kind))
    policy.write_text(text)
    assert main([str(policy), "--ak", str(ak), "--nonce", "00", "--pcr-policy", str(policy), "--json"]) == 6
    assert "PCR policy" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--days", "0"], "no number of days"),
        (["--days", "-3"], "no number of days"),
        (["--days", "99999999"], "no number of days"),
        (["--days", "0000000019999999999"], "no number of days"),
        (["--days", "99999999999999"], "no number of days"),
        (["--days", "\N{SUPERSCRIPT TWO}"], "no number of days"),
        (["--name", "x" * 65], "1 to 64 bytes"),
        (["--name", "\udcff"], "1 to 64 bytes"),
        (["--name", "a\nb"], "1 to 64 bytes"),
    ],
)
def test_an_authority_that_no_certificate_can_name_is_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["new-ca", str(tmp_path / "ca.key"), str(tmp_path / "ca.crt"), *options])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_secret_of_a_size_that_no_tpm_takes_is_our_mistake(
    parts: tuple[HardwareTpm, AttestationKey, Request],
) -> None:
    _, _, request = parts
    for size in (0, 33):
        with pytest.raises(ValueError, match="1 to 32"):
            make_credential(request.endorsement, request.attestation.name, bytes(size))
