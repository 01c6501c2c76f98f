"""Approvals against a real TPM at locality 2: each attack of reference hardware-tpm.md section 2, with its code."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from approval_rig import after_extend, approve, extend, target
from fixtures_tpm import SwtpmProcess, recorded_bus, running_swtpm
from tpm2_pytss import ESYS_TR, TPM2_CC, TPM2_EO, TPMA_LOCALITY, TPML_DIGEST, TSS2_Exception

from manager.approval import Approval
from manager.approval_errors import ApprovalRevoked, NotApproved, RevocationDenied, RevocationMissing
from manager.approval_key import ApproverPrivate
from manager.approval_target import Target
from manager.hwtpm import HardwareTpm
from manager.hwtpm_approval import SignatureRefusedByTpm, approval_ticket, authorize
from manager.hwtpm_errors import SealDamaged, SealUnverified, TpmError, TpmFull, WrongLocality
from manager.hwtpm_link import LOADED_SESSION_FIRST, TRANSIENT_FIRST, flushed
from manager.hwtpm_records import SealedBlob
from manager.policy import AuthorizeBranch, Branch, SealPolicy, SignedBranch
from manager.recovery_key import RecoveryPrivate
from manager.revocation_writer import RevocationWriter
from storage.secrets import StoreKey

SECRET = os.urandom(32)
PCRS = (0, 7)
SAA = ApproverPrivate.new()
EVIL = ApproverPrivate.new()
RECOVERY = RecoveryPrivate.new()


@pytest.fixture
def swtpm() -> Iterator[SwtpmProcess]:
    with running_swtpm() as process:
        yield process


class World:
    """A TPM with a revocation index and one object sealed for the approver."""

    def __init__(self, tpm: HardwareTpm) -> None:
        self.tpm = tpm
        tpm.provision_srk()
        self.writer = RevocationWriter.of(StoreKey(os.urandom(32)), uuid4())
        self.index = tpm.revocations.place(self.writer.point)
        tpm.revocations.ensure(self.index, self.writer, {})
        self.what = target(SAA, self.index)
        self.blob = tpm.seal(SECRET, self.policy(self.what))

    @staticmethod
    def policy(what: Target) -> SealPolicy:
        return SealPolicy.build(
            approver_point=SAA.public.point,
            recovery_point=RECOVERY.public.signing_point,
            reference=what.reference,
            locality=what.locality,
        )

    def present(self) -> dict[int, bytes]:
        return self.tpm.pcr_read(PCRS)

    def approved(self, sequence: int = 1, **changes: Any) -> Approval:
        return approve(SAA, self.what, self.present(), sequence, **changes)

    def unseal(self, *approvals: Approval) -> bytes:
        return self.tpm.unseal(replace(self.blob, approvals=tuple(one.to_bytes() for one in approvals)))

    def raise_to(self, sequence: int) -> None:
        assert self.tpm.revocations.raise_to(self.index, self.writer, self.what.slot, sequence)


@pytest.fixture
def world(swtpm: SwtpmProcess) -> Iterator[World]:
    with HardwareTpm.open(swtpm.setting) as opened:
        yield World(opened)
        if not opened._link._closed:
            assert opened.transient_handles() == ()


def test_an_approval_opens_what_nothing_else_does(world: World) -> None:
    with pytest.raises(NotApproved, match="there is no approval yet"):
        world.unseal()
    assert world.unseal(world.approved()) == SECRET
    assert world.tpm.unseal_with_recovery(world.blob, RECOVERY.sign_statement) == SECRET


def test_an_upgrade_that_was_approved_before_opens_without_sealing_anew(world: World) -> None:
    before = world.present()
    after = before | {7: after_extend(before[7])}
    both = world.approved(1), approve(SAA, world.what, after, 2)
    assert world.unseal(*both) == SECRET
    extend(world.tpm, 7)
    assert world.unseal(*both) == SECRET
    with pytest.raises(NotApproved) as refused:
        world.unseal(both[0])
    assert refused.value.differing == {7: (before[7], after[7])}
    assert after[7].hex() in str(refused.value)
    assert before[7].hex() in str(refused.value)
    assert refused.value.code == 5


def test_the_nearest_approval_is_explained(world: World) -> None:
    far = approve(SAA, world.what, dict.fromkeys(PCRS, b"\1" * 32), 2)
    near = world.approved()
    extend(world.tpm, 0)
    with pytest.raises(NotApproved) as refused:
        world.unseal(far, near)
    assert set(refused.value.differing) == {0}
    assert len(refused.value.reasons) == 2


@pytest.mark.parametrize("locality", [0, 1, 3, 4])
def test_no_other_locality_opens_by_an_approval(world: World, locality: int) -> None:
    approval = world.approved()
    world.tpm._link.locality = locality
    with pytest.raises(WrongLocality, match="wants locality 2"):
        world.unseal(approval)
    world.tpm._link.locality = 2
    assert world.unseal(approval) == SECRET


# --- each step by itself, as somebody would who leaves our checks out ----------------------------------------------


def steps(
    world: World,
    approval: Approval,
    *,
    point: bytes = SAA.public.point,
    hierarchy: Any = ESYS_TR.OWNER,
    spoil: Any = lambda ticket: ticket,
    second_locality: bool = True,
    session_locality: int = 2,
) -> bytes:
    """What Sealer does, with our own checks left out; returns the secret."""
    link, srk = world.tpm._link, world.tpm._srk
    policy = world.blob.policy
    with link.operation("try an attack") as esapi:
        ticket = spoil(approval_ticket(esapi, approval, point, hierarchy))
        with (
            flushed(esapi, world.tpm._sealer._load(esapi, world.blob)) as sealed,
            link.session(esapi, srk.handle(esapi), policy=True) as session,
        ):
            authorize(esapi, session, approval, point, ticket)
            if second_locality:
                esapi.policy_locality(session, TPMA_LOCALITY.TWO)
            esapi.policy_or(session, TPML_DIGEST(list(policy.branch_digests())))
            return bytes(esapi.unseal(sealed, session))


def cause(error: BaseException) -> int:
    """The TPM's own response code behind an error."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, TSS2_Exception):
        found = found.__cause__
    assert found is not None
    return int(found.rc)


def test_the_steps_by_themselves_open(world: World) -> None:
    assert steps(world, world.approved()) == SECRET


def test_changed_pcrs_under_an_old_approval(world: World) -> None:
    approval = world.approved()
    extend(world.tpm, 7)
    with pytest.raises(NotApproved, match="not the approved policy") as refused:
        steps(world, approval)
    assert cause(refused.value) == 0x1C4


def test_a_signature_by_another_key(world: World) -> None:
    forged = approve(EVIL, replace(world.what, approver=EVIL.public.fingerprint), world.present())
    with pytest.raises(SignatureRefusedByTpm, match="not by the approver's key") as refused:
        steps(world, forged)
    assert cause(refused.value) == 0x2DB
    with pytest.raises(NotApproved, match="names the approver"):
        world.unseal(forged)


def test_another_key_with_its_own_public_part(world: World) -> None:
    forged = approve(EVIL, replace(world.what, approver=EVIL.public.fingerprint), world.present())
    with pytest.raises(TpmError) as refused:
        steps(world, forged, point=EVIL.public.point)
    assert cause(refused.value) == 0x1C4


def test_an_approval_of_another_group(world: World) -> None:
    other = approve(SAA, target(SAA, world.index), world.present())
    with pytest.raises(TpmError) as refused:
        steps(world, other)
    assert cause(refused.value) == 0x1C4
    with pytest.raises(NotApproved, match="made for something else"):
        world.unseal(other)


def test_a_ticket_that_was_changed(world: World) -> None:
    def spoil(ticket: Any) -> Any:
        digest = bytearray(bytes(ticket.digest))
        digest[0] ^= 1
        ticket.digest = bytes(digest)
        return ticket

    with pytest.raises(SealDamaged, match="ticket") as refused:
        steps(world, world.approved(), spoil=spoil)
    assert cause(refused.value) == 0x4C4


def test_an_approver_loaded_in_the_null_hierarchy(world: World) -> None:
    with pytest.raises(SealDamaged, match="ticket") as refused:
        steps(world, world.approved(), hierarchy=ESYS_TR.NULL)
    assert cause(refused.value) == 0x4C4


def test_an_approval_without_locality_cannot_drop_the_locality(world: World) -> None:
    lax = world.approved(locality=None)
    assert steps(world, lax) == SECRET  # the approver may leave it out of what he signs ...
    with pytest.raises(TpmError) as refused:
        steps(world, lax, second_locality=False)  # ... but the object asks for it all the same
    assert cause(refused.value) == 0x1C4
    world.tpm._link.locality = 0
    with pytest.raises(WrongLocality) as at_zero:
        steps(world, lax)
    assert cause(at_zero.value) == 0x907
    world.tpm._link.locality = 2
    with pytest.raises(NotApproved, match="made for something else"):
        world.unseal(lax)


def test_an_expired_approval_whose_validity_was_changed_is_noticed_before_the_tpm_is_asked(world: World) -> None:
    """The TPM knows no validity: without our own check of the whole document it would open."""
    expired = world.approved(issued=1_792_900_000, not_after=1_792_900_001)
    with pytest.raises(NotApproved, match="it was valid until 2026-10-25T03:46:41"):
        world.unseal(expired)
    longer = replace(expired, not_after=0)
    assert steps(world, longer) == SECRET
    with pytest.raises(NotApproved, match="the signature over the whole document does not verify"):
        world.unseal(longer)


# --- revocation -----------------------------------------------------------------------------------------------------


def test_a_revoked_approval_never_opens_again(world: World) -> None:
    old, new = world.approved(4), world.approved(5)
    assert world.unseal(old) == SECRET
    world.raise_to(5)
    with pytest.raises(ApprovalRevoked, match="sequence 4 is revoked") as refused:
        world.unseal(old)
    assert cause(refused.value) == 0x126
    assert world.unseal(old, new) == SECRET


def test_a_slot_of_another_group_revokes_nothing(world: World) -> None:
    world.tpm.revocations.raise_to(world.index, world.writer, world.what.slot + 1, 99)
    world.tpm.revocations.raise_to(world.index, world.writer, world.what.slot - 1, 2**63 - 1)
    assert world.unseal(world.approved(1)) == SECRET
    found = world.tpm.revocations.read(world.index)
    assert found[2:5] == (2**63 - 1, 0, 99)


def test_an_approval_for_another_slot_or_index_opens_nothing(world: World) -> None:
    """The approver signed it, for a slot that holds 0, or for an index that somebody else writes: it is useless."""
    world.raise_to(5)
    moved = world.approved(4, slot=world.what.slot + 1)
    with pytest.raises(TpmError) as refused:
        steps(world, moved)
    assert cause(refused.value) == 0x1C4
    thief = RevocationWriter.of(StoreKey(os.urandom(32)), world.what.store)
    his = world.tpm.revocations.place(thief.point)
    world.tpm.revocations.ensure(his, thief, {})
    elsewhere = world.approved(4, nv_index=his.index, nv_name=his.name)
    with pytest.raises(TpmError) as refused:
        steps(world, elsewhere)
    assert cause(refused.value) == 0x1C4
    for approval in (moved, elsewhere):
        with pytest.raises(NotApproved, match="made for something else"):
            world.unseal(approval)


def test_a_slot_is_never_lowered(world: World) -> None:
    world.raise_to(5)
    assert not world.tpm.revocations.raise_to(world.index, world.writer, world.what.slot, 4)
    assert world.tpm.revocations.read(world.index)[world.what.slot] == 5


@pytest.mark.parametrize("locality", [0, 1, 3, 4])
def test_no_other_locality_raises_a_slot(world: World, locality: int) -> None:
    world.tpm._link.locality = locality
    with pytest.raises(WrongLocality, match="revocation index wants locality 2") as refused:
        world.raise_to(5)
    assert cause(refused.value) == 0x907
    world.tpm._link.locality = 2
    assert world.tpm.revocations.read(world.index)[world.what.slot] == 0


def test_nobody_but_the_installation_writes_the_index_at_locality_two(world: World) -> None:
    world.raise_to(5)
    with pytest.raises(RevocationDenied, match="refuses us to write") as refused:
        _write(world, RevocationWriter.of(StoreKey(os.urandom(32)), world.what.store), world.writer.point, 4)
    assert cause(refused.value) == 0x5DB
    for session in ("password", "owner", "policy without a signature"):
        with pytest.raises(TSS2_Exception) as error:
            _write_raw(world, session)
        assert int(error.value.rc) in {0x12F, 0x149, 0x99D}, session
    assert world.tpm.revocations.read(world.index)[world.what.slot] == 5


def _write(world: World, signer: RevocationWriter, point: bytes, sequence: int) -> None:
    signer.point = point
    with world.tpm._link.operation("write as an attacker") as esapi:
        handle = esapi.tr_from_tpmpublic(world.index.index)
        try:
            world.tpm.revocations._write(esapi, world.index, handle, signer, sequence.to_bytes(8), world.what.slot * 8)
        finally:
            esapi.tr_close(handle)


def _write_raw(world: World, how: str) -> None:
    link = world.tpm._link
    with link._busy:
        esapi = link._connected()
        handle = esapi.tr_from_tpmpublic(world.index.index)
        try:
            if how == "policy without a signature":
                with link.session(esapi, world.tpm._srk.handle(esapi), policy=True) as session:
                    esapi.policy_locality(session, TPMA_LOCALITY.TWO)
                    esapi.nv_write(handle, bytes(8), 24, handle, session1=session)
            else:
                esapi.nv_write(handle, bytes(8), 24, handle if how == "password" else ESYS_TR.OWNER)
        finally:
            esapi.tr_close(handle)


def test_an_owner_who_defines_the_index_anew_causes_denial_only(world: World, swtpm: SwtpmProcess) -> None:
    """Even one at locality 2: the index's Name is that of its writer, whose key he does not have."""
    world.raise_to(5)
    old, new = world.approved(4), world.approved(5)
    _define_anew(world, auth=b"attacker")
    for approval in (old, new):
        with pytest.raises(RevocationMissing, match="defined anew, or never written"):
            world.unseal(approval)
        with pytest.raises(RevocationMissing, match="defined anew") as refused:
            steps(world, approval)
        assert refused.value.code == 6
    for how in ("password", "owner", "policy without a signature"):
        with pytest.raises(TSS2_Exception) as error:
            _write_raw(world, how)
        assert int(error.value.rc) in {0x12F, 0x149, 0x99D}, how
    with pytest.raises(RevocationDenied):
        _write(world, RevocationWriter.of(StoreKey(os.urandom(32)), world.what.store), world.writer.point, 4)
    # the installation itself, opened by its recovery key, brings the index back as high as it knows
    with pytest.raises(RevocationDenied):  # the attacker's password is still on it
        world.tpm.revocations.ensure(world.index, world.writer, {world.what.slot: 5})
    assert world.tpm.revocations.renew(world.writer, {world.what.slot: 5}) == world.index
    assert world.unseal(new) == SECRET
    with pytest.raises(ApprovalRevoked):
        world.unseal(old)


def _define_anew(world: World, auth: bytes | None) -> None:
    from tpm2_pytss import TPM2_ALG, TPM2B_NV_PUBLIC, TPMA_NV, TPMS_NV_PUBLIC

    from manager import hwtpm_revocation as module
    from manager.policy_digests import p256_key_name, revocation_write_policy

    world.tpm.revocations.undefine(world.index)
    public = TPM2B_NV_PUBLIC(
        TPMS_NV_PUBLIC(
            nvIndex=world.index.index,
            nameAlg=TPM2_ALG.SHA256,
            attributes=TPMA_NV(module._ATTRIBUTES),
            authPolicy=revocation_write_policy(2, p256_key_name(world.writer.point)),
            dataSize=module.INDEX_BYTES,
        )
    )
    with world.tpm._link.operation("define as an attacker") as esapi:
        esapi.tr_close(esapi.nv_define_space(auth, public))


@pytest.mark.parametrize(("auth", "code"), [(None, 0x14A), (b"his", 0x9A2)])
def test_the_tpm_compares_nothing_with_an_index_that_was_defined_anew(
    world: World, auth: bytes | None, code: int
) -> None:
    """Without our own look at its Name, too."""
    approval = world.approved()
    _define_anew(world, auth)
    link = world.tpm._link
    with link._busy:
        esapi = link._connected()
        handle = esapi.tr_from_tpmpublic(world.index.index)
        try:
            with (
                link.session(esapi, world.tpm._srk.handle(esapi), policy=True) as session,
                pytest.raises(TSS2_Exception) as refused,
            ):
                esapi.policy_nv(handle, handle, session, approval.operand, TPM2_EO.UNSIGNED_LE, approval.offset)
        finally:
            esapi.tr_close(handle)
    assert int(refused.value.rc) == code


def test_an_index_with_another_writer_is_another_policy(world: World) -> None:
    world.raise_to(5)
    old = world.approved(4)
    world.tpm.revocations.undefine(world.index)
    thief = RevocationWriter.of(StoreKey(os.urandom(32)), world.what.store)
    his = world.tpm.revocations.plan(world.index.index, thief.point)
    world.tpm.revocations.ensure(his, thief, {})
    with pytest.raises(RevocationMissing, match="its Name is"):
        world.unseal(old)
    rewritten = replace(old, nv_name=his.name)  # and if he changes the document, no signature fits
    with pytest.raises(SignatureRefusedByTpm):
        steps(world, rewritten)


def test_an_index_that_was_removed_opens_nothing(world: World) -> None:
    approval = world.approved()
    world.tpm.revocations.undefine(world.index)
    with pytest.raises(RevocationMissing, match="does not exist"):
        world.unseal(approval)
    assert world.tpm.unseal_with_recovery(world.blob, RECOVERY.sign_statement) == SECRET


def test_the_index_is_found_again_and_an_interrupted_definition_completed(world: World) -> None:
    assert world.tpm.revocations.place(world.writer.point) == world.index
    other = RevocationWriter.of(StoreKey(os.urandom(32)), world.what.store)
    free = world.tpm.revocations.place(other.point)
    assert free.index != world.index.index
    with world.tpm._link.operation("stop half-way") as esapi:
        world.tpm.revocations._define(esapi, free, other.point)  # defined, then killed before the first write
    assert world.tpm.revocations.place(other.point) == free
    world.tpm.revocations.ensure(free, other, {2: 7})
    assert world.tpm.revocations.read(free)[2] == 7
    world.tpm.revocations.ensure(free, other, {2: 6, 3: 1})
    assert world.tpm.revocations.read(free)[:4] == (0, 0, 7, 1)


def test_the_name_is_the_same_on_another_tpm(world: World) -> None:
    with running_swtpm() as second, HardwareTpm.open(second.setting) as fresh:
        fresh.provision_srk()
        place = fresh.revocations.place(world.writer.point)
        assert place == world.index
        fresh.revocations.ensure(place, world.writer, {3: 5})
        assert fresh.revocations.read(place)[3] == 5


def test_a_number_that_somebody_else_has_gives_another_one_and_his_is_left(world: World) -> None:
    world.tpm.revocations.undefine(world.index)
    thief = RevocationWriter.of(StoreKey(os.urandom(32)), world.what.store)
    his = world.tpm.revocations.plan(world.index.index, thief.point)
    world.tpm.revocations.ensure(his, thief, {1: 9})
    with pytest.raises(RevocationMissing, match="another index has its number"):
        world.tpm.revocations.undefine(world.index)
    with pytest.raises(RevocationMissing, match="another index with the Name"):
        world.tpm.revocations.ensure(world.index, world.writer, {})
    ours = world.tpm.revocations.renew(world.writer, {3: 5}, world.index.index)
    assert ours.index != world.index.index
    assert world.tpm.revocations.read(ours)[3] == 5
    assert world.tpm.revocations.read(his)[1] == 9
    assert world.tpm.revocations.renew(world.writer, {3: 6}, world.index.index) == ours
    assert world.tpm.revocations.read(ours)[3] == 6


def test_a_decoy_beside_our_index_is_not_taken_for_it(world: World) -> None:
    """The index's policy can be read by anybody: an index with it, at a lower number, is not the one approvals name."""
    least, taken = {world.what.slot: 4}, world.index.index
    ours = world.tpm.revocations.plan(taken + 1, world.writer.point)
    world.tpm.revocations.ensure(ours, world.writer, least)  # where ours is because something else had the first number
    assert world.tpm.revocations.place(world.writer.point, ours.index) == ours
    assert world.tpm.revocations.renew(world.writer, least, ours.index) == ours


# --- limits and the bus ---------------------------------------------------------------------------------------------


def test_it_opens_with_the_room_that_a_chip_has(world: World) -> None:
    """Three objects, three sessions; of these one object and two sessions are somebody else's here.

    What is left is what opening a seal without an approver takes, too: the TPM loads the SRK into one of the places.
    """
    approval = world.approved()
    plain = world.tpm.seal(SECRET, SealPolicy.build())
    link = world.tpm._link
    with link.operation("take room") as esapi:
        key = world.tpm._sealer._load(esapi, world.blob)
        sessions = [esapi.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, 0, None, 0x000B) for _ in range(2)]
        assert len(link.handles(esapi, TRANSIENT_FIRST)) == 1
        assert len(link.handles(esapi, LOADED_SESSION_FIRST)) == 2
    assert world.unseal(approval) == world.tpm.unseal(plain) == SECRET
    with link.operation("take more room") as esapi:
        more = world.tpm._sealer._load(esapi, world.blob)
    with pytest.raises(TpmFull):
        world.tpm.unseal(plain)
    with pytest.raises(TpmFull):
        world.unseal(approval)
    with link.operation("give it back") as esapi:
        for handle in (key, more, *sessions):
            esapi.flush_context(handle)


def test_neither_secret_nor_signing_key_is_on_the_bus(swtpm: SwtpmProcess) -> None:
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        world = World(tpm)
        assert world.unseal(world.approved()) == SECRET
        assert not bus.saw(SECRET)
        assert any(int.from_bytes(packet[6:10]) == int(TPM2_CC.PolicyNV) for packet in bus.commands)


def test_an_approval_is_found_without_blind_tries(swtpm: SwtpmProcess) -> None:
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        world = World(tpm)
        wrong = [approve(SAA, world.what, dict.fromkeys(PCRS, bytes([n]) * 32), n) for n in range(2, 6)]
        right = world.approved(1)
        bus.clear()
        assert world.unseal(*wrong, right) == SECRET
        codes = [int.from_bytes(packet[6:10]) for packet in bus.commands]
        assert codes.count(int(TPM2_CC.PolicyNV)) == codes.count(int(TPM2_CC.Unseal)) == 1
        assert codes.count(int(TPM2_CC.PCR_Read)) == 1


def test_pcrs_that_move_meanwhile_are_tried_again(swtpm: SwtpmProcess) -> None:
    from fixtures_tpm import extend_command

    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        world = World(tpm)
        approval = world.approved()
        bus.before[int(TPM2_CC.Unseal)] = [extend_command(12)] * 2
        assert world.unseal(approval) == SECRET


class WrongBranch(AuthorizeBranch):
    """As an error in our own arithmetic would be."""

    def digest(self, reference: bytes) -> bytes:
        return super().digest(reference + b"\0")


@pytest.mark.parametrize("others", [(), (SignedBranch(RECOVERY.public.signing_point),)])
def test_a_wrong_policy_in_software_is_noticed_when_sealing(world: World, others: tuple[Branch, ...]) -> None:
    policy = SealPolicy((WrongBranch(SAA.public.point), *others), world.what.reference)
    with pytest.raises(SealUnverified, match="another policy"):
        world.tpm.seal(SECRET, policy)


def test_the_weaker_mode_has_approvals_too(swtpm: SwtpmProcess) -> None:
    with HardwareTpm.open(swtpm.setting, locality=0) as weak:
        world = World(weak)
        approval = world.approved()
        assert approval.locality is None
        assert world.unseal(approval) == SECRET
        world.raise_to(2)
        with pytest.raises(ApprovalRevoked):
            world.unseal(approval)


def test_without_a_recovery_key_there_is_one_branch(world: World) -> None:
    policy = SealPolicy.build(approver_point=SAA.public.point, reference=world.what.reference)
    blob = world.tpm.seal(SECRET, policy)
    assert world.tpm.unseal(SealedBlob(blob.public, blob.private, policy, (world.approved().to_bytes(),))) == SECRET
