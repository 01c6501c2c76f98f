"""Approval documents: what is signed, what is refused, which of several is used. No TPM."""

import dataclasses
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from approval_rig import approve, target
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from manager.approval import (
    MAX_COMMENT_BYTES,
    MAX_DOCUMENT_BYTES,
    MAX_NAME_BYTES,
    MAX_SEQUENCE,
    MAX_TIME,
    SLOTS,
    Approval,
    Kind,
    reference_for,
)
from manager.approval_errors import ApprovalElsewhere, ApprovalError, ApprovalForged, ApprovalUnreadable
from manager.approval_key import ApproverPrivate, ApproverPublic
from manager.approval_target import CLOCK_FLOOR, CLOCK_SKEW, NO_GROUP, Target, choose, untimely
from manager.hwtpm_records import AnchorInfo
from manager.policy import UNFIT_PCRS
from manager.policy_digests import hashed

SAA = ApproverPrivate.new()
INDEX = AnchorInfo(0x01800200, b"\x00\x0b" + bytes(range(32)), 2)
TARGET = target(SAA, INDEX)
VALUES = {0: b"\x0a" * 32, 7: b"\x0b" * 32}
DOCUMENT = approve(SAA, TARGET, VALUES, 5, comment="firmware 1.2", not_before=int(time.time()) - 60)
FIT = sorted(set(range(24)) - UNFIT_PCRS)
TEXT = st.text(st.characters(categories=["L", "N", "Zs"], include_characters="-._"), max_size=20).filter(
    str.isprintable
)


@st.composite
def approvals(draw: Any) -> Approval:
    kind = draw(st.sampled_from(Kind))
    pcrs = draw(st.sets(st.sampled_from(FIT), min_size=1))
    issued = draw(st.integers(0, MAX_TIME))
    before = draw(st.integers(0, MAX_TIME))
    return Approval(
        kind=kind,
        store=draw(st.uuids()),
        group=NO_GROUP if kind is Kind.PLATFORM else draw(st.uuids()),
        name=draw(TEXT),
        locality=draw(st.sampled_from([None, 2])),
        nv_index=draw(st.integers(0, 2**32 - 1)),
        nv_name=draw(st.binary(min_size=34, max_size=34)),
        slot=0 if kind is Kind.PLATFORM else draw(st.integers(1, SLOTS - 1)),
        sequence=draw(st.integers(1, MAX_SEQUENCE)),
        issued=issued,
        values=tuple((pcr, draw(st.binary(min_size=32, max_size=32))) for pcr in sorted(pcrs)),
        approver=SAA.public.fingerprint,
        not_before=before,
        not_after=draw(st.sampled_from([0, max(issued, before), MAX_TIME])),
        comment=draw(TEXT),
    ).signed(SAA)


@given(approvals())
@settings(max_examples=60)
def test_a_document_says_what_was_signed(approval: Approval) -> None:
    document = approval.to_bytes()
    assert len(document) <= MAX_DOCUMENT_BYTES
    again = Approval.parse(document)
    assert again == approval
    again.verify(SAA.public)
    assert Approval.from_armoured(approval.armoured()) == approval


def test_the_longest_document_fits() -> None:
    longest = replace(
        DOCUMENT, name="n" * MAX_NAME_BYTES, comment="c" * MAX_COMMENT_BYTES, values=tuple((p, bytes(32)) for p in FIT)
    ).signed(SAA)
    assert len(longest.to_bytes()) == 1247 <= MAX_DOCUMENT_BYTES


def refused(document: bytes) -> bool:
    try:
        Approval.parse(document).verify(SAA.public)
    except ApprovalError:
        return True
    return False


def test_every_single_byte_change_of_a_document_is_refused() -> None:
    document = DOCUMENT.to_bytes()
    assert not refused(document)
    for place in range(len(document)):
        for mask in (0x01, 0x20, 0x80, 0xFF):
            changed = bytearray(document)
            changed[place] ^= mask
            assert refused(bytes(changed)), f"byte {place} ^ {mask:#x}"


def test_every_single_byte_change_of_a_file_is_refused() -> None:
    text = DOCUMENT.armoured()
    for place in range(len(text)):
        for character in ("A", "b", "=", "\n", " ", "-"):
            if text[place] != character:
                with pytest.raises(ApprovalError):
                    Approval.from_armoured(text[:place] + character + text[place + 1 :]).verify(SAA.public)


@given(st.data())
@settings(max_examples=200)
def test_cut_and_lengthened_and_foreign_bytes_are_refused(data: st.DataObject) -> None:
    document = DOCUMENT.to_bytes()
    cut = data.draw(st.integers(0, len(document) - 1))
    more = data.draw(st.binary(min_size=1, max_size=300))
    assert refused(document[:cut])
    assert refused(document + more)
    assert refused(document[:cut] + more + document[cut:])
    assert refused(data.draw(st.binary(max_size=1000)))


@pytest.mark.parametrize("change", ["\n", " ", "\r\n", "-----BEGIN VTPM APPROVAL-----\n"])
def test_a_file_has_one_form_only(change: str) -> None:
    for text in (change + DOCUMENT.armoured(), DOCUMENT.armoured() + change):
        with pytest.raises(ApprovalUnreadable):
            Approval.from_armoured(text)
    with pytest.raises(ApprovalUnreadable, match="no short text"):
        Approval.from_armoured("é" + DOCUMENT.armoured())
    with pytest.raises(ApprovalUnreadable, match="no short text"):
        Approval.from_armoured("A" * 5000)
    with pytest.raises(ApprovalUnreadable, match="does not begin with -----BEGIN VTPM APPROVAL-----"):
        Approval.from_armoured("garbage\n")


def test_the_other_form_of_each_signature_is_refused() -> None:
    """ECDSA accepts (r, s) and (r, n - s): a document would have four forms."""
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    other = DOCUMENT.signature[:32] + (order - int.from_bytes(DOCUMENT.signature[32:])).to_bytes(32)
    with pytest.raises(ApprovalForged, match="whole document"):
        replace(DOCUMENT, signature=other).verify(SAA.public)
    assert SAA.public.verifies(bytes(32), SAA.sign(bytes(32)))
    assert not SAA.public.verifies(bytes(32), SAA.sign(bytes(32))[:63])


WRONG: list[dict[str, Any]] = [
    {"values": ()},
    {"values": ((16, bytes(32)),)},
    {"values": ((0, bytes(20)),)},
    {"sequence": 0},
    {"sequence": MAX_SEQUENCE + 1},
    {"slot": 0},
    {"slot": SLOTS},
    {"group": NO_GROUP},
    {"kind": Kind.PLATFORM},
    {"nv_name": bytes(33)},
    {"name": "n" * (MAX_NAME_BYTES + 1)},
    {"name": "two\nlines"},
    {"comment": "c" * (MAX_COMMENT_BYTES + 1)},
    {"comment": "\x1b[31m"},
    {"not_after": 1},
    {"not_before": MAX_TIME + 1},
    {"issued": 200, "not_after": 100},
    {"not_before": 200, "not_after": 100, "issued": 1},
]


@pytest.mark.parametrize("wrong", WRONG, ids=",".join)
def test_what_no_approver_can_mean_is_not_signed(wrong: dict[str, Any]) -> None:
    with pytest.raises(ApprovalUnreadable):
        replace(DOCUMENT, **wrong).signed(SAA)


class Careless(Approval):
    """What an approver's own, wrong program would sign."""

    def _check(self, name: str) -> None:
        pass


@pytest.mark.parametrize("wrong", [wrong for wrong in WRONG if not {"values", "nv_name"} & set(wrong)], ids=str)
def test_what_no_approver_can_mean_is_not_read_either(wrong: dict[str, Any]) -> None:
    """Both signatures hold, and the document is refused all the same."""
    fields = {field.name: getattr(DOCUMENT, field.name) for field in dataclasses.fields(DOCUMENT)}
    document = Careless(**fields | wrong).signed(SAA).to_bytes()
    with pytest.raises(ApprovalUnreadable):
        Approval.parse(document)


def test_a_key_that_the_document_does_not_name_neither_signs_nor_verifies() -> None:
    other = ApproverPrivate.new()
    with pytest.raises(ApprovalForged):
        DOCUMENT.signed(other)
    with pytest.raises(ApprovalForged, match="names the approver"):
        DOCUMENT.verify(other.public)


def test_the_signature_over_the_policy_alone_does_not_make_a_document() -> None:
    longer = replace(DOCUMENT, not_before=0)
    with pytest.raises(ApprovalForged, match="whole document"):
        longer.verify(SAA.public)
    other = replace(DOCUMENT, sequence=6)
    resigned = replace(other, signature=SAA.sign(other._digest()))
    with pytest.raises(ApprovalForged, match="approved policy"):
        resigned.verify(SAA.public)


def test_the_reference_is_of_kind_store_group_index_and_slot() -> None:
    base = (Kind.GROUP, TARGET.store, TARGET.group, TARGET.nv_name, 3)
    others = [
        (Kind.PLATFORM, *base[1:]),
        (base[0], uuid4(), *base[2:]),
        (*base[:2], uuid4(), *base[3:]),
        (*base[:3], bytes(34), 3),
        (*base[:4], 4),
    ]
    references = {reference_for(*fields) for fields in (base, *others)}
    assert len(references) == 1 + len(others)
    assert all(len(reference) == 32 for reference in references)
    assert DOCUMENT.reference == hashed(
        b"vtpm-manager policyRef v2\0", b"\2", TARGET.store.bytes, TARGET.group.bytes, TARGET.nv_name, b"\0\3"
    )


def test_the_document_is_laid_out_as_it_is_described() -> None:
    text = (Path(__file__).parent.parent / "docs" / "approval.md").read_text(encoding="utf-8")
    rows = [tuple(map(int, row)) for row in re.findall(r"^\| (\d+) \| (\d+) \| ", text, flags=re.MULTILINE)]
    document = DOCUMENT.to_bytes()
    place = 0
    for offset, size in rows:
        assert offset == place
        place += size
    assert place + len(DOCUMENT.name) + len(DOCUMENT.comment) + 2 * 32 + 2 * 64 == len(document)
    fields = {offset: document[offset : offset + size] for offset, size in rows}
    assert (fields[0], fields[4], fields[5], fields[8]) == (b"VAPR", b"\1", b"\2", b"\0\3")
    assert (fields[10], fields[11], fields[14]) == (b"\4", b"\x81\0\0", (0x01800200).to_bytes(4))
    assert (fields[18], int.from_bytes(fields[52])) == (TARGET.nv_name, 5)
    assert int.from_bytes(fields[68]) == DOCUMENT.not_before
    assert (fields[84], fields[100]) == (TARGET.store.bytes, TARGET.group.bytes)
    assert (fields[116], fields[148], fields[180]) == (
        DOCUMENT.reference,
        SAA.public.fingerprint,
        DOCUMENT.approved_policy(),
    )
    assert (fields[212][0], int.from_bytes(fields[213])) == (len(DOCUMENT.name), len(DOCUMENT.comment))


# --- targets --------------------------------------------------------------------------------------------------------


def test_a_target_says_what_it_was_made_of() -> None:
    assert Target.from_json(TARGET.to_json() | {"more": 1}, "it") == TARGET
    platform = target(SAA, INDEX, kind=Kind.PLATFORM, group=NO_GROUP, slot=0, name="platform")
    assert Target.from_json(platform.to_json(), "it") == platform


@pytest.mark.parametrize("field", [name for name in TARGET.to_json() if name not in ("name", "sequence", "saa")])
def test_a_target_that_was_changed_is_refused_or_another_one(field: str) -> None:
    """Where the index, the slot, the store or the group was exchanged on the way, the reference does not fit."""
    for value in (None, 0, "00", [], str(uuid4()), "sha256:16", 63):
        told = TARGET.to_json() | {field: value}
        try:
            found = Target.from_json(told, "it")
        except ApprovalUnreadable:
            continue
        assert found.reference == TARGET.reference
        assert field in ("locality", "revocation_index", "approved_pcrs", "name")


@pytest.mark.parametrize(
    "change",
    [
        {"store": uuid4()},
        {"group": uuid4()},
        {"kind": Kind.PLATFORM, "group": NO_GROUP, "slot": 0},
        {"locality": None},
        {"nv_index": 0x01800201},
        {"nv_name": bytes(34)},
        {"slot": 4},
    ],
    ids=",".join,
)
def test_an_approval_for_something_else_is_not_installed(change: dict[str, Any]) -> None:
    TARGET.check(DOCUMENT, SAA.public)
    with pytest.raises(ApprovalElsewhere):
        TARGET.check(approve(SAA, replace(TARGET, **change), VALUES, 5), SAA.public)


# --- which one is used ----------------------------------------------------------------------------------------------

NOW = time.time()


@pytest.mark.parametrize(
    ("limits", "now", "why"),
    [
        ({}, 0, None),
        ({"not_before": int(NOW) - 10}, NOW, None),
        ({"not_before": int(NOW) + 10}, NOW, "valid from"),
        ({"not_after": int(NOW) + 10}, NOW, None),
        ({"not_after": int(NOW) + 10}, NOW + 20, "was valid until"),
        ({"not_after": int(NOW) + 10}, NOW - CLOCK_SKEW - 60, "clock .* is wrong"),
        ({"not_after": int(NOW) + 10}, CLOCK_FLOOR - CLOCK_SKEW - 1, "clock .* is wrong"),
        ({"not_after": int(NOW) + 10}, 0, "clock .* is wrong"),
    ],
    ids=["no limits", "begun", "not begun", "not over", "over", "clock went back", "clock below the floor", "no clock"],
)
def test_validity_takes_a_clock_that_can_be_right(limits: dict[str, int], now: float, why: str | None) -> None:
    found = untimely(approve(SAA, TARGET, VALUES, issued=int(NOW), **limits), now)
    assert (found is None) if why is None else (found is not None and re.search(why, found))


def test_a_clock_set_back_does_not_bring_an_expired_approval_to_life() -> None:
    """Another approval that was issued later shows that the clock is wrong."""
    expired = approve(SAA, TARGET, VALUES, issued=int(NOW) - 10_000, not_after=int(NOW) - 5_000)
    newer = approve(SAA, TARGET, VALUES, 2, issued=int(NOW))
    assert "was valid until" in str(untimely(expired, NOW, [expired, newer]))
    assert untimely(expired, NOW - 6_000, [expired]) is None
    assert "is wrong" in str(untimely(expired, NOW - 6_000, [expired, newer]))


def test_the_highest_sequence_that_holds_comes_first() -> None:
    low, high, other = (approve(SAA, TARGET, VALUES, number) for number in (1, 9, 4))
    elsewhere = approve(SAA, TARGET, VALUES | {7: bytes(32)}, 99)
    choice = choose([low, elsewhere, high, other], VALUES, NOW)
    assert choice.holding == (high, other, low)
    assert choice.differing == {7: (bytes(32), VALUES[7])}
    (reason,) = choice.reasons
    assert reason.startswith("approval 99: PCR 7 is 0b0b")


def test_nothing_at_hand_is_no_choice() -> None:
    assert choose([], VALUES, NOW).holding == ()


def test_a_point_that_is_not_on_the_curve_is_no_approver() -> None:
    with pytest.raises(ApprovalError, match="no point of P-256"):
        ApproverPublic.of_point(b"\4" + bytes(63) + b"\1")


def test_keys_do_not_print() -> None:
    private = SAA.to_pem().split(b"\n")[1].decode()
    assert private not in repr(SAA)
    assert "ApproverPrivate" in repr(SAA)
    assert isinstance(SAA.public.key, ec.EllipticCurvePublicKey)
