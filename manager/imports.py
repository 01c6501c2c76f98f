"""State blobs on their way back: whether a vTPM may start from them. docs/adr/0011 has the rule and why.

An export is taken back without permission only if it is the very state that the record names; else as `restores`
permits. The same is judged twice: when the instance asks for the key, and, by what the commit says of itself, when the
state that was put in is made the record's. Between the two nothing is remembered, so that a manager that dies there
leaves nothing to be put right. An export of another manager is the `Claimer`'s affair.
"""

import logging
import time
from dataclasses import dataclass, field
from typing import Final, Protocol
from uuid import UUID

from frontend_backend import messages_instance as m
from frontend_backend.errors import BlobError
from frontend_backend.messages_blobs import Export, Import, ImportReply
from frontend_backend.state_blob import BlobHeader
from manager.blob_events import BlobEvents
from manager.errors import ManagerError
from manager.exports import Exports, family_of, is_fresh
from manager.migration_records import is_away
from manager.registry import Registry
from manager.restores import Policy, Restores
from manager.running import Running
from manager.tombstones import iso
from storage.errors import CatalogueError, StorageError
from storage.store_records import VtpmRecord

_log = logging.getLogger("vtpm.blobs")
_WORDS: Final = 600  # characters of a refusal that are sent to the instance; a message has one page


class Claimer(Protocol):
    """Has a vTPM come over from the manager that exported it (migration)."""

    async def claim(self, vtpm: UUID, header: BlobHeader, raw: bytes) -> bytes:
        """Return the key of another manager's export, having claimed the vTPM from it; `raw` is the packed header.

        Raises:
            ManagerError: it is not to be had; nothing was changed here.

        """

    def may_commit(self, vtpm: UUID, header: BlobHeader) -> str | None:
        """Return why a state that came in by this export may not be made durable here, None where it may."""

    def committed(self, vtpm: UUID, header: BlobHeader) -> None:
        """Take note that it is durable here."""


class _Refused(Exception):  # noqa: N818 - an outcome, not an error of ours
    """An import is not to be: `code` and words for the instance and for people."""

    def __init__(self, code: m.RefusalCode, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class _Grounds:
    """On what an import was granted; `policy` None: it is the newest state, or another manager's, without a `key`."""

    header: BlobHeader
    policy: Policy | None = None
    key: bytes = field(default=b"", repr=False)


class Imports:
    """Judges what instances want to start from; `refused` says, by vTPM, what was refused last and why."""

    def __init__(self, registry: Registry, exports: Exports, restores: Restores, events: BlobEvents) -> None:
        """Judge by `registry`'s records; `claimer` is set by whoever knows other managers."""
        self._registry, self._exports, self._restores, self._events = registry, exports, restores, events
        self.claimer: Claimer | None = None
        self.refused: dict[UUID, str] = {}

    # what an instance asks

    def export(self, running: Running, request: Export) -> m.Reply:
        """Answer an instance that wants to let its vTPM's state out."""
        return self._exports.export(running, request)

    async def take_in(self, running: Running, request: Import) -> m.Reply:
        """Answer an instance that was given a state blob: with the key, or why not."""
        try:
            record = self._record(running.vtpm)
            grounds = self._judge(record, request.header)
            key = grounds.key or await self._claim(running.vtpm, grounds.header, request.header)
            newest = bool(grounds.key) and grounds.policy is None
        except _Refused as refused:
            self._tell(running.vtpm, str(refused))
            return m.Refusal(refused.code, str(refused)[:_WORDS])
        _log.debug("vTPM %s: %s is put in", running.vtpm, grounds.header)
        return ImportReply(key, newest)

    def noted(self, running: Running, report: m.Report) -> None:
        """Take note of what an instance says of a blob that it refused by itself."""
        self._tell(running.vtpm, report.text)

    # what an instance commits

    def objection(self, record: VtpmRecord, commit: m.Commit) -> m.Refusal | None:
        """Return why a state that was put in may not be made the record's, None where it may.

        Of one that is not the newest an event is kept first: none is put in that nobody is told of.
        """
        try:
            grounds = self._judge(record, commit.restored)
            if not grounds.key:
                why = None if self.claimer is None else self.claimer.may_commit(record.uuid, grounds.header)
                if why is not None:
                    raise _Refused(m.RefusalCode.DENIED, why)
            elif grounds.policy is not None:
                self._audit(record, grounds.header, commit.generation)
        except _Refused as refused:
            self._tell(record.uuid, str(refused))
            return m.Refusal(refused.code, str(refused)[:_WORDS])
        return None

    def committed(self, record: VtpmRecord, commit: m.Commit) -> None:
        """Take note that it is durable; `record` is the one that was replaced, or the new one, sent again."""
        try:
            header = self._exports.header_of(commit.restored)
        except BlobError:
            return  # of a commit that is sent again nothing but its triple was looked at
        if header.vtpm != record.uuid:
            return
        self.refused.pop(record.uuid, None)
        if header.store != self._exports.store:
            if self.claimer is not None:
                self.claimer.committed(record.uuid, header)
        elif is_fresh(header, record):
            text = f"state of generation {header.generation}, the newest, as generation {commit.generation}"
            self._events.routine("restored", record.uuid, text)
        else:
            self._restores.used(record.uuid)

    # judgement

    def _record(self, vtpm: UUID) -> VtpmRecord:
        try:
            return self._registry.committer.store.get(vtpm)
        except StorageError as error:
            raise _Refused(m.RefusalCode.UNKNOWN_VTPM, str(error)) from error

    def _judge(self, record: VtpmRecord, untrusted: bytes) -> _Grounds:
        """Return on what grounds an export may be put in. Raises _Refused."""
        denied = m.RefusalCode.DENIED
        try:
            header = self._exports.header_of(untrusted)
        except BlobError as error:
            raise _Refused(m.RefusalCode.MALFORMED, f"what was put in cannot be read: {error}") from error
        if header.vtpm != record.uuid:
            raise _Refused(denied, f"what was put in is a state of vTPM {header.vtpm}, which is another one")
        if header.family != family_of(record):
            text = f"what was put in is a state of a TPM {header.family}, and the vTPM is a TPM {family_of(record)}"
            raise _Refused(denied, text)
        if header.store != self._exports.store:
            if self.claimer is None:
                raise _Refused(denied, f"what was put in comes from another manager (store {header.store})")
            return _Grounds(header)
        try:
            key = self._exports.unwrap(header)
        except BlobError as error:
            raise _Refused(denied, f"what was put in is not as it was exported: {error}") from error
        if is_away(record.flags):  # a permission for an older state is none for a second one of it
            text = (
                "what was put in was exported here, and the vTPM has moved, or is to come, by migration: only a claim"
            )
            raise _Refused(denied, f"{text} brings its state")
        if is_fresh(header, record):
            return _Grounds(header, None, key)
        policy = self._restores.may_use(record.uuid, record.flags, header.export)
        if policy is Policy.NEVER:
            raise _Refused(m.RefusalCode.ROLLBACK, self._older(record, header))
        return _Grounds(header, policy, key)

    def _older(self, record: VtpmRecord, header: BlobHeader) -> str:
        return (
            f"what was put in is the state of generation {header.generation}, exported {iso(header.made)}, and the "
            f"newest is generation {record.generation}: that is a rollback, which nobody permitted. The newest state "
            f"is kept. If the older one is wanted all the same, say 'vtpm-allow-restore {self._name(record.uuid)}' and "
            f"have QEMU restore it again"
        )

    async def _claim(self, vtpm: UUID, header: BlobHeader, raw: bytes) -> bytes:
        assert self.claimer is not None, "judged before"
        try:
            return await self.claimer.claim(vtpm, header, raw)
        except (ManagerError, StorageError) as error:
            raise _Refused(m.RefusalCode.DENIED, str(error)) from error
        except Exception as error:
            _log.exception("vTPM %s: a claim failed in a way nobody foresaw", vtpm)  # it must not end the manager
            raise _Refused(m.RefusalCode.DENIED, "the manager made a mistake; see its log") from error

    def _audit(self, record: VtpmRecord, header: BlobHeader, generation: int) -> None:
        text = (
            f"{self._name(record.uuid)}: state of generation {header.generation}, exported {iso(header.made)}, in "
            f"place of generation {record.generation}, as generation {generation}; {self._restores.words(record.uuid)}"
        )
        _log.warning("vTPM %s rolled back: %s", record.uuid, text)
        try:
            self._registry.catalogue.log("rolled-back", record.uuid, text)
        except CatalogueError as error:
            raise _Refused(m.RefusalCode.STORE_FAILED, f"the event of it cannot be kept: {error}") from error

    def _tell(self, vtpm: UUID, text: str) -> None:
        """Keep a refusal where an administrator looks; QEMU's user is told nothing but that it failed."""
        self.refused[vtpm] = f"{iso(time.time())}: {text}"
        if not self._events.may_tell_of_refusal(vtpm):
            return
        _log.warning("vTPM %s: a state blob was refused: %s", vtpm, text)
        try:
            self._registry.catalogue.log("restore-refused", vtpm, text)
        except CatalogueError as error:
            _log.warning("vTPM %s: the event of it is not kept: %s", vtpm, error)

    def _name(self, vtpm: UUID) -> str:
        try:
            row = self._registry.catalogue.find_vtpm(vtpm)
        except CatalogueError:
            row = None
        return str(vtpm) if row is None else row.name
