"""The save path: what libtpms stores becomes durable, and covered by the store, before the guest is answered.

Theory of operation (design section 6). libtpms calls the store hook inside a command. The hook encrypts all blobs
under a fresh key into the slot that is not live (`StateImage.save`), has the manager commit (key, digest,
generation), waits for the acknowledgement, and only then makes that slot live and returns. If anything of this fails
the hook raises, libtpms is told TPM_FAIL, and the state is not known to count or not to count until the manager is
asked again (`load`). Nothing here decides what the guest sees then; that is `vtpm`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Final
from uuid import UUID

from frontend_backend.deep_quote import bits
from frontend_backend.messages_instance import (
    Commit,
    CommitReply,
    Hibernate,
    Load,
    LoadReply,
    Measurements,
    MeasurementsReply,
    PcrRead,
    PcrReadReply,
)
from storage.errors import StorageError, StorageFull
from storage.secrets import StateKey
from storage.state_image import Emulator, Saved, StateImage
from vtpm_instance.errors import (
    BootNotMeasuredError,
    CommitRefusedError,
    CommitUnansweredError,
    HardwarePcrsError,
    ManagerConfusedError,
    ManagerRefusedError,
    ManagerSilentError,
    SlumberUnreadableError,
    StateNotWrittenError,
    WrongLeaseError,
    WrongVtpmError,
)
from vtpm_instance.managerlink import ManagerLink
from vtpm_instance.slumber import Slumber
from vtpm_instance.tpm_commands import MARGIN

LOAD_TIMEOUT: Final = 30.0  # seconds for the first Load; later ones have the commit's deadline
PCRS_TIMEOUT: Final = 10.0  # seconds for a busy hardware TPM; an attach waits 20 for the whole start
DEFAULT_COMMIT_TIMEOUT: Final = 90.0  # seconds; Linux' front end waits 120 s (reference/xen-vtpm.md 6.3)


class _Ahead:
    """Reads a state image while the manager commits that its state is used up: for what it is, a key tells later.

    A new object each time: after a failed flush the old one refuses to write.
    """

    def __init__(self, descriptor: int, vtpm: UUID) -> None:
        self._descriptor, self._vtpm = descriptor, vtpm
        self._image: StateImage | None = None
        self._error: StorageError | None = None

    def read(self) -> None:
        try:
            self._image = StateImage.open(self._descriptor, self._vtpm)
            self._image.read_ahead()
        except StorageError as error:
            self._error = error

    def image(self) -> StateImage:
        """Return it; raises what went wrong, now that the manager has said its word."""
        if self._error is not None:
            raise self._error
        assert self._image is not None, "the manager has answered, so it was asked"
        return self._image


class StateKeeper:
    """Keeps one vTPM's blobs durable. `blobs` is the dict that libtpms fills; `changed` is its store hook."""

    def __init__(self, vtpm: UUID, lease: int, image_descriptor: int, link: ManagerLink, emulator: Emulator) -> None:
        """Work on the locked state image `image_descriptor` of `vtpm`; opens nothing yet."""
        self._vtpm, self._lease, self._descriptor = vtpm, lease, image_descriptor
        self._link, self._emulator = link, emulator
        self._image: StateImage | None = None
        self._generation = 0
        self._needed = 0
        self.roomy = False
        self._gathering = False
        self._dirty = False
        self._timeout = LOAD_TIMEOUT
        self._slumber: Slumber | SlumberUnreadableError | None = None
        self.restoring = b""  # header of the export that `blobs` came in by, until they are committed
        self.blobs: dict[str, bytes] = {}

    def load(self) -> LoadReply:
        """Ask the manager which state counts, and read that one into `blobs`. Writes nothing.

        The reply that is returned has lost its key. `blobs` is empty when the reply is fresh. What a hibernated vTPM
        left beside them is for `take_slumber`, and is gone with the next load.

        Raises:
            ManagerError: see ManagerLink.ask.
            WrongVtpmError, WrongLeaseError: the record is not this instance's.
            StorageError: the image does not open, or no slot is the recorded one.

        """
        ahead = _Ahead(self._descriptor, self._vtpm)
        reply = self._link.ask(Load(), self._timeout, ahead.read)
        if not isinstance(reply, LoadReply):
            raise ManagerConfusedError("Load", type(reply).__name__)
        if reply.vtpm != self._vtpm.bytes:
            raise WrongVtpmError(self._vtpm, UUID(bytes=reply.vtpm))
        if reply.lease != self._lease:
            raise WrongLeaseError(self._lease, reply.lease)
        image = ahead.image()
        blobs: dict[str, bytes] = {}
        if reply.fresh:
            image.assume_fresh()
        else:
            key = StateKey(reply.key)
            try:
                blobs = dict(image.load(key, reply.digest, reply.generation))
            finally:
                key.wipe()
        try:
            self._slumber = Slumber.taken_from(blobs)
        except SlumberUnreadableError as error:
            self._slumber = error  # a platform reset needs nothing of it
        self._image, self.blobs, self.restoring = image, blobs, b""
        self._generation, self._timeout, self._dirty = reply.generation, reply.commit_timeout, False
        self._measure()
        return replace(reply, key=b"")

    def hardware_pcrs(self, selection: int) -> dict[int, bytes]:
        """Ask the manager for the hardware TPM's SHA-256 PCRs in a bit map.

        Raises:
            HardwarePcrsError: it has none for us, or none in time. ManagerGoneError, ManagerConfusedError.

        """
        pcrs = tuple(bits(selection))
        try:
            reply = self._link.ask(PcrRead("sha256", pcrs), min(self._timeout, PCRS_TIMEOUT))
        except (ManagerRefusedError, ManagerSilentError) as error:
            raise HardwarePcrsError(str(error)) from error
        if not isinstance(reply, PcrReadReply) or [len(value) for value in reply.values] != [32] * len(pcrs):
            raise ManagerConfusedError("PcrRead", type(reply).__name__)
        return dict(zip(pcrs, reply.values, strict=True))

    def measurements(self) -> tuple[bytes, ...]:
        """Ask the manager what this boot of the guest is measured by.

        Raises:
            BootNotMeasuredError: it does not say, or not in time. ManagerGoneError, ManagerConfusedError.

        """
        try:
            reply = self._link.ask(Measurements(), self._timeout)
        except (ManagerRefusedError, ManagerSilentError) as error:
            raise BootNotMeasuredError(str(error)) from error
        if not isinstance(reply, MeasurementsReply):
            raise ManagerConfusedError("Measurements", type(reply).__name__)
        return reply.measured

    @property
    def config(self) -> int:
        """What GET_CONFIG answers: the stored state and state blobs are both encrypted, always."""
        return 3

    @staticmethod
    def lock(_retries: int) -> int:
        """Succeed (LOCK_STORAGE): the image is locked for as long as the instance lives."""
        return 0

    @property
    def generation(self) -> int:
        """Generation of the last acknowledged state, 0 when there is none."""
        return self._generation

    def changed(self, _name: str, _content: bytes | None) -> None:
        """Take note that libtpms changed `blobs`; returns when the change is durable, or is being gathered.

        Raises what `commit` raises.
        """
        self._dirty = True
        if not self._gathering:
            self.commit()

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Leave changes in memory for the while; the caller commits afterwards, before any guest is answered."""
        self._gathering = True
        try:
            yield
        finally:
            self._gathering = False

    def commit_gathered(self) -> None:
        """Commit if something changed since the last commit. Raises what `commit` raises."""
        if self._dirty:
            self.commit()

    def take_slumber(self) -> Slumber | None:
        """Return what a hibernated vTPM left, once; None when the loaded state is not that of one.

        Raises:
            SlumberUnreadableError: it is one's, and cannot be read.

        """
        slumber, self._slumber = self._slumber, None
        if isinstance(slumber, SlumberUnreadableError):
            raise slumber
        return slumber

    def commit_slumber(self, slumber: Slumber) -> None:
        """Make `blobs` and `slumber` durable as the state to wake up with; nothing may be committed after it.

        Raises what `commit` raises; after StateNotWrittenError and CommitRefusedError one can go on as if nothing had
        been tried.
        """
        saved = self._save(self.blobs | slumber.blobs())
        message = Hibernate(saved.generation, saved.key.reveal(), saved.digest, self._lease)
        saved.key.wipe()
        self._tell_manager(message)

    def commit(self, *, final: bool = False) -> None:
        """Make `blobs` durable and covered by the store; `final` marks the state of a clean stop.

        Raises:
            StateNotWrittenError: the image took no state, the last acknowledged one counts.
            CommitUnansweredError: the manager did not say whether the new one counts.
            CommitRefusedError: the manager refused, the last acknowledged one counts.
            ManagerGoneError, ManagerConfusedError: see ManagerLink.ask.

        """
        saved = self._save(self.blobs)
        message = Commit(saved.generation, saved.key.reveal(), saved.digest, self._lease, final, self.restoring)
        saved.key.wipe()
        self._tell_manager(message)
        self._opened().switch()
        self._generation, self._dirty, self.restoring = saved.generation, False, b""
        self._measure()

    def _save(self, blobs: Mapping[str, bytes]) -> Saved:
        """Write the slot that is not live. Raises StateNotWrittenError."""
        image, generation = self._opened(), self._generation + 1
        try:
            image.ensure_room(sum(map(len, blobs.values())))
            return image.save(blobs, generation, self._emulator)
        except StorageError as error:
            raise StateNotWrittenError(generation) from error

    def _tell_manager(self, message: Commit | Hibernate) -> None:
        try:
            reply = self._link.ask(message, self._timeout)
        except ManagerSilentError as error:
            raise CommitUnansweredError(message.generation, error.seconds) from error
        except ManagerRefusedError as error:
            raise CommitRefusedError(message.generation, error.code, error.text) from error
        if not isinstance(reply, CommitReply) or reply.generation != message.generation:
            raise ManagerConfusedError("Commit", repr(reply))

    def make_room(self) -> bool:
        """Grow the image until the next command's state fits for certain; returns False when the disk is full.

        `roomy` tells whether there is need to.

        Raises:
            StorageError: the image does not grow for another reason.

        """
        try:
            self._opened().ensure_room(self._needed)
        except StorageFull:
            return False
        self.roomy = True
        return True

    def fits(self, growth: int) -> bool:
        """Tell whether a state that is `growth` bytes larger than now fits into the image as it is."""
        return growth - MARGIN <= self._opened().room - self._needed

    def _opened(self) -> StateImage:
        assert self._image is not None, "load comes first"
        return self._image

    def _measure(self) -> None:
        self._needed = sum(map(len, self.blobs.values())) + MARGIN
        self.roomy = self._needed <= self._opened().room
