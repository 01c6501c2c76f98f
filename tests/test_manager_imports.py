"""Who may start from a state blob: judged on real records, before the key is given and again at the commit."""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

import pytest
import trio
from e2e_rig import Guest
from manager_rig import ModelTpm, RunningDaemon, installation, running_daemon

from frontend_backend import messages_instance as m
from frontend_backend.local import LocalRing
from frontend_backend.messages_blobs import Export, ExportReply, Import, ImportReply
from frontend_backend.state_blob import BlobHeader, Part, wrap
from manager.blob_events import REFUSED_AT_ONCE, ROUTINE_AT_ONCE, BlobEvents
from manager.client import RemoteError
from manager.errors import ConflictError
from manager.exports import Exports, is_fresh
from manager.imports import Imports
from manager.keys import state_blob_key
from manager.restores import Policy, Restores
from manager.ring_blobs import NoBlobs
from manager.running import Running, Stage
from storage.catalogue_rows import VtpmRow
from storage.store_records import PutVtpm, RecordFlags, VtpmRecord

PARTS = frozenset({Part.PERMANENT, Part.VOLATILE})
INDEX = 0x01500030


@pytest.fixture
def model() -> ModelTpm:
    return ModelTpm()


@pytest.fixture
def place(model: ModelTpm) -> Iterator[Any]:
    with installation(model) as made:
        yield made


@dataclass
class Noted:
    """Events that come often."""

    events: list[tuple[str, str]] = field(default_factory=list)

    def note(self, kind: str, _vtpm: UUID, text: str, _seconds: float) -> None:
        self.events.append((kind, text))


class World:
    """A manager with one vTPM that was used, and what judges its state blobs."""

    def __init__(self, running: RunningDaemon, row: VtpmRow) -> None:
        self.daemon, self.row, self.registry = running, row, running.registry
        self.key = state_blob_key(running.opened.secret.store_key, running.opened.store.uuid)
        self.noted = Noted()
        self.happened = BlobEvents(self.noted)
        self.exports = Exports(running.opened.store, self.key, self.happened)
        self.restores = Restores(self.registry)
        self.imports = Imports(self.registry, self.exports, self.restores, self.happened)
        front, back = LocalRing.pair()
        self.rings = (front, back)
        self.instance = Running(row.uuid, 1, 1, back, "none", "none", stage=Stage.RUNNING)

    @property
    def record(self) -> VtpmRecord:
        return self.registry.record(self.row.uuid)

    def header(self, **changes: Any) -> BlobHeader:
        """What was exported of the state that is the newest now, or would be if something were otherwise."""
        made, key = self.exports.make(self.record, PARTS)
        return wrap(self.key, replace(made, wrapped=b"", **changes), key)

    async def put_in(self, header: BlobHeader | bytes) -> m.Reply:
        return await self.imports.take_in(self.instance, Import(header if isinstance(header, bytes) else header.pack()))

    async def refused(self, header: BlobHeader | bytes, code: m.RefusalCode) -> str:
        reply = await self.put_in(header)
        assert isinstance(reply, m.Refusal), "the key was given"
        assert reply.code is code, reply
        assert reply.text in self.imports.refused[self.row.uuid]
        return reply.text

    def commit(self, header: BlobHeader) -> m.Commit:
        return m.Commit(self.record.generation + 1, bytes(32), bytes(32), 1, restored=header.pack())

    async def move_on(self) -> None:
        """The guest saves: another state is the newest."""
        record = self.record
        new = replace(record, generation=record.generation + 1, digest=bytes([record.generation % 256]) * 32)
        await self.registry.committer.commit(PutVtpm(new))

    def events(self, kind: str) -> list[str]:
        return [row.text for row in self.registry.catalogue.events(self.row.uuid) if row.kind == kind]


@asynccontextmanager
async def world(model: ModelTpm, place: Any, family: str = "2.0") -> AsyncIterator[World]:
    async with running_daemon(model, place) as running:
        await running.ask("add", name="web", tpm=family)
        await running.ask("attach", vtpm="web", guest="g")
        await running.ask("detach", vtpm="web")
        made = World(running, running.registry.find("web"))
        yield made
        for ring in made.rings:
            ring.close()


async def test_the_newest_state_comes_back_and_no_other(model: ModelTpm, place: Any) -> None:
    async with world(model, place) as made:
        header = made.header()
        assert isinstance(await made.put_in(header), ImportReply)
        assert made.imports.objection(made.record, made.commit(header)) is None
        await made.move_on()
        assert "rollback" in await made.refused(header, m.RefusalCode.ROLLBACK)
        refusal = made.imports.objection(made.record, made.commit(header))
        assert refusal is not None, "it is looked at again when it is committed"
        assert refusal.code is m.RefusalCode.ROLLBACK


async def test_a_generation_that_came_again_is_not_the_state_that_had_it(model: ModelTpm, place: Any) -> None:
    """A UUID that is used anew, or a store that was rolled back on purpose, counts its states over again."""
    async with world(model, place) as made:
        await made.refused(made.header(state=bytes(32)), m.RefusalCode.ROLLBACK)
        await made.refused(made.header(generation=made.record.generation + 1), m.RefusalCode.ROLLBACK)
        header = made.header()
        await made.daemon.ask("reset", vtpm="web", yes=True)
        assert made.record.generation == header.generation
        await made.refused(header, m.RefusalCode.ROLLBACK)
        assert not is_fresh(replace(header, state=made.record.digest), made.record), "there is no state to be the one"


async def test_nothing_but_this_vtpms_own_is_taken(model: ModelTpm, place: Any) -> None:
    async with world(model, place) as made:
        await made.restores.permit(made.row, Policy.ALWAYS, 0)
        denied = m.RefusalCode.DENIED
        assert "another one" in await made.refused(made.header(vtpm=UUID(int=5)), denied)
        assert "TPM 1.2" in await made.refused(made.header(family="1.2"), denied)
        assert "another manager" in await made.refused(made.header(store=UUID(int=5)), denied)
        good = made.header()
        assert "not as it was exported" in await made.refused(replace(good, wrapped=bytes(48)), denied)
        assert "not as it was exported" in await made.refused(replace(good, generation=good.generation + 1), denied)
        for garbage in (b"", b"x" * BlobHeader.SIZE, good.pack() + b"x"):
            await made.refused(garbage, m.RefusalCode.MALFORMED)
        assert isinstance(await made.put_in(good), ImportReply)
    assert len(made.imports.refused) == 1


async def test_one_that_lives_elsewhere_is_not_brought_to_life_here_by_its_old_state(
    model: ModelTpm, place: Any
) -> None:
    """It moved away, and is expected back; or it is frozen: who permits an older state does not permit two of it."""
    async with world(model, place) as made:
        header = made.header()
        await made.restores.permit(made.row, Policy.ALWAYS, 0)
        record = made.record
        for away in (RecordFlags.AWAY, RecordFlags.AWAY | RecordFlags.FRESH):
            flags = (record.flags | away) & ~RecordFlags.RESUMABLE
            made.registry.committer.store.commit([PutVtpm(replace(record, flags=flags))])
            assert "migration" in await made.refused(header, m.RefusalCode.DENIED)
            refusal = made.imports.objection(made.record, made.commit(header))
            assert refusal is not None
            assert refusal.code is m.RefusalCode.DENIED


async def test_a_manager_that_came_between_judges_for_itself(model: ModelTpm, place: Any) -> None:
    """The key was given by one manager; the next one, which is asked to commit, knows of nothing."""
    async with world(model, place) as made:
        fresh, old = made.header(), made.header(generation=0)
        await made.restores.permit(made.row, Policy.ONCE, 7)
        assert isinstance(await made.put_in(old), ImportReply)
        another = Imports(made.registry, made.exports, Restores(made.registry), made.happened)
        assert another.objection(made.record, made.commit(fresh)) is None
        refusal = another.objection(made.record, made.commit(old))
        assert refusal is not None, "what was permitted once was permitted by the manager before"
        assert made.imports.objection(made.record, made.commit(old)) is None
        assert made.events("rolled-back"), "the event is there before anything is committed"
        made.imports.committed(made.record, made.commit(old))
        assert made.imports.objection(made.record, made.commit(old)) is not None, "once"


async def test_once_is_for_the_state_that_asks_first(model: ModelTpm, place: Any) -> None:
    async with world(model, place) as made:
        one, two = made.header(generation=0), made.header(generation=0)
        await made.restores.permit(made.row, Policy.ONCE, 7)
        assert isinstance(await made.put_in(one), ImportReply)
        await made.refused(two, m.RefusalCode.ROLLBACK)
        assert isinstance(await made.put_in(one), ImportReply)
        await made.restores.permit(made.row, Policy.ONCE, 7)
        assert isinstance(await made.put_in(two), ImportReply), "permitted anew"
        await made.restores.permit(made.row, Policy.NEVER, 7)
        await made.refused(two, m.RefusalCode.ROLLBACK)
        assert len(made.events("restore-allowed")) == 2
        assert len(made.events("restore-forbidden")) == 1


async def test_refusals_do_not_fill_the_events(model: ModelTpm, place: Any) -> None:
    async with world(model, place) as made:
        for _ in range(int(REFUSED_AT_ONCE) + 30):
            await made.refused(b"", m.RefusalCode.MALFORMED)
        assert len(made.events("restore-refused")) <= REFUSED_AT_ONCE + 1


async def test_always_is_in_the_store_and_a_reset_takes_it_away(model: ModelTpm, place: Any) -> None:
    async with world(model, place) as made:
        before = made.daemon.daemon._anchoring.statistics().durable_writes
        await made.daemon.ask("allow-restore", vtpm="web", always=True, once=False, never=False)
        assert made.record.flags & RecordFlags.ANY_AGE
        assert made.daemon.daemon._anchoring.statistics().durable_writes == before + 1, "anchored before it is answered"
        with pytest.raises(ConflictError):
            await made.restores.permit(made.row, Policy.ONCE, 0)
        await made.move_on()
        assert made.record.flags & RecordFlags.ANY_AGE
        await made.daemon.ask("reset", vtpm="web", yes=True)
        assert not made.record.flags & RecordFlags.ANY_AGE


async def test_a_permission_is_not_lost_to_a_guest_that_saves_meanwhile(model: ModelTpm, place: Any) -> None:
    async with running_daemon(model, place) as running:
        await running.ask("add", name="web")
        (shown,) = await running.ask("attach", vtpm="web", guest="g")
        guest = Guest(shown["endpoint"])
        row, restores, done = running.registry.find("web"), Restores(running.registry), trio.Event()

        async def save() -> None:
            await trio.to_thread.run_sync(lambda: guest.define(INDEX, 8))
            number = 0
            while not done.is_set():
                number += 1
                content = number.to_bytes(8)
                await trio.to_thread.run_sync(lambda: guest.write(INDEX, content))  # noqa: B023 - awaited here

        async with trio.open_nursery() as nursery:
            nursery.start_soon(save)
            for number in range(30):
                policy = Policy.NEVER if number % 2 else Policy.ALWAYS
                await restores.permit(row, policy, 0)
                for _ in range(3):
                    await trio.sleep(0.001)
                    assert restores.policy(row.uuid, running.registry.record(row.uuid).flags) is policy
            done.set()
        guest.close()


async def test_only_administrators_permit_it(model: ModelTpm, place: Any) -> None:
    async with world(model, place) as made:
        with pytest.raises(RemoteError) as refused:
            await made.daemon.ask("allow-restore", vtpm="web", always=True, once=True, never=False)
        assert refused.value.exit_code == 2
        from manager.verb_table import BY_NAME, Role

        assert BY_NAME["allow-restore"].role is Role.ADMINISTRATOR


# --- exports ---------------------------------------------------------------------------------------


async def test_an_export_is_of_the_newest_state_of_one_that_runs(model: ModelTpm, place: Any) -> None:
    async with world(model, place) as made:
        generation, parts = made.record.generation, tuple(sorted(PARTS))
        reply = made.imports.export(made.instance, Export(generation, parts))
        assert isinstance(reply, ExportReply)
        header = BlobHeader.unpack(reply.header)
        assert is_fresh(header, made.record)
        assert made.exports.unwrap(header) == reply.key
        assert abs(header.made - time.time()) < 60
        refusals = {
            (generation - 1, parts): m.RefusalCode.STALE_GENERATION,
            (generation + 1, parts): m.RefusalCode.STALE_GENERATION,
            (generation, (1,)): m.RefusalCode.MALFORMED,
            (generation, (1, 2, 2)): m.RefusalCode.MALFORMED,
            (generation, (1, 2, 7)): m.RefusalCode.MALFORMED,
        }
        for (wanted, which), code in refusals.items():
            refusal = made.imports.export(made.instance, Export(wanted, which))
            assert isinstance(refusal, m.Refusal)
            assert refusal.code is code
        made.instance.stage = Stage.NEEDS_RESET
        assert isinstance(made.imports.export(made.instance, Export(generation, parts)), m.Refusal)
        made.instance.stage = Stage.RUNNING
        given = [made.imports.export(made.instance, Export(generation, parts)) for _ in range(200)]
        headers = [one.header for one in given if isinstance(one, ExportReply)]
        assert len(set(headers)) == len(given), "each has an id and a key of its own"
        assert len(made.noted.events) <= ROUTINE_AT_ONCE + 5, "not each has an event"


async def test_a_manager_without_state_blobs_refuses() -> None:
    none = NoBlobs()
    assert isinstance(await none.take_in(None, None), m.Refusal)  # type: ignore[arg-type]
    assert isinstance(none.export(None, None), m.Refusal)  # type: ignore[arg-type]
    assert isinstance(none.objection(None, None), m.Refusal)  # type: ignore[arg-type]


# --- other managers --------------------------------------------------------------------------------


class Claims:
    """Has vTPMs come from somewhere, as migration does."""

    def __init__(self, why_not: str | None = None) -> None:
        self.why_not, self.confirmed = why_not, list[tuple[UUID, bytes]]()

    async def claim(self, _vtpm: UUID, header: BlobHeader, raw: bytes) -> bytes:
        if self.why_not == "broken":
            raise ZeroDivisionError
        if self.why_not is not None:
            raise ConflictError(self.why_not)
        assert BlobHeader.unpack(raw) == header
        return b"k" * 32

    def may_commit(self, _vtpm: UUID, _header: BlobHeader) -> str | None:
        return self.why_not

    def committed(self, vtpm: UUID, header: BlobHeader) -> None:
        self.confirmed.append((vtpm, header.export))


async def test_a_state_of_another_manager_is_had_by_a_claim_alone(model: ModelTpm, place: Any) -> None:
    async with world(model, place) as made:
        theirs = made.header(store=UUID(int=9))
        claims = made.imports.claimer = Claims()
        assert await made.put_in(theirs) == ImportReply(b"k" * 32)
        commit = made.commit(theirs)
        assert made.imports.objection(made.record, commit) is None
        made.imports.committed(made.record, commit)
        assert claims.confirmed == [(made.row.uuid, theirs.export)]
        made.imports.committed(made.record, made.commit(replace(theirs, vtpm=UUID(int=5))))
        made.imports.committed(made.record, replace(commit, restored=b"garbage"))
        assert len(claims.confirmed) == 1, "nobody confirms what is another vTPM's"
        made.imports.claimer = Claims("it lives elsewhere")
        assert "elsewhere" in await made.refused(theirs, m.RefusalCode.DENIED)
        assert made.imports.objection(made.record, commit) is not None
        made.imports.claimer = Claims("broken")
        assert "mistake" in await made.refused(theirs, m.RefusalCode.DENIED)
