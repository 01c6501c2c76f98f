# ruff: noqa: N818 - named for what happened, as in hwtpm_errors
"""What can go wrong with attestation keys and quotes. Must not import tpm2_pytss: the off-line tools use it too."""

from frontend_backend.messages_admin import ExitCode
from manager.errors import ManagerError
from manager.hwtpm_errors import KEPT_ALL, TpmError


class EndorsementAuthWanted(TpmError):
    """The endorsement hierarchy has a password that we were not given, or is switched off."""

    code = ExitCode.DENIED

    def __init__(self) -> None:
        super().__init__(
            "The hardware TPM refused the endorsement hierarchy, in which attestation keys live",
            KEPT_ALL,
            "Give its password, or empty it with `tpm2_changeauth -c e`; firmware may have switched the hierarchy off.",
        )


class CredentialRefused(TpmError):
    """TPM2_ActivateCredential: the challenge is not for this attestation key in this TPM, or was altered."""

    code = ExitCode.DENIED

    def __init__(self) -> None:
        super().__init__(
            "The hardware TPM refused the challenge: it was made for another key or another TPM, or altered on the way",
            "The group and its attestation key were kept.",
            "Take a new request with `vtpm-group-enroll GROUP`, and have the verifier make a new challenge from it.",
        )


class AttestationKeyChanged(TpmError):
    """The hardware TPM does not make the attestation key that the group's record names."""

    code = ExitCode.TPM_UNAVAILABLE

    def __init__(self, why: str) -> None:
        super().__init__(
            f"The group's attestation key cannot be had: {why}",
            "The group and its vTPMs were kept; only quotes are not possible.",
            "Run `vtpm-group-enroll GROUP --renew` and have the verifier certify the new key.",
        )


class DocumentUnreadable(ManagerError):
    """A request, challenge, proof or certificate is not what it should be: damaged, of another kind, or a forgery."""

    code = ExitCode.INTEGRITY

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what} cannot be used: {why}. Nothing was made")
