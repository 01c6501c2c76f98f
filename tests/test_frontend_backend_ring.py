from itertools import product

import pytest
from generated_docs import check_generated
from hostile_page import StoppedError, recorded, scribbled, stopping
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_conformance import REFUSAL, refuse

from frontend_backend.errors import IllegalTransitionError, PageError, RingCancelledError
from frontend_backend.ring import Answered, BackRing, FrontRing, Request
from frontend_backend.ring_table import TRANSITIONS, RingEvent, advance
from frontend_backend.tpmif import MAX_PACKET, PAGE_SIZE, RingState, SharedPage

FEW = settings(max_examples=150, deadline=None)
SECRET = b"0123456789abcdef the key of a former answer fedcba9876543210"
IN_FLIGHT = (RingState.SUBMIT, RingState.CANCEL)

heads = st.builds(
    SharedPage,
    length=st.one_of(st.integers(0, MAX_PACKET + 1), st.integers(0, 2**32 - 1)),
    state=st.sampled_from(RingState),
    locality=st.integers(0, 255),
    nr_extra_pages=st.sampled_from([0, 0, 0, 1, 255]),
).map(SharedPage.pack)
scribbles = st.one_of(
    st.tuples(st.just(0), heads),
    st.tuples(st.just(0), st.binary(min_size=8, max_size=16)),
    st.tuples(st.just(SharedPage.STATE_OFFSET), st.binary(min_size=1, max_size=1)),
    st.tuples(st.integers(0, PAGE_SIZE - 1), st.binary(max_size=64)),
    st.tuples(st.just(0), st.integers(0, 255).map(lambda byte: bytes([byte]) * PAGE_SIZE)),
)
scripts = st.dictionaries(st.integers(0, 12), scribbles, max_size=6)
pages = st.builds(lambda head, fill: bytearray(head.ljust(PAGE_SIZE, fill)), heads, st.binary(min_size=1, max_size=1))


def ends() -> tuple[bytearray, FrontRing, BackRing]:
    page = bytearray(PAGE_SIZE)
    return page, FrontRing(memoryview(page)), BackRing(memoryview(page), refuse)


def submitted(packet: bytes, fill: bytes = b"\0") -> bytearray:
    head = SharedPage(len(packet), RingState.SUBMIT, 0, 0).pack()
    return bytearray((head + packet).ljust(PAGE_SIZE, fill))


# --- the table


def expected(state: RingState, event: RingEvent) -> RingState | None:
    match event:
        case RingEvent.FRONT_SUBMITS:
            return None if state in IN_FLIGHT else RingState.SUBMIT
        case RingEvent.FRONT_CANCELS:
            return RingState.CANCEL
        case RingEvent.BACK_FINISHES:
            return RingState.FINISH if state in IN_FLIGHT else None
        case RingEvent.BACK_ABORTS:
            return RingState.IDLE if state in IN_FLIGHT else None


@pytest.mark.parametrize(("state", "event"), list(product(RingState, RingEvent)))
def test_every_pair_of_state_and_event_is_as_the_protocol_says(state: RingState, event: RingEvent) -> None:
    target = expected(state, event)
    if target is not None:
        assert advance(state, event) is target
        return
    assert (state, event) not in TRANSITIONS
    with pytest.raises(IllegalTransitionError, match=f"state {state.name} where {event.name} is not allowed") as caught:
        advance(state, event)
    assert (caught.value.state, caught.value.event) == (state.name, event.name)


def test_the_table_in_the_documents_is_the_table_in_the_code() -> None:
    lines = ["| state | " + " | ".join(event.name for event in RingEvent) + " |", "|---" * (len(RingEvent) + 1) + "|"]
    for state in RingState:
        targets = (TRANSITIONS.get((state, event)) for event in RingEvent)
        cells = " | ".join("refused" if target is None else target.name for target in targets)
        lines.append(f"| {state.name} ({state.value}) | {cells} |")
    check_generated("ring.md", "transitions", "\n".join(lines) + "\n")


# --- the two ends, used properly


@pytest.mark.parametrize("size", [0, MAX_PACKET + 1])
def test_a_packet_that_does_not_fit_is_not_submitted(size: int) -> None:
    page, front, _ = ends()
    with pytest.raises(ValueError, match="1 to 4088 bytes"):
        front.submit(bytes(size))
    assert page == bytes(PAGE_SIZE)


@pytest.mark.parametrize("locality", [-1, 256])
def test_a_locality_that_is_no_byte_is_a_value_error_and_leaves_the_page_alone(locality: int) -> None:
    page, front, _ = ends()
    with pytest.raises(ValueError, match="locality"):
        front.submit(b"packet", locality)
    assert page == bytes(PAGE_SIZE)


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_second_command_is_refused_while_one_is_in_flight(cancelled: bool) -> None:
    page, front, _ = ends()
    front.submit(b"first")
    if cancelled:
        front.cancel()
    before = bytes(page)
    assert front.in_flight
    with pytest.raises(IllegalTransitionError):
        front.submit(b"second")
    assert bytes(page) == before


def test_an_answer_that_does_not_fit_is_a_value_error_and_leaves_the_page_alone() -> None:
    page, front, back = ends()
    front.submit(b"request")
    back.take()
    before = bytes(page)
    with pytest.raises(ValueError, match="at most 4088"):
        back.finish(bytes(MAX_PACKET + 1))
    assert bytes(page) == before
    assert back.finish(bytes(MAX_PACKET))


def test_an_empty_answer_is_an_answer() -> None:
    _, front, back = ends()
    front.submit(b"request")
    back.take()
    assert back.finish(b"")
    assert front.poll() == b""


def test_finish_from_idle_answers_nothing() -> None:
    page, front, back = ends()
    assert not back.finish(SECRET)
    assert page == bytes(PAGE_SIZE)
    assert not front.in_flight


def test_an_aborted_request_looks_cancelled_and_leaves_no_bytes() -> None:
    page, front, back = ends()
    front.submit(SECRET)
    back.take()
    back.abort()
    with pytest.raises(RingCancelledError):
        front.poll()
    assert page[SharedPage.SIZE :] == bytes(MAX_PACKET)


def test_a_cancel_that_comes_after_the_answer_is_given_back_and_takes_the_answer_along() -> None:
    page, front, back = ends()
    front.submit(b"request")
    back.take()
    back.finish(SECRET)
    front.cancel()
    assert isinstance(back.take(), Answered)
    assert SECRET not in page
    with pytest.raises(RingCancelledError):
        front.poll()


def test_a_request_in_hand_is_not_handed_out_twice() -> None:
    _, front, back = ends()
    front.submit(b"extend")
    assert back.take() == Request(b"extend", 0)
    assert back.take() is None
    back.finish(b"extended")
    assert back.take() is None
    assert front.poll() == b"extended"
    front.submit(b"read")
    assert back.take() == Request(b"read", 0)


def test_a_cancel_of_a_request_in_hand_waits_for_its_answer_so_that_no_later_request_gets_it() -> None:
    _, front, back = ends()
    front.submit(b"first")
    back.take()
    front.cancel()
    assert back.take() is None
    with pytest.raises(IllegalTransitionError):
        front.submit(b"second")
    assert back.finish(b"answer to the first")
    assert front.poll() == b"answer to the first"


@pytest.mark.parametrize(
    "page",
    [
        memoryview(bytearray(4095)),
        memoryview(bytearray(8191)),
        memoryview(bytearray(5 * 4096)),
        memoryview(bytes(4096)),
    ],
)
def test_a_page_of_another_size_or_read_only_is_refused(page: memoryview) -> None:
    with pytest.raises(PageError, match="writable page of 4096 bytes"):
        FrontRing(page)


# --- secrets leave the page


def test_the_answer_is_wiped_when_it_is_read() -> None:
    page, front, back = ends()
    front.submit(b"load")
    back.take()
    back.finish(SECRET)
    assert SECRET in page
    assert front.poll() == SECRET
    assert page[SharedPage.SIZE :] == bytes(MAX_PACKET)


def test_a_request_is_wiped_with_its_answer_where_the_back_end_does_not_do_that() -> None:
    page, front, _ = ends()
    front.submit(b"commit " + SECRET)
    page[: SharedPage.SIZE] = SharedPage(4, RingState.FINISH, 0, 0).pack()  # as mini-os' tpmback: the rest stays
    assert front.poll() == b"comm"
    assert page[SharedPage.SIZE :] == bytes(MAX_PACKET)


def test_a_longer_request_is_wiped_by_its_shorter_answer() -> None:
    page, front, back = ends()
    front.submit(b"commit " + SECRET)
    back.take()
    back.finish(b"done")
    assert bytes(page[SharedPage.SIZE :]) == b"done".ljust(MAX_PACKET, b"\0")


def test_an_answer_that_nobody_read_is_wiped_by_the_next_request() -> None:
    page, front, back = ends()
    front.submit(b"load")
    back.take()
    back.finish(b"some header " + SECRET)
    front.submit(b"read")
    assert bytes(page[SharedPage.SIZE :]) == b"read".ljust(MAX_PACKET, b"\0")


def test_an_answer_never_carries_what_the_page_held_before() -> None:
    page = submitted(b"short", fill=b"\xee")
    page[2000 : 2000 + len(SECRET)] = SECRET
    back = BackRing(memoryview(page), refuse)
    back.take()
    back.finish(b"ok")
    assert page == (SharedPage(2, RingState.FINISH, 0, 0).pack() + b"ok").ljust(PAGE_SIZE, b"\0")


# --- a back end that dies


@pytest.mark.parametrize("answer", [b"ok", b"an answer longer than its request", b"", bytes(range(256)) * 15])
def test_a_back_end_killed_between_any_two_stores_leaves_the_request_whole_or_gone(answer: bytes) -> None:
    original = b"extend with a digest"
    for stores in range(20):
        memory = submitted(original)
        dying = BackRing(stopping(memory, stores), refuse)
        assert dying.take() == Request(original, 0)
        try:
            dying.finish(answer)
        except StoppedError:
            found = BackRing(memoryview(memory), refuse).take()
            assert found == Request(original, 0) or not isinstance(found, Request), f"after {stores} stores"
        else:
            assert FrontRing(memoryview(memory)).poll() == answer
            return
    raise AssertionError("the answer takes more than twenty stores")


def test_a_front_end_killed_between_any_two_stores_has_submitted_everything_or_nothing() -> None:
    for stores in range(20):
        memory = bytearray(PAGE_SIZE)
        dying = FrontRing(stopping(memory, stores))
        try:
            dying.submit(b"whole", 2)
        except StoppedError:
            assert BackRing(memoryview(memory), refuse).take() is None
        else:
            assert BackRing(memoryview(memory), refuse).take() == Request(b"whole", 2)
            return
    raise AssertionError("the request takes more than twenty stores")


# --- a hostile front end


def test_the_back_end_reads_head_and_packet_once_each() -> None:
    page, accesses = recorded(submitted(b"request"))
    BackRing(page, refuse).take()
    assert accesses == [("read", slice(None, 8)), ("read", slice(8, 15))]


@FEW
@given(pages)
def test_take_answers_whatever_a_page_may_hold(memory: bytearray) -> None:
    before = bytes(memory)
    taken = BackRing(memoryview(memory), refuse).take()
    head = SharedPage.unpack(before)
    if isinstance(taken, Request):
        assert 0 < len(taken.packet) == head.length <= MAX_PACKET
        assert taken.packet == before[8 : 8 + head.length]
        assert bytes(memory) == before, "the request stays for a back end that replaces this one"
    elif taken is None:
        assert head.state in (RingState.IDLE, RingState.FINISH)
        assert bytes(memory) == before
    elif head.state is RingState.CANCEL or not head.length:
        assert memory[4] == RingState.IDLE
    else:
        assert FrontRing(memoryview(memory)).poll() == REFUSAL


@pytest.mark.parametrize("state", [4, 77, 255])
def test_a_state_that_does_not_exist_is_set_to_idle(state: int) -> None:
    memory = bytearray(PAGE_SIZE)
    memory[SharedPage.STATE_OFFSET] = state
    assert BackRing(memoryview(memory), refuse).take() == Answered(f"{state} is not a tpmif state")
    assert memory[SharedPage.STATE_OFFSET] == RingState.IDLE


@FEW
@given(pages, scripts, st.binary(max_size=64))
def test_a_front_end_that_writes_at_any_moment_cannot_make_the_back_end_raise(
    memory: bytearray, script: dict[int, tuple[int, bytes]], answer: bytes
) -> None:
    back = BackRing(scribbled(memory, script), refuse)
    for _ in range(4):
        taken = back.take()
        if isinstance(taken, Request):
            assert 0 < len(taken.packet) <= MAX_PACKET
            assert isinstance(back.finish(answer), bool)


@FEW
@given(pages, scripts)
def test_a_page_abandoned_by_a_hostile_front_end_serves_the_next_command(
    memory: bytearray, script: dict[int, tuple[int, bytes]]
) -> None:
    back = BackRing(scribbled(memory, script), refuse)
    for _ in range(14):
        if isinstance(back.take(), Request):
            back.finish(b"answer")
    memory[:] = submitted(b"honest")
    assert back.take() == Request(b"honest", 0)
    assert back.finish(b"served")
    assert FrontRing(memoryview(memory)).poll() == b"served"


@given(st.integers(0, 8), heads)
@FEW
def test_a_length_changed_after_the_check_is_not_believed(moment: int, head: bytes) -> None:
    memory = submitted(b"original", fill=b"\xee")
    taken = BackRing(scribbled(memory, {1 + moment: (0, head)}), refuse).take()
    assert taken == Request(b"original", 0)


# --- a hostile back end


@FEW
@given(pages, scripts)
def test_a_back_end_that_writes_at_any_moment_can_only_cause_the_documented_errors(
    memory: bytearray, script: dict[int, tuple[int, bytes]]
) -> None:
    front = FrontRing(scribbled(memory, script))
    for step in (lambda: front.submit(b"packet"), front.poll, front.cancel, lambda: front.in_flight, front.poll):
        try:
            result = step()
        except (PageError, IllegalTransitionError, RingCancelledError):
            continue
        assert result is None or isinstance(result, bool) or len(result) <= MAX_PACKET


@pytest.mark.parametrize("length", [MAX_PACKET + 1, 2**31, 2**32 - 1])
def test_an_answer_longer_than_the_page_is_a_page_error(length: int) -> None:
    page, front, _ = ends()
    front.submit(b"request")
    page[: SharedPage.SIZE] = SharedPage(length, RingState.FINISH, 0, 0).pack()
    with pytest.raises(PageError, match=f"packet of {length} bytes announced, the page has room for 4088"):
        front.poll()


def test_an_answer_on_extra_pages_is_a_page_error() -> None:
    page, front, _ = ends()
    front.submit(b"request")
    page[: SharedPage.SIZE] = SharedPage(10, RingState.FINISH, 0, 1).pack()
    with pytest.raises(PageError, match="1 extra pages"):
        front.poll()
