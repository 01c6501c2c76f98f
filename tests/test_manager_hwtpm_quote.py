"""Attestation keys against a real swtpm: what they can be used for, by whom, and what happens on another TPM."""

import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attestation_rig import certified_swtpm
from fixtures_tpm import SwtpmProcess, recorded_bus, running_swtpm
from tpm2_pytss import (
    ESYS_TR,
    TPM2_ALG,
    TPM2_RH,
    TPM2_ST,
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_PUBLIC,
    TPMA_LOCALITY,
    TPML_DIGEST,
    TPMT_SIG_SCHEME,
    TPMT_TK_HASHCHECK,
    TSS2_Exception,
)

from frontend_backend.errors import MessageError
from manager.attest_credential import make_credential
from manager.attest_errors import AttestationKeyChanged, CredentialRefused, EndorsementAuthWanted
from manager.attest_wire import (
    ALG_ECC,
    ALG_RSA,
    RH_ENDORSEMENT,
    KeyPublic,
    QuoteAttest,
    ak_branches,
    ak_policy,
    pcr_digest,
    qualified_name,
    verify,
)
from manager.attestation import key_of, without_a_strangers
from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import TpmError, WrongLocality
from manager.hwtpm_link import TpmLink
from manager.hwtpm_quote import AttestationKey
from manager.hwtpm_records import SealedBlob
from manager.keys import GroupSeal
from manager.policy import SealPolicy

QUALIFYING = b"q" * 32


@pytest.fixture(scope="module")
def swtpm() -> Iterator[SwtpmProcess]:
    with running_swtpm() as process:
        yield process


@pytest.fixture
def tpm(swtpm: SwtpmProcess) -> Iterator[HardwareTpm]:
    with HardwareTpm.open(swtpm.setting) as opened:
        opened.provision_srk()
        yield opened


def test_a_quote_is_by_the_key_over_the_values_and_tells_the_true_counters(tpm: HardwareTpm) -> None:
    key = tpm.attester.new_key()
    made = tpm.attester.quote(key, 0b10000101, QUALIFYING)
    verify(made.signature, made.attest, key.public.point)
    quote = QuoteAttest.unpack(made.attest)
    assert (quote.extra, quote.selection, quote.pcr_digest) == (QUALIFYING, 0b10000101, pcr_digest(made.values))
    assert quote.signer == qualified_name(RH_ENDORSEMENT, key.public.name)
    clock = tpm.clock()
    assert (quote.reset_count, quote.restart_count) == (clock.reset_count, clock.restart_count)
    assert key.public.auth_policy == ak_policy()
    with pytest.raises(MessageError):
        verify(made.signature, made.attest, tpm.attester.new_key().public.point)


def test_a_quote_touches_no_pcr_and_leaves_nothing_in_the_tpm(tpm: HardwareTpm) -> None:
    key, before = tpm.attester.new_key(), tpm.pcr_read(range(24))
    tpm.attester.endorsement()
    for _ in range(3):
        tpm.attester.quote(key, (1 << 24) - 1, QUALIFYING)
    assert tpm.pcr_read(range(24)) == before
    assert tpm.transient_handles() == ()


def test_the_key_comes_back_from_its_record_until_the_tpm_is_another(tpm: HardwareTpm) -> None:
    key = tpm.attester.new_key()
    again = AttestationKey.from_json(key.to_json())
    assert (again.seed, again.public.area) == (key.seed, key.public.area)
    assert tpm.attester.is_ours(again)
    assert key.seed.hex() not in repr(key)
    with running_swtpm() as other, HardwareTpm.open(other.setting) as another:
        another.provision_srk()
        assert not another.attester.is_ours(key)
        with pytest.raises(AttestationKeyChanged, match="another TPM"):
            another.attester.quote(key, 1, QUALIFYING)


def test_a_recovery_keeps_a_key_that_its_tpm_makes_and_drops_a_strangers(tpm: HardwareTpm) -> None:
    seal = GroupSeal("g", SealedBlob(b"", b"", SealPolicy.build()), b"", ak=tpm.attester.new_key().to_json())
    assert without_a_strangers(tpm, seal) is seal
    assert without_a_strangers(tpm, replace(seal, ak=None)).ak is None
    with running_swtpm() as other, HardwareTpm.open(other.setting) as another:
        another.provision_srk()
        assert without_a_strangers(another, seal) == replace(seal, ak=None)
    with running_swtpm() as other:
        other.tool("tpm2_changeauth", "-c", "e", "somebody's")
        with HardwareTpm.open(other.setting) as another:  # cannot tell whose key it is: no reason not to recover
            another.provision_srk()
            assert without_a_strangers(another, seal) is seal
            with pytest.raises(EndorsementAuthWanted):
                another.attester.quote(key_of(seal), 1, QUALIFYING)
    unreadable = replace(seal, ak={"version": 7})
    assert without_a_strangers(tpm, unreadable) == replace(seal, ak=None)


@pytest.mark.parametrize("change", [{"version": 2}, {"seed": "zz"}, {"public": "00"}, {"public": 7}])
def test_a_record_that_is_no_key_is_refused(tpm: HardwareTpm, change: dict[str, object]) -> None:
    with pytest.raises(AttestationKeyChanged):
        AttestationKey.from_json(tpm.attester.new_key().to_json() | change)


def test_the_saved_context_is_done_without_after_a_reset_and_the_key_stays() -> None:
    with running_swtpm() as swtpm:
        with HardwareTpm.open(swtpm.setting) as tpm:
            tpm.provision_srk()
            key = tpm.attester.new_key()
            first = QuoteAttest.unpack(tpm.attester.quote(key, 1, QUALIFYING).attest)
            swtpm.stop()
            swtpm.start()
            with pytest.raises(TpmError):
                tpm.clock()  # notices that the connection is gone
            second = tpm.attester.quote(key, 1, QUALIFYING)
            verify(second.signature, second.attest, key.public.point)
            assert QuoteAttest.unpack(second.attest).reset_count == first.reset_count + 1
        swtpm.tool("tpm2_clear", "-c", "p")
        with HardwareTpm.open(swtpm.setting) as tpm:
            tpm.provision_srk()
            assert tpm.attester.is_ours(key)  # TPM2_Clear leaves the endorsement hierarchy's seed


def raw(tpm: HardwareTpm) -> TpmLink:
    return tpm._link


def quote_branch(esapi: Any, session: Any) -> None:
    esapi.policy_locality(session, TPMA_LOCALITY.TWO)
    esapi.policy_or(session, TPML_DIGEST(list(ak_branches())))


@pytest.mark.parametrize(("locality", "code"), [(0, 0x907), (2, 0)])
def test_the_key_is_of_no_use_at_locality_0(tpm: HardwareTpm, locality: int, code: int) -> None:
    key = tpm.attester.new_key()

    def quote_at(number: int) -> int:
        link, attester = raw(tpm), tpm.attester
        with (
            link.operation("try", locality=2) as esapi,
            attester._loaded(esapi, key) as handle,
            link.session(esapi, ESYS_TR.NONE, policy=True) as session,
        ):
            quote_branch(esapi, session)
            link._be_at(number, 10)
            try:
                esapi.quote(handle, "sha256:1", QUALIFYING, session1=session)
            except TSS2_Exception as error:
                return int(error.rc)
        return 0

    assert quote_at(locality) == code


def test_a_password_opens_nothing_and_no_digest_from_outside_is_signed(tpm: HardwareTpm) -> None:
    key, link = tpm.attester.new_key(), raw(tpm)
    with link.operation("try") as esapi, tpm.attester._loaded(esapi, key) as handle:
        with pytest.raises(TSS2_Exception) as refused:
            esapi.quote(handle, "sha256:1", QUALIFYING)
        assert int(refused.value.rc) == 0x12F

        ticket = TPMT_TK_HASHCHECK(tag=TPM2_ST.HASHCHECK, hierarchy=TPM2_RH.NULL)
        with link.session(esapi, ESYS_TR.NONE, policy=True) as session:
            quote_branch(esapi, session)
            with pytest.raises(TSS2_Exception) as refused:
                esapi.sign(handle, b"f" * 32, TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL), ticket, session1=session)
        assert int(refused.value.rc) == 0x3E0


def test_the_branch_for_quotes_activates_no_credential(tpm: HardwareTpm) -> None:
    key, endorsement, link = tpm.attester.new_key(), tpm.attester.endorsement(), raw(tpm)
    credential = make_credential(endorsement.public, key.public.name, b"secret")

    parts = TPM2B_ID_OBJECT(credential[0]), TPM2B_ENCRYPTED_SECRET(credential[1])
    with (
        link.operation("try") as esapi,
        tpm.attester._endorsement_key(esapi) as (ek, _, _),
        tpm.attester._loaded(esapi, key) as handle,
        link.session(esapi, ESYS_TR.NONE, policy=True) as theirs,
        link.session(esapi, ESYS_TR.NONE, policy=True) as ours,
    ):
        esapi.policy_secret(ESYS_TR.ENDORSEMENT, theirs, expiration=0)
        quote_branch(esapi, ours)
        with pytest.raises(TSS2_Exception) as refused:
            esapi.activate_credential(handle, ek, *parts, session1=ours, session2=theirs)
    assert int(refused.value.rc) == 0x99D


def test_without_locality_2_there_are_no_quotes(swtpm: SwtpmProcess) -> None:
    with HardwareTpm.open(swtpm.setting, locality=0) as tpm:
        tpm.provision_srk()
        with pytest.raises(WrongLocality, match="locality 2 only"):
            tpm.attester.new_key()


@pytest.mark.parametrize("size", [1, 16, 32])
def test_a_credential_made_in_software_opens_in_the_tpm(tpm: HardwareTpm, size: int) -> None:
    key, endorsement = tpm.attester.new_key(), tpm.attester.endorsement()
    assert (endorsement.public.kind, endorsement.certificate) == (ALG_ECC, b"")
    secret = os.urandom(size)
    assert tpm.attester.activate(key, *make_credential(endorsement.public, key.public.name, secret)) == secret
    assert tpm.transient_handles() == ()


def test_an_altered_credential_or_one_for_another_key_is_refused(tpm: HardwareTpm) -> None:
    key, endorsement = tpm.attester.new_key(), tpm.attester.endorsement()
    identity, seed = make_credential(endorsement.public, key.public.name, b"secret")
    for position in range(0, len(identity), 7):
        with pytest.raises(CredentialRefused):
            tpm.attester.activate(key, turned(identity, position), seed)
    for position in (0, 1, 2, 30, 40, 60):
        with pytest.raises(CredentialRefused):
            tpm.attester.activate(key, identity, turned(seed, position))
    other = tpm.attester.new_key()
    with pytest.raises(CredentialRefused) as refused:
        tpm.attester.activate(other, identity, seed)
    assert isinstance(refused.value.__cause__, TSS2_Exception)
    assert int(refused.value.__cause__.rc) == 0x1DF
    assert tpm.transient_handles() == ()


def turned(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def test_a_certified_rsa_endorsement_key_is_taken_and_its_password_wanted(tmp_path: Path) -> None:
    with certified_swtpm(tmp_path) as (swtpm, _):
        with HardwareTpm.open(swtpm.setting) as tpm:
            tpm.provision_srk()
            key, endorsement = tpm.attester.new_key(), tpm.attester.endorsement()
            assert endorsement.public.kind == ALG_RSA
            assert endorsement.certificate[:2] == b"\x30\x82"
            identity, seed = make_credential(endorsement.public, key.public.name, b"s" * 32)
            assert tpm.attester.activate(key, identity, seed) == b"s" * 32
            for position in (0, 100, 255):  # libtpms answers TPM_RC_FAILURE to these, and goes on
                with pytest.raises(CredentialRefused):
                    tpm.attester.activate(key, identity, turned(seed, position))
        swtpm.tool("tpm2_changeauth", "-c", "e", "password")
        with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
            tpm.provision_srk()
            for use in (tpm.attester.new_key, tpm.attester.endorsement, lambda: tpm.attester.is_ours(key)):
                with pytest.raises(EndorsementAuthWanted):
                    use()
            tpm.use_hierarchy_auths(b"", b"password")
            assert tpm.attester.is_ours(key)
            assert tpm.attester.activate(key, identity, seed) == b"s" * 32
            assert not bus.saw(b"password")
            assert not bus.saw(b"s" * 32)


def test_a_public_area_is_named_as_the_tss_names_it(tpm: HardwareTpm) -> None:
    for public in (tpm.attester.new_key().public, tpm.attester.endorsement().public):
        marshalled = struct.pack(">H", len(public.area)) + public.area
        assert public.name == bytes(TPM2B_PUBLIC.unmarshal(marshalled)[0].get_name())


def test_a_public_area_cut_short_or_longer_is_refused(tpm: HardwareTpm) -> None:
    area = tpm.attester.new_key().public.area
    for position in range(len(area)):
        with pytest.raises(MessageError):
            KeyPublic.unpack(area[:position])
    with pytest.raises(MessageError):
        KeyPublic.unpack(area + b"\0")
