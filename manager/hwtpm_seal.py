"""Sealed objects: making, opening, and opening with the recovery key. Policy arithmetic is in policy.py.

Secrets cross the bus only inside sessions salted with the pinned SRK. Every handle is flushed on every path.
"""

import hmac
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from tpm2_pytss import (
    TPM2_CC,
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMA_LOCALITY,
    TPML_DIGEST,
    TPMS_SENSITIVE_CREATE,
    TSS2_Exception,
)

from manager import hwtpm_rc as rc
from manager.approval_errors import ApprovalRevoked, NotApproved
from manager.approval_target import choose
from manager.hwtpm_approval import approval_ticket, approvals_of, authorize, check_by_trial
from manager.hwtpm_errors import (
    PcrsMoving,
    PolicyMismatch,
    RecoveryRefused,
    SealDamaged,
    SealUnverified,
    TpmError,
    WrongLocality,
)
from manager.hwtpm_link import TpmLink, flushed
from manager.hwtpm_pcr import read_pcrs, selection_text
from manager.hwtpm_records import SealedBlob
from manager.hwtpm_signed import SignStatement, policy_signed
from manager.hwtpm_srk import Srk
from manager.hwtpm_templates import seal_template
from manager.policy import AuthorizeBranch, Branch, PcrBranch, PlainBranch, SealPolicy, SignedBranch

__all__ = ["MAX_SECRET_BYTES", "PCR_TRIES", "Sealer", "SignStatement"]

# MAX_SYM_DATA, Part 2, 11.1.13: what a KEYEDHASH object can carry.
MAX_SECRET_BYTES: Final = 128
# An extend of any ordinary PCR (IMA does it often) spoils a policy session; the next try nearly always fits.
PCR_TRIES: Final = 16

_Satisfy = Callable[[Any, Any], None]
"""Does what one branch asks of a policy session (esapi, session), before the locality."""


class Sealer:
    """Seals and unseals through one link under one SRK."""

    def __init__(self, link: TpmLink, srk: Srk) -> None:
        self._link = link
        self._srk = srk

    def seal(self, secret: bytes, policy: SealPolicy) -> SealedBlob:
        """Seal 1..128 bytes, and prove that they come back under the present PCRs and locality.

        With an approver nothing opens before there is an approval: then the object is loaded, and a trial session
        shows that the TPM computes the policy it was sealed with.
        Raises SealUnverified (with the cause chained) if they do not; then nothing was returned.
        """
        if not 1 <= len(secret) <= MAX_SECRET_BYTES:
            raise ValueError(f"a secret of {len(secret)} bytes cannot be sealed, 1 to {MAX_SECRET_BYTES} can")
        with self._link.operation("seal a secret") as esapi:
            srk = self._srk.handle(esapi)
            sensitive = TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(data=secret))
            with self._link.session(esapi, srk) as session:
                private, public, *_ = esapi.create(srk, sensitive, seal_template(policy.digest()), session1=session)
            blob = SealedBlob(bytes(public.marshal()), bytes(private.marshal()), policy)
        try:
            if policy.approver_point is not None:
                self._try_out(blob)
                return blob
            returned = self.unseal(blob)
        except (PolicyMismatch, SealDamaged, WrongLocality) as error:
            raise SealUnverified(str(error)) from error
        if not hmac.compare_digest(returned, secret):
            raise SealUnverified("other bytes came back")
        return blob

    def unseal(self, blob: SealedBlob) -> bytes:
        """Open by the first branch that holds here: PCR branches and plain ones in their order, or an approval.

        Raises PolicyMismatch (with the PCRs that differ from the nearest branch), NotApproved, ApprovalRevoked,
        RevocationMissing, SealDamaged, TpmCleared, SrkChanged, WrongLocality, PcrsMoving, and what
        TpmLink.operation raises.
        """
        if blob.policy.approver_point is not None:
            return self._unseal_approved(blob, blob.policy.approver_point)
        usable = [branch for branch in blob.policy.branches if not isinstance(branch, SignedBranch)]
        with self._link.operation("unseal") as esapi, flushed(esapi, self._load(esapi, blob)) as sealed:
            for branch in usable:
                try:
                    return self._open_by(esapi, sealed, blob.policy, _plainly(branch))
                except _BranchDoesNotHoldError:
                    continue
            raise PolicyMismatch("unseal", _nearest_difference(esapi, usable))

    def _unseal_approved(self, blob: SealedBlob, point: bytes) -> bytes:
        """Open by the approvals that hold, the highest sequence first; values are compared before anything is tried."""
        with self._link.operation("unseal by an approval") as esapi:
            approvals, unusable = approvals_of(blob, point)
            wanted = {pcr for approval in approvals for pcr in approval.selection}
            choice = choose(approvals, read_pcrs(esapi, wanted), time.time())
            refused: NotApproved | None = None
            for approval in choice.holding:
                # The ticket first: key and sealed object need not be loaded at once, a chip has room for three.
                ticket = approval_ticket(esapi, approval, point)
                with flushed(esapi, self._load(esapi, blob)) as sealed:
                    try:
                        return self._open_by(
                            esapi,
                            sealed,
                            blob.policy,
                            lambda tpm, session, a=approval, t=ticket: authorize(tpm, session, a, point, t),  # type: ignore[misc]
                        )
                    except ApprovalRevoked as error:
                        refused = refused or error
            raise refused or NotApproved("unseal", choice.differing, (*choice.reasons, *unusable))

    def _try_out(self, blob: SealedBlob) -> None:
        with self._link.operation("try a new seal out") as esapi:
            with flushed(esapi, self._load(esapi, blob)):
                pass
            check_by_trial(esapi, blob.policy)

    def unseal_with_recovery(self, blob: SealedBlob, sign: SignStatement) -> bytes:
        """Open by the recovery branch. `sign` gets a statement with this session's nonceTPM, useless elsewhere.

        Raises RecoveryRefused: no such branch, or not a signature by its key. Otherwise as `unseal`.
        """
        point = blob.policy.recovery_point
        if point is None:
            raise RecoveryRefused("it was sealed without one")

        def satisfy(esapi: Any, session: Any) -> None:
            policy_signed(esapi, session, point, blob.policy.reference, sign, RecoveryRefused)

        with (
            self._link.operation("unseal with the recovery key") as esapi,
            flushed(esapi, self._load(esapi, blob)) as sealed,
        ):
            return self._open_by(esapi, sealed, blob.policy, satisfy)

    def _open_by(self, esapi: Any, sealed: Any, policy: SealPolicy, satisfy: _Satisfy) -> bytes:
        srk = self._srk.handle(esapi)
        with self._link.session(esapi, srk, policy=True) as session:
            for _ in range(PCR_TRIES):
                satisfy(esapi, session)
                if policy.locality is not None:
                    esapi.policy_locality(session, TPMA_LOCALITY.TWO)
                with rc.meaning({rc.RC_VALUE: lambda: SealDamaged("its policy has no such branch")}):
                    if len(policy.branches) > 1:
                        esapi.policy_or(session, TPML_DIGEST(list(policy.branch_digests())))
                try:
                    with rc.meaning(_unseal_meanings()):
                        return bytes(esapi.unseal(sealed, session))
                except TSS2_Exception as error:
                    if rc.tpm_code(error) != rc.RC_PCR_CHANGED:
                        raise
                # A failed use does not reset the policy of a session (reference section 2).
                esapi.policy_restart(session)
        raise PcrsMoving(PCR_TRIES)

    def _load(self, esapi: Any, blob: SealedBlob) -> Any:
        """Load a blob whose policy description is the true one; ESYS_TR. Raises SealDamaged, SrkChanged, TpmCleared."""
        public, private = _unmarshal(blob)
        srk = self._srk.handle(esapi)
        try:
            return esapi.load(srk, private, public)
        except TSS2_Exception as error:
            if rc.is_about_arguments(error):
                damaged = SealDamaged(f"the TPM does not accept it (0x{int(error.rc):x}, {error})")
                raise self._srk.recheck(esapi, damaged) from error
            raise


class _BranchDoesNotHoldError(TpmError):
    """TPM2_PolicyPCR: the PCRs have other values than this branch wants. Stays inside this module."""

    def __init__(self) -> None:
        super().__init__("A PCR branch does not hold", "", "")


def _plainly(branch: Branch) -> _Satisfy:
    """Return how a branch is satisfied that needs nothing but the platform's state."""

    def satisfy(esapi: Any, session: Any) -> None:
        match branch:
            case PcrBranch():
                with rc.meaning({rc.RC_VALUE: _BranchDoesNotHoldError}):
                    esapi.policy_pcr(session, branch.pcr_digest, selection_text(branch.selection))
            case PlainBranch():
                esapi.policy_command_code(session, TPM2_CC.Unseal)
            case SignedBranch() | AuthorizeBranch():
                raise AssertionError("these need a signature")

    return satisfy


def _unseal_meanings() -> rc.Special:
    return {
        rc.RC_LOCALITY: lambda: WrongLocality(2, "it refused to unseal, the sealed object wants locality 2"),
        rc.RC_POLICY_FAIL: lambda: PolicyMismatch("unseal", {}),
        rc.RC_AUTH_UNAVAILABLE: lambda: SealDamaged("it does not open by a policy"),
    }


def _unmarshal(blob: SealedBlob) -> tuple[Any, Any]:
    try:
        public, public_used = TPM2B_PUBLIC.unmarshal(blob.public)
        private, private_used = TPM2B_PRIVATE.unmarshal(blob.private)
    except TSS2_Exception as error:
        raise SealDamaged(f"its bytes do not parse ({error})") from error
    if (public_used, private_used) != (len(blob.public), len(blob.private)):
        raise SealDamaged("it has bytes too many")
    if bytes(public.publicArea.authPolicy) != blob.policy.digest():
        raise SealDamaged("its recorded policy is not the one it was sealed with")
    return public, private


def _nearest_difference(esapi: Any, branches: Iterable[Branch]) -> dict[int, tuple[bytes, bytes]]:
    """PCR -> (wanted, present) for the PCR branch that is nearest to the present values."""
    wanted = [dict(branch.values) for branch in branches if isinstance(branch, PcrBranch)]
    present = read_pcrs(esapi, {pcr for values in wanted for pcr in values})
    different = [{p: (v, present[p]) for p, v in values.items() if present[p] != v} for values in wanted]
    return min(different, key=len, default={})
