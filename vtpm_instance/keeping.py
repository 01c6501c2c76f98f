"""What a vTPM needs of whoever keeps its state: the manager's `statekeeper`, or swtpm's files without a manager."""

from contextlib import AbstractContextManager
from typing import Protocol

from vtpm_instance.slumber import Slumber


class Loaded(Protocol):
    """What is known of a state that was loaded; `frontend_backend.messages_instance.LoadReply` is one."""

    @property
    def family(self) -> str:
        """The TCG family as users write it."""

    @property
    def startup(self) -> str:
        """How the vTPM comes up: a value of `tpm_commands.Startup`."""

    @property
    def fresh(self) -> bool:
        """Whether there is no state yet, so that the TPM is to be manufactured."""

    @property
    def hw_pcrs(self) -> int:
        """Hardware PCRs to put in after each Startup(CLEAR), bit 0 for PCR 0."""

    @property
    def after_reset(self) -> str:
        """How it comes up after each platform reset, where that is another way than `startup` and than CLEAR."""

    @property
    def measured(self) -> tuple[bytes, ...]:
        """What this boot of the guest is measured by (frontend_backend.measurements), should it be a Startup(CLEAR)."""


class Keeper(Protocol):
    """Keeps one vTPM's blobs durable. `blobs` is the dict that libtpms fills; `changed` is its store hook."""

    blobs: dict[str, bytes]
    roomy: bool  # whether any command's state surely fits; plain, for a hot path

    @property
    def generation(self) -> int:
        """Number of the last state that is durable, 0 when there is none."""

    @property
    def config(self) -> int:
        """The answer to GET_CONFIG: bit 0, stored blobs are encrypted; bit 1, blobs that are taken out are."""

    def load(self) -> Loaded:
        """Read the state that counts into `blobs`; empty when it is fresh. Writes nothing."""

    def take_slumber(self) -> Slumber | None:
        """Return what a hibernated vTPM left, once; None when the loaded state is not that of one."""

    def changed(self, name: str, content: bytes | None) -> None:
        """Take note that libtpms changed `blobs`; returns when the change is durable, or is being gathered."""

    def gather(self) -> AbstractContextManager[None]:
        """Leave changes in memory for the while; the caller commits afterwards, before any guest is answered."""

    def commit_gathered(self) -> None:
        """Commit if something changed since the last commit."""

    def commit(self, *, final: bool = False) -> None:
        """Make `blobs` durable; `final` marks the state of a clean stop."""

    def commit_slumber(self, slumber: Slumber) -> None:
        """Make `blobs` and `slumber` durable as the state to wake up with."""

    def hardware_pcrs(self, selection: int) -> dict[int, bytes]:
        """Return the hardware TPM's SHA-256 PCRs in a bit map."""

    def measurements(self) -> tuple[bytes, ...]:
        """Return what the guest's next boot is measured by, as `Loaded.measured`."""

    def make_room(self) -> bool:
        """See to it that the next command's state fits for certain; returns False when the disk is full."""

    def fits(self, growth: int) -> bool:
        """Tell whether a state that is `growth` bytes larger than now fits as it is."""

    def lock(self, retries: int) -> int:
        """Take the lock on the stored state back (LOCK_STORAGE), with `retries` 10 ms apart; returns a `Result`."""
