"""Judges a deep quote off line: one line for each thing that is checked, or could not be. Needs no TPM.

What each check means for the trust in a vTPM is in docs/attestation.md, by the same names.
"""

import hashlib
import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from frontend_backend.deep_quote import Evidence, bits
from frontend_backend.errors import MessageError
from frontend_backend.tpmhdr import TpmFamily
from manager.attest_bundle import Bundle
from manager.attest_certificate import AkCertificate
from manager.attest_policy import PcrPolicy
from manager.attest_wire import (
    AK_ATTRIBUTES,
    RH_ENDORSEMENT,
    RH_NULL,
    VTPM_KEY_ATTRIBUTES,
    KeyPublic,
    QuoteAttest,
    ak_policy,
    p256_area,
    pcr_digest,
    qualified_name,
    verify,
)
from manager.event_log import read_log, replay
from manager.policy_digests import ALG_SHA256


class Verdict(StrEnum):
    """What became of a check."""

    OK = "ok"
    FAILED = "failed"
    NOT_CHECKED = "not checked"


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was checked, and why it is as it is."""

    name: str
    verdict: Verdict
    text: str


@dataclass(frozen=True, slots=True)
class Expected:
    """What a verifier holds against a bundle. `ak` is a certificate, or a bare key that he trusts for other reasons."""

    ak: AkCertificate | ec.EllipticCurvePublicKey
    nonce: bytes
    moment: datetime
    vtpm: UUID | None = None
    group: UUID | None = None
    authorities: Sequence[x509.Certificate] = ()
    policy: PcrPolicy = field(default_factory=PcrPolicy)
    event_log: bytes | None = None  # what vtpm-event-log wrote


@dataclass(frozen=True, slots=True)
class Judgement:
    """All checks, and what the bundle says if it could be read; nothing of it counts unless `holds`."""

    checks: tuple[Check, ...]
    says: dict[str, Any]

    @property
    def holds(self) -> bool:
        """Whether no check failed."""
        return all(check.verdict is not Verdict.FAILED for check in self.checks)


_NONE: Final = "nothing was given to compare it with"


def judge(untrusted: bytes, expected: Expected) -> Judgement:
    """Check a bundle in every respect that `expected` allows."""
    checks = _Checks()
    bundle = checks.parsed("bundle", "can be read, and has one encoding", lambda: Bundle.unpack(untrusted))
    if bundle is None:
        return Judgement(tuple(checks.done), {})
    quote = checks.parsed(
        "hardware quote", "is a quote made by a TPM", lambda: QuoteAttest.unpack(bundle.hardware.attest)
    )
    if quote is None:
        return Judgement(tuple(checks.done), {})
    _check_key(checks, expected, bundle)
    _check_hardware(checks, expected, bundle, quote)
    _check_statement(checks, expected, bundle)
    _check_evidence(checks, expected, bundle.evidence)
    _check_boot(checks, expected, bundle)
    return Judgement(tuple(checks.done), _says(bundle, quote))


class _Checks:
    """Collects verdicts."""

    def __init__(self) -> None:
        self.done: list[Check] = []

    def parsed(self, name: str, text: str, parse: Callable[[], Any]) -> Any:
        """Return what `parse` returns, None (and a failed check) where it raises MessageError."""
        try:
            found = parse()
        except MessageError as error:
            self.done.append(Check(name, Verdict.FAILED, str(error)))
            return None
        self.done.append(Check(name, Verdict.OK, text))
        return found

    def passes(self, name: str, text: str, test: Callable[[], None]) -> None:
        """Note whether `test` raises MessageError."""
        self.parsed(name, text, test)

    def that(self, name: str, holds: bool, text: str, otherwise: str) -> None:
        """Note a verdict."""
        self.done.append(Check(name, Verdict.OK if holds else Verdict.FAILED, text if holds else otherwise))

    def skipped(self, name: str, why: str) -> None:
        """Note what could not be checked."""
        self.done.append(Check(name, Verdict.NOT_CHECKED, why))


def _check_key(checks: _Checks, expected: Expected, bundle: Bundle) -> None:
    group, ak = expected.group, expected.ak
    if isinstance(ak, AkCertificate):
        problem = ak.problem(expected.authorities, expected.moment)
        issued = " and issued by an authority that was given" if expected.authorities else ""
        checks.that(
            "attestation key", problem is None, f"its certificate is in date{issued}", f"certificate: {problem}"
        )
        if not expected.authorities:
            checks.skipped(
                "attestation key's issuer", "no authorities were given: anybody can have made the certificate"
            )
        stored = ak.store == bundle.statement.store
        checks.that(
            "store", stored, "is the one that the key was certified for", f"{bundle.statement.store}, not {ak.store}"
        )
        group = group or ak.group
        if group != ak.group:
            checks.that("certificate", False, "", f"the key was certified for group {ak.group}, not {group}")
    else:
        checks.skipped("attestation key", "a bare key was given: whose it is, only who gave it knows")
        checks.skipped("store", _NONE)
    if group is None:
        checks.skipped("group", _NONE)
    else:
        found = bundle.statement.group
        checks.that("group", found == group, "is the one that the key was certified for", f"{found}, not {group}")


def _check_hardware(checks: _Checks, expected: Expected, bundle: Bundle, quote: QuoteAttest) -> None:
    key = expected.ak.key if isinstance(expected.ak, AkCertificate) else expected.ak
    signature, attest = bundle.hardware.signature, bundle.hardware.attest
    checks.passes("hardware signature", "is the attestation key's", lambda: verify(signature, attest, key))
    name = ALG_SHA256.to_bytes(2) + hashlib.sha256(p256_area(AK_ATTRIBUTES, ak_policy(), key)).digest()
    checks.that(
        "key's attributes",
        quote.signer == qualified_name(RH_ENDORSEMENT, name),
        "restricted, endorsement hierarchy, usable at locality 2 only",
        "the signing key is not a restricted key of the endorsement hierarchy for locality 2 only",
    )
    bound = hmac.compare_digest(quote.extra, bundle.statement.digest())
    checks.that("statement", bound, "is what the hardware TPM signed for", "is not what the hardware TPM signed for")
    values = bundle.hardware.values
    same = quote.selection == bundle.hardware.selection and quote.pcr_digest == pcr_digest(values)
    checks.that("hardware PCRs", same, "have the values that were signed", "are not those that were signed")
    _check_policy(checks, "hardware PCR policy", expected.policy.hardware, bundle.hardware.selection, values)


def _check_statement(checks: _Checks, expected: Expected, bundle: Bundle) -> None:
    statement = bundle.statement
    fresh = hmac.compare_digest(statement.nonce, expected.nonce)
    checks.that("nonce", fresh, "is the one that was asked with", "is another: an old quote, or one for somebody else")
    if expected.vtpm is None:
        checks.skipped("vTPM", _NONE)
    else:
        checks.that(
            "vTPM", statement.vtpm == expected.vtpm, "is the wanted one", f"{statement.vtpm}, not {expected.vtpm}"
        )
    digest = hashlib.sha256(bundle.evidence.pack()).digest()
    checks.that(
        "evidence",
        hmac.compare_digest(digest, statement.evidence),
        "is what the statement names",
        "is not what the statement names",
    )


def _check_evidence(checks: _Checks, expected: Expected, evidence: Evidence) -> None:
    policy = expected.policy.vtpm
    if evidence.family is TpmFamily.TPM_1_2:
        checks.skipped("vTPM quote", "a TPM 1.2 signs none: its PCRs are what its instance told the manager")
        _check_policy(checks, "vTPM PCR policy", policy, evidence.selection, evidence.values)
        return
    quote = checks.parsed("vTPM quote", "is a quote made by a TPM", lambda: QuoteAttest.unpack(evidence.attest))
    key = checks.parsed("vTPM key", "can be read", lambda: _vtpm_key(evidence))
    if quote is None or key is None:
        return
    checks.passes("vTPM signature", "is the vTPM key's", lambda: verify(evidence.signature, evidence.attest, key.point))
    checks.that(
        "vTPM key's attributes",
        quote.signer == qualified_name(RH_NULL, key.name),
        "restricted, made by the vTPM for this run",
        "is not a restricted key of the vTPM's NULL hierarchy",
    )
    fresh = hmac.compare_digest(quote.extra, expected.nonce)
    checks.that("vTPM nonce", fresh, "is the one that was asked with", "is another")
    same = quote.selection == evidence.selection and quote.pcr_digest == pcr_digest(evidence.values)
    checks.that("vTPM PCRs", same, "have the values that were signed", "are not those that were signed")
    _check_policy(checks, "vTPM PCR policy", policy, evidence.selection, evidence.values)


def _vtpm_key(evidence: Evidence) -> KeyPublic:
    key = KeyPublic.unpack(evidence.public)
    if key.attributes != VTPM_KEY_ATTRIBUTES or key.auth_policy:
        raise MessageError(f"a key with attributes 0x{key.attributes:08x}, which is not made for quotes")
    return key


def _check_policy(
    checks: _Checks, name: str, allowed: Mapping[int, tuple[bytes, ...]], selection: int, values: tuple[bytes, ...]
) -> None:
    if not allowed:
        checks.skipped(name, "no values were given to compare with")
        return
    present = dict(zip(bits(selection), values, strict=True))
    wrong = [pcr for pcr in sorted(allowed) if present.get(pcr) not in allowed[pcr]]
    told = "; ".join(f"PCR {pcr} is {present[pcr].hex() if pcr in present else 'not quoted'}" for pcr in wrong)
    checks.that(name, not wrong, f"holds for PCRs {', '.join(map(str, sorted(allowed)))}", told)


def _check_boot(checks: _Checks, expected: Expected, bundle: Bundle) -> None:
    """Look at how far the vTPM's PCRs tell what its guest was started with."""
    statement, log = bundle.statement, expected.event_log
    if statement.late is not None:
        # no failure: PCRs that software of the running guest extends still mean what it says of them
        text = "the guest ran before it had this vTPM: its PCRs say nothing of how it was started"
        verdict = Verdict.NOT_CHECKED if statement.late else Verdict.OK
        checks.done.append(Check("attach", verdict, text if statement.late else "before the guest ran"))
    elif statement.event_log:
        checks.skipped("attach", "whether the guest ran before it had this vTPM is not known")
    if log is None:
        if statement.event_log:
            checks.skipped("boot", "was measured; no event log was given (vtpm-event-log -o FILE)")
        return
    same = hmac.compare_digest(hashlib.sha256(log).digest(), statement.event_log or bytes(32))
    other = "is another" if statement.event_log else "the boot was not measured"
    checks.that("event log", same, "is the one that the statement names", other)
    if same:
        _check_replay(checks, bundle.evidence, log)


def _check_replay(checks: _Checks, evidence: Evidence, log: bytes) -> None:
    """Compare the quoted PCRs with what comes of an event log."""
    present = dict(zip(bits(evidence.selection), evidence.values, strict=True))
    try:
        wanted = replay(read_log(log), "sha1" if evidence.family is TpmFamily.TPM_1_2 else "sha256")
    except MessageError as error:
        checks.that("boot", False, "", str(error))
        return
    absent = [str(pcr) for pcr in sorted(wanted) if pcr not in present]
    if absent:
        checks.skipped("boot", f"PCR {' and '.join(absent)} was not quoted, so the event log cannot be compared")
        return
    wrong = [str(pcr) for pcr in sorted(wanted) if present[pcr] != wanted[pcr]]
    told = f"PCR {' and '.join(wrong)} is not what comes of the event log: something else extended it, too"
    checks.that("boot", not wrong, f"PCR {' and '.join(map(str, sorted(wanted)))} is what the event log says", told)


def _says(bundle: Bundle, quote: QuoteAttest) -> dict[str, Any]:
    """Return what a bundle says, for showing."""
    statement, evidence = bundle.statement, bundle.evidence
    return {
        "vtpm": str(statement.vtpm),
        "group": str(statement.group),
        "store": str(statement.store),
        "tpm": evidence.family.value,
        "guest": statement.guest,
        "frontend": statement.frontend,
        "startup": statement.startup,
        "hwinitpcrs": statement.hw_pcrs or None,
        "late_attach": statement.late,
        "boot_measured": bool(statement.event_log),
        "for_guest": statement.for_guest,
        "approval": statement.approval,
        "generation": statement.generation,
        "manager": statement.manager,
        "emulator": evidence.emulator,
        "clock_ms": quote.clock,
        "reset_count": quote.reset_count,
        "restart_count": quote.restart_count,
        "clock_safe": quote.safe,
        "firmware": f"0x{quote.firmware:016x}",
        "hardware_pcrs": _shown(bundle.hardware.selection, bundle.hardware.values),
        "vtpm_pcrs": _shown(evidence.selection, evidence.values),
    }


def _shown(selection: int, values: tuple[bytes, ...]) -> dict[str, str]:
    return {str(pcr): value.hex() for pcr, value in zip(bits(selection), values, strict=True)}
