"""Judging bundles: made by a real hardware TPM and a real vTPM, then altered in every way there is."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from uuid import UUID, uuid4

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from fixtures_tpm import running_swtpm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frontend_backend.deep_quote import Evidence
from frontend_backend.errors import MessageError
from frontend_backend.measurements import Measurement
from frontend_backend.tpmhdr import TpmFamily
from manager.attest_bundle import MAX_BUNDLE, Bundle, HardwareQuote, Statement
from manager.attest_certificate import AkCertificate, new_authority, read_certificates, read_signing_key
from manager.attest_check import Expected, Judgement, Verdict, judge
from manager.attest_errors import DocumentUnreadable
from manager.attest_policy import PcrPolicy
from manager.attest_wire import QuoteAttest, verify
from manager.event_log import event_log
from manager.hwtpm import HardwareTpm
from manager.hwtpm_quote import AttestationKey, Attester
from vtpm_instance import tpm_commands
from vtpm_instance.evidence import gather
from vtpm_instance.hardware_pcrs import measure
from vtpm_instance.libtpms import the_tpm

NONCE = b"the verifier's nonce"
GROUP, STORE, VTPM = uuid4(), uuid4(), uuid4()


@dataclass
class Made:
    """A hardware TPM with an enrolled key, and what it signed."""

    attester: Attester
    key: AttestationKey
    certificate: AkCertificate
    authority: x509.Certificate
    evidence: Evidence
    old: Evidence

    def bundle(self, *, evidence: Evidence | None = None, digest: bytes | None = None, **changes: object) -> Bundle:
        """Have the hardware TPM sign a statement, changed as wanted."""
        evidence = evidence or self.evidence
        said = replace(statement(evidence), **changes)  # type: ignore[arg-type]
        return Bundle(said, evidence, self.attester.quote(self.key, 0xFF, digest or said.digest()))

    def expected(self, **changes: object) -> Expected:
        plain = Expected(self.certificate, NONCE, datetime.now(UTC), VTPM, None, (self.authority,))
        return replace(plain, **changes)  # type: ignore[arg-type]


def statement(evidence: Evidence) -> Statement:
    return Statement(
        nonce=NONCE,
        vtpm=VTPM,
        group=GROUP,
        store=STORE,
        approval=3,
        generation=7,
        for_guest=False,
        guest="customer",
        frontend="socket",
        startup="clear",
        hw_pcrs="0,2,7",
        manager="vtpm-manager 0.1.0",
        evidence=sha256(evidence.pack()).digest(),
    )


def evidence_of(family: TpmFamily) -> Evidence:
    emulator = the_tpm()
    emulator.start(family, {}, fresh=True)
    try:
        emulator.process(tpm_commands.startup(family, tpm_commands.Startup.CLEAR))
        return gather(emulator.process, family, NONCE, 0x8003FF, "libtpms 0.9.2")
    finally:
        emulator.terminate()


@pytest.fixture(scope="module")
def made() -> Iterator[Made]:
    private, certificate = new_authority("test", 10)
    authority = read_certificates(certificate, "test")[0]
    with running_swtpm() as swtpm, HardwareTpm.open(swtpm.setting) as tpm:
        tpm.provision_srk()
        key = tpm.attester.new_key()
        signing = read_signing_key(private, "test")
        issued = AkCertificate.issue(key.public.point, (GROUP, STORE), authority, signing, 5)
        evidences = evidence_of(TpmFamily.TPM_2_0), evidence_of(TpmFamily.TPM_1_2)
        yield Made(tpm.attester, key, AkCertificate.read(issued.certificate), authority, *evidences)


def failed(judgement: Judgement) -> set[str]:
    assert judgement.holds == all(check.verdict is not Verdict.FAILED for check in judgement.checks)
    return {check.name for check in judgement.checks if check.verdict is Verdict.FAILED}


def test_what_was_made_so_holds(made: Made) -> None:
    bundle = made.bundle()
    judgement = judge(bundle.pack(), made.expected())
    assert failed(judgement) == set()
    assert Bundle.unpack(bundle.pack()) == bundle
    assert judgement.says["approval"] == 3
    assert failed(judge(made.bundle(evidence=made.old).pack(), made.expected())) == set()
    bare = judge(bundle.pack(), made.expected(ak=made.key.public.point))
    assert failed(bare) == set()
    skipped = {check.name for check in bare.checks if check.verdict is Verdict.NOT_CHECKED}
    assert {"attestation key", "store", "group"} <= skipped


@pytest.mark.parametrize("family", list(TpmFamily))
def test_every_change_of_a_single_byte_is_refused(made: Made, family: TpmFamily) -> None:
    whole = made.bundle(evidence=made.evidence if family is TpmFamily.TPM_2_0 else made.old).pack()
    expected = made.expected(vtpm=None, ak=made.key.public.point)  # with nothing but the key and the nonce
    assert judge(whole, expected).holds
    for position in range(len(whole)):
        for bit in (0, 3, 7):
            changed = bytearray(whole)
            changed[position] ^= 1 << bit
            assert not judge(bytes(changed), expected).holds, (position, bit)
        assert not judge(whole[:position], expected).holds
        assert not judge(whole[:position] + b"\0" + whole[position:], expected).holds
    assert not judge(whole + b"\0", expected).holds


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_bytes_put_in_anywhere_are_refused_without_a_crash(made: Made, data: st.DataObject) -> None:
    whole = _whole(made)
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 80)))
    changed = whole[:start] + data.draw(st.binary(max_size=80)) + whole[end:]
    assert judge(changed, made.expected(vtpm=None)).holds == (changed == whole)


_cached: list[bytes] = []


def _whole(made: Made) -> bytes:
    if not _cached:
        _cached.append(made.bundle().pack())
    return _cached[0]


@given(st.binary(max_size=400))
def test_hostile_bytes_are_no_attestation(data: bytes) -> None:
    for start in (b"", b"\xffTCG\x80\x18"):
        with pytest.raises(MessageError):
            QuoteAttest.unpack(start + data)


def test_an_old_quote_and_one_of_another_are_refused(made: Made) -> None:
    whole = made.bundle().pack()
    assert failed(judge(whole, made.expected(nonce=b"another"))) == {"nonce", "vTPM nonce"}
    assert failed(judge(whole, made.expected(vtpm=uuid4()))) == {"vTPM"}
    assert failed(judge(whole, made.expected(group=uuid4()))) == {"certificate", "group"}
    another = made.attester.new_key()
    wrong = failed(judge(whole, made.expected(ak=another.public.point)))
    assert wrong == {"hardware signature", "key's attributes"}


def test_a_statement_of_another_group_or_store_by_the_same_key_is_refused(made: Made) -> None:
    assert failed(judge(made.bundle(group=uuid4()).pack(), made.expected())) == {"group"}
    assert failed(judge(made.bundle(store=uuid4()).pack(), made.expected())) == {"store"}


def test_parts_of_two_quotes_do_not_make_one(made: Made) -> None:
    one, two = made.bundle(), made.bundle(vtpm=UUID(int=5), evidence=evidence_of(TpmFamily.TPM_2_0))
    expected = made.expected(vtpm=None)
    assert failed(judge(replace(one, statement=two.statement).pack(), expected)) == {"statement", "evidence"}
    assert failed(judge(replace(one, hardware=two.hardware).pack(), expected)) == {"statement"}
    assert failed(judge(replace(one, evidence=two.evidence).pack(), expected)) == {"evidence"}
    mixed = replace(one.hardware, attest=two.hardware.attest)
    assert "hardware signature" in failed(judge(replace(one, hardware=mixed).pack(), expected))
    wrong_values = replace(one.hardware, values=(b"\1" * 32, *one.hardware.values[1:]))
    assert failed(judge(replace(one, hardware=wrong_values).pack(), expected)) == {"hardware PCRs"}
    fewer = replace(one.hardware, selection=0x7F, values=one.hardware.values[:7])
    assert failed(judge(replace(one, hardware=fewer).pack(), expected)) == {"hardware PCRs"}


def test_values_are_not_taken_for_other_pcrs(made: Made) -> None:
    bundle = made.bundle()
    moved = replace(bundle.hardware, selection=bundle.hardware.selection << 8)
    assert failed(judge(replace(bundle, hardware=moved).pack(), made.expected())) == {"hardware PCRs"}
    shifted = replace(made.evidence, selection=(made.evidence.selection & ~(1 << 23)) | 1 << 22)
    assert shifted.selection.bit_count() == len(made.evidence.values)
    assert failed(judge(made.bundle(evidence=shifted).pack(), made.expected())) == {"vTPM PCRs"}


def test_evidence_whose_quote_is_not_its_own_is_refused(made: Made) -> None:
    other = evidence_of(TpmFamily.TPM_2_0)
    expected = made.expected()
    for part, wrong in (
        ("public", {"vTPM signature", "vTPM key's attributes"}),
        ("signature", {"vTPM signature"}),
        ("attest", {"vTPM signature", "vTPM key's attributes"}),
    ):
        mixed = replace(made.evidence, **{part: getattr(other, part)})
        assert failed(judge(made.bundle(evidence=mixed).pack(), expected)) == wrong
    values = (b"\1" * 32, *made.evidence.values[1:])
    assert failed(judge(made.bundle(evidence=replace(made.evidence, values=values)).pack(), expected)) == {"vTPM PCRs"}
    quoted = replace(made.evidence, attest=b"\xffTCG" + b"\x80\x17" + made.evidence.attest[6:])
    assert failed(judge(made.bundle(evidence=quoted).pack(), expected)) == {"vTPM quote"}
    # the hardware's key cannot pose as a vTPM's
    posing = replace(made.evidence, public=made.key.public.area)
    assert "vTPM key" in failed(judge(made.bundle(evidence=posing).pack(), expected))


def test_a_key_that_is_not_for_locality_2_only_is_refused(made: Made) -> None:
    soft = ec.generate_private_key(ec.SECP256R1())  # a key outside any TPM that signs what a TPM would have
    bundle = made.bundle()
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    r, s = decode_dss_signature(soft.sign(bundle.hardware.attest, ec.ECDSA(hashes.SHA256())))
    signature = b"\0\x18\0\x0b" + b"".join(b"\0\x20" + number.to_bytes(32) for number in (r, s))
    verify(signature, bundle.hardware.attest, soft.public_key())
    forged = replace(bundle, hardware=replace(bundle.hardware, signature=signature))
    assert failed(judge(forged.pack(), made.expected(ak=soft.public_key()))) == {"key's attributes"}


def test_pcr_policies_are_held_against_the_values(made: Made) -> None:
    whole = made.bundle().pack()
    ones = b"\xff" * 32
    for policy, wrong in (
        (PcrPolicy(hardware={0: (ones, bytes(32))}, vtpm={9: (bytes(32),)}), set()),
        (PcrPolicy(hardware={0: (ones,)}), {"hardware PCR policy"}),
        (PcrPolicy(hardware={8: (bytes(32),)}), {"hardware PCR policy"}),  # not quoted
        (PcrPolicy(vtpm={9: (ones,)}), {"vTPM PCR policy"}),
        (PcrPolicy(vtpm={17: (ones,)}), {"vTPM PCR policy"}),
    ):
        assert failed(judge(whole, made.expected(policy=policy))) == wrong
    old = made.bundle(evidence=made.old).pack()
    assert failed(judge(old, made.expected(policy=PcrPolicy(vtpm={9: (bytes(20),)})))) == set()
    assert failed(judge(old, made.expected(policy=PcrPolicy(vtpm={9: (ones,)})))) == {"vTPM PCR policy"}


@pytest.mark.parametrize(
    "wrong", [[], {"x": {}}, {"vtpm": {"24": ["00"]}}, {"vtpm": {"1": []}}, {"vtpm": {"1": ["zz"]}}, {"vtpm": 1}]
)
def test_a_pcr_policy_that_says_nothing_clear_is_refused(wrong: object) -> None:
    with pytest.raises(DocumentUnreadable) as refused:
        PcrPolicy.from_json(wrong)
    assert "object has no attribute" not in str(refused.value)


def test_a_certificate_out_of_date_or_by_somebody_else_fails(made: Made) -> None:
    whole = made.bundle().pack()
    for moment in (datetime.now(UTC) + timedelta(days=days) for days in (-1, 6)):
        assert failed(judge(whole, made.expected(moment=moment))) == {"attestation key"}
    _, certificate = new_authority("test", 10)
    stranger = read_certificates(certificate, "test")[0]
    assert failed(judge(whole, made.expected(authorities=(stranger,)))) == {"attestation key"}
    unchecked = judge(whole, made.expected(authorities=()))
    assert unchecked.holds
    verdicts = {check.name: check.verdict for check in unchecked.checks}
    assert verdicts["attestation key"] is Verdict.OK
    assert verdicts["attestation key's issuer"] is Verdict.NOT_CHECKED
    assert "attestation key's issuer" not in {check.name for check in judge(whole, made.expected()).checks}


def measured_boot(made: Made, *, late: bool | None = False, **changes: object) -> tuple[Bundle, bytes]:
    """A bundle of a vTPM whose PCRs 4 and 5 are what its boot's event log says, and the log."""
    boot = [Measurement.of(what, [what.encode()]) for what in ("kernel", "cmdline", "initrd")]
    log = event_log("2.0", boot)
    emulator = the_tpm()
    emulator.start(TpmFamily.TPM_2_0, {}, fresh=True)
    try:
        emulator.process(tpm_commands.startup(TpmFamily.TPM_2_0, tpm_commands.Startup.CLEAR))
        measure(emulator.process, TpmFamily.TPM_2_0, [one.pack() for one in boot])
        evidence = gather(emulator.process, TpmFamily.TPM_2_0, NONCE, 0x8003FF, "libtpms 0.9.2")
    finally:
        emulator.terminate()
    return made.bundle(evidence=evidence, late=late, event_log=sha256(log).digest(), **changes), log


def test_a_measured_boot_is_explained_by_its_log_and_by_no_other(made: Made) -> None:
    bundle, log = measured_boot(made)
    assert Bundle.unpack(bundle.pack()) == bundle
    judgement = judge(bundle.pack(), made.expected(event_log=log))
    assert failed(judgement) == set()
    assert {check.name: check.verdict for check in judgement.checks}.items() >= {
        ("attach", Verdict.OK),
        ("event log", Verdict.OK),
        ("boot", Verdict.OK),
    }
    assert (judgement.says["late_attach"], judgement.says["boot_measured"]) == (False, True)
    without = judge(bundle.pack(), made.expected())
    assert without.holds
    assert [check.verdict for check in without.checks if check.name == "boot"] == [Verdict.NOT_CHECKED]
    for altered in (log[:-1], log + b"\0", b"", log.replace(b"kernel", b"Kernel")):
        assert failed(judge(bundle.pack(), made.expected(event_log=altered))) == {"event log"}
    # the statement names the log, but the PCRs are another boot's: a vTPM that was attached without
    other = made.bundle(event_log=sha256(log).digest())
    assert failed(judge(other.pack(), made.expected(event_log=log))) == {"boot"}
    assert failed(judge(made.bundle().pack(), made.expected(event_log=log))) == {"event log"}


def test_a_late_attach_is_said_and_what_is_not_known_makes_the_bytes_of_before(made: Made) -> None:
    bundle, log = measured_boot(made, late=True)
    judgement = judge(bundle.pack(), made.expected(event_log=log))
    assert judgement.holds
    said = {check.name: check for check in judgement.checks}["attach"]
    assert (said.verdict, "ran before" in said.text) == (Verdict.NOT_CHECKED, True)
    plain = made.bundle().statement
    assert plain.pack()[16:18] == b"\0\1"
    assert "attach" not in {check.name for check in judge(made.bundle().pack(), made.expected()).checks}
    assert replace(plain, late=True).pack()[16:18] == b"\0\2"
    unknown, _ = measured_boot(made, late=None)
    said = {check.name: check for check in judge(unknown.pack(), made.expected()).checks}["attach"]
    assert (said.verdict, "not known" in said.text) == (Verdict.NOT_CHECKED, True)
    nothing = replace(plain, late=True).pack()[:-33] + bytes(33)
    for odd in (nothing, nothing[:-33] + b"\3" + bytes(32), plain.pack() + bytes(33)):
        with pytest.raises(MessageError):
            Statement.unpack(odd)


def test_the_longest_bundle_fits_an_answer_to_a_guest(made: Made) -> None:
    wide = Evidence(TpmFamily.TPM_2_0, "e" * 64, 0xFFFFFF, (bytes(32),) * 24, b"p" * 120, b"a" * 220, b"s" * 100)
    said = replace(
        statement(wide),
        nonce=b"n" * 64,
        guest="g" * 64,
        frontend="f" * 64,
        startup="s" * 64,
        hw_pcrs="h" * 64,
        manager="m" * 64,
        late=True,
        event_log=b"l" * 32,
    )
    quote = HardwareQuote(b"a" * 200, b"s" * 100, 0xFFFFFF, (bytes(32),) * 24)
    assert len(Bundle(said, wide, quote).pack()) <= MAX_BUNDLE
