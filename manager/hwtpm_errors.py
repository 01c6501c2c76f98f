# ruff: noqa: N818 - these are named for what happened to the TPM; only the root says Error
"""What can go wrong with the hardware TPM: one tree, messages built here.

Each message says what happened, what was kept and what to do. `code` is the process exit code of
the command line (design section 9). This module must not import tpm2_pytss, so that everyone may import it.
"""

from collections.abc import Mapping
from typing import Final

from frontend_backend.messages_admin import ExitCode
from manager.errors import ManagerError

KEPT_ALL: Final = "Nothing was changed."
KEPT_UNKNOWN: Final = "Whether the TPM carried the last command out is not known; nothing else was changed."


class TpmError(ManagerError):
    """The hardware TPM did not do what was asked. Attributes: `happened`, `kept`, `todo` (sentences)."""

    def __init__(self, happened: str, kept: str, todo: str) -> None:
        super().__init__(f"{happened}. {kept} {todo}")
        self.happened = happened
        self.kept = kept
        self.todo = todo


class UnknownTpmCode(TpmError):
    """The TPM or the TSS answered a code that has no error of its own here."""

    def __init__(self, doing: str, rc: int, text: str) -> None:
        super().__init__(
            f"The hardware TPM refused to {doing}: response code 0x{rc:x} ({text})",
            KEPT_ALL,
            "Look the code up with `tpm2_rc_decode`; if it comes again, report it with the log.",
        )
        self.rc = rc


class BadSetting(TpmError):
    """The configuration names a TPM, PCRs or a policy that cannot be used: caller's fault."""

    code = ExitCode.USAGE

    def __init__(self, what: str, todo: str) -> None:
        super().__init__(what, KEPT_ALL, todo)


class TpmUnavailable(TpmError):
    """There is no TPM to talk to: missing, refused, busy beyond the deadline, or out of order."""

    code = ExitCode.TPM_UNAVAILABLE

    def __init__(self, reason: str, todo: str, kept: str = KEPT_ALL) -> None:
        super().__init__(f"The hardware TPM is not available: {reason}", kept, todo)
        self.reason = reason


class TpmBusy(TpmUnavailable):
    """Somebody else holds the TPM, or it asks for patience for longer than the deadline."""

    def __init__(self, doing: str, seconds: float, reason: str, kept: str = KEPT_ALL) -> None:
        super().__init__(
            f"it stayed busy for {seconds:g} s while we tried to {doing} ({reason})",
            "Find who else uses it (`fuser /dev/tpm0`; another manager; tpm2-abrmd), or try again later.",
            kept,
        )


class TpmFull(TpmUnavailable):
    """No room for another object, session or NV index inside the TPM."""

    def __init__(self, doing: str, what: str) -> None:
        super().__init__(
            f"it has no room for {what} (to {doing})",
            "Close other users of the TPM, or free the room: `tpm2_flushcontext -t -l -s`, `tpm2_nvundefine`.",
        )


class TpmNotStarted(TpmUnavailable):
    """TPM_RC_INITIALIZE: nobody sent TPM2_Startup. Locality 2 may not send it; firmware does."""

    def __init__(self, doing: str) -> None:
        super().__init__(
            f"it was not started (to {doing}); TPM2_Startup is the firmware's job",
            "Enable the TPM in the firmware set-up and reboot; with swtpm use `--flags startup-clear`.",
        )


class TpmFailureMode(TpmUnavailable):
    """TPM_RC_FAILURE or a failed self-test: the TPM does nothing until it is reset."""

    def __init__(self, doing: str, detail: str) -> None:
        super().__init__(
            f"it is in failure mode (to {doing}; {detail})",
            "Power-cycle the platform. If it stays so the chip is broken: use the recovery key on another TPM.",
        )


class TpmTransport(TpmUnavailable):
    """The bus, socket or device failed in the middle of a command, or a reply was not authentic."""

    def __init__(self, doing: str, detail: str) -> None:
        super().__init__(
            f"talking to it failed while we tried to {doing} ({detail})",
            "The connection is made anew at the next command. If it fails again check the TPM's wiring and log.",
            KEPT_UNKNOWN,
        )


class TpmWasReset(TpmUnavailable):
    """TPM_RC_REFERENCE_*: a session or object of ours is gone, in the middle of its use."""

    def __init__(self, doing: str) -> None:
        super().__init__(
            f"it lost what we had loaded (to {doing}): it was reset, or somebody else empties it",
            "Try again. If it comes back without a suspend or reset of this machine, find who else uses the TPM.",
            KEPT_UNKNOWN,
        )


class TpmLockout(TpmUnavailable):
    """TPM_RC_LOCKOUT: the dictionary-attack guard refuses protected objects for a while."""

    def __init__(self, doing: str) -> None:
        super().__init__(
            f"it is in dictionary-attack lockout (to {doing})",
            "Wait for its recovery time, or run `tpm2_dictionarylockout --clear-lockout` with the lockout password.",
        )


class OwnerAuthWanted(TpmError):
    """The owner hierarchy (or the SRK) has a password that we were not given."""

    code = ExitCode.DENIED

    def __init__(self, doing: str) -> None:
        super().__init__(
            f"The hardware TPM refused the owner password needed to {doing}",
            KEPT_ALL,
            "Give its owner password (`init --owner-auth-file FILE`), or take it away with `tpm2_changeauth -c o`.",
        )


class HierarchyAuthRefused(TpmError):
    """A hierarchy's password is another one than was given."""

    code = ExitCode.DENIED

    def __init__(self, hierarchy: str) -> None:
        super().__init__(
            f"The hardware TPM refused the {hierarchy} password",
            KEPT_ALL,
            f"Give its {hierarchy} password, or take it away with `tpm2_changeauth`.",
        )


class WrongLocality(TpmError):
    """The TPM does not see us at the locality we need, or does not enforce localities at all."""

    code = ExitCode.TPM_UNAVAILABLE

    def __init__(self, wanted: int, detail: str) -> None:
        super().__init__(
            f"The hardware TPM does not serve us at locality {wanted}: {detail}",
            KEPT_ALL,
            "Use a transport that can reach it (swtpm's control channel, `tis:` or `crb:` with `locality=2`), "
            "or choose the weaker mode explicitly with `--allow-locality 0`.",
        )
        self.wanted = wanted


class TpmCleared(TpmError):
    """There is no key at the SRK's handle: the TPM was cleared, or it is another, fresh TPM."""

    code = ExitCode.INTEGRITY

    def __init__(self, handle: int, pinned_name: bytes) -> None:
        super().__init__(
            f"The hardware TPM was cleared: no storage root key at 0x{handle:08x} (pinned {pinned_name.hex()})",
            "The store and all state images were kept as they are; the TPM can no longer unseal their keys.",
            "Run `vtpm-manager recover` with the recovery key.",
        )


class SrkChanged(TpmError):
    """The key at the SRK's handle is not the pinned one: other TPM, or somebody between it and us."""

    code = ExitCode.INTEGRITY

    def __init__(self, handle: int, pinned_name: bytes, found: bytes) -> None:
        super().__init__(
            f"This is not the hardware TPM the store belongs to: the storage root key at 0x{handle:08x} "
            f"is {found.hex()}, pinned is {pinned_name.hex()}",
            "No secret was sent to it; the store and all state images were kept.",
            "Put the right TPM back, or run `vtpm-manager recover` with the recovery key if it was replaced.",
        )
        self.found = found


class SrkUnusable(TpmError):
    """A key sits at the SRK's handle that cannot serve as storage root key."""

    code = ExitCode.TPM_UNAVAILABLE

    def __init__(self, handle: int, why: str) -> None:
        super().__init__(
            f"The key at 0x{handle:08x} is no storage root key we can use: {why}",
            "It was left in place.",
            f"If nobody needs it remove it with `tpm2_evictcontrol -c 0x{handle:08x}` and try again.",
        )


class PolicyMismatch(TpmError):
    """The platform is not in a state the sealed object allows. `differing`: PCR -> (sealed, present)."""

    code = ExitCode.DENIED

    def __init__(self, doing: str, differing: Mapping[int, tuple[bytes, bytes]]) -> None:
        pcrs = ", ".join(str(pcr) for pcr in sorted(differing)) or "none"
        values = sorted(differing.items())
        detail = "; ".join(f"PCR {pcr} is {new.hex()}, sealed for {old.hex()}" for pcr, (old, new) in values)
        why = f"PCRs that differ: {pcrs} ({detail})" if differing else "the policy is not satisfied here"
        super().__init__(
            f"The hardware TPM refused to {doing}: {why}",
            "The sealed object was kept and opens again when the values return.",
            "Boot the configuration it was sealed for, or run `vtpm-manager reseal` with the recovery key.",
        )
        self.differing = dict(differing)


class PcrsMoving(TpmBusy):
    """TPM_RC_PCR_CHANGED again and again: something extends PCRs faster than we can unseal."""

    def __init__(self, tries: int, doing: str = "unseal (TPM_RC_PCR_CHANGED)") -> None:
        super(TpmBusy, self).__init__(
            f"something extended PCRs during each of {tries} tries to {doing}",
            "Try again when the machine is quieter; a measuring service (IMA) may be extending PCRs.",
        )


class RecoveryRefused(TpmError):
    """The signature for the recovery branch does not fit the recovery key of the sealed object."""

    code = ExitCode.DENIED

    def __init__(self, why: str) -> None:
        super().__init__(
            f"The recovery key does not open the sealed object: {why}",
            "The sealed object was kept.",
            "Use the recovery file whose fingerprint `vtpm-manager check` shows.",
        )


class SealDamaged(TpmError):
    """A sealed object or its description is not what this TPM made: damaged, truncated or swapped."""

    code = ExitCode.INTEGRITY

    def __init__(self, why: str) -> None:
        super().__init__(
            f"A sealed object is damaged or was replaced: {why}",
            "Its bytes were kept.",
            "Restore the store from a backup, or run `vtpm-manager recover` with the recovery key.",
        )


class SealUnverified(TpmError):
    """What was just sealed did not come back: it must not be used."""

    code = ExitCode.TPM_UNAVAILABLE

    def __init__(self, why: str) -> None:
        super().__init__(
            f"A fresh seal could not be verified: {why}",
            "The new object was thrown away; whatever was sealed before stays valid.",
            "Check the PCR selection and the TPM with `vtpm-manager check`.",
        )


class AnchorMissing(TpmError):
    """The NV index of the anchor is gone, was never written, or is not the one we defined."""

    code = ExitCode.INTEGRITY

    def __init__(self, index: int, why: str) -> None:
        super().__init__(
            f"The anchor at NV index 0x{index:08x} is not ours any more: {why}",
            "The store was kept and is not opened, because nothing proves that it is the latest.",
            "Run `vtpm-manager recover` with the recovery key.",
        )
        self.index = index


class AnchorDenied(TpmError):
    """The anchor refuses our authorisation value: somebody redefined it, or the store is a foreign one."""

    code = ExitCode.INTEGRITY

    def __init__(self, index: int, doing: str) -> None:
        super().__init__(
            f"The anchor at NV index 0x{index:08x} refuses our authorisation to {doing}",
            "The anchor and the store were kept as they are.",
            "If the TPM's owner redefined it run `vtpm-manager recover` with the recovery key.",
        )
        self.index = index


class AnchorExists(TpmError):
    """The NV index is in use already, by us or by somebody else."""

    code = ExitCode.CONFLICT

    def __init__(self, index: int) -> None:
        super().__init__(
            f"NV index 0x{index:08x} exists already",
            "It was left as it is.",
            "Choose a free index, or remove it with `tpm2_nvundefine` if nobody needs it.",
        )
        self.index = index


class VolatileAnchorUnavailable(TpmError):
    """PCR 22 can only be used at locality 2."""

    code = ExitCode.TPM_UNAVAILABLE

    def __init__(self, locality: int) -> None:
        super().__init__(
            f"The volatile anchor (PCR 22) needs locality 2; this manager runs at locality {locality}",
            KEPT_ALL,
            "Use the durable anchor for every commit (strict mode), or a transport with locality 2.",
        )
