"""Who executed what, under links that break anywhere and far sides that forget: once, or failure, and never both."""

from dataclasses import dataclass, field

from hypothesis import example, given, settings
from hypothesis import strategies as st

from manager.relay_ledger import MAX_KEPT, AfterLink, Asked, Duty, Executed, Kept


@dataclass
class World:
    """One channel: what is on the wire, what the TPM executed, what the client was told."""

    near: Asked = field(default_factory=lambda: Asked(lambda request: request.startswith(b"again")))
    far: Executed = field(default_factory=Executed)
    far_run: int = 1
    known_run: int = 0  # what the near side knows of it
    wire_out: list[tuple[int, bytes]] = field(default_factory=list)
    wire_back: list[tuple[int, bytes]] = field(default_factory=list)
    running: list[tuple[int, bytes, Executed]] = field(default_factory=list)
    executed: list[bytes] = field(default_factory=list)
    told: dict[bytes, str] = field(default_factory=dict)
    up: bool = False

    def ask(self, request: bytes) -> None:
        if self.near.request is None:
            self.near.ask(request, self.near.sequence + 1)
            self.say()

    def say(self) -> None:
        if self.up and self.near.request is not None:
            self.near.sent = True
            self.wire_out.append((self.near.sequence, self.near.request))

    def arrive(self) -> None:
        if self.wire_out:
            sequence, request = self.wire_out.pop(0)
            duty = self.far.take(sequence)
            if duty is Duty.EXECUTE:
                self.running.append((sequence, request, self.far))
            elif duty is Duty.ANSWER and self.far.answer is not None:
                self.wire_back.append((sequence, self.far.answer))
            elif duty is Duty.FAIL:
                self.wire_back.append((sequence, b"failure"))

    def execute(self) -> None:
        if self.running:
            sequence, request, ledger = self.running.pop(0)
            self.executed.append(request)
            if ledger.done(sequence, b"done " + request) and ledger is self.far and self.up:
                self.wire_back.append((sequence, b"done " + request))

    def hear(self) -> None:
        if self.wire_back:
            sequence, answer = self.wire_back.pop(0)
            request = self.near.request
            if self.near.take(sequence):
                assert request is not None
                assert answer in (b"failure", b"done " + request), "another request's answer"
                self.tell(request, "failure" if answer == b"failure" else "done")

    def tell(self, request: bytes, what: str) -> None:
        assert request not in self.told, "told twice"
        self.told[request] = what

    def break_link(self) -> None:
        self.up = False
        self.wire_out.clear()
        self.wire_back.clear()

    def link(self) -> None:
        if not self.up:
            self.up = True
            verdict = self.near.on_link(resumed=self.known_run == self.far_run)
            self.known_run = self.far_run
            if verdict is AfterLink.FAIL:
                request = self.near.give_up()
                assert request is not None
                self.tell(request, "failure")
            else:
                self.say()

    def forget(self) -> None:
        """The far side is killed, and has no holder."""
        self.break_link()
        self.far, self.far_run = Executed(), self.far_run + 1

    def succeed(self) -> None:
        """The far side is killed, and its successor knows from the holder what was begun, no answers."""
        self.break_link()
        sequence = self.far.sequence
        self.far = Executed(sequence, dropped=sequence is not None)

    def drop_answer(self) -> None:
        if self.far.answer is not None:
            self.far.answer, self.far.dropped = None, True

    def give_up(self) -> None:
        if not self.up and (request := self.near.give_up()) is not None:
            self.tell(request, "failure")


STEPS = ["arrive", "execute", "hear", "break_link", "link", "forget", "succeed", "drop_answer", "give_up"]


USUAL = ["ask", "link", "arrive", "execute"] * 4


@settings(max_examples=600, deadline=None)
@given(
    st.lists(
        st.sampled_from(["ask again", *STEPS, *USUAL]),
        min_size=20,
        max_size=80,
    )
)
@example(["ask", "arrive", "execute", "forget", "link", "arrive", "execute", "hear"])
@example(["ask", "arrive", "execute", "succeed", "link", "arrive", "execute", "hear"])
@example(["ask", "arrive", "break_link", "link", "arrive", "execute", "execute", "hear"])
@example(["ask", "arrive", "execute", "break_link", "drop_answer", "link", "arrive", "execute", "hear"])
def test_a_request_is_executed_at_most_once_and_success_is_true(steps: list[str]) -> None:
    world = World()
    world.link()
    for number, step in enumerate(steps):
        if step.startswith("ask"):
            world.ask(b"again %d" % number if step == "ask again" else b"once %d" % number)
        else:
            getattr(world, step)()
    once = [request for request in world.executed if request.startswith(b"once")]
    assert len(once) == len(set(once)), "executed twice"
    for request, what in world.told.items():
        assert what == "failure" or request in world.executed, "success without execution"


@given(st.lists(st.sampled_from(["ask", "ask again", *STEPS]), max_size=40))
def test_whoever_waits_is_told_as_soon_as_everything_works(steps: list[str]) -> None:
    world = World()
    for number, step in enumerate(steps):
        if step.startswith("ask"):
            world.ask(b"again %d" % number if step == "ask again" else b"once %d" % number)
        else:
            getattr(world, step)()
    world.link()
    for _ in range(8):
        world.arrive()
        world.execute()
        world.hear()
    assert world.near.request is None, "somebody waits for ever"


def test_kept_answers_are_bounded_the_longest_go_first() -> None:
    kept = Kept()
    for number in range(10):
        each = kept.channels[number] = Executed()
        each.take(1)
        each.done(1, bytes(MAX_KEPT // 8 if number < 9 else 100))
    kept.trim()
    held = [each for each in kept.channels.values() if each.answer is not None]
    assert sum(len(each.answer or b"") for each in held) <= MAX_KEPT
    assert kept.channels[9].answer is not None
    dropped = next(each for each in kept.channels.values() if each.dropped)
    assert dropped.take(1) is Duty.FAIL
