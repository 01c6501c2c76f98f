"""The source's half of a migration: a claim freezes the vTPM, a confirmation removes it, an operator may decide.

Order of a claim: the instance is heard no more; who claims is durable; the record says frozen; the anchor stands for
that; and only then the export's key leaves. `kill -9` between any two of them leaves a vTPM that runs here and was not
given away, or one that is frozen and that its claimer may ask for again.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final
from uuid import UUID

import trio

from frontend_backend import messages_migration as m
from frontend_backend.errors import BlobError
from frontend_backend.state_blob import BlobHeader
from manager.errors import BusyError, ConflictError, IntegrityError, ManagerError, NotFoundError
from manager.migration_parts import NotAsItWasError, Parts
from manager.migration_records import is_away, is_frozen, thawed
from manager.migration_state import Departure, Peer
from manager.removal_words import MIGRATED, event_text, migration_text
from storage.catalogue_rows import VtpmRow
from storage.store_records import PutVtpm, RecordFlags, VtpmRecord

_log = logging.getLogger("vtpm.migration")
UNKNOWN: Final = "unknown"  # peer of a frozen vTPM for which the data of who claimed it is lost
DEPARTED_KEPT: Final = 30 * 86400.0  # seconds in which a repeated confirmation is recognised
_NOT_TO_GIVE: Final = RecordFlags.FRESH | RecordFlags.QUARANTINED
_DENIED: Final = m.Refused(
    m.MigrationRefusal.DENIED, "this manager has no such state that may leave to yours now: see its 'vtpm-events'"
)
_STALE: Final = m.Refused(
    m.MigrationRefusal.STALE, "the vTPM was used after this state was taken out of it, so this is not its newest one"
)
_TAKEN: Final = m.Refused(m.MigrationRefusal.TAKEN, "the vTPM is frozen for another claim")


class Departures:
    """vTPMs that leave."""

    def __init__(self, parts: Parts, unwrap: Callable[[BlobHeader], bytes]) -> None:
        """`unwrap` returns the key of an export that this manager made; BlobError: it did not."""
        self._parts, self._unwrap = parts, unwrap
        self._registry, self._box = parts.registry, parts.box
        self._anchored: set[UUID] = set()  # frozen ones that the anchor is known to stand for

    def of(self, vtpm: UUID) -> Departure | None:
        """Return who claimed a vTPM that is frozen, None where it is not known."""
        return None if self._box.problem is not None else self._box.state.departures.get(vtpm)

    # --- what the destination asks -------------------------------------------------------------------

    async def claim(self, peer: Peer, request: m.Claim) -> m.MigrationReply:
        """Freeze a vTPM for a peer and hand its export's key over; the same answer to the same claim, no other."""
        vtpm = UUID(bytes=request.vtpm)
        try:
            header = BlobHeader.unpack(request.header)
            if header.vtpm != vtpm or header.store != self._registry.committer.store.uuid:
                return _DENIED
            key = self._unwrap(header)
        except BlobError as error:
            _log.warning("peer %s claims vTPM %s with what is no state of it: %s", peer.name, vtpm, error)
            return _DENIED
        row = self._registry.catalogue.find_vtpm(vtpm)
        if row is None or len(request.claim) != m.ID_SIZE:
            return _DENIED
        wanted = Departure(
            vtpm=vtpm,
            peer=peer.name,
            fingerprint=peer.fingerprint,
            export=header.export.hex(),
            claim=request.claim.hex(),
            generation=header.generation,
            since=int(time.time()),
        )
        async with self._parts.attachments.lock(vtpm):
            refused = await self._frozen_for(row, peer, wanted, header)
            if refused is not None:
                return refused
            if vtpm not in self._anchored:
                await self._registry.anchoring.write_durable()
                self._anchored.add(vtpm)
        return m.ClaimReply(key)

    async def _frozen_for(self, row: VtpmRow, peer: Peer, wanted: Departure, header: BlobHeader) -> m.Refused | None:
        """Have a vTPM frozen for this claim. Returns why it is not."""
        record = self._registry.record(row.uuid)
        if is_frozen(record.flags):
            if not _same(self._box.state.departures.get(row.uuid), wanted):
                return _TAKEN
            with trio.CancelScope(shield=True):  # it may have failed when it was frozen, and left an instance
                await self._parts.attachments.let_go(row, f"frozen, claimed by {peer.name}")
            return None
        not_here = is_away(record.flags) or record.flags & _NOT_TO_GIVE
        if not peer.may_take(row.uuid, record.group, time.time()) or not_here:
            return _DENIED
        self._anchored.discard(row.uuid)
        with trio.CancelScope(shield=True):
            try:
                await self._parts.freeze(row, wanted, lambda now: self._is_newest(now, header))
            except NotAsItWasError:
                return _STALE
            text = f"{row.name} claimed by {peer.name} {peer.fingerprint}, generation {wanted.generation}: frozen"
            self._registry.catalogue.log("migration-frozen", row.uuid, text)
        return None

    def _is_newest(self, now: VtpmRecord, header: BlobHeader) -> bool:
        same = (now.generation, now.digest) == (header.generation, header.state)
        return same and now.uuid not in self._parts.attachments.sleepers

    async def confirm(self, peer: Peer, request: m.Confirm) -> m.MigrationReply:
        """Remove a vTPM whose state the claimer has; the same answer to who asks again."""
        vtpm = UUID(bytes=request.vtpm)
        async with self._parts.attachments.lock(vtpm):
            row, departure = self._registry.catalogue.find_vtpm(vtpm), self._box.state.departures.get(vtpm)
            its_own = departure is not None and _named(departure, peer, request)
            if departure is not None and its_own and departure.done:
                return m.ConfirmReply()  # whether or not it is expected back by now
            if row is None and departure is None:
                return m.ConfirmReply()
            if row is None or departure is None or not its_own or not self._is_leaving(vtpm):
                return m.Refused(m.MigrationRefusal.RECLAIMED, "the vTPM is not frozen for this claim (any more)")
            with trio.CancelScope(shield=True):
                await self._left(row, departure, peer.by)
        return m.ConfirmReply()

    def _is_leaving(self, vtpm: UUID) -> bool:
        """Tell whether a vTPM is frozen, or its removal was cut short."""
        try:
            return is_frozen(self._registry.record(vtpm).flags)
        except NotFoundError:
            return True

    # --- what an operator says -----------------------------------------------------------------------

    async def release(self, row: VtpmRow, uid: int) -> None:
        """Remove a frozen vTPM because its operator says that the destination has it. Raises ConflictError."""
        async with self._parts.attachments.lock(row.uuid):
            self._refuse_other_than_frozen(row)
            departure = self.of(row.uuid) or Departure(row.uuid, UNKNOWN, "", "", "", 0, 0)
            self._registry.catalogue.log("migration-released", row.uuid, f"{row.name} by user {uid}")
            with trio.CancelScope(shield=True):
                await self._left(row, departure, uid)

    async def reclaim(self, row: VtpmRow, uid: int, *, unasked: bool) -> None:
        """Take a frozen vTPM back once the destination has promised never to run it; `unasked`: without that.

        Raises:
            ConflictError: it is not frozen, or the destination has it. BusyError, DeniedError: it does not answer.

        """
        async with self._parts.attachments.lock(row.uuid):
            self._refuse_other_than_frozen(row)
            if not unasked:
                await self._promised(row)
            with trio.CancelScope(shield=True):
                await self._registry.committer.commit(PutVtpm(thawed(self._registry.record(row.uuid))))
                if self._box.problem is None:
                    await self._box.save(lambda state: state.without_departure(row.uuid))
                self._anchored.discard(row.uuid)
                how = "WITHOUT the destination's promise" if unasked else "the destination promised not to run it"
                self._registry.catalogue.log("migration-reclaimed", row.uuid, f"{row.name} by user {uid}: {how}")
                await self._registry.anchoring.write_durable()

    async def _promised(self, row: VtpmRow) -> None:
        departure = self.of(row.uuid)
        stronger = (
            f"Nothing was changed, the vTPM stays frozen. If that manager is gone for good and its disk with it, "
            f"'vtpm-migrate-reclaim {row.name} --yes --destination-is-gone' takes it back; if it is not, two will run"
        )
        claimers = "" if departure is None else departure.fingerprint
        for fingerprint in claimers.split(","):  # several: one of them may have claimed it before a rollback
            peer = self._box.state.by_fingerprint(fingerprint)
            if departure is None or peer is None:
                raise ConflictError(
                    f"a manager that claimed vTPM {row.name}, or may have, is not paired any more: pair it again, or "
                    f"give the vTPM up with 'vtpm-migrate-release {row.name} --yes'. {stronger}"
                )
            await self._promised_by(peer, row, departure, stronger)

    async def _promised_by(self, peer: Peer, row: VtpmRow, departure: Departure, stronger: str) -> None:
        try:
            reply = await self._parts.ask(peer, m.Renounce(row.uuid.bytes, bytes.fromhex(departure.export)))
        except ManagerError as error:
            raise BusyError(f"{peer.name} was asked to give vTPM {row.name} up: {error}. {stronger}") from error
        match reply:
            case m.RenounceReply():
                return
            case m.Refused(m.MigrationRefusal.HAS_IT):
                raise ConflictError(
                    f"{peer.name} has vTPM {row.name}, or had it: it was not taken back, and stays frozen. Its "
                    f"confirmation removes it here, or 'vtpm-migrate-release {row.name} --yes'"
                )
            case m.Refused(code, text):
                raise BusyError(f"{peer.name} did not give vTPM {row.name} up ({code}: {text}). {stronger}")
            case _:
                raise IntegrityError(f"{peer.name} gave an answer that is none to Renounce. {stronger}")

    def _refuse_other_than_frozen(self, row: VtpmRow) -> None:
        if not is_frozen(self._registry.record(row.uuid).flags):
            raise ConflictError(f"vTPM {row.name} is not frozen: nobody claimed it. Nothing was changed")

    async def _left(self, row: VtpmRow, departure: Departure, uid: int) -> None:
        """Remove a vTPM that is with another manager; what was cut short is done again."""
        text = migration_text(row.name, departure.peer, departure.fingerprint)
        self._registry.catalogue.log(MIGRATED, row.uuid, text)
        await self._registry.remove(row, event_text(row.name, uid), departed=True)
        self._anchored.discard(row.uuid)
        if self._box.problem is None:
            oldest = time.time() - DEPARTED_KEPT
            gone = replace(departure, done=int(time.time()))
            await self._box.save(
                lambda state: replace(
                    state,
                    departures={
                        vtpm: kept for vtpm, kept in state.departures.items() if not kept.done or kept.done > oldest
                    }
                    | {row.uuid: gone},
                )
            )


def _same(kept: Departure | None, wanted: Departure) -> bool:
    """Tell whether it is the claim for which the vTPM was frozen; a peer may have another name by now."""
    if kept is None or kept.done:
        return False
    return (kept.fingerprint, kept.export, kept.claim) == (wanted.fingerprint, wanted.export, wanted.claim)


def _named(kept: Departure, peer: Peer, request: m.Confirm) -> bool:
    named = (peer.fingerprint, request.export.hex(), request.claim.hex())
    return (kept.fingerprint, kept.export, kept.claim) == named
