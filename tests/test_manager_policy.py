import hashlib
import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from approval_rig import approve, target
from fixtures_tpm import running_swtpm
from hypothesis import given
from hypothesis import strategies as st
from tpm2_pytss import ESYS_TR, TPM2_CC, TPM2_EO, TPMA_LOCALITY, TPML_DIGEST

from manager import policy
from manager.approval_key import ApproverPrivate
from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import AnchorMissing, BadSetting, SealDamaged
from manager.hwtpm_records import AnchorInfo, SealedBlob
from manager.hwtpm_templates import recovery_key_template
from manager.policy import PcrBranch, PlainBranch, SealPolicy, SignedBranch, check_pcrs, parse_pcrs
from manager.recovery_key import RecoveryPrivate
from manager.revocation_writer import RevocationWriter
from storage.secrets import StoreKey

RECOVERY = RecoveryPrivate.new()
POINT = RECOVERY.public.signing_point
VALUES = {0: bytes(32), 2: b"\x02" * 32, 7: b"\x07" * 32}
POLICIES = {
    "plain": SealPolicy.build(),
    "plain without locality": SealPolicy.build(locality=None),
    "pcr": SealPolicy.build(pcrs=[VALUES]),
    "predicted": SealPolicy.build(pcrs=[VALUES, VALUES | {7: b"\x08" * 32}]),
    "recovery": SealPolicy.build(pcrs=[VALUES], recovery_point=POINT, reference=b"store"),
    "approver": SealPolicy.build(approver_point=POINT, recovery_point=POINT, reference=b"store"),
    "recovery without locality": SealPolicy.build(recovery_point=POINT, reference=b"store", locality=None),
}


@pytest.fixture(scope="module")
def tpm() -> Iterator[HardwareTpm]:
    with running_swtpm() as swtpm, HardwareTpm.open(swtpm.setting) as opened:
        opened.provision_srk()
        yield opened


def test_policy_locality_two_has_the_measured_digest() -> None:
    measured = "f3d7b918b2fa2a1c108cc717e7fb52f543184580a34e9fdbba2fbb2bbd11b07b"
    assert policy.after_locality(policy.ZERO_DIGEST).hex() == measured


@pytest.mark.parametrize("name", ["plain", "plain without locality", "pcr", "predicted"])
def test_software_and_tpm_compute_the_same_policy(tpm: HardwareTpm, name: str) -> None:
    present = tpm.pcr_read([0, 2, 7])
    chosen = POLICIES[name]
    branches = [present, present | {7: b"\x08" * 32}][: len(chosen.branches)]
    if isinstance(chosen.branches[0], PcrBranch):
        chosen = SealPolicy.build(pcrs=branches, locality=chosen.locality)
    with (
        tpm._link.operation("compute a policy") as esapi,
        tpm._link.session(esapi, ESYS_TR.NONE, policy=True) as session,
    ):
        if isinstance(chosen.branches[0], PcrBranch):
            esapi.policy_pcr(session, b"", "sha256:0,2,7")
        else:
            esapi.policy_command_code(session, TPM2_CC.Unseal)
        if chosen.locality is not None:
            esapi.policy_locality(session, TPMA_LOCALITY.TWO)
        if len(chosen.branches) > 1:
            esapi.policy_or(session, TPML_DIGEST(list(chosen.branch_digests())))
        assert bytes(esapi.policy_get_digest(session)) == chosen.digest()


def test_software_and_tpm_name_the_recovery_key_alike(tpm: HardwareTpm) -> None:
    with tpm._link.operation("load a key") as esapi:
        key = esapi.load_external(recovery_key_template(POINT), hierarchy=ESYS_TR.OWNER)
        assert bytes(esapi.tr_get_name(key)) == policy.p256_key_name(POINT)
        esapi.flush_context(key)


@pytest.mark.parametrize(
    "point", [b"", POINT[:-1], b"\x02" + POINT[1:], POINT + b"\0"], ids=["none", "short", "compressed", "long"]
)
def test_what_is_no_point_gets_no_name(point: bytes) -> None:
    with pytest.raises(SealDamaged, match="65 bytes"):
        policy.p256_key_name(point)


def test_one_branch_needs_no_or_and_several_do() -> None:
    single, several = POLICIES["pcr"], POLICIES["recovery"]
    assert single.digest() == single.branch_digests()[0]
    assert several.digest() == policy.policy_or(several.branch_digests())
    assert len({chosen.digest() for chosen in POLICIES.values()}) == len(POLICIES)


def test_the_reference_changes_the_recovery_branch_only() -> None:
    one = SealPolicy.build(pcrs=[VALUES], recovery_point=POINT, reference=b"one")
    two = SealPolicy.build(pcrs=[VALUES], recovery_point=POINT, reference=b"two")
    assert one.branch_digests()[0] == two.branch_digests()[0]
    assert one.branch_digests()[1] != two.branch_digests()[1]
    assert one.recovery_point == POINT
    assert POLICIES["pcr"].recovery_point is None


def test_an_approver_takes_a_reference_and_no_values_of_its_own() -> None:
    assert POLICIES["approver"].approver_point == POINT
    assert POLICIES["recovery"].approver_point is None
    for wrong in ({"reference": b""}, {"reference": b"store", "pcrs": [VALUES]}):
        with pytest.raises(BadSetting, match="approver"):
            SealPolicy.build(approver_point=POINT, **wrong)


@pytest.mark.parametrize("locality", [None, 2])
def test_software_and_tpm_compute_the_same_approved_policy(tpm: HardwareTpm, locality: int | None) -> None:
    """PolicyPCR, PolicyNV, PolicyLocality, as an approver signs them."""
    writer = RevocationWriter.of(StoreKey(b"\x05" * 32), UUID(int=5))
    index = tpm.revocations.place(writer.point)
    tpm.revocations.ensure(index, writer, {})
    saa = ApproverPrivate.new()
    approval = approve(saa, target(saa, index, locality=locality), tpm.pcr_read([0, 7]), 5)
    with (
        tpm._link.operation("compute a policy") as esapi,
        tpm._link.session(esapi, ESYS_TR.NONE, policy=True) as session,
    ):
        esapi.policy_pcr(session, b"", "sha256:0,7")
        handle = esapi.tr_from_tpmpublic(index.index)
        esapi.policy_nv(handle, handle, session, approval.operand, TPM2_EO.UNSIGNED_LE, approval.offset)
        esapi.tr_close(handle)
        if locality is not None:
            esapi.policy_locality(session, TPMA_LOCALITY.TWO)
        assert bytes(esapi.policy_get_digest(session)) == approval.approved_policy()
    tpm.revocations.undefine(index)


def test_a_statement_needs_the_nonce_of_the_tpm() -> None:
    nonce, reference = b"\x01" * 32, b"ref"
    expected = hashlib.sha256(nonce + bytes(4) + reference).digest()
    assert policy.signed_statement(nonce, reference) == expected
    with pytest.raises(AssertionError):
        policy.signed_statement(b"", reference)


def test_more_branches_than_policy_or_takes_are_refused() -> None:
    many = [VALUES | {7: bytes([number]) * 32} for number in range(8)]
    assert len(SealPolicy.build(pcrs=many).branches) == 8
    with pytest.raises(BadSetting, match="9 branches"):
        SealPolicy.build(pcrs=many, recovery_point=POINT)
    with pytest.raises(BadSetting, match="0 branches"):
        SealPolicy(())


@pytest.mark.parametrize("locality", [0, 1, 3, 4, "2"])
def test_other_localities_are_refused(locality: Any) -> None:
    with pytest.raises(BadSetting, match="locality"):
        SealPolicy.build(locality=locality)


@pytest.mark.parametrize(
    ("text", "pcrs"),
    [("sha256:0,2,7", (0, 2, 7)), ("7,0-2", (0, 1, 2, 7)), ("none", ()), ("sha256:4-7,5", (4, 5, 6, 7))],
)
def test_selections_are_read(text: str, pcrs: tuple[int, ...]) -> None:
    assert parse_pcrs(text) == pcrs


@pytest.mark.parametrize(
    "text",
    ["", "sha1:0", "sha256:", "0,,2", "a", "-1", "24", "7-4", "0-24", "sha256:16", "20", "22", "21-23", "٣", "1-2-3"],
)
def test_selections_that_cannot_be_used_are_refused(text: str) -> None:
    with pytest.raises(BadSetting):
        parse_pcrs(text)


def test_pcrs_are_sorted_and_unique() -> None:
    assert check_pcrs([7, 0, 7]) == (0, 7)
    with pytest.raises(BadSetting):
        check_pcrs([-1])


@pytest.mark.parametrize("values", [{}, {0: b"short"}, {16: bytes(32)}, {30: bytes(32)}])
def test_pcr_branches_need_fit_pcrs_and_whole_values(values: dict[int, bytes]) -> None:
    with pytest.raises(BadSetting):
        PcrBranch.of(values)


@pytest.mark.parametrize("name", POLICIES)
def test_a_description_survives_json(name: str) -> None:
    kept = json.dumps(POLICIES[name].to_json())
    assert SealPolicy.from_json(json.loads(kept)) == POLICIES[name]


def broken(**changes: Any) -> Any:
    return POLICIES["recovery"].to_json() | changes


@pytest.mark.parametrize(
    "untrusted",
    [
        None,
        [],
        {},
        broken(version=2),
        broken(version=None),
        broken(locality=0),
        broken(locality="2"),
        broken(locality=[]),
        broken(reference=5),
        broken(reference="zz"),
        broken(branches=[]),
        broken(branches=None),
        broken(branches=[{}]),
        broken(branches=[{"kind": "authorize"}]),
        broken(branches=[{"kind": "authorize", "key": "04"}]),
        broken(branches=[{"kind": "authorize", "key": POINT.hex(), "more": 1}]),
        broken(branches=[{"kind": "plain", "more": 1}]),
        broken(branches=[{"kind": "pcr", "bank": "sha1", "values": {}}]),
        broken(branches=[{"kind": "pcr", "bank": "sha256", "values": {}}]),
        broken(branches=[{"kind": "pcr", "bank": "sha256", "values": []}]),
        broken(branches=[{"kind": "pcr", "bank": "sha256", "values": {"0": "00"}}]),
        broken(branches=[{"kind": "pcr", "bank": "sha256", "values": {"x": "00" * 32}}]),
        broken(branches=[{"kind": "signed", "key": "04"}]),
        broken(branches=[{"kind": "signed", "key": None}]),
    ],
)
def test_a_description_that_cannot_be_read_is_damage_and_never_a_laxer_policy(untrusted: Any) -> None:
    with pytest.raises(SealDamaged):
        SealPolicy.from_json(untrusted)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(field=st.sampled_from(["version", "locality", "reference", "branches"]), value=JSON)
def test_any_json_in_a_description_parses_or_is_damage(field: str, value: Any) -> None:
    try:
        read = SealPolicy.from_json(broken(**{field: value}))
    except SealDamaged:
        return
    assert isinstance(read.branches[0], PcrBranch | PlainBranch | SignedBranch)
    assert SealPolicy.from_json(read.to_json()) == read


@pytest.mark.parametrize("untrusted", [None, {}, {"public": "00", "private": 1, "policy": {}}, {"public": "0"}])
def test_a_blob_record_that_cannot_be_read_is_damage(untrusted: Any) -> None:
    with pytest.raises(SealDamaged):
        SealedBlob.from_json(untrusted)


@pytest.mark.parametrize(
    "untrusted",
    [
        None,
        {},
        {"index": "1", "name": "00" * 34, "locality": 2},
        {"index": 1, "name": "00" * 33, "locality": 2},
        {"index": 1, "name": "00" * 34, "locality": 0},
        {"index": 1, "name": "00" * 34, "locality": []},
    ],
)
def test_an_anchor_record_that_cannot_be_read_is_no_anchor(untrusted: Any) -> None:
    with pytest.raises(AnchorMissing):
        AnchorInfo.from_json(untrusted)


def test_records_survive_json() -> None:
    anchor = AnchorInfo(0x01800100, bytes(34), None)
    assert AnchorInfo.from_json(json.loads(json.dumps(anchor.to_json()))) == anchor
    blob = SealedBlob(b"public", b"private", POLICIES["recovery"])
    assert SealedBlob.from_json(json.loads(json.dumps(blob.to_json()))) == blob
