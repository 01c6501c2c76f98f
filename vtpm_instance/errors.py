"""Errors of the instance and the keeper. Each message says what happened, what was kept and what to do.

One tree: InstanceError. Below it: the C library (LibtpmsError...), the save path (SaveError...), the life of the
process (StartError...), and the keeper (KeeperError...).
"""

from collections.abc import Sequence
from uuid import UUID


class InstanceError(Exception):
    """Something in the instance or the keeper went wrong."""


class LibtpmsError(InstanceError):
    """A libtpms call failed."""

    def __init__(self, call: str, code: int, text: str = "") -> None:
        super().__init__(text or f"libtpms: {call} failed with 0x{code:x}")
        self.call, self.code = call, code


class LibtpmsMisuseError(InstanceError):
    """Our fault: libtpms was called in the wrong order (it does not guard itself)."""


class StateRefusedError(LibtpmsError):
    """The emulator cannot take the stored state: damaged, incomplete or of another family."""

    def __init__(self, family: str, code: int, why: str) -> None:
        super().__init__(
            "MainInit",
            code,
            f"the TPM {family} emulator refuses the stored state ({why}, 0x{code:x}); nothing was changed and no "
            "fresh TPM was made; restore a good state image, or have the manager clear its vTPM with vtpm-reset",
        )
        self.family, self.why = family, why


class QuoteRefusedError(InstanceError):
    """The vTPM gives no evidence for a quote; it goes on as before."""

    def __init__(self, command: int, code: int, why: str = "") -> None:
        super().__init__(why or f"the vTPM answered command 0x{command:x} with 0x{code:x}")
        self.code = code


class StartupRefusedError(InstanceError):
    """The TPM answered its Startup command with an error."""

    def __init__(self, kind: str, code: int) -> None:
        super().__init__(
            f"TPM2_Startup({kind}) was answered with 0x{code:x}; the stored state is unchanged; "
            "a platform reset starts this vTPM with Startup(CLEAR)"
        )
        self.kind, self.code = kind, code


class ResumeRefusedError(InstanceError):
    """The emulator does not take the volatile state that a hibernated vTPM left."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"this vTPM was hibernated, and its volatile state cannot be resumed ({why}); what it stored is kept; a "
            "platform reset starts it with Startup(CLEAR)"
        )


class SlumberUnreadableError(ResumeRefusedError):
    """What was saved beside the volatile state is not what this release writes."""

    def __init__(self) -> None:
        super().__init__("what was saved with it is of another release")


class NotNowError(InstanceError):
    """Nobody's fault: an order to hibernate comes at a moment, or meets a vTPM, that does not allow it."""

    def __init__(self, why: str) -> None:
        super().__init__(why)


class SaveError(InstanceError):
    """A state could not be made durable; the last acknowledged state is untouched."""


class StateNotWrittenError(SaveError):
    """The state image took no new state, so nothing was committed."""

    def __init__(self, generation: int) -> None:
        super().__init__(
            f"state {generation} could not be written to the state image; the last acknowledged state is kept; "
            "make room or repair the disk, then do a platform reset"
        )
        self.generation = generation


class CommitUnansweredError(SaveError):
    """The manager did not acknowledge in time: the state may or may not count; a new Load tells."""

    def __init__(self, generation: int, seconds: float) -> None:
        super().__init__(
            f"the manager did not acknowledge state {generation} within {seconds:g} s; both states are kept; "
            "start the manager, then do a platform reset"
        )
        self.generation, self.seconds = generation, seconds


class CommitRefusedError(SaveError):
    """The manager refused a commit."""

    def __init__(self, generation: int, code: str, text: str) -> None:
        super().__init__(
            f"the manager refused state {generation} ({code}: {text}); the last acknowledged state is kept; "
            "see the manager's log, then do a platform reset"
        )
        self.generation, self.code = generation, code


class HardwarePcrsError(InstanceError):
    """The hardware TPM's PCR values could not be put into the vTPM, which its attachment asks for."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"the hardware TPM's PCR values were not put into this vTPM: {problem}; its state is kept, and it answers "
            "failure until a platform reset, which tries again"
        )


class BootNotMeasuredError(InstanceError):
    """What the guest is started with could not be put into the vTPM's PCRs; nobody may take them for a boot's."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"the guest's boot was not measured into this vTPM: {problem}; its state is kept, and it answers failure "
            "until a platform reset, which tries again"
        )


class ManagerError(InstanceError):
    """The manager's side of the ring is not usable."""


class ManagerSilentError(ManagerError):
    """The manager did not answer a request in time."""

    def __init__(self, verb: str, seconds: float) -> None:
        super().__init__(f"the manager did not answer {verb} within {seconds:g} s; nothing was changed; is it running?")
        self.verb, self.seconds = verb, seconds


class ManagerGoneError(ManagerError):
    """Nobody holds the manager's end of the ring any more, so it can never answer again."""

    def __init__(self) -> None:
        super().__init__(
            "manager and keeper are both gone; the last acknowledged state is kept; start them and attach again"
        )


class ManagerRefusedError(ManagerError):
    """The manager refused a request."""

    def __init__(self, verb: str, code: str, text: str) -> None:
        super().__init__(f"the manager refused {verb} ({code}): {text}")
        self.verb, self.code, self.text = verb, code, text


class ManagerConfusedError(ManagerError):
    """The manager's answer does not fit the request."""

    def __init__(self, verb: str, answer: str) -> None:
        super().__init__(f"the manager answered {verb} with {answer}; nothing was changed; are both of one version?")
        self.verb, self.answer = verb, answer


class StartError(InstanceError):
    """The instance cannot start; the state image is unchanged."""


class ImageBusyError(StartError):
    """Another process holds the lock on the state image."""

    def __init__(self, vtpm: UUID) -> None:
        super().__init__(f"the state image of {vtpm} is in use by another process; nothing was changed; stop that one")
        self.vtpm = vtpm


class WrongVtpmError(StartError):
    """The manager's record is for another vTPM than this instance was started for."""

    def __init__(self, expected: UUID, got: UUID) -> None:
        super().__init__(f"the manager answered Load for {got}, this instance was started for {expected}")
        self.expected, self.got = expected, got


class WrongLeaseError(StartError):
    """The manager's record carries another lease than this instance was started with."""

    def __init__(self, expected: int, got: int) -> None:
        super().__init__(f"the manager answered Load for lease {got}, this instance was started for lease {expected}")
        self.expected, self.got = expected, got


class WrongFamilyError(StartError):
    """The manager's record is of another TPM family than this instance was started for."""

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(f"the manager answered Load for a TPM {got}, this instance was started for a TPM {expected}")
        self.expected, self.got = expected, got


class CrashedBeforeError(InstanceError):
    """An earlier instance of this vTPM ended without a clean stop, so its PCRs are lost."""

    def __init__(self) -> None:
        super().__init__(
            "the instance before this one ended without a clean stop: what it acknowledged is kept, its PCRs are lost; "
            "a platform reset (vtpm-reset-platform) starts this vTPM again"
        )


class FramingError(InstanceError):
    """A stream of TPM commands cannot be cut into commands any more."""

    def __init__(self, size: int) -> None:
        super().__init__(f"a TPM command announces {size} bytes; at least 10 and at most 4096 are possible")
        self.size = size


class KeeperError(InstanceError):
    """The keeper cannot do what the manager asked."""


class NoSuchInstanceError(KeeperError):
    """The keeper keeps nothing under this UUID and lease."""

    def __init__(self, vtpm: UUID, lease: int) -> None:
        super().__init__(f"no instance of {vtpm} with lease {lease} is kept here")
        self.vtpm, self.lease = vtpm, lease


class AlreadyKeptError(KeeperError):
    """An instance of this vTPM is kept already."""

    def __init__(self, vtpm: UUID, lease: int) -> None:
        super().__init__(
            f"an instance of {vtpm} (lease {lease}) is kept already; nothing was started; "
            "stop and forget that one first"
        )
        self.vtpm, self.lease = vtpm, lease


class StillRunningError(KeeperError):
    """An instance that still runs cannot be forgotten."""

    def __init__(self, vtpm: UUID, pid: int) -> None:
        super().__init__(f"the instance of {vtpm} still runs as process {pid}; it is kept; stop it first")
        self.vtpm, self.pid = vtpm, pid


class WrongDescriptorsError(KeeperError):
    """A request came with another number or kind of descriptors than it names."""

    def __init__(self, wanted: int, got: int) -> None:
        super().__init__(f"the request needs {wanted} descriptors, {got} came; nothing was started")
        self.wanted, self.got = wanted, got


class BadRequestError(KeeperError):
    """A request of the manager's makes no sense; nothing was done."""


class KeeperStoppingError(KeeperError):
    """The keeper is ending and starts nothing any more."""

    def __init__(self) -> None:
        super().__init__("the keeper is stopping; nothing was started; start it again")


class KeeperInUseError(KeeperError):
    """Another keeper serves this socket."""

    def __init__(self, path: str) -> None:
        super().__init__(f"a keeper already serves {path}; it was left alone; use that one or another path")
        self.path = path


class SpawnRefusedError(KeeperError):
    """The spawner did not make an instance."""


class SpawnerLostError(KeeperError):
    """The spawner is not there any more. Instances that run are not affected."""

    def __init__(self, pid: int, why: str, status: int | None) -> None:
        ended = "" if status is None else f", its exit status is {status}"
        super().__init__(
            f"the spawner (process {pid}) is lost: {why}{ended}; running instances are not affected; another one is "
            "started for the next instance"
        )
        self.pid, self.why, self.status = pid, why, status


class NotTakenOutError(InstanceError):
    """No state blob was given out; the vTPM goes on as it is."""

    def __init__(self, generation: int, why: str) -> None:
        super().__init__(
            f"the state of generation {generation} was not given out, as the manager gives no key for it: {why}; the "
            "vTPM goes on"
        )
        self.generation = generation


class IncompleteBlobsError(InstanceError):
    """Whoever put state blobs in left some out; the stored state is kept."""

    def __init__(self, missing: Sequence[str]) -> None:
        super().__init__(
            f"the state that was put in lacks its {' and '.join(missing)} part, so it was not used; the stored state "
            "is kept; have it restored whole"
        )
        self.missing = tuple(missing)


class RehearsalError(InstanceError):
    """An instance that was tried out in the spawner did not end as it should, so real ones are not started."""

    def __init__(self, status: int, player: int) -> None:
        super().__init__(
            f"a throw-away instance ended with status {status} (its counterpart with {player}); no instance can be "
            "started here; look at the lines above"
        )
        self.status, self.player = status, player
