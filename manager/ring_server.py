"""Answers the instances' rings: one trio task on one nested epoll descriptor serves them all.

An instance is who the manager made the ring for. Commits of all instances that are ready go into one group.
Nothing an instance writes can raise here beyond its own ring (design section 2: it costs only itself).
"""

import logging
import os
import select
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Final
from uuid import UUID

import trio

from frontend_backend import messages_instance as m
from frontend_backend.errors import MessageError
from frontend_backend.messages_blobs import Export, Import
from frontend_backend.ring import Answered, Request
from manager.committer import Committer
from manager.errors import ManagerError
from manager.hardware import Hardware
from manager.hardware_pcrs import may_read
from manager.migration_records import is_away, is_frozen
from manager.ring_blobs import Blobs, NoBlobs
from manager.ring_records import SLEPT, committed, load_reply, marked, objection, same, same_triple
from manager.running import Running, Stage
from storage.errors import StorageError
from storage.store_records import PutVtpm, RecordFlags, VtpmRecord

_log = logging.getLogger("vtpm.ring")
QUOTE_SECONDS: Final = 15.0  # a guest's quote at most: its instance can neither save, nor be reset, nor stop meanwhile
_UNHEARD_SECONDS: Final = 0.1  # that one which rings for nothing is not heard; what it rings then is heard after it
_MAX_RANDOM: Final = 64  # bytes a Random may ask for


def _nothing(_running: Running) -> None:
    pass


def _not_measured(_running: Running) -> tuple[bytes, ...]:
    return ()


async def _no_quote(_running: Running, _request: m.Quote) -> m.Reply:
    return m.Refusal(m.RefusalCode.DENIED, "this manager does not offer it")


class RingServer:
    """The back end of every instance's ring. `on_hang_up` is called once an instance's end is closed.

    `on_sleep` is called when one has committed the state that it will wake up with, and is about to end.
    """

    def __init__(self, committer: Committer, hardware: Hardware, nursery: trio.Nursery, commit_timeout: float) -> None:
        """Serve from `committer`'s store; verbs that need the hardware TPM run in `nursery`."""
        self._committer, self._hardware, self._nursery = committer, hardware, nursery
        self._commit_timeout = commit_timeout
        self._epoll = select.epoll()
        self._by_fileno: dict[int, Running] = {}
        self._released = trio.Event()  # not set while all rings wait (`held`)
        self._released.set()
        self.on_hang_up: Callable[[Running], None] = _nothing
        self.on_quote: Callable[[Running, m.Quote], Awaitable[m.Reply]] = _no_quote
        self.on_sleep: Callable[[Running], None] = _nothing
        self.on_boot: Callable[[Running], tuple[bytes, ...]] = _not_measured
        self.blobs: Blobs = NoBlobs()

    def add(self, running: Running) -> None:
        """Serve this instance's ring from now on; a request that waits on its page is answered."""
        self._by_fileno[running.ring.fileno()] = running
        self._epoll.register(running.ring.fileno(), 0 if running.stage is Stage.HIBERNATED else select.EPOLLIN)
        if self._released.is_set():
            self._look_at(running)
            self._committer.proceed()

    def remove(self, running: Running) -> bool:
        """Serve it no longer (its process is gone). Returns whether it was served until now."""
        if self._by_fileno.get(running.ring.fileno()) is not running:
            return False  # a closed ring's number is -1, or another's by now
        del self._by_fileno[running.ring.fileno()]
        self._epoll.unregister(running.ring.fileno())
        running.hurry.set()
        return True

    async def quiesce(self, running: Running) -> None:
        """Serve it no longer, and wait until what it asked for last is done: its record then says what counts."""
        self.remove(running)
        while running.busy:
            running.idle = trio.Event()
            await running.idle.wait()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let every ring wait meanwhile, then serve all of them.

        For taking over many: whoever came first would otherwise be served again and again, and the last would wait
        for all that work, which takes the processors and a turn of the event loop between two of them.
        """
        assert self._released.is_set(), "held twice"
        self._released = trio.Event()
        try:
            yield
        finally:
            self._released.set()
            for running in list(self._by_fileno.values()):
                self._look_at(running)
            self._committer.proceed()

    def close(self) -> None:
        """Close the epoll descriptor."""
        self._epoll.close()

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            if not self._released.is_set():  # to wait for what is set takes another turn of all tasks
                await self._released.wait()
            for fileno, _ in self._epoll.poll(0):
                running = self._by_fileno.get(fileno)
                if running is None:
                    continue
                # what one that sleeps left on its doorbell is the keeper's, and its ring is only watched for its end
                alive = running.stage is not Stage.HIBERNATED and running.ring.drain()
                self._look_at(running, alive=alive)
                if not alive:
                    self.remove(running)
                    self.on_hang_up(running)
            self._committer.proceed()  # what all of these rings want is one group

    def _look_at(self, running: Running, *, alive: bool = True) -> None:
        if running.busy:
            self._rang_for_nothing(running)
            return
        match running.back.take():
            case Request(packet, _):
                running.asks()
                self._dispatch(running, packet, alive=alive)
            case Answered(reason):
                self._complain(running, f"ring request not obeyed: {reason}")
                running.ring.ring()
            case None:
                self._rang_for_nothing(running)

    def _rang_for_nothing(self, running: Running) -> None:
        """Hear one that rings without wanting anything no more often than a quick one asks; its end is seen at once."""
        if running.unheard or running.idle_rings.take(trio.current_time()):
            return
        if self._by_fileno.get(running.ring.fileno()) is running:
            running.unheard = True
            self._epoll.modify(running.ring.fileno(), 0)
            self._nursery.start_soon(self._hear_again, running)

    async def _hear_again(self, running: Running) -> None:
        await trio.sleep(_UNHEARD_SECONDS)
        running.unheard = False
        if self._by_fileno.get(running.ring.fileno()) is running and running.stage is not Stage.HIBERNATED:
            self._epoll.modify(running.ring.fileno(), select.EPOLLIN)

    def _dispatch(self, running: Running, packet: bytes, *, alive: bool) -> None:
        try:
            request = m.decode_request(packet)
        except MessageError as error:
            self._complain(running, f"malformed message: {error}")
            self._answer(running, m.Refusal(m.RefusalCode.MALFORMED, str(error)[:200]))
            return
        match request:
            case m.Commit():
                self._commit(running, request)
            case m.Hibernate():
                self._hibernate(running, request)
            case m.Load() if not alive:  # a state that can be resumed once is not used up for a process that is gone
                self._answer(running, m.Refusal(m.RefusalCode.UNAVAILABLE, "the instance has ended"))
            case m.Load():
                self._load(running)
            case m.Report():
                running.take_report(request)
                if request.reason == m.RESTORE_REFUSED and running.report is not None:
                    self.blobs.noted(running, running.report)
                self._answer(running, m.ReportReply())
            case m.Random() | m.Quote() | m.PcrRead():
                self._nursery.start_soon(self._ask_hardware, running, request)
            case Export():
                self._answer(running, self.blobs.export(running, request))
            case Import():
                self._nursery.start_soon(self._take_in, running, request)
            case m.QuoteTask() | m.QuoteMade() | m.Measurements():
                self._answer_at_once(running, request)

    def _answer_at_once(self, running: Running, request: m.QuoteTask | m.QuoteMade | m.Measurements) -> None:
        """Answer what nobody has to be asked for."""
        task = running.quote
        match request:
            case m.Measurements():
                measured = self._measured(running)
                self._answer(running, m.MeasurementsReply(measured) if isinstance(measured, tuple) else measured)
            case m.QuoteTask():
                self._answer(running, task.taken() if task is not None else m.QuoteTaskReply(0))
            case m.QuoteMade():
                if task is not None:
                    task.made(request)
                self._answer(running, m.ReportReply())

    async def _ask_hardware(self, running: Running, request: m.Random | m.Quote | m.PcrRead) -> None:
        """Answer what the hardware TPM is needed for; nobody else waits for it."""
        match request:
            case m.Random(count):
                await self._random(running, count)
            case m.Quote():
                await self._quote(running, request)
            case m.PcrRead():
                await self._pcr_read(running, request)

    async def _take_in(self, running: Running, request: Import) -> None:
        """Answer Import; nobody else waits for a claim from another manager."""
        self._answer(running, await self.blobs.take_in(running, request))

    def _answer(self, running: Running, reply: m.Reply) -> None:
        running.busy = False
        running.idle.set()
        running.back.finish(m.encode_reply(reply, running.take_orders()))
        running.ring.ring()

    @staticmethod
    def _complain(running: Running, what: str) -> None:
        if running.complain():
            _log.warning("vTPM %s: %s (request %d that was not obeyed)", running.vtpm, what, running.complaints)

    def _record(self, vtpm: UUID) -> VtpmRecord | m.Refusal:
        try:
            return self._committer.store.get(vtpm)
        except StorageError as error:
            return m.Refusal(m.RefusalCode.UNKNOWN_VTPM, str(error)[:200])

    def _hibernate(self, running: Running, wanted: m.Hibernate) -> None:
        """Commit a state to wake up with, unless the instance is wanted; one that is committed already stays so."""
        record = self._record(running.vtpm)
        commit = m.Commit(wanted.generation, wanted.key, wanted.digest, wanted.lease, final=True)
        done = not isinstance(record, m.Refusal) and record.flags & RecordFlags.HIBERNATED
        if running.may_hibernate or (done and not isinstance(record, m.Refusal) and same_triple(record, commit)):
            self._commit(running, commit, sleeps=True)
        else:
            self._answer(running, m.Refusal(m.RefusalCode.WANTED, "it is wanted just now, or was not told to"))

    def _commit(self, running: Running, commit: m.Commit, *, sleeps: bool = False) -> None:
        if self._committer.defer(running.vtpm, partial(self._commit, running, commit, sleeps=sleeps)):
            return
        record = self._record(running.vtpm)
        refusal = record if isinstance(record, m.Refusal) else objection(running, record, commit)
        if refusal is not None or isinstance(record, m.Refusal):
            self._complain(running, f"commit of generation {commit.generation} refused: {refusal}")
            self._answer(running, refusal or m.Refusal(m.RefusalCode.UNKNOWN_VTPM, "no such vTPM"))
            return
        new = committed(record, commit, running, sleeps=sleeps)
        if same(record, new):  # sent again, by an instance whose manager died before it could answer
            if commit.restored:
                self.blobs.committed(record, commit)
            self._acknowledge(running, commit, sleeps)
            return
        if commit.restored:
            refusal = self.blobs.objection(record, commit)
            if refusal is not None:
                self._answer(running, refusal)
                return

        def acknowledge(error: Exception | None) -> None:
            if error is None:
                if commit.restored:
                    self.blobs.committed(record, commit)
                self._acknowledge(running, commit, sleeps)
            else:
                _log.error("vTPM %s: generation %d not committed: %s", running.vtpm, commit.generation, error)
                self._answer(running, m.Refusal(m.RefusalCode.STORE_FAILED, str(error)[:200]))

        self._committer.enqueue((PutVtpm(new),), acknowledge)

    def _acknowledge(self, running: Running, commit: m.Commit, sleeps: bool) -> None:
        if sleeps:
            self._let_sleep(running)
        self._answer(running, m.CommitReply(commit.generation))

    def _let_sleep(self, running: Running) -> None:
        """Read no ring of this one any more: the next thing on its doorbell may be connections, for the keeper."""
        running.stage = Stage.HIBERNATED
        if self._by_fileno.get(running.ring.fileno()) is running:
            self._epoll.modify(running.ring.fileno(), 0)
        self.on_sleep(running)

    def _load(self, running: Running) -> None:
        """Answer Load; a resumable state is first marked consumed, the record attached, durably, in one commit."""
        if self._committer.defer(running.vtpm, partial(self._load, running)):
            return
        record = self._record(running.vtpm)
        if isinstance(record, m.Refusal):
            self._answer(running, record)
            return
        if is_frozen(record.flags):
            self._answer(running, m.Refusal(m.RefusalCode.DENIED, "another manager claimed this vTPM"))
            return
        startup = running.startup
        if startup == "state" and not record.flags & RecordFlags.RESUMABLE:
            startup = "failed"  # consumed, or never saved: the same volatile state is not resumed twice
        try:
            running.begin()
        except StorageError as error:
            _log.error("vTPM %s: whose it is could not be kept: %s", running.vtpm, error)
            self._answer(running, m.Refusal(m.RefusalCode.STORE_FAILED, str(error)[:200]))
            return
        measured = self._measured(running) if running.begins_boot(startup) else ()
        if isinstance(measured, m.Refusal):
            self._answer(running, measured)
            return
        reply = load_reply(running, record, startup, self._commit_timeout, measured)
        new = record if is_away(record.flags) else replace(record, flags=RecordFlags(int(record.flags) & ~SLEPT))
        if not new.flags & RecordFlags.FRESH:  # a fresh one commits before its guest is answered
            new = marked(new, running)
        if same(record, new):
            running.told(startup)
            self._answer(running, reply)
            return

        def acknowledge(error: Exception | None) -> None:
            if error is None:
                running.told(startup)
                self._answer(running, reply)
            else:
                self._answer(running, m.Refusal(m.RefusalCode.STORE_FAILED, str(error)[:200]))

        self._committer.enqueue((PutVtpm(new),), acknowledge)

    def _measured(self, running: Running) -> tuple[bytes, ...] | m.Refusal:
        """Return what the boot that begins is measured by; where that cannot be kept, no boot begins."""
        try:
            return self.on_boot(running)
        except (MessageError, StorageError) as error:
            _log.error("vTPM %s: what its guest's boot is measured by is not known: %s", running.vtpm, error)
            return m.Refusal(m.RefusalCode.UNAVAILABLE, str(error)[:200])

    async def _quote(self, running: Running, request: m.Quote) -> None:
        """Answer a guest's wish; LIMIT where the hardware TPM takes long, or the instance has to do something else."""
        hurry = running.hurry = trio.Event()
        reply: m.Reply = m.Refusal(m.RefusalCode.LIMIT, "not just now: the hardware TPM takes long, or you are to stop")

        async def make() -> None:
            nonlocal reply
            reply = await self.on_quote(running, request)
            hurry.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(make)
            if not running.pressed:
                with trio.move_on_after(QUOTE_SECONDS):
                    await hurry.wait()
            self._answer(running, reply)
            nursery.cancel_scope.cancel()  # what waits for the hardware TPM no longer does

    async def _pcr_read(self, running: Running, request: m.PcrRead) -> None:
        """Tell an instance hardware PCRs that its attachment asks for, and no others."""
        if not may_read(running.hw_pcrs, request.bank, request.pcrs):
            text = "its attachment does not ask for these hardware PCRs (vtpm-attach --hwinitpcrs)"
            self._answer(running, m.Refusal(m.RefusalCode.DENIED, text))
            return
        if not running.pcr_reads.take(trio.current_time()):
            self._answer(running, m.Refusal(m.RefusalCode.UNAVAILABLE, "too often just now"))
            return
        try:
            reply: m.Reply = m.PcrReadReply(await self._hardware.pcrs(request.pcrs))
        except ManagerError as error:
            reply = m.Refusal(m.RefusalCode.UNAVAILABLE, str(error)[:200])
        self._answer(running, reply)

    async def _random(self, running: Running, count: int) -> None:
        """Mix the hardware TPM's random bytes with the kernel's: neither alone decides."""
        if not 0 < count <= _MAX_RANDOM:
            self._answer(running, m.Refusal(m.RefusalCode.LIMIT, f"1 to {_MAX_RANDOM} bytes at a time"))
            return
        try:
            theirs = await self._hardware.random(count)
        except ManagerError as error:
            self._answer(running, m.Refusal(m.RefusalCode.UNAVAILABLE, str(error)[:200]))
            return
        ours = os.urandom(count)
        self._answer(running, m.RandomReply(bytes(a ^ b for a, b in zip(ours, theirs, strict=True))))
