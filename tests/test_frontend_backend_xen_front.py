from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend_backend.xen_front import (
    MAX_TRIES,
    FrontAction,
    FrontComplain,
    FrontDevice,
    FrontSeen,
    Offer,
    Publish,
    SetFrontState,
    Start,
    Unpublish,
    Withdraw,
)
from frontend_backend.xenbus_table import FrontLink, XenbusState

X = XenbusState
FRESH = FrontSeen(
    front_state=X.INITIALISING,
    backend="/local/domain/1/backend/vtpm/7/0",
    backend_id=1,
    back_state=X.INIT_WAIT,
    feature=b"1",
    extra_pages=1,
)
LEAVE = [Withdraw(), Unpublish(), SetFrontState(X.CLOSED)]


def running() -> FrontDevice:
    machine = FrontDevice(extra_pages=3)
    machine.step(FRESH)
    machine.offered()
    machine.step(replace(FRESH, front_state=X.INITIALISED, back_state=X.CONNECTED))
    assert machine.link is FrontLink.RUNNING
    return machine


def test_the_documented_opening() -> None:
    machine = FrontDevice(extra_pages=3)
    assert machine.step(FRESH) == [Offer(1, 1)]
    assert machine.offered() == [Publish(), SetFrontState(X.INITIALISED)]
    seen = replace(FRESH, front_state=X.INITIALISED)
    assert machine.step(seen) == []
    assert machine.step(replace(seen, back_state=X.CONNECTED)) == [Start(), SetFrontState(X.CONNECTED)]
    assert machine.step(replace(seen, front_state=X.CONNECTED, back_state=X.CONNECTED)) == []


def test_the_back_end_is_waited_for_until_it_has_said_how_many_pages_it_takes() -> None:
    machine = FrontDevice(extra_pages=3)
    assert machine.step(replace(FRESH, back_state=X.INITIALISING, feature=None, extra_pages=0)) == []
    assert machine.step(FRESH) == [Offer(1, 1)]


def test_what_a_dead_front_end_left_is_closed_first_and_the_back_end_waited_for() -> None:
    machine = FrontDevice()
    left = replace(FRESH, front_state=X.CONNECTED, back_state=X.CONNECTED)
    assert machine.step(left) == [Unpublish(), SetFrontState(X.CLOSED)]
    assert machine.step(replace(left, front_state=X.CLOSED)) == []
    ready = replace(left, front_state=X.CLOSED, back_state=X.INIT_WAIT)
    assert machine.step(ready) == [SetFrontState(X.INITIALISING), Offer(1, 0)]


@pytest.mark.parametrize("state", [X.CLOSING, X.CLOSED, None])
def test_a_back_end_that_goes_takes_the_offer_with_it_and_may_come_back(state: XenbusState | None) -> None:
    machine = running()
    gone = replace(FRESH, front_state=X.CONNECTED, back_state=state)
    assert machine.step(gone) == LEAVE
    assert machine.step(replace(gone, front_state=X.CLOSED)) == []
    back = replace(FRESH, front_state=X.CLOSED)
    assert machine.step(back) == [SetFrontState(X.INITIALISING), Offer(1, 1)]


@pytest.mark.parametrize("state", [X.INITIALISING, X.INIT_WAIT, X.INITIALISED, X.UNKNOWN, X.RECONFIGURING])
def test_a_back_end_that_starts_anew_finds_everything_as_it_was(state: XenbusState) -> None:
    assert running().step(replace(FRESH, front_state=X.CONNECTED, back_state=state)) == []


def test_another_back_end_gets_pages_of_its_own() -> None:
    machine = running()
    moved = replace(FRESH, backend="/local/domain/9/backend/vtpm/7/0", backend_id=9)
    assert machine.step(moved) == [Withdraw(), Offer(9, 1)]


def test_a_removed_device_is_withdrawn() -> None:
    machine = running()
    assert machine.step(replace(FRESH, front_state=None, backend=None, backend_id=None)) == [Withdraw()]
    assert machine.step(FRESH) == [Offer(1, 1)]


@pytest.mark.parametrize("feature", [None, b"", b"0", b"x"])
def test_a_back_end_of_another_protocol_is_given_up(feature: bytes | None) -> None:
    machine = FrontDevice()
    machine.step(FRESH)
    machine.offered()
    foreign = replace(FRESH, front_state=X.INITIALISED, back_state=X.CONNECTED, feature=feature)
    actions = machine.step(foreign)
    assert isinstance(actions[0], FrontComplain)
    assert actions[1:] == LEAVE
    assert machine.step(replace(foreign, front_state=X.CLOSED, back_state=X.INIT_WAIT)) == []


def test_two_ends_that_cannot_work_together_do_not_try_for_ever() -> None:
    machine = FrontDevice()
    tries = 0
    for _ in range(3 * MAX_TRIES):
        actions = machine.step(replace(FRESH, front_state=machine._written or X.INITIALISING))
        if any(isinstance(action, Offer) for action in actions):
            tries += 1
            machine.offered()
            machine.step(replace(FRESH, front_state=X.INITIALISED, back_state=X.CLOSED))
    assert tries == MAX_TRIES
    assert machine.link is FrontLink.FAILED


def test_an_offer_that_fails_is_told() -> None:
    machine = FrontDevice()
    machine.step(FRESH)
    assert machine.offer_failed("no room") == [FrontComplain("no room"), SetFrontState(X.CLOSED)]


def test_a_clean_end_says_5_then_6() -> None:
    expected = [SetFrontState(X.CLOSING), Withdraw(), Unpublish(), SetFrontState(X.CLOSED)]
    machine = running()
    assert machine.close() == expected
    assert machine.close() == []


anything = st.builds(
    FrontSeen,
    front_state=st.sampled_from([None, *XenbusState]),
    backend=st.sampled_from(["/a", "/a", "/b", None]),
    backend_id=st.sampled_from([1, 1, 2, None]),
    back_state=st.sampled_from([None, *XenbusState]),
    feature=st.sampled_from([b"1", b"1", None, b"0", b"9" * 9000, b"\xb2"]),
    extra_pages=st.integers(0, 1 << 32),
)


@settings(max_examples=150, deadline=None)
@given(seen=st.lists(st.tuples(anything, st.integers(0, 3)), max_size=30))
def test_whatever_is_seen_the_actions_fit_each_other(seen: list[tuple[FrontSeen, int]]) -> None:
    machine = FrontDevice(extra_pages=1)
    offered = False

    def carry_out(actions: list[FrontAction], luck: int) -> None:
        nonlocal offered
        assert len(actions) <= 8
        for action in actions:
            if isinstance(action, Offer):
                assert action is actions[-1]
                assert not offered
                assert action.extra_pages <= 1
                offered = luck != 0
                carry_out(machine.offered() if offered else machine.offer_failed("no"), luck)
            elif isinstance(action, Withdraw):
                assert offered
                offered = False
            elif isinstance(action, Publish | Start):
                assert offered
        assert offered == (machine.link in (FrontLink.OPENING, FrontLink.RUNNING))

    for now, luck in seen:
        carry_out(machine.step(now), luck)
    carry_out(machine.close(), 1)
    assert not offered
