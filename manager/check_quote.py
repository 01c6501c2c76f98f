"""The command `vtpm-check-quote`: judges deep quotes, and enrols attestation keys, on a verifier's machine.

Needs no TPM, no TPM library and no manager. `vtpm-check-quote BUNDLE ...` judges; `challenge`, `certify` and `new-ca`
are the verifier's side of enrolment (docs/attestation.md).
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from frontend_backend.command_line import parsed, whole
from frontend_backend.messages_admin import ExitCode
from manager import attest_enrolment as enrolment
from manager.attest_certificate import (
    AkCertificate,
    endorsement_problem,
    new_authority,
    read_certificates,
    read_signing_key,
)
from manager.attest_check import Expected, Judgement, Verdict, judge
from manager.attest_errors import DocumentUnreadable
from manager.attest_policy import PcrPolicy
from manager.errors import ManagerError, NotFoundError, UsageError
from manager.new_file import PRIVATE, PUBLIC, write_new

JSON_SCHEMA: Final = "vtpm-check-quote/1"
_MAX_FILE: Final = 256 * 1024  # bytes; a file of certificates of TPM makers has some dozen
_YEARS: Final = 3650  # days that an authority made here is valid
_MOST_DAYS: Final = 36_500  # a certificate's end has a year of four digits
_MOST_NAME: Final = 64  # bytes of a common name (X.520, ub-common-name)
_DAYS: Final = 365  # days that a certificate of an attestation key is valid


def read_file(path: str) -> bytes:
    """Return a file's bytes. Raises NotFoundError, UsageError: longer than anything read here."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read: {error.strerror}. Nothing was done") from error
    if len(content) > _MAX_FILE:
        raise UsageError(f"{path} is longer than {_MAX_FILE} bytes: it is not what it should be. Nothing was done")
    return content


# --- judging ---------------------------------------------------------------------------------------


def _judge(options: argparse.Namespace) -> int:
    policy = PcrPolicy.from_text(read_file(options.pcr_policy)) if options.pcr_policy else PcrPolicy()
    expected = Expected(
        ak=_attestation_key(read_file(options.ak)),
        nonce=options.nonce,
        moment=options.at,
        vtpm=options.vtpm,
        group=options.group,
        authorities=_authorities(options.ca),
        policy=policy,
        event_log=read_file(options.event_log) if options.event_log else None,
    )
    judgement = judge(read_file(options.bundle), expected)
    _print_judgement(judgement, as_json=options.json)
    return int(ExitCode.OK if judgement.holds else ExitCode.INTEGRITY)


def _attestation_key(pem: bytes) -> AkCertificate | ec.EllipticCurvePublicKey:
    if b"-----BEGIN CERTIFICATE-----" in pem:
        return AkCertificate.read(read_certificates(pem, "the attestation key's certificate")[0])
    what = "the attestation key"
    try:
        key = serialization.load_pem_public_key(pem)
    except ValueError as error:
        raise DocumentUnreadable(what, f"it is neither a certificate nor a public key in PEM ({error})") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise DocumentUnreadable(what, "it is not P-256")
    return key


def _authorities(path: str | None) -> list[x509.Certificate]:
    return read_certificates(read_file(path), path) if path else []


def _print_judgement(judgement: Judgement, *, as_json: bool) -> None:
    verdict = Verdict.OK if judgement.holds else Verdict.FAILED
    if as_json:
        checks = [{"name": item.name, "verdict": item.verdict, "text": item.text} for item in judgement.checks]
        print(json.dumps({"schema": JSON_SCHEMA, "verdict": verdict, "checks": checks} | {"says": judgement.says}))
        return
    for check in judgement.checks:
        print(f"{check.verdict.value:12} {check.name}: {check.text}")
    print()
    for name, value in judgement.says.items():
        if not isinstance(value, dict):
            print(f"{name + ':':18} {value}")
    skipped = [check.name for check in judgement.checks if check.verdict is Verdict.NOT_CHECKED]
    if not judgement.holds:
        print("The quote does not hold: believe nothing of what it says.")
    elif skipped:
        print(f"The quote holds as far as it was checked; nobody looked at: {', '.join(skipped)}.")
    else:
        print("The quote holds.")


# --- enrolling -------------------------------------------------------------------------------------


def _challenge(options: argparse.Namespace) -> int:
    request = enrolment.Request.from_text(read_file(options.request))
    if options.ca:
        problem = endorsement_problem(request.certificates, _authorities(options.ca), options.at)
        if problem is not None:
            raise DocumentUnreadable("the endorsement key", problem)
        checked = "its certificate leads to an authority that was given"
    elif options.ek_name is not None:
        if request.endorsement.name.hex() != options.ek_name.lower():
            raise DocumentUnreadable("the endorsement key", f"its Name is {request.endorsement.name.hex()}")
        checked = "its Name is the one that was given"
    else:
        checked = "NOT CHECKED: what made this request may be no TPM at all"
    challenge, kept = enrolment.new_challenge(request)
    write_new(options.keep, kept.to_text().encode(), PRIVATE)
    try:
        write_new(options.output, challenge.to_text().encode(), PUBLIC)
    except ManagerError:
        os.unlink(options.keep)
        raise
    group, store = request.place
    said = {
        "group": str(group),
        "group_name": request.name,
        "store": str(store),
        "endorsement_key": request.endorsement.name.hex(),
        "endorsement": checked,
        "challenge": options.output,
        "kept": options.keep,
    }
    _print(said, f"Send {options.output} to the manager; keep {options.keep} here.", as_json=options.json)
    return int(ExitCode.OK)


def _certify(options: argparse.Namespace) -> int:
    request = enrolment.Request.from_text(read_file(options.request))
    kept = enrolment.Kept.from_text(read_file(options.kept))
    enrolment.check_proof(request, kept, enrolment.Proof.from_text(read_file(options.proof)))
    issuer = read_certificates(read_file(options.ca_cert), options.ca_cert)[0]
    signing = read_signing_key(read_file(options.ca_key), options.ca_key)
    made = AkCertificate.issue(request.attestation.point, request.place, issuer, signing, options.days)
    write_new(options.output, made.pem(), PUBLIC)
    said = {"group": str(made.group), "store": str(made.store), "certificate": options.output}
    _print(said, f"Who checks quotes of this group needs {options.output}.", as_json=options.json)
    return int(ExitCode.OK)


def _new_ca(options: argparse.Namespace) -> int:
    private, certificate = new_authority(options.name, options.days)
    write_new(options.key, private, PRIVATE)
    try:
        write_new(options.certificate, certificate, PUBLIC)
    except ManagerError:
        os.unlink(options.key)
        raise
    said = {"key": options.key, "certificate": options.certificate}
    _print(said, f"Keep {options.key} off line: who has it can certify any key.", as_json=options.json)
    return int(ExitCode.OK)


def _print(said: dict[str, Any], advice: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"schema": JSON_SCHEMA} | said))
        return
    for name, value in said.items():
        print(f"{name + ':':17} {value}")
    print(advice)


# --- the command line ------------------------------------------------------------------------------


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text[:80]}' is not hexadecimal") from None


def _days(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= _MOST_DAYS:
        raise argparse.ArgumentTypeError(f"'{text[:80]}' is no number of days: 1 to {_MOST_DAYS}")
    return int(text)


def _common_name(text: str) -> str:
    if not text.isprintable() or not 1 <= len(text.encode()) <= _MOST_NAME:
        raise argparse.ArgumentTypeError(f"a name in a certificate has 1 to {_MOST_NAME} bytes that can be printed")
    return text


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text[:80]}' is no time: write 2026-11-21T14:00:00+01:00") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _parser(call: Callable[[argparse.Namespace], int], prog: str, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=text)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(call=call)
    return parser


def _add_moment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--at", type=_moment, default=datetime.now(UTC), metavar="TIME", help="judge certificates as of then (ISO 8601)"
    )


def _judge_parser() -> argparse.ArgumentParser:
    text = "Check a deep quote off line; exits with 6 if anything fails. Also: challenge, certify, new-ca (enrolment)."
    parser = _parser(_judge, "vtpm-check-quote", text)
    parser.add_argument("bundle", metavar="BUNDLE", help="what vtpm-quote -o or vtpm-guest-quote -o wrote")
    parser.add_argument(
        "--ak", required=True, metavar="PEM", help="the group's attestation key: certificate, or bare key"
    )
    parser.add_argument("--nonce", required=True, type=_hex, metavar="HEX", help="the nonce that was asked with")
    parser.add_argument("--vtpm", type=UUID, metavar="UUID", help="the vTPM that it must be")
    parser.add_argument("--group", type=UUID, metavar="UUID", help="the group that it must be of (default: the key's)")
    parser.add_argument(
        "--ca", metavar="PEM", help="the authorities that may have issued the attestation key's certificate"
    )
    parser.add_argument("--pcr-policy", metavar="JSON", help="values that PCRs may have")
    parser.add_argument("--event-log", metavar="FILE", help="what the guest's boot was measured by (vtpm-event-log -o)")
    _add_moment(parser)
    return parser


def _challenge_parser() -> argparse.ArgumentParser:
    parser = _parser(_challenge, "vtpm-check-quote challenge", "Make a challenge that only the request's TPM can open.")
    parser.add_argument("request", metavar="REQUEST", help="what vtpm-group-enroll GROUP -o wrote")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--ca", metavar="PEM", help="authorities that endorsement keys must come from (TPM makers')")
    how.add_argument("--ek-name", metavar="HEX", help="the endorsement key's Name, known from elsewhere")
    how.add_argument("--unchecked-ek", action="store_true", help="take any endorsement key: proves no genuine TPM")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the challenge, for the manager")
    parser.add_argument("--keep", required=True, metavar="FILE", help="the secret in it, for certify; stays here")
    _add_moment(parser)
    return parser


def _certify_parser() -> argparse.ArgumentParser:
    parser = _parser(_certify, "vtpm-check-quote certify", "Certify an attestation key whose challenge was opened.")
    for name, text in (
        ("request", "the request that the challenge was made from"),
        ("proof", "what vtpm-group-enroll GROUP --challenge wrote"),
        ("kept", "what challenge --keep wrote"),
    ):
        parser.add_argument(name, metavar=name.upper(), help=text)
    parser.add_argument("--ca-key", required=True, metavar="PEM", help="the verifier's authority: private key")
    parser.add_argument("--ca-cert", required=True, metavar="PEM", help="and its certificate")
    parser.add_argument("--days", type=_days, default=_DAYS, help=f"how long it is valid (default: {_DAYS})")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the certificate")
    return parser


def _new_ca_parser() -> argparse.ArgumentParser:
    parser = _parser(_new_ca, "vtpm-check-quote new-ca", "Make an authority for attestation keys (P-256).")
    parser.add_argument("key", metavar="KEY", help="a new file for the private key (mode 0600, no passphrase)")
    parser.add_argument("certificate", metavar="CERTIFICATE", help="a new file for its certificate")
    parser.add_argument("--name", type=_common_name, default="vTPM attestation authority", help="the name in it")
    parser.add_argument("--days", type=_days, default=_YEARS, help=f"how long it is valid (default: {_YEARS})")
    return parser


_PARSERS: Final = {"challenge": _challenge_parser, "certify": _certify_parser, "new-ca": _new_ca_parser}


@whole
def main(argv: Sequence[str] | None = None) -> int:
    """Run `vtpm-check-quote`. Returns an ExitCode; argparse itself exits with 2 for wrong usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb = words[0] if words else ""
    parser = _PARSERS[verb]() if verb in _PARSERS else _judge_parser()
    options = parsed(parser, words[1:] if verb in _PARSERS else words)
    try:
        code: int = options.call(options)
    except ManagerError as error:
        if options.json:
            print(json.dumps({"schema": JSON_SCHEMA, "error": str(error), "code": int(error.code)}))
        else:
            print(f"{parser.prog}: {error}", file=sys.stderr)
        return int(error.code)
    return code


if __name__ == "__main__":
    sys.exit(main())
