"""To what a group's master key is sealed and escrowed: the group's own choice, else the installation's."""

from dataclasses import dataclass, replace
from uuid import UUID

from manager import escrow
from manager.approval_key import ApproverPublic
from manager.approval_records import reference_of
from manager.errors import UsageError
from manager.escrow import EscrowPlace, EscrowPurpose
from manager.hwtpm import HardwareTpm
from manager.hwtpm_records import AnchorInfo
from manager.keys import GroupSeal
from manager.policy import check_pcrs, parse_pcrs
from manager.policy_references import group_reference
from manager.provision import PCRS_NONE, policy_for
from manager.recovery_key import RecoveryPublic
from storage.secrets import GroupKey


@dataclass(frozen=True, slots=True)
class Terms:
    """What a group's key is bound to: PCRs (a selection, or none) or an approver (PEM), and who may recover it."""

    pcrs: str
    recovery: RecoveryPublic | None
    saa: str = ""

    @classmethod
    def of(cls, seal: GroupSeal, pcrs: str, recovery: str) -> "Terms":
        """Return a group's terms; `pcrs` and `recovery` (PEM) are the installation's.

        Raises:
            UsageError: PCRs or an approver without a recovery key. BadSetting, RecoveryError, SignerError: what they
                are made of cannot be read.

        """
        own = seal.recovery or recovery
        public = RecoveryPublic.parse(own.encode(), "the group's recovery key") if own else None
        terms = cls(seal.pcrs or pcrs, public, seal.saa)
        if terms.saa:
            ApproverPublic.parse(terms.saa.encode())
        if terms.pcrs != PCRS_NONE:
            check_pcrs(parse_pcrs(terms.pcrs))
        if public is None and (terms.saa or terms.pcrs != PCRS_NONE):
            raise UsageError(
                f"without a recovery key a firmware update or a lost approver's key would lock group {seal.name} out "
                f"for good: give --recovery PUB.pem (made by 'vtpm-recovery-key new FILE'), or bind none: --pcrs none"
            )
        return terms


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a group is to be like; None: as it is, or as the installation's. `recovery` and `saa` are PEM."""

    name: str | None = None
    pcrs: str | None = None
    recovery: str | None = None
    saa: str | None = None
    quota: int | None = None
    exportable: bool | None = None

    def applied(self, seal: GroupSeal) -> GroupSeal:
        """Return the record with these wishes in it, its key not yet sealed to them. Raises UsageError."""
        if self.quota is not None and self.quota < 0:
            raise UsageError("--quota is a number of vTPMs, 0 for as many as the configuration allows")
        changed = replace(
            seal,
            name=seal.name if self.name is None else self.name,
            pcrs=seal.pcrs if self.pcrs is None else self.pcrs,
            recovery=seal.recovery if self.recovery is None else self.recovery,
            saa=seal.saa if self.saa is None else self.saa,
            exportable=seal.exportable if self.exportable is None else self.exportable,
        )
        if self.saa is not None and self.saa != seal.saa:
            changed = replace(changed, approvals=())  # the former approver's word counts no longer
        return changed if self.quota is None else replace(changed, quota=self.quota or None)

    @property
    def reseals(self) -> bool:
        """Tell whether the group's key has to be sealed anew for it."""
        return any(wish is not None for wish in (self.pcrs, self.recovery, self.saa))


def seal_key(
    tpm: HardwareTpm,
    store: UUID,
    group: UUID,
    key: GroupKey,
    seal: GroupSeal,
    terms: Terms,
    predicted: tuple[dict[int, bytes], ...] = (),
    revocation: AnchorInfo | None = None,
) -> GroupSeal:
    """Return the group's record with `key` sealed to `terms` as the PCRs are now (and predicted), and escrowed anew.

    `revocation` is the installation's revocation index, which an approver's group refers to.

    Raises:
        TpmError: the hardware TPM did not seal it. BadSetting: such a policy is not possible.

    """
    reference = reference_of(store, group, seal.slot, revocation) if terms.saa else group_reference(group)
    policy = policy_for(tpm, terms.pcrs, terms.recovery, reference, predicted, saa=terms.saa)
    return replace(seal, sealed=tpm.seal(key.reveal(), policy), escrow=group_escrow(store, group, key, terms.recovery))


def group_escrow(store: UUID, group: UUID, key: GroupKey, recovery: RecoveryPublic | None) -> bytes:
    """Return the off-line escrow of a group's master key; empty without a recovery key."""
    if recovery is None:
        return b""
    return escrow.wrap(key.reveal(), recovery, EscrowPlace(store, EscrowPurpose.GROUP_KEY, group))
