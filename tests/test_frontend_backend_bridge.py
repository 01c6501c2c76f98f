import os
from dataclasses import dataclass

import pytest

from frontend_backend.bridge import Bridge, Rewrite, Wake
from frontend_backend.errors import PageError, RingCancelledError
from frontend_backend.ring import Answered, BackRing, FrontRing, Request
from frontend_backend.tpmif import MAX_PACKET, PAGE_SIZE, RingState, SharedPage

BOTH = Wake.BACK | Wake.FRONT


def refuse(reason: str) -> bytes:
    return b"refused: " + reason.encode()


class Rig:
    """A guest, a bridge, an instance; `marks` is the ledger's book."""

    def __init__(self, pages: int = 1, *, inspect: object = None, wishes: bool = False) -> None:
        self.near, self.far = memoryview(bytearray(pages * PAGE_SIZE)), memoryview(bytearray(pages * PAGE_SIZE))
        self.guest, self.instance = FrontRing(self.near), BackRing(self.far, refuse)
        self.marks: list[str] = []
        self.bridge = self.make(inspect=inspect, wishes=wishes)

    def make(self, *, inspect: object = None, wishes: bool = False) -> Bridge:
        return Bridge(
            BackRing(self.near, refuse),
            FrontRing(self.far),
            inspect=inspect,  # type: ignore[arg-type]
            before_submit=lambda: self.marks.append(f"take, far {self.state(self.far)}"),
            after_answer=lambda: self.marks.append(f"settle, near {self.state(self.near)}"),
            wishes=wishes,
        )

    @staticmethod
    def state(page: memoryview) -> str:
        return RingState(page[SharedPage.STATE_OFFSET]).name

    def answers(self, answer: bytes) -> Request:
        taken = self.instance.take()
        assert isinstance(taken, Request)
        assert self.instance.finish(answer)
        return taken


def test_a_command_crosses_and_its_answer_comes_back_and_the_ledger_brackets_both() -> None:
    rig = Rig()
    rig.guest.submit(b"question", locality=3)
    assert rig.bridge.on_back() == Wake.FRONT
    assert rig.guest.poll() is None
    assert rig.answers(b"answer") == Request(b"question", 3)
    assert rig.bridge.on_front() == Wake.BACK
    assert rig.guest.poll() == b"answer"
    assert rig.marks == ["take, far IDLE", "settle, near FINISH"]


def test_rings_that_say_nothing_do_nothing() -> None:
    rig = Rig()
    assert rig.bridge.on_back() == rig.bridge.on_front() == rig.bridge.tick() == Wake.NONE
    rig.guest.submit(b"question")
    rig.bridge.on_back()
    assert rig.bridge.on_back() == rig.bridge.on_front() == Wake.NONE
    assert not rig.bridge.wishing


def test_a_malformed_request_is_answered_here() -> None:
    rig = Rig()
    rig.near[: SharedPage.SIZE] = SharedPage(2**32 - 1, RingState.SUBMIT, 0, 0).pack()
    assert rig.bridge.on_back() == Wake.BACK
    assert (rig.guest.poll() or b"").startswith(b"refused")
    assert rig.state(rig.far) == "IDLE"
    assert not rig.marks


def test_a_cancel_is_passed_on_once_and_the_answer_still_arrives() -> None:
    rig = Rig()
    rig.guest.submit(b"question")
    rig.bridge.on_back()
    taken = rig.instance.take()
    assert isinstance(taken, Request)
    rig.guest.cancel()
    assert rig.bridge.on_back() == Wake.FRONT
    assert rig.instance.cancelled
    assert rig.bridge.on_back() == Wake.NONE
    rig.instance.finish(b"answer")
    assert rig.bridge.on_front() == Wake.BACK
    assert rig.guest.poll() == b"answer"


def test_a_cancelled_command_that_the_instance_gives_back_is_given_back() -> None:
    rig = Rig()
    rig.guest.submit(b"question")
    rig.bridge.on_back()
    rig.guest.cancel()
    rig.bridge.on_back()
    assert isinstance(rig.instance.take(), Answered)
    assert rig.bridge.on_front() == Wake.BACK
    with pytest.raises(RingCancelledError):
        rig.guest.poll()
    assert rig.marks[-1] == "settle, near IDLE"


def test_without_an_instance_a_command_waits_and_a_cancelled_one_goes() -> None:
    rig = Rig()
    rig.bridge.lose_front()
    rig.guest.submit(b"question")
    assert rig.bridge.on_back() == Wake.NONE
    rig.guest.cancel()
    assert rig.bridge.on_back() == Wake.BACK
    assert not rig.guest.in_flight
    rig.guest.submit(b"another")
    assert rig.bridge.on_back() == Wake.NONE
    assert rig.bridge.replace_front(FrontRing(rig.far)) == Wake.FRONT
    assert rig.answers(b"answer").packet == b"another"


def test_what_a_lost_instance_had_is_given_back_and_never_said_again() -> None:
    rig = Rig()
    rig.guest.submit(b"question")
    rig.bridge.on_back()
    assert rig.bridge.lose_front() == Wake.BACK
    with pytest.raises(RingCancelledError):
        rig.guest.poll()
    other = memoryview(bytearray(PAGE_SIZE))
    assert rig.bridge.replace_front(FrontRing(other)) == Wake.NONE
    assert rig.state(other) == "IDLE"


def test_a_successor_gives_back_what_was_in_hand_and_takes_what_was_not() -> None:
    rig = Rig()
    rig.guest.submit(b"executed perhaps")
    rig.bridge.on_back()
    successor = rig.make()
    assert successor.start(in_hand=True) == Wake.BACK
    with pytest.raises(RingCancelledError):
        rig.guest.poll()
    assert rig.marks[-1] == "settle, near IDLE"
    rig = Rig()
    rig.guest.submit(b"nobody has seen it")
    assert rig.make().start() == Wake.FRONT


def test_a_ring_that_still_holds_something_for_nobody_is_waited_for() -> None:
    rig = Rig()
    FrontRing(rig.far).submit(b"of a bridge before")
    bridge = Bridge(BackRing(rig.near, refuse), None)
    rig.guest.submit(b"question")
    assert bridge.replace_front(FrontRing(rig.far)) == Wake.NONE
    rig.answers(b"for nobody")
    assert bridge.on_front() == Wake.FRONT
    assert rig.answers(b"answer").packet == b"question"
    assert bridge.on_front() == Wake.BACK
    assert rig.guest.poll() == b"answer"


def test_a_wish_is_said_again_until_the_next_submit() -> None:
    rig = Rig(wishes=True)
    assert rig.bridge.on_front() == Wake.BACK
    assert rig.bridge.tick() == rig.bridge.tick() == Wake.BACK
    rig.guest.submit(b"what is it?")
    assert rig.bridge.on_back() == Wake.FRONT
    assert rig.bridge.tick() == Wake.NONE
    rig.answers(b"stop")
    assert rig.bridge.on_front(rings=2) == Wake.BACK
    assert rig.bridge.wishing, "one ring was the answer's, the other a wish"


def test_a_wish_while_a_command_is_in_flight_is_not_taken_for_its_answer() -> None:
    rig = Rig(wishes=True)
    rig.guest.submit(b"question")
    rig.bridge.on_back()
    assert rig.bridge.on_front() == Wake.BACK
    assert rig.guest.poll() is None
    rig.answers(b"answer")
    assert rig.bridge.on_front() == Wake.BACK
    assert rig.guest.poll() == b"answer"
    assert rig.bridge.wishing


def test_close_gives_back_what_is_in_flight_or_waits_and_tells_the_instance() -> None:
    rig = Rig()
    rig.guest.submit(b"question")
    rig.bridge.on_back()
    assert rig.bridge.close() == BOTH
    assert rig.instance.cancelled
    with pytest.raises(RingCancelledError):
        rig.guest.poll()
    rig = Rig()
    rig.bridge.lose_front()
    rig.guest.submit(b"waits")
    assert rig.bridge.close() == Wake.BACK
    assert not rig.guest.in_flight


@dataclass
class Other:
    request: bytes

    def answer(self, answer: bytes) -> bytes:
        return b"made of " + answer


def test_inspect_may_answer_or_send_something_else() -> None:
    def inspect(packet: bytes, locality: int) -> bytes | Rewrite | None:
        if locality:
            return b"not at this locality"
        return Other(b"other question") if packet == b"question" else None

    rig = Rig(inspect=inspect)
    rig.guest.submit(b"question", locality=1)
    assert rig.bridge.on_back() == Wake.BACK
    assert rig.guest.poll() == b"not at this locality"
    assert not rig.marks
    rig.guest.submit(b"question")
    rig.bridge.on_back()
    assert rig.answers(b"answer").packet == b"other question"
    rig.bridge.on_front()
    assert rig.guest.poll() == b"made of answer"
    rig.guest.submit(b"as it is")
    rig.bridge.on_back()
    assert rig.answers(b"answer").packet == b"as it is"
    rig.bridge.on_front()
    assert rig.guest.poll() == b"answer"


def test_long_packets_cross_both_ways() -> None:
    rig = Rig(pages=2)
    question, answer = os.urandom(8000), os.urandom(8180)
    rig.guest.submit(question)
    assert rig.bridge.on_back() == Wake.FRONT
    assert rig.answers(answer).packet == question
    rig.bridge.on_front()
    assert rig.guest.poll() == answer
    rig.guest.submit_long(b"short", 0, 1)
    rig.bridge.on_back()
    rig.answers(answer)
    rig.bridge.on_front()
    assert rig.guest.poll() == answer


def test_what_the_instances_ring_has_no_room_for_is_given_back() -> None:
    rig = Rig(pages=2)
    rig.bridge.replace_front(FrontRing(memoryview(bytearray(PAGE_SIZE))))
    rig.guest.submit(bytes(MAX_PACKET + 1))
    assert rig.bridge.on_back() == Wake.BACK
    with pytest.raises(RingCancelledError):
        rig.guest.poll()
    assert rig.marks[-1].startswith("settle")


@pytest.mark.parametrize(
    "head",
    [SharedPage(0, RingState.IDLE, 0, 0).pack()[:4] + b"\x09\0\0\0", SharedPage(9999, RingState.FINISH, 0, 0).pack()],
)
def test_an_instance_that_breaks_its_page_is_told_of_and_the_command_given_back(head: bytes) -> None:
    rig = Rig()
    rig.guest.submit(b"question")
    rig.bridge.on_back()
    rig.far[: SharedPage.SIZE] = head
    with pytest.raises(PageError):
        rig.bridge.on_front()
    assert rig.bridge.lose_front() == Wake.BACK
    with pytest.raises(RingCancelledError):
        rig.guest.poll()


def test_a_guest_that_takes_its_command_off_the_page_gets_no_answer_and_the_next_is_served() -> None:
    rig = Rig()
    rig.guest.submit(b"question")
    rig.bridge.on_back()
    rig.near[SharedPage.STATE_OFFSET] = RingState.FINISH
    rig.answers(b"answer")
    assert rig.bridge.on_front() == Wake.BACK
    assert rig.state(rig.near) == "IDLE"
    assert bytes(rig.near[SharedPage.SIZE :]) == bytes(MAX_PACKET), "an answer nobody asked for is not shown"
    rig.guest.submit(b"next")
    assert rig.bridge.on_back() == Wake.FRONT
