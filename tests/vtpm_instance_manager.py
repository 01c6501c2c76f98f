"""A small manager for the tests of vtpm_instance: serves real rings with real messages; its store is a dict.

It can be silent, which is how a manager looks that is away.
"""

import os
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

from frontend_backend.local import LocalRing
from frontend_backend.messages_blobs import Export, Import
from frontend_backend.messages_instance import (
    Commit,
    CommitReply,
    Hibernate,
    InstanceState,
    Load,
    LoadReply,
    Measurements,
    MeasurementsReply,
    PcrRead,
    PcrReadReply,
    Quote,
    QuoteMade,
    QuoteTask,
    QuoteTaskReply,
    Refusal,
    RefusalCode,
    Reply,
    Report,
    ReportReply,
    decode_request,
    encode_reply,
    refusal_for_malformed,
)
from frontend_backend.orders import Orders
from frontend_backend.ring import BackRing, Request

DEADLINE = 15.0  # seconds after which a test gives up waiting


def page_state(ring: LocalRing) -> int:
    return ring.page[4]


def until(condition: Callable[[], bool], what: str) -> None:
    limit = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < limit, f"waited in vain for: {what}"
        time.sleep(0.005)


@dataclass
class Record:
    """What the store knows of one vTPM."""

    vtpm: UUID
    family: str = "2.0"
    lease: int = 1
    fresh: bool = True
    key: bytes = b""
    digest: bytes = b""
    generation: int = 0
    resumable: bool = False
    startup: str = "clear"
    commit_timeout: float = 90.0
    commits: int = 0
    reports: list[Report] = field(default_factory=list)
    hw_pcrs: dict[int, bytes] = field(default_factory=dict)  # what its attachment asks for, and the hardware has
    pcr_reads: int = 0
    after_reset: str = ""
    measured: tuple[bytes, ...] = ()  # what the next boot is measured by
    measurements: int = 0  # how often an instance asked
    quotes: list[Quote] = field(default_factory=list)
    made: list[QuoteMade] = field(default_factory=list)

    @property
    def states(self) -> list[InstanceState]:
        return [report.state for report in self.reports]


class SmallManager:
    """Serves one ring from a thread of its own, from and into one record."""

    def __init__(self, ring: LocalRing, record: Record) -> None:
        self.ring, self.record = ring, record
        self.orders = Orders.NONE
        self.silent = False
        self.mute = False
        self._held: bytes | None = None
        self.refused = 0
        self.garbage = b""
        self.refuse: RefusalCode | None = None
        self.refuse_measurements: RefusalCode | None = None
        self.quote_answer: Reply = Refusal(RefusalCode.DENIED, "no quotes here")
        self.task = QuoteTaskReply(0)
        self.closed = False
        self.asleep = False
        self.keeps_ring = False  # whether it leaves the ring alone once its instance is asleep, as the manager does
        self._wake, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        back = BackRing(self.ring.page, refusal_for_malformed)
        poll = select.poll()
        poll.register(self.ring.fileno(), select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        alive = True
        while alive and not self.closed:
            if not self.silent:
                self._serve(back)
            if self.asleep and self.keeps_ring:
                return  # what comes over the doorbell now is for the keeper: the guest's connections
            ready = dict(poll.poll())
            if self._wake in ready:
                os.read(self._wake, 64)
            if self.ring.fileno() in ready:
                alive = self.ring.drain()

    def _serve(self, back: BackRing) -> None:
        if self._held is not None and not self.mute:
            held, self._held = self._held, None
            back.finish(held)
            self.ring.ring()
        match back.take():
            case None:
                return
            case Request(packet, _):
                reply = self._answer(packet)
                orders, self.orders = self.orders, Orders.NONE
                if self.garbage:
                    back.finish(self.garbage)
                    self.garbage = b""
                    self.ring.ring()
                    return
                if self.mute:
                    self._held = encode_reply(reply, orders)
                    return
                back.finish(encode_reply(reply, orders))
                self.ring.ring()
            case _:
                self.ring.ring()

    def _answer(self, packet: bytes) -> Reply:  # noqa: PLR0911 - one for each request
        record = self.record
        match decode_request(packet):
            case Load():
                return LoadReply(
                    record.vtpm.bytes,
                    record.family,
                    record.lease,
                    record.fresh,
                    record.key,
                    record.digest,
                    record.generation,
                    record.startup,
                    record.commit_timeout,
                    sum(1 << pcr for pcr in record.hw_pcrs),
                    record.measured,
                    after_reset=record.after_reset,
                )
            case Commit() as commit:
                return self._commit(commit)
            case Hibernate(generation, key, digest, lease):
                reply = self._commit(Commit(generation, key, digest, lease, final=True))
                self.asleep = isinstance(reply, CommitReply)
                return reply
            case Report() as report:
                record.reports.append(report)
                return ReportReply()
            case PcrRead(_, pcrs) if self.refuse is None:
                record.pcr_reads += 1
                return PcrReadReply(tuple(record.hw_pcrs[pcr] for pcr in pcrs))
            case Measurements():
                record.measurements += 1
                if self.refuse_measurements is not None:
                    return Refusal(self.refuse_measurements, "as the test wants")
                return MeasurementsReply(record.measured)
            case Quote() as quote:
                record.quotes.append(quote)
                return self.quote_answer
            case QuoteTask():
                return self.task
            case QuoteMade() as made:
                record.made.append(made)
                return ReportReply()
            case Export() | Import():
                return Refusal(RefusalCode.DENIED, "no state blobs here")
            case other:
                return Refusal(RefusalCode.UNAVAILABLE, type(other).__name__)

    def _commit(self, commit: Commit) -> Reply:
        record = self.record
        if self.refuse is not None:
            self.refused += 1
            return Refusal(self.refuse, "as the test wants")
        if commit.lease != record.lease:
            return Refusal(RefusalCode.STALE_LEASE, "another lease")
        if (commit.generation, commit.key, commit.digest) != (record.generation, record.key, record.digest):
            if commit.generation != record.generation + 1:
                return Refusal(RefusalCode.STALE_GENERATION, f"{commit.generation} after {record.generation}")
            record.key, record.digest, record.generation = commit.key, commit.digest, commit.generation
            record.commits += 1
        record.fresh, record.resumable = False, commit.final
        return CommitReply(commit.generation)

    def set_mute(self, *, mute: bool) -> None:
        """Do what is asked, but answer only when no longer mute."""
        self.mute = mute
        os.write(self._waker, b"x")

    def set_silent(self, silent: bool) -> None:
        self.silent = silent
        os.write(self._waker, b"x")

    def give(self, orders: Orders) -> None:
        """Order, and ring: the instance then asks."""
        self.orders = orders
        self.ring.ring()

    def close(self) -> None:
        self.closed = True
        os.write(self._waker, b"x")
        self._thread.join(DEADLINE)
        self.ring.close()
        os.close(self._wake)
        os.close(self._waker)
