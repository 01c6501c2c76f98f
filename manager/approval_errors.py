# ruff: noqa: N818 - these are named for what happened; only the roots say Error
"""What can go wrong with approvals, their keys and the revocation index; messages built here. No TPM library."""

from collections.abc import Mapping, Sequence

from frontend_backend.messages_admin import ExitCode
from manager.errors import ManagerError
from manager.hwtpm_errors import KEPT_ALL, PolicyMismatch, TpmError


class ApprovalError(ManagerError):
    """An approval, or the key that signs them, could not be used."""


class ApprovalUnreadable(ApprovalError):
    """The bytes are no approval, one of a newer version, or one whose fields contradict each other."""

    code = ExitCode.INTEGRITY

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name} is no approval that can be used: {why}. Nothing was changed. Ask for it again.")


class ApprovalForged(ApprovalError):
    """A signature is not by the approver's key, or the document was changed after it was signed."""

    code = ExitCode.INTEGRITY

    def __init__(self, name: str, which: str) -> None:
        super().__init__(
            f"{name} was not signed by the approver, or was changed afterwards ({which} does not verify). "
            "Nothing was changed. Ask the approver for it again, over a way you trust."
        )


class ApprovalElsewhere(ApprovalError):
    """It is genuine, but for another installation, group, approver or revocation index."""

    code = ExitCode.CONFLICT

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name} does not fit here: {why}. Nothing was changed. Install the one made for this place.")


class ApprovalStale(ApprovalError):
    """Its sequence is below the one that the hardware TPM asks for."""

    code = ExitCode.CONFLICT

    def __init__(self, name: str, sequence: int, least: int) -> None:
        super().__init__(
            f"{name} has sequence {sequence} and is revoked: the hardware TPM takes {least} and above. "
            "Nothing was changed. Have a new one signed with a higher sequence."
        )


class ApprovalUntimely(ApprovalError):
    """Outside of its validity, or the clock cannot be trusted to tell."""

    code = ExitCode.DENIED

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name} cannot be used now: {why}. Nothing was changed.")


class ApprovalRoom(ApprovalError):
    """No room for another approval, or for another group with an approver."""

    code = ExitCode.CONFLICT

    def __init__(self, what: str, todo: str) -> None:
        super().__init__(f"There is no room for {what}. Nothing was changed. {todo}")


class SignerKeyMissing(ApprovalError):
    """No such key file, or we may not read it."""

    code = ExitCode.NOT_FOUND

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path} cannot be read: {why}. Nothing was changed. Check the name and the permissions.")


class SignerKeyExists(ApprovalError):
    """A new key would overwrite another file."""

    code = ExitCode.CONFLICT

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path} exists already. It was kept: what is sealed for an approver opens by that key alone. "
            "Choose another name."
        )


class SignerKeyUnreadable(ApprovalError):
    """The file is there, but is no approver's key."""

    code = ExitCode.INTEGRITY

    def __init__(self, path: str, why: str) -> None:
        super().__init__(
            f"{path} is no approver's key: {why}. It was not changed. It must hold one P-256 key in PEM: the private "
            "one (made by `vtpm-approve new-key`) to sign with, the public one to be given to the manager."
        )


class SignerPassphraseWrong(ApprovalError):
    """The key is encrypted, and the passphrase given is missing or another one."""

    code = ExitCode.DENIED

    def __init__(self, path: str, *, given: bool) -> None:
        what = "is not opened by this passphrase" if given else "is protected by a passphrase"
        super().__init__(f"{path} {what}. It was not changed. Give the right one with --passphrase-file.")


class NotApproved(PolicyMismatch):
    """No approval at hand opens the sealed object here. `differing`: PCR -> (approved, present) of the nearest one.

    `reasons`: one sentence for each approval at hand, the newest first.
    """

    def __init__(self, doing: str, differing: Mapping[int, tuple[bytes, bytes]], reasons: Sequence[str]) -> None:
        why = "; ".join(reasons) or "there is no approval yet"
        TpmError.__init__(
            self,
            f"The hardware TPM refused to {doing}: this platform is not approved ({why})",
            "The sealed object and its approvals were kept.",
            "Boot an approved configuration, or have the approver sign this one (`vtpm-approve`) and install it "
            "(`vtpm-manager approve`, `vtpm-group-update`). If the approver's key is lost, the recovery key names "
            "another (`vtpm-manager reseal --recovery-key FILE --saa PUB.pem`, `recover --group`).",
        )
        self.differing = dict(differing)
        self.reasons = tuple(reasons)


class ApprovalRevoked(NotApproved):
    """The hardware TPM's revocation index holds a higher sequence: this approval never opens anything again."""

    def __init__(self, doing: str, sequence: int) -> None:
        super().__init__(doing, {}, [f"the approval with sequence {sequence} is revoked: a later one was in use"])


class RevocationMissing(TpmError):
    """The revocation index is gone, was never written, or is not the one that approvals name: denial, no more."""

    code = ExitCode.INTEGRITY

    def __init__(self, index: int, why: str) -> None:
        super().__init__(
            f"The revocation index at NV index 0x{index:08x} is not ours any more: {why}",
            "Nothing opens by an approval until it is back; the sealed objects and approvals were kept.",
            "Run `vtpm-manager reseal --recovery-key FILE`, which makes it anew (on another TPM: `recover`). Find out "
            "who used the TPM's owner password.",
        )
        self.index = index


class RevocationDenied(TpmError):
    """The TPM did not let us write (or read) the revocation index."""

    code = ExitCode.DENIED

    def __init__(self, index: int, doing: str) -> None:
        super().__init__(
            f"The revocation index at NV index 0x{index:08x} refuses us to {doing}",
            KEPT_ALL,
            "Somebody may have defined it anew with his own password: run `vtpm-manager reseal --recovery-key FILE`.",
        )
        self.index = index
