"""The destination's half of a migration: an incoming vTPM, the claim, its confirmation, and giving it up.

A claim's number is durable before it is asked, so that only who asked may ask again. The state is committed as the
vTPM's own record by its instance; the anchor stands for that before the source is told to remove its own.
"""

import logging
import math
import os
import time
from contextlib import suppress
from dataclasses import replace
from typing import Final
from uuid import UUID

import trio

from frontend_backend import messages_migration as m
from frontend_backend.state_blob import BlobHeader
from manager.errors import BusyError, ConflictError, DeniedError, ManagerError, NotFoundError
from manager.group_rows import find_group
from manager.incoming import add_incoming, never_had, remove_incoming
from manager.migration_identity import parse_certificate
from manager.migration_parts import NotAsItWasError, Parts
from manager.migration_records import is_away, is_incoming
from manager.migration_state import Arrival, Departure, MigrationState, Peer
from storage.catalogue_rows import VtpmRow
from storage.errors import StorageError

_log = logging.getLogger("vtpm.migration")
_TRIES: Final = 3  # of a claim whose answer was lost: QEMU waits, and its guest stands still meanwhile
_BETWEEN_TRIES: Final = 1.0  # seconds
_CLAIM_SECONDS: Final = 50.0  # below the 60 that an instance waits for the key
_FIRST_PAUSE: Final = 1.0  # seconds between two confirmations of what the source did not answer, doubled up to
_LONGEST_PAUSE: Final = 300.0
_MALFORMED: Final = "an answer that is none"


class Arrivals:
    """vTPMs that come."""

    def __init__(self, parts: Parts) -> None:
        """Work with `parts`."""
        self._parts, self._registry, self._box = parts, parts.registry, parts.box
        self._claiming: dict[UUID, trio.CancelScope] = {}
        self._some = trio.Event()
        self._anchored: set[str] = set()  # claims of those that came, and that the anchor stands for

    def of(self, vtpm: UUID) -> Arrival | None:
        """Return from whom a vTPM comes, or came and was not confirmed yet."""
        return None if self._box.problem is not None else self._box.state.arrivals.get(vtpm)

    def may_commit(self, vtpm: UUID, header: BlobHeader) -> str | None:
        """Return why the state that came with this export may not be made durable here, None where it may."""
        arrival = self.of(vtpm)
        if arrival is None or not arrival.claim or arrival.export != header.export.hex():
            return f"vTPM {vtpm} was not claimed with this state (any more)"
        return None if is_incoming(self._registry.record(vtpm).flags) else f"vTPM {vtpm} has a state already"

    def committed(self, _vtpm: UUID, _header: BlobHeader) -> None:
        """Tell that an incoming vTPM's state is durable here."""
        self._some.set()

    # --- incoming vTPMs ------------------------------------------------------------------------------

    async def expect(self, peer: Peer, uuid: UUID, name: str | None, group: str, family: str, uid: int) -> VtpmRow:
        """Make an incoming vTPM: a record without state, which only a claim from this peer can fill.

        Raises:
            DeniedError: it may not come from there into this group. And what `Registry.add` raises.

        """
        place = find_group(self._registry.catalogue, group)
        if not peer.may_bring(uuid, place.uuid, time.time()):
            raise DeniedError(
                f"vTPM {uuid} may not come from {peer.name} into group {place.name} now; nothing was made. "
                f"'vtpm-migrate-authorise {peer.name} --come {uuid}' or '--come-group {place.name}' allows it"
            )
        arrival = Arrival(uuid, peer.name, peer.fingerprint, int(time.time()))
        row = await add_incoming(
            self._registry, name, uuid, place, family, lambda: self._box.save(lambda state: state.with_arrival(arrival))
        )
        text = f"{row.name} from {peer.name} {peer.fingerprint}, by user {uid}"
        self._registry.catalogue.log("migration-expected", uuid, text)
        return row

    async def forget(self, row: VtpmRow, event: str) -> bool:
        """Remove a vTPM that never got its state; the caller has its lock. Returns False where it is no such one."""
        try:
            if not is_incoming(self._registry.record(row.uuid).flags):
                return False
        except NotFoundError:
            return False  # a removal that was cut short
        self._registry.refuse_attached(row)
        if self.of(row.uuid) is not None:
            await self._box.save(lambda state: state.without_arrival(row.uuid))
        await remove_incoming(self._registry, row, event)
        return True

    # --- the claim -----------------------------------------------------------------------------------

    async def claim(self, vtpm: UUID, header: BlobHeader, raw: bytes) -> bytes:
        """Claim a vTPM by a state blob's header (`raw`: its bytes) and return the export's key, 32 bytes.

        Raises:
            DeniedError: it is not expected, or the source does not give it. ConflictError: the source used it since,
            or gave it to another claim. BusyError: the source does not answer; the same claim may be repeated.

        """
        arrival, peer = self._expected(vtpm, header)
        if arrival.export != header.export.hex():
            arrival = replace(arrival, export=header.export.hex(), claim=os.urandom(m.ID_SIZE).hex())
            await self._box.save(lambda state: state.with_arrival(arrival))
        request = m.Claim(vtpm.bytes, raw[: BlobHeader.SIZE], bytes.fromhex(arrival.claim))
        with trio.CancelScope() as scope:
            self._claiming[vtpm] = scope
            try:
                with trio.fail_after(_CLAIM_SECONDS):
                    reply = await self._asked(peer, request)
            except trio.TooSlowError as error:
                raise BusyError(f"{peer.name} did not answer within {_CLAIM_SECONDS:g} s; ask again") from error
            finally:
                if self._claiming.get(vtpm) is scope:  # else another instance's claim, of after this one's end
                    del self._claiming[vtpm]
        if scope.cancelled_caught or self.of(vtpm) != arrival or not is_incoming(self._registry.record(vtpm).flags):
            raise ConflictError(f"vTPM {vtpm} was given up while it was claimed: {peer.name} wanted it back")
        match reply:
            case m.ClaimReply(key):
                self._registry.catalogue.log("migration-claimed", vtpm, f"from {peer.name} {peer.fingerprint}")
                return key
            case m.Refused(code, text):
                self._registry.catalogue.log("migration-refused", vtpm, f"{peer.name} says {code}: {text}")
                raise _refusal(code, f"{peer.name} does not give vTPM {vtpm} away: {text}")
            case _:
                raise ManagerError(f"{peer.name} gave {_MALFORMED}")

    def _expected(self, vtpm: UUID, header: BlobHeader) -> tuple[Arrival, Peer]:
        """Return from whom this vTPM is expected now. Raises DeniedError."""
        arrival = self.of(vtpm)
        record = self._registry.record(vtpm)
        if arrival is None or header.vtpm != vtpm or not is_incoming(record.flags):
            raise DeniedError(
                f"this state is of vTPM {header.vtpm} of another manager (store {header.store}), and vTPM {vtpm} does "
                f"not wait for it: 'vtpm-migrate-expect' makes one that does"
            )
        peer = self._box.state.by_fingerprint(arrival.fingerprint)
        if peer is None or not peer.may_bring(vtpm, record.group, time.time()):
            raise DeniedError(f"vTPM {vtpm} may not come from {arrival.peer} (any more): 'vtpm-migrate-authorise'")
        if parse_certificate(peer.certificate)[2] != header.store:
            raise DeniedError(f"this state is of the manager of store {header.store}, which is not {peer.name}")
        return arrival, peer

    async def _asked(self, peer: Peer, request: m.Claim) -> m.MigrationReply:
        """Ask for the same thing again where an answer was lost: the source may have frozen the vTPM already."""
        for left in reversed(range(_TRIES)):
            try:
                reply = await self._parts.ask(peer, request)
                if left and isinstance(reply, m.Refused) and reply.code is m.MigrationRefusal.BUSY:
                    raise BusyError(reply.text)
            except BusyError:
                if not left:
                    raise
                await trio.sleep(_BETWEEN_TRIES)
            else:
                return reply
        raise AssertionError("the last try returns or raises")

    # --- the confirmation ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Tell sources that what they gave is durable here, until they answer; until cancelled."""
        pause = math.inf
        self._some.set()  # what an earlier life of this manager did not come to
        while True:
            with trio.move_on_after(pause):
                await self._some.wait()
                pause = _FIRST_PAUSE
            self._some = trio.Event()
            left = False
            for arrival in self._unconfirmed():
                try:
                    await self._confirm(arrival)
                except (ManagerError, StorageError, OSError) as error:
                    _log.warning("vTPM %s is here, and its source was not told yet: %s", arrival.vtpm, error)
                    left = True
            pause = min(pause * 2, _LONGEST_PAUSE) if left else math.inf

    def _unconfirmed(self) -> list[Arrival]:
        if self._box.problem is not None:
            return []
        return [arrival for arrival in self._box.state.arrivals.values() if arrival.claim and self._is_here(arrival)]

    def _is_here(self, arrival: Arrival) -> bool:
        """Tell whether what was claimed became durable here; what is not seen (a closed group) is not confirmed."""
        try:
            return not is_away(self._registry.record(arrival.vtpm).flags)
        except NotFoundError:
            return True  # it was, and was removed since: what is given up before leaves no arrival
        except ManagerError:
            return False

    async def _confirm(self, arrival: Arrival) -> None:
        """Confirm one arrival; whatever takes its place meanwhile (the vTPM is expected again) stays as it is."""
        vtpm = arrival.vtpm
        if self.of(vtpm) != arrival:
            return
        peer = self._box.state.by_fingerprint(arrival.fingerprint)
        if peer is None:
            raise DeniedError(f"{arrival.peer} is not paired any more: its operator has to release the vTPM there")
        if arrival.claim not in self._anchored:  # it must not be lost here once it is removed there
            await self._registry.anchoring.write_durable()
            self._anchored.add(arrival.claim)
        request = m.Confirm(vtpm.bytes, bytes.fromhex(arrival.export), bytes.fromhex(arrival.claim))
        match await self._parts.ask(peer, request):
            case m.ConfirmReply():
                await self._done(arrival)
                self._registry.catalogue.log("migrated-in", vtpm, f"from {peer.name} {peer.fingerprint}")
            case m.Refused(m.MigrationRefusal.RECLAIMED, text):
                await self._taken_back(arrival, text)
            case m.Refused(code, text):
                raise BusyError(f"{peer.name} says {code}: {text}")
            case _:
                raise ManagerError(f"{peer.name} gave {_MALFORMED}")

    async def _done(self, arrival: Arrival) -> None:
        def without(state: MigrationState) -> MigrationState:
            return state.without_arrival(arrival.vtpm) if state.arrivals.get(arrival.vtpm) == arrival else state

        await self._box.save(without)
        self._anchored.discard(arrival.claim)

    async def _taken_back(self, arrival: Arrival, why: str) -> None:
        """Freeze what the source's operator took back without asking us: of two, this one stops, asleep or not."""
        vtpm = arrival.vtpm
        async with self._parts.attachments.lock(vtpm):
            row = self._registry.catalogue.find_vtpm(vtpm)
            if row is None or self.of(vtpm) != arrival:  # removed since, and perhaps expected again
                await self._done(arrival)
                return
            generation, since = self._registry.record(vtpm).generation, int(time.time())
            departure = Departure(
                vtpm, arrival.peer, arrival.fingerprint, arrival.export, arrival.claim, generation, since
            )
            with trio.CancelScope(shield=True):
                with suppress(NotAsItWasError):
                    await self._parts.freeze(row, departure, lambda record: not is_away(record.flags))
                await self._done(arrival)
                await self._registry.anchoring.write_durable()
        text = f"{row.name} is frozen: {arrival.peer} took it back and did not ask ({why})"
        _log.error("vTPM %s", text)
        self._registry.catalogue.log("migration-frozen", vtpm, text)

    # --- giving up -----------------------------------------------------------------------------------

    async def renounce(self, peer: Peer, request: m.Renounce) -> m.MigrationReply:
        """Give a claimed vTPM up that has not come to a durable state here, so that its source may run it again."""
        vtpm = UUID(bytes=request.vtpm)
        arrival = self.of(vtpm)
        if arrival is not None and arrival.fingerprint != peer.fingerprint:
            text = (
                f"it is expected from '{arrival.peer}', paired under another certificate; vtpm-remove there ends that"
            )
            return m.Refused(m.MigrationRefusal.DENIED, text)
        if (scope := self._claiming.get(vtpm)) is not None:
            scope.cancel()
        async with self._parts.attachments.lock(vtpm):
            with trio.CancelScope(shield=True):
                if not await self._given_up(vtpm, peer):
                    return m.Refused(m.MigrationRefusal.HAS_IT, "it has the vTPM, or had it")
        return m.RenounceReply()

    async def _given_up(self, vtpm: UUID, peer: Peer) -> bool:
        """Remove an incoming vTPM, its instance first. Returns False where it has or had a state."""
        row = self._registry.catalogue.find_vtpm(vtpm)
        if row is None:
            left = self._box.state.departures.get(vtpm)
            passed_on = left is not None and left.fingerprint != peer.fingerprint
            return self.of(vtpm) is None and not passed_on and never_had(self._registry, vtpm)
        running = self._parts.attachments.running(vtpm)
        if running is not None:
            await self._parts.instances.silence(running)  # what it is committing is durable, or never will be
        try:
            incoming = is_incoming(self._registry.record(vtpm).flags)
        except NotFoundError:
            incoming = False
        if not incoming:
            if running is not None:
                self._parts.instances.hear(running)
            return False
        await self._parts.attachments.let_go(row, "given up: its source took it back")
        await self._box.save(lambda state: state.without_arrival(vtpm))
        await remove_incoming(self._registry, row, "its source took it back")
        return True


def _refusal(code: m.MigrationRefusal, text: str) -> ManagerError:
    if code in (m.MigrationRefusal.STALE, m.MigrationRefusal.TAKEN, m.MigrationRefusal.RECLAIMED):
        return ConflictError(text)
    return BusyError(text) if code is m.MigrationRefusal.BUSY else DeniedError(text)
