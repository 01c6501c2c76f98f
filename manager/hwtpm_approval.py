"""Opening a sealed object by an approval: TPM2_PolicyPCR, PolicyNV, PolicyLocality, PolicyAuthorize, in that order.

The caller adds the locality a second time and PolicyOr, so that a lax approval cannot drop either (reference, 2).
"""

from typing import Any

from tpm2_pytss import (
    ESYS_TR,
    TPM2_ALG,
    TPM2_EO,
    TPM2_RH,
    TPM2_SE,
    TPM2_ST,
    TPMA_LOCALITY,
    TPML_DIGEST,
    TPMT_TK_VERIFIED,
    TSS2_Exception,
)

from manager import hwtpm_rc as rc
from manager.approval import Approval
from manager.approval_errors import ApprovalError, ApprovalForged, ApprovalRevoked, NotApproved
from manager.approval_key import ApproverPublic
from manager.hwtpm_errors import SealDamaged, SealUnverified, TpmError
from manager.hwtpm_link import flushed
from manager.hwtpm_pcr import selection_text
from manager.hwtpm_records import AnchorInfo, SealedBlob
from manager.hwtpm_revocation import open_revocation, revocation_meanings
from manager.hwtpm_signed import verified_ticket
from manager.policy import SealPolicy
from manager.policy_digests import p256_key_name

RC_POLICY = 0x126  # Part 2, 6.6: the comparison of TPM2_PolicyNV does not hold
_TICKET_PARAMETER = 4  # checkTicket of TPM2_PolicyAuthorize


class SignatureRefusedByTpm(TpmError):  # noqa: N818 - named for what happened
    """The TPM finds that the signature over the approved policy is not by the approver's key."""

    code = ApprovalForged.code

    def __init__(self) -> None:
        super().__init__(
            "The hardware TPM refused an approval: its signature is not by the approver's key",
            "The sealed object and its approvals were kept.",
            "Ask the approver for the approval again, over a way you trust.",
        )


def approvals_of(blob: SealedBlob, point: bytes) -> tuple[list[Approval], list[str]]:
    """Return the approvals kept beside an object that are genuine and made for it; of the others why not.

    The platform object's are kept in clear: their validity, which the TPM does not know, counts only if the
    signature over the whole document holds.
    """
    approver = ApproverPublic.of_point(point)
    found, unusable = [], []
    for number, untrusted in enumerate(blob.approvals, 1):
        try:
            approval = Approval.parse(untrusted, f"stored approval {number}")
            approval.verify(approver, f"stored approval {number}")
        except ApprovalError as error:
            unusable.append(str(error))
            continue
        if (approval.reference, approval.locality) != (blob.policy.reference, blob.policy.locality):
            unusable.append(f"stored approval {number} was made for something else ({approval.name})")
            continue
        found.append(approval)
    return found, unusable


def approval_ticket(esapi: Any, approval: Approval, point: bytes, hierarchy: Any = ESYS_TR.OWNER) -> Any:
    """Return the TPM's ticket for the approved policy. Raises SignatureRefusedByTpm."""
    signature = approval.policy_signature
    return verified_ticket(esapi, point, approval.statement(), signature, SignatureRefusedByTpm, hierarchy)


def authorize(esapi: Any, session: Any, approval: Approval, point: bytes, ticket: Any) -> None:
    """Satisfy an AuthorizeBranch in a policy session.

    Raises NotApproved: the PCRs are others. ApprovalRevoked: the revocation index holds a higher sequence.
    RevocationMissing, RevocationDenied. SealDamaged: the ticket is not the TPM's own.
    """
    esapi.policy_pcr(session, None, selection_text(approval.selection))
    info = AnchorInfo(approval.nv_index, approval.nv_name, approval.locality)
    index = open_revocation(esapi, info)
    try:
        meanings = dict(revocation_meanings(info, "compare an approval with it"))
        meanings[RC_POLICY] = lambda: ApprovalRevoked("unseal", approval.sequence)
        with rc.meaning(meanings):
            esapi.policy_nv(index, index, session, approval.operand, TPM2_EO.UNSIGNED_LE, approval.offset)
    finally:
        esapi.tr_close(index)
    if approval.locality is not None:
        esapi.policy_locality(session, TPMA_LOCALITY.TWO)
    try:
        esapi.policy_authorize(
            session, approval.approved_policy(), p256_key_name(point), ticket, policy_ref=approval.reference
        )
    except TSS2_Exception as error:
        if rc.tpm_code(error) != rc.RC_VALUE:
            raise
        if int(error.rc) >> 8 & 0xF == _TICKET_PARAMETER:
            raise SealDamaged("the TPM did not make the ticket of its approval") from error
        reason = f"approval {approval.sequence}: what the hardware TPM computes is not the approved policy"
        raise NotApproved("unseal", {}, [reason]) from error


def check_by_trial(esapi: Any, policy: SealPolicy) -> None:
    """Have the TPM compute the policy of an object with an approver in a trial session. Raises SealUnverified.

    A trial session takes any ticket (Part 3, 23.16), so no approval is needed.
    """
    point = policy.approver_point
    assert point is not None, "asked for policies with an approver only"
    session = esapi.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.TRIAL, None, TPM2_ALG.SHA256)
    with flushed(esapi, session):
        none = TPMT_TK_VERIFIED(tag=TPM2_ST.VERIFIED, hierarchy=TPM2_RH.OWNER)
        esapi.policy_authorize(session, bytes(32), p256_key_name(point), none, policy_ref=policy.reference)
        if policy.locality is not None:
            esapi.policy_locality(session, TPMA_LOCALITY.TWO)
        branch = bytes(esapi.policy_get_digest(session))  # a trial session takes any list in PolicyOr, too
        if len(policy.branches) > 1:
            esapi.policy_or(session, TPML_DIGEST(list(policy.branch_digests())))
        computed = bytes(esapi.policy_get_digest(session))
    if branch not in policy.branch_digests() or computed != policy.digest():
        raise SealUnverified("the TPM computes another policy for the approver's branch")
