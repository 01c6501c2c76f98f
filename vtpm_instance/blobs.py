"""A managed vTPM's state on its way out to QEMU and back, always encrypted: `StateBlobs` on the manager's keys.

An *export* is what QEMU reads out between two commands of the guest: all parts are made at once from one state and
encrypted under a key of their own, which the manager's header has, wrapped. Before anything more is done with the TPM
`used` makes a new generation, so that what was read out is history by then. What is *put in* is decrypted with the key
that the manager gives if this vTPM may start from it, and is complete or not used at all (docs/adr/0011).

What lives here: the two directions. What must not: when power comes and goes (`power`).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from frontend_backend.errors import BlobDamagedError, BlobError
from frontend_backend.messages_blobs import Export, ExportReply, Import, ImportReply
from frontend_backend.messages_instance import RefusalCode
from frontend_backend.state_blob import NONCE_BYTES, BlobHeader, Part, PartFlags, SealedPart, seal_part
from frontend_backend.tpmhdr import TpmFamily
from storage.secrets import ExportKey
from vtpm_instance.control_machine import BlobFlags, Result
from vtpm_instance.errors import (
    IncompleteBlobsError,
    ManagerConfusedError,
    ManagerError,
    ManagerRefusedError,
    NotTakenOutError,
)
from vtpm_instance.journal import note
from vtpm_instance.libtpms import PERMANENT, SAVED, VOLATILE, Tpm
from vtpm_instance.managerlink import ManagerLink
from vtpm_instance.statekeeper import StateKeeper
from vtpm_instance.tpm_commands import RC_INITIALIZE, code_of, read_clock

EXPORT_TIMEOUT: Final = 20.0  # seconds that QEMU, whose guest is stopped, waits for a manager that is away
IMPORT_TIMEOUT: Final = 60.0  # seconds; the manager may have to claim the vTPM from another one first
_NAMES: Final = {Part.PERMANENT: PERMANENT, Part.VOLATILE: VOLATILE, Part.SAVED: SAVED}
# What QEMU prints as a number is all that its user sees; the manager's log and events have the words.
_RESULTS: Final = {
    RefusalCode.MALFORMED.value: Result.BAD_PARAMETER,
    RefusalCode.ROLLBACK.value: Result.BAD_VERSION,
}


@dataclass(slots=True)
class _TakenOut:
    """What was read out: of which generation, of which start of the TPM, the encrypted blobs and their key.

    The key stays for as long as this state is the one that counts, which the process has in clear anyway: QEMU's
    restore mostly meets the instance that saved.
    """

    generation: int
    start: int
    header: bytes
    key: ExportKey
    blobs: dict[Part, bytes] = field(repr=False)


@dataclass(slots=True)
class _PutIn:
    """What was put in so far: parts of one export, in clear, and its key while parts are missing."""

    header: BlobHeader
    raw: bytes
    key: ExportKey
    newest: bool
    parts: dict[Part, bytes] = field(default_factory=dict, repr=False)
    started: bool = True  # whether there is anything to go on from, beyond a power on

    @property
    def missing(self) -> frozenset[Part]:
        """Parts that are still to come."""
        return self.header.parts - self.parts.keys()


class ManagedBlobs:
    """The state blobs of one managed vTPM; `refused` tells the manager why one was not taken."""

    def __init__(
        self, emulator: Tpm, keeper: StateKeeper, link: ManagerLink, family: TpmFamily, refused: Callable[[str], None]
    ) -> None:
        """Let out what `emulator` and `keeper` have, with keys that the manager at `link` gives."""
        self._tpm, self._keeper, self._link, self._family = emulator, keeper, link, family
        self._refused = refused
        self._taken_out: _TakenOut | None = None
        self._put_in: _PutIn | None = None

    # out

    def take_out(self, kind: int, _flags: int) -> tuple[int, int, bytes]:
        """Return (result, reply flags, whole blob), encrypted; RETRY where the state has no such part.

        Raises:
            NotTakenOutError: the manager gives no key. LibtpmsError. ManagerError: see ManagerLink.ask.

        """
        part = Part(kind)
        if part is Part.SAVED and not self._has_saved:
            return Result.RETRY, 0, b""  # nothing is taken out, so nothing may be kept of this moment either
        out = self._taken_out
        if out is None or (out.generation, out.start) != (self._keeper.generation, self._tpm.starts):
            self._forget_taken_out()
            out = self._taken_out = self._export()
        return Result.SUCCESS, BlobFlags.ENCRYPTED, out.blobs[part]

    @property
    def _has_saved(self) -> bool:
        return self._family is TpmFamily.TPM_1_2 and SAVED in self._keeper.blobs

    def _export(self) -> _TakenOut:
        """Encrypt the state as it is now: the permanent part as committed, the volatile one of the running TPM."""
        flags = dict.fromkeys(Part, PartFlags.NONE)
        # First: with any command libtpms may store its clock, or fewer failed tries, which is a commit of its own.
        if self._family is TpmFamily.TPM_2_0 and code_of(self._tpm.process(read_clock())) == RC_INITIALIZE:
            flags[Part.VOLATILE] = PartFlags.UNSTARTED
        contents = {Part.PERMANENT: self._keeper.blobs[PERMANENT]}
        if self._has_saved:
            contents[Part.SAVED] = self._keeper.blobs[SAVED]

        def look_at_tpm() -> None:
            contents[Part.VOLATILE] = self._tpm.volatile()

        generation, parts = self._keeper.generation, tuple(map(int, (*contents, Part.VOLATILE)))
        try:
            reply = self._link.ask(Export(generation, parts), EXPORT_TIMEOUT, look_at_tpm)
        except ManagerRefusedError as error:
            raise NotTakenOutError(generation, error.text) from error
        if not isinstance(reply, ExportReply) or len(reply.header) != BlobHeader.SIZE:
            raise ManagerConfusedError("Export", type(reply).__name__)
        key = ExportKey(reply.key)
        blobs = {
            part: seal_part(reply.header, key.view, part, content, os.urandom(NONCE_BYTES), flags[part])
            for part, content in contents.items()
        }
        return _TakenOut(generation, self._tpm.starts, reply.header, key, blobs)

    def used(self) -> None:
        """Make what was taken out, or put in, history: a new generation, unless there is one since.

        Without anything that was taken out, something was put in: perhaps before a power on that dropped it.

        Raises what a commit raises.
        """
        out = self._taken_out
        if self._keeper.restoring or out is None or out.generation == self._keeper.generation:
            self._keeper.commit()
        self._forget_taken_out()

    def _forget_taken_out(self) -> None:
        if self._taken_out is not None:
            self._taken_out.key.wipe()
            self._taken_out = None

    # in

    @property
    def staged(self) -> bool:
        """Whether a part was put in: the next power on starts from all of them, or fails."""
        return self._put_in is not None

    def put_in(self, kind: int, _flags: int, data: bytes) -> int:
        """Take a part in; one that is refused drops those before it, too."""
        try:
            result, why = self._take(kind, data)
        except BlobDamagedError as error:
            result, why = Result.DECRYPT_ERROR, f"a state blob was put in that cannot be used: {error}"
        except BlobError as error:
            result, why = Result.BAD_PARAMETER, f"a state blob was put in that cannot be used: {error}"
        except ManagerRefusedError as error:  # which has told its own log and events
            result, why = _RESULTS.get(error.code, Result.FAIL), ""
            note(f"state blob {kind} refused: {error.text}")
        except ManagerError:
            self.forget()
            raise
        if result:
            self.forget()
        if why:
            note(f"state blob {kind} refused: {why}")
            self._refused(why)
        return result

    def _take(self, kind: int, data: bytes) -> tuple[Result, str]:
        """Take a part in; returns (result, what is wrong). Raises BlobError, ManagerError."""
        sealed = SealedPart.parse(data)
        if sealed.part != kind:
            return Result.BAD_PARAMETER, f"state blob {sealed.part:d} was put in as {kind}"
        held = self._put_in
        if held is None:
            key, newest = self._key_of(sealed)
            held = self._put_in = _PutIn(sealed.header, sealed.export_header, key, newest)
        elif held.raw != sealed.export_header:
            return Result.BAD_PARAMETER, f"the state blobs put in are of two exports: {held.header}, {sealed.header}"
        elif sealed.part in held.parts:
            return Result.BAD_PARAMETER, f"state blob {kind} was put in twice"
        held.parts[sealed.part] = sealed.open(held.key.view)
        held.started &= not sealed.flags & PartFlags.UNSTARTED
        if not held.missing:
            held.key.wipe()
        return Result.SUCCESS, ""

    def _key_of(self, sealed: SealedPart) -> tuple[ExportKey, bool]:
        """Return the key, and whether this is the newest state: known where we gave it out; else the manager judges.

        It judges in any case when what came in is committed.
        """
        out = self._taken_out
        if out is not None and out.header == sealed.export_header and out.generation == self._keeper.generation:
            return ExportKey(out.key.view), True
        reply = self._link.ask(Import(sealed.export_header), IMPORT_TIMEOUT)
        if not isinstance(reply, ImportReply) or len(reply.key) != ExportKey.size:
            raise ManagerConfusedError("Import", type(reply).__name__)
        return ExportKey(reply.key), reply.newest

    @property
    def newest(self) -> bool:
        """Whether what was put in is the state that the record names."""
        return self._put_in is not None and self._put_in.newest

    def take_staged(self) -> dict[str, bytes]:
        """Return what was put in by libtpms' names, and forget it; the next commit says whose state it is.

        Raises:
            IncompleteBlobsError: a part is missing.

        """
        held, self._put_in = self._put_in, None
        assert held is not None, "asked only where something is staged"
        held.key.wipe()
        if held.missing:
            error = IncompleteBlobsError(sorted(part.name.lower() for part in held.missing))
            self._refused(str(error))
            raise error
        self._keeper.restoring = held.raw
        self._forget_taken_out()
        used = held.parts if held.started else {Part.PERMANENT: held.parts[Part.PERMANENT]}
        return {_NAMES[part]: content for part, content in used.items()}

    def forget(self) -> None:
        """Drop what was put in: it was refused, or switched off before it was used."""
        self._keeper.restoring = b""
        if self._put_in is not None:
            self._put_in.key.wipe()
            self._put_in = None
