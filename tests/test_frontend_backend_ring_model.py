"""The two ends of a ring against a model that knows nothing of pages: what is asked, what is answered, who waits."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from ring_conformance import refuse

from frontend_backend.errors import IllegalTransitionError, RingCancelledError
from frontend_backend.ring import Answered, BackRing, FrontRing, Request
from frontend_backend.tpmif import MAX_PACKET, PAGE_SIZE, RingState, SharedPage

packets = st.one_of(
    st.binary(min_size=1, max_size=80),
    st.builds(lambda byte, size: bytes([byte]) * size, st.integers(0, 255), st.integers(1, MAX_PACKET)),
)


class RingModel(RuleBasedStateMachine):
    """Commands, answers and cancels in any order, with back ends that die and are replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.page = bytearray(PAGE_SIZE)
        self.front = FrontRing(memoryview(self.page))
        self.back = BackRing(memoryview(self.page), refuse)
        self.state = RingState.IDLE
        self.request = Request(b"", 0)
        self.in_hand = False
        self.visible = b""  # what may stand behind the head: the last packet written and not yet wiped

    @rule(packet=packets, locality=st.integers(0, 4))
    def front_submits(self, packet: bytes, locality: int) -> None:
        if self.state in (RingState.SUBMIT, RingState.CANCEL):
            with pytest.raises(IllegalTransitionError):
                self.front.submit(packet, locality)
            return
        self.front.submit(packet, locality)
        self.state, self.request, self.visible = RingState.SUBMIT, Request(packet, locality), packet

    @rule()
    def front_cancels(self) -> None:
        self.front.cancel()
        self.state = RingState.CANCEL

    @rule()
    def front_polls(self) -> None:
        if self.state is RingState.IDLE:
            with pytest.raises(RingCancelledError):
                self.front.poll()
            return
        answer = self.front.poll()
        if self.state is not RingState.FINISH:
            assert answer is None
            return
        assert answer is not None
        assert answer.ljust(len(self.visible), b"\0") == self.visible or not self.visible
        self.visible = b""

    @rule()
    def back_takes(self) -> None:
        taken = self.back.take()
        if self.in_hand:
            assert taken is None
        elif self.state is RingState.SUBMIT:
            assert taken == self.request
            self.in_hand = True
        elif self.state is RingState.CANCEL:
            assert isinstance(taken, Answered)
            self.state, self.visible = RingState.IDLE, b""
        else:
            assert taken is None

    @precondition(lambda self: self.in_hand)
    @rule(answer=packets)
    def back_finishes(self, answer: bytes) -> None:
        assert self.back.finish(answer)
        self.state, self.visible, self.in_hand = RingState.FINISH, answer, False

    @precondition(lambda self: self.in_hand)
    @rule()
    def back_aborts(self) -> None:
        self.back.abort()
        self.state, self.visible, self.in_hand = RingState.IDLE, b"", False

    @rule()
    def back_dies_and_is_replaced(self) -> None:
        self.back = BackRing(memoryview(self.page), refuse)
        self.in_hand = False

    @invariant()
    def the_page_shows_the_models_state_and_nothing_else(self) -> None:
        assert self.page[SharedPage.STATE_OFFSET] == self.state
        assert self.page[SharedPage.SIZE :] == self.visible.ljust(MAX_PACKET, b"\0")
        assert self.front.in_flight == (self.state in (RingState.SUBMIT, RingState.CANCEL))


def test_the_ends_agree_with_the_model() -> None:
    run_state_machine_as_test(RingModel, settings=settings(max_examples=60, stateful_step_count=30, deadline=None))
