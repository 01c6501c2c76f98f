"""Migration between managers: who this one is, which others it knows, and what either may do. Never two running.

The source's half is `migration_source`, the destination's `migration_destination`, the lines between them
`migration_wire`; docs/adr/ has why a claim decides.
"""

import logging
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Final
from uuid import UUID

import trio

from frontend_backend import messages_migration as m
from frontend_backend.state_blob import BlobHeader
from manager.attachments import Attachments
from manager.errors import BusyError, ConflictError, ManagerError, NotFoundError, UsageError
from manager.instances import Instances
from manager.migration_box import MigrationBox
from manager.migration_destination import Arrivals
from manager.migration_identity import make, parse_certificate, tls_context
from manager.migration_parts import Parts
from manager.migration_records import frozen, is_frozen
from manager.migration_rollback import may_have_left, with_departures
from manager.migration_source import Departures
from manager.migration_state import Identity, MigrationState, Peer
from manager.migration_wire import ask, parse_address
from manager.registry import Registry
from manager.token_bucket import TokenBucket
from storage.errors import StorageError
from storage.store_records import PutVtpm

_log = logging.getLogger("vtpm.migration")
_REFUSALS_A_SECOND: Final = 1.0  # of one peer that are told in events; more are refused all the same
_REFUSALS_AT_ONCE: Final = 20.0


class Migration:
    """This manager among others. `departures` and `arrivals` are its two halves."""

    def __init__(
        self,
        box: MigrationBox,
        registry: Registry,
        attachments: Attachments,
        instances: Instances,
        unwrap: Callable[[BlobHeader], bytes],
    ) -> None:
        """Work with an open installation; `unwrap` returns the key of an export of this manager's (BlobError: none)."""
        self.box, self._registry, self._attachments = box, registry, attachments
        self._instances, self._store = instances, registry.committer.store.uuid
        self._making = trio.Lock()
        self._noted: dict[str, TokenBucket] = {}
        self._server_context: tuple[object, ssl.SSLContext] | None = None
        parts = Parts(box, registry, attachments, instances, self.ask)
        self.departures, self.arrivals = Departures(parts, unwrap), Arrivals(parts)

    # --- who we are, whom we know --------------------------------------------------------------------

    async def identity(self) -> Identity:
        """Return the identity that counts; it is made at the first need, durable and anchored before it is shown.

        Raises:
            IntegrityError: the data is missing. TpmError: the anchor was not written.

        """
        async with self._making:
            made = self.known_identity()
            if made is None:
                made = await trio.to_thread.run_sync(make, self._store)
                fingerprint = parse_certificate(made.certificate)[1]
                await self.box.save(lambda state: _with_identity(state, made), fingerprint)
                await self._registry.anchoring.write_durable()
                self._registry.catalogue.log("migration-identity", None, f"made: {fingerprint}")
            return made

    async def begin_anew(self, uid: int) -> None:
        """Go on without the data that is missing: nobody is paired, and who claimed what is frozen is not known.

        Raises ConflictError: it is not missing. TpmError: the anchor was not written.
        """
        await self.box.begin_anew()
        self._registry.catalogue.log("migration-anew", None, f"without the data that was missing, by user {uid}")
        await self._registry.anchoring.write_durable()

    def known_identity(self) -> Identity | None:
        """Return the identity that counts, None where there is none: of an earlier life none does."""
        made = self.box.state.identity
        if made is None or parse_certificate(made.certificate)[1] != self.box.identity_counts:
            return None
        return made

    def peer(self, name: str) -> Peer:
        """Return a peer by name. Raises NotFoundError."""
        try:
            return self.box.state.peers[name]
        except KeyError:
            raise NotFoundError(f"there is no peer '{name[:80]}'; 'vtpm-migrate-list' shows what there is") from None

    async def authorise(self, peer: Peer) -> None:
        """Pair with a manager, or change what it may; durable and anchored on return.

        Raises:
            ConflictError: another name has this certificate. UsageError: its address is none, or it is ourselves.

        """
        if peer.address:
            parse_address(peer.address)
        own = parse_certificate((await self.identity()).certificate)[1]
        if peer.fingerprint == own:
            raise UsageError("this is this manager's own certificate: the other manager's is wanted. Nothing was done")
        known = self.box.state.by_fingerprint(peer.fingerprint)
        if known is not None and known.name != peer.name:
            raise ConflictError(
                f"this certificate is that of peer '{known.name}'; nothing was changed. Revoke that one first, or "
                f"authorise under its name"
            )
        await self.box.save(lambda state: state.with_peer(peer))
        await self._registry.anchoring.write_durable()
        self._registry.catalogue.log("migration-authorised", None, f"{_in_words(peer)}, by user {peer.by}")

    async def revoke(self, name: str, uid: int) -> Peer:
        """Forget a peer: from now on it is not even spoken to. What it claimed stays frozen. Raises NotFoundError."""
        peer = self.peer(name)
        await self.box.save(lambda state: state.without_peer(name))
        await self._registry.anchoring.write_durable()
        self._registry.catalogue.log("migration-revoked", None, f"{name} {peer.fingerprint}, by user {uid}")
        return peer

    async def settle(self) -> None:
        """Freeze what may have left of groups that are open by now, and take frozen vTPMs from their guests.

        Before anything is taken over or started. Raises StorageError, TpmError.
        """
        await self._freeze_doubtful()
        store, away = self._registry.committer.store, []
        for attachment in self._registry.catalogue.each_attachment():
            with suppress(StorageError):  # closed, damaged, missing: whoever starts it meets that
                if is_frozen(store.get(attachment.vtpm).flags):
                    away.append(attachment.vtpm)
        for vtpm in away:
            row = self._registry.catalogue.find_vtpm(vtpm)
            if row is not None:
                async with self._attachments.lock(vtpm):
                    await self._attachments.let_go(row, "frozen, claimed by another manager")

    async def _freeze_doubtful(self) -> None:
        store = self._registry.committer.store
        if self.box.problem is not None:
            return
        groups = [group for group in self.box.state.doubtful if group not in store.groups() or store.is_open(group)]
        if not groups:
            return
        left = [(record, peers) for record, peers in may_have_left(store, self.box.state) if record.group in groups]
        await self.box.save(lambda state: with_departures(state, left))  # so that what is frozen says for whom
        for record, _ in left:
            await self._freeze_now(record.uuid)
            self._registry.catalogue.log(
                "migration-frozen", record.uuid, "it may have left before the store was put back"
            )

        def settled(state: MigrationState) -> MigrationState:
            doubtful = tuple(group for group in state.doubtful if group not in groups)
            claimants = state.claimants if doubtful else ()
            return replace(state, doubtful=doubtful, claimants=claimants)

        await self.box.save(settled)
        await self._registry.anchoring.write_durable()

    async def _freeze_now(self, vtpm: UUID) -> None:
        """Freeze a vTPM as its record is by now; one that ran on while its group was closed is heard no more."""
        async with self._attachments.lock(vtpm):
            running = self._attachments.running(vtpm)
            if running is not None:
                await self._instances.silence(running)
            store = self._registry.committer.store
            await self._registry.committer.commit(PutVtpm(frozen(store.get(vtpm))))

    # --- speaking ------------------------------------------------------------------------------------

    async def ask(self, peer: Peer, request: m.MigrationRequest) -> m.MigrationReply:
        """Ask a peer. Raises UsageError: it has no address. And what `migration_wire.ask` raises."""
        if not peer.address:
            raise UsageError(
                f"peer {peer.name} has no address: give it with 'vtpm-migrate-authorise {peer.name} --address'"
            )
        context = tls_context(await self.identity(), [peer.certificate], server=False)
        return await ask(parse_address(peer.address), context, peer.fingerprint, request)

    def server_context(self) -> ssl.SSLContext | None:
        """Return TLS that takes the peers there are, None where nobody is paired; it is made anew when they change."""
        if self.box.problem is not None:
            return None
        peers, identity = self.box.state.peers, self.known_identity()
        if identity is None or not peers:
            return None
        if self._server_context is None or self._server_context[0] is not self.box.state:
            context = tls_context(identity, [peer.certificate for peer in peers.values()], server=True)
            self._server_context = (self.box.state, context)
        return self._server_context[1]

    def knows(self, fingerprint: str) -> bool:
        """Tell whether this is a peer's certificate."""
        return self.box.problem is None and self.box.state.by_fingerprint(fingerprint) is not None

    async def handle(self, fingerprint: str, request: m.MigrationRequest) -> m.MigrationReply:
        """Answer a peer, whom the TLS connection has proved to be the one with this certificate."""
        try:
            peer = self.box.state.by_fingerprint(fingerprint)
            if peer is None:  # revoked while the connection stood
                return m.Refused(m.MigrationRefusal.DENIED, "not authorised")
            reply = await self._answer(peer, request)
        except BusyError as error:
            return m.Refused(m.MigrationRefusal.BUSY, str(error)[:200])
        except (ManagerError, StorageError, OSError) as error:
            _log.error("a request of another manager failed: %s", error)
            return m.Refused(m.MigrationRefusal.FAILED, "it failed; that manager's log says why")
        if isinstance(reply, m.Refused):
            self._note_refusal(peer, UUID(bytes=request.vtpm), type(request).__name__, reply)
        return reply

    async def _answer(self, peer: Peer, request: m.MigrationRequest) -> m.MigrationReply:
        match request:
            case m.Claim():
                return await self.departures.claim(peer, request)
            case m.Confirm():
                return await self.departures.confirm(peer, request)
            case m.Renounce():
                return await self.arrivals.renounce(peer, request)

    def _note_refusal(self, peer: Peer, vtpm: UUID, what: str, refused: m.Refused) -> None:
        bucket = self._noted.setdefault(peer.fingerprint, TokenBucket(_REFUSALS_A_SECOND, _REFUSALS_AT_ONCE))
        _log.warning("%s of vTPM %s by peer %s refused (%s): %s", what, vtpm, peer.name, refused.code, refused.text)
        if bucket.take(time.monotonic()):
            text = f"{what} by {peer.name} refused ({refused.code}): {refused.text}"
            self._registry.catalogue.log("migration-refused", vtpm, text)


def _with_identity(state: MigrationState, identity: Identity) -> MigrationState:
    return replace(state, identity=identity)


def _in_words(peer: Peer) -> str:
    counts = (
        f"{len(peer.leave_vtpms)} vTPMs and {len(peer.leave_groups)} groups may leave, "
        f"{len(peer.come_vtpms)} vTPMs and {len(peer.come_groups)} groups may come"
    )
    return f"{peer.name} {peer.fingerprint}: {counts}"
