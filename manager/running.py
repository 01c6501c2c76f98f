"""One running instance as the manager sees it, and the table of its states."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

import trio

from frontend_backend.local import LocalRing
from frontend_backend.messages_instance import IDLE, InstanceState, Report, refusal_for_malformed
from frontend_backend.orders import Orders
from frontend_backend.ring import BackRing
from manager.quote_task import QuoteTask
from manager.token_bucket import TokenBucket

_WORDS_LIMIT: Final = 1000  # characters of a report that are kept
# a chip signs some five times a second, and does the manager's own work too
PCR_READS_A_SECOND: Final = 1.0  # each takes the hardware TPM a handful of commands; a platform reset takes one
PCR_READS_AT_ONCE: Final = 5.0
IDLE_RINGS_A_SECOND: Final = 1000.0  # rings without a request: an instance makes hardly any, each takes us some 30 us
IDLE_RINGS_AT_ONCE: Final = 500.0
GUEST_QUOTES_A_SECOND: Final = 1.0
GUEST_QUOTES_AT_ONCE: Final = 5.0
_LOOK_AGAIN: Final = 0.02  # seconds: a stage can change without a report


class Stage(StrEnum):
    """Where an instance is in its life."""

    WAITING = "waiting"  # it lives elsewhere, and has asked nothing on its ring so far
    STARTING = "starting"
    RUNNING = "running"
    NEEDS_RESET = "needs-reset"
    STOPPING = "stopping"
    HIBERNATED = "hibernated"  # its last state is committed, the volatile part too; its process is about to end
    STOPPED = "stopped"  # said so: its last state is committed
    FAILED = "failed"  # said so: its state could not be loaded
    ENDED = "ended"  # the process is gone


ENDED: Final = frozenset({Stage.STOPPED, Stage.FAILED, Stage.ENDED})
# (stage, what the instance reported) -> stage. An unlisted pair changes nothing: a report carries no authority.
ON_REPORT: Final[dict[tuple[Stage, InstanceState], Stage]] = {
    (Stage.STARTING, InstanceState.READY): Stage.RUNNING,
    (Stage.STARTING, InstanceState.NEEDS_RESET): Stage.NEEDS_RESET,
    (Stage.STARTING, InstanceState.FAILED): Stage.FAILED,
    (Stage.STARTING, InstanceState.STOPPED): Stage.STOPPED,
    (Stage.RUNNING, InstanceState.NEEDS_RESET): Stage.NEEDS_RESET,
    (Stage.RUNNING, InstanceState.STOPPED): Stage.STOPPED,
    (Stage.RUNNING, InstanceState.FAILED): Stage.FAILED,
    (Stage.NEEDS_RESET, InstanceState.READY): Stage.RUNNING,
    (Stage.NEEDS_RESET, InstanceState.FAILED): Stage.FAILED,
    (Stage.NEEDS_RESET, InstanceState.STOPPED): Stage.STOPPED,
    (Stage.STOPPING, InstanceState.STOPPED): Stage.STOPPED,
    (Stage.STOPPING, InstanceState.FAILED): Stage.FAILED,
}


@dataclass(eq=False, slots=True)
class Running:
    """An instance: its process, its ring, and what is being waited for.

    `startup` is what the next Load will be told; `after_reset` what every Load after that will be. One that lives
    `elsewhere`, in a domain of Xen of its own, has no process here (`pid` 0): nothing of it ends but its ring.
    """

    vtpm: UUID
    lease: int
    pid: int
    ring: LocalRing
    startup: str
    after_reset: str
    uid: int | None = None  # its own user id, None for the keeper's
    elsewhere: bool = False
    terms: Mapping[str, Any] = field(default_factory=dict)  # of one that lives elsewhere: what else Load tells it
    at_first_load: Callable[[], None] | None = None  # what is kept before it is told anything; raises StorageError
    first_told: str | None = None  # the startup that its first Load was told
    epoch: int = 0  # of the attachment it runs for: each of its commits says so in the record
    start: int | None = None  # when its process began (orphans.start_of)
    stage: Stage = Stage.STARTING
    unused: bool = False  # started as its vTPM was attached, and no guest of Xen has had it yet
    came_up: bool = False  # it has been running, or in failure; before that its end is its starter's affair
    awaited: bool = False  # somebody stops it, and deals with its end
    orders: Orders = Orders.NONE
    rest_after: float = 0.0  # seconds without a command before it is hibernated, 0: never
    told_to_sleep: bool = False  # the order to hibernate was handed over
    asked: bool = False  # how idle it is; what it says unasked of that does not count
    idle_reports: int = 0  # how often, one after the other, it said that it had nothing to do
    look_next: float = 0.0  # when it is asked next (trio.current_time)
    private_bytes: int | None = None  # memory of its process for itself, before it was ordered to hibernate
    report: Report | None = None
    settled: trio.Event = field(default_factory=trio.Event)  # left STARTING, or left NEEDS_RESET after a reset
    ended: trio.Event = field(default_factory=trio.Event)  # the process is gone
    reported: trio.Event = field(default_factory=trio.Event)  # replaced by another one with each report
    busy: bool = False  # a request of this ring is being worked on
    complaints: int = 0  # requests that were not obeyed
    quote: QuoteTask | None = None  # what the order QUOTE was for
    quoting: bool = False  # a quote that its guest asked for is under way, perhaps given up already
    hurry: trio.Event = field(default_factory=trio.Event)  # what it waits for is to be given up
    hw_pcrs: int = 0  # hardware PCRs that its attachment asks for, and no others are told it; bit 0 for PCR 0
    measure: str = ""  # what its guest's next boot is measured by (boot_measurements), as in the attachment's row
    measured: str = ""  # what the present one was measured by
    pcr_reads: TokenBucket = field(default_factory=lambda: TokenBucket(PCR_READS_A_SECOND, PCR_READS_AT_ONCE))
    guest_quotes: TokenBucket = field(default_factory=lambda: TokenBucket(GUEST_QUOTES_A_SECOND, GUEST_QUOTES_AT_ONCE))
    idle_rings: TokenBucket = field(default_factory=lambda: TokenBucket(IDLE_RINGS_A_SECOND, IDLE_RINGS_AT_ONCE))
    unheard: bool = False  # it rings for nothing, and is not listened to for a moment
    heard: trio.Event = field(default_factory=trio.Event)  # it has asked for something
    idle: trio.Event = field(default_factory=trio.Event)  # set when a request was done after the process had ended
    back: BackRing = field(init=False)

    def __post_init__(self) -> None:
        self.back = BackRing(self.ring.page, refusal_for_malformed)

    def asks(self) -> None:
        """Take note that it asks for something."""
        self.busy = True
        if self.stage is Stage.WAITING:
            self.stage = Stage.STARTING
            self.heard.set()

    def begin(self) -> None:
        """Keep what is to be kept before the first Load is answered. Raises StorageError: it is not to be answered."""
        if self.at_first_load is not None:
            self.at_first_load()
            self.at_first_load = None

    def told(self, startup: str) -> None:
        """Take note of what a Load was answered."""
        self.first_told = self.first_told or startup
        self.startup = self.after_reset

    def begins_boot(self, startup: str) -> bool:
        """Tell whether what a Load is answered begins a boot of the guest.

        Elsewhere a program loads first, and hands that word to its instance's own Load; whatever boot comes after that
        is asked for by Measurements.
        """
        return startup == "clear" and not (self.elsewhere and self.first_told not in (None, "clear"))

    def take_report(self, report: Report) -> None:
        """Move on by what the instance says of itself; its words may have been chosen by a guest."""
        self.report = replace(report, reason=printable(report.reason), text=printable(report.text))
        self.stage = ON_REPORT.get((self.stage, report.state), self.stage)
        self.idle_reports = self.idle_reports + self.asked if report.reason == IDLE else 0
        self.asked = False
        self.reported.set()
        self.reported = trio.Event()
        self.came_up |= self.stage in (Stage.RUNNING, Stage.NEEDS_RESET)
        # a report that came before the order to reset was handed over says how it was before
        if self.stage not in (Stage.STARTING, Stage.STOPPING) and not self.orders & Orders.RESET:
            self.settled.set()

    def take_orders(self) -> Orders:
        """Return the orders for the next answer; a stop is ordered until it is done, everything else once."""
        if self.orders is Orders.NONE:  # as nearly always: an IntFlag's operations take long
            return self.orders
        orders, self.orders = self.orders, self.orders & Orders.STOP
        self.told_to_sleep |= Orders.HIBERNATE in orders
        return orders

    def order(self, orders: Orders) -> None:
        """Give an order: it travels in the next answer, and the doorbell makes the instance ask for one."""
        self.orders |= orders
        if orders & (Orders.STOP | Orders.RESET):
            self.orders &= ~Orders.HIBERNATE
        if orders & Orders.STOP and self.stage in (Stage.STARTING, Stage.RUNNING, Stage.NEEDS_RESET):
            self.stage = Stage.STOPPING
        if orders & Orders.RESET:
            self.settled = trio.Event()
        if self.pressed:
            self.hurry.set()
        self.ring.ring()

    @property
    def pressed(self) -> bool:
        """Whether an order waits that is to be obeyed at once; it travels with the next answer."""
        return bool(self.orders & (Orders.STOP | Orders.RESET))

    def order_quote(self, task: QuoteTask) -> None:
        """Order evidence for a quote; only an instance whose report says `quotes` knows the order."""
        self.quote = task
        self.order(Orders.QUOTE)

    @property
    def may_hibernate(self) -> bool:
        """Whether it was told to, and nothing is wanted of it that it would not do any more."""
        wanted = self.quote is not None or self.orders & (Orders.STOP | Orders.RESET)
        return self.stage is Stage.RUNNING and self.told_to_sleep and not wanted

    async def answered(self, reason: str) -> None:
        """Wait until it has said this, or is not running any more."""
        while self.stage is Stage.RUNNING:
            with trio.move_on_after(_LOOK_AGAIN):
                await self.reported.wait()
                if self.report is not None and self.report.reason == reason:
                    return

    async def last_word(self) -> None:
        """Wait until it has said that it ends, or its ring has ended."""
        while self.stage not in ENDED and not self.ended.is_set():
            with trio.move_on_after(_LOOK_AGAIN):
                await self.reported.wait()

    def complain(self) -> bool:
        """Count a request that was not obeyed; returns whether to log it: a hostile instance must not fill the log."""
        self.complaints += 1
        return self.complaints.bit_count() == 1  # the 1st, 2nd, 4th, 8th, ...


def printable(text: str) -> str:
    """Return `text` without what a terminal would obey or a log would take for another line."""
    return "".join(character if character.isprintable() else "?" for character in text[:_WORDS_LIMIT])
