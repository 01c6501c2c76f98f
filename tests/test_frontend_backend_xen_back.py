from dataclasses import replace

import pytest
from generated_docs import check_generated
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend_backend.xen_back import (
    Action,
    BackDevice,
    Bind,
    Complain,
    Connect,
    Disconnect,
    PublishFeatures,
    RemoveNode,
    Seen,
    SetState,
    Unbind,
)
from frontend_backend.xenbus_table import (
    BACK_TABLE,
    FRONT_TABLE,
    BackLink,
    BackSight,
    FrontLink,
    FrontSight,
    Move,
    XenbusState,
    parse_number,
    parse_state,
)

X = XenbusState
FRESH = Seen(
    back_state=X.INITIALISING,
    online=True,
    front_state=X.INITIALISING,
    ring_ref=None,
    event_channel=None,
    feature=None,
    bound=False,
    identity="one",
)
READY = replace(FRESH, front_state=X.INITIALISED, ring_ref=8, event_channel=3, feature=b"1", bound=True)


def device(*, link: BackLink = BackLink.NEW, removes_own_node: bool = False) -> BackDevice:
    """Make a machine and lead it to `link` on the ordinary way."""
    machine = BackDevice(removes_own_node=removes_own_node)
    if link is BackLink.NEW:
        return machine
    machine.step(FRESH)
    if link is not BackLink.WAITING:
        machine.step(replace(READY, back_state=X.INIT_WAIT))
        machine.connected()
    assert machine.link is (BackLink.WAITING if link is BackLink.WAITING else BackLink.CONNECTED)
    return machine


def connected(**changes: object) -> Seen:
    return replace(READY, back_state=X.CONNECTED, **changes)  # type: ignore[arg-type]


def test_every_pair_is_in_the_tables() -> None:
    assert set(BACK_TABLE) == {(link, sight) for link in BackLink for sight in BackSight}
    assert set(FRONT_TABLE) == {(link, sight) for link in FrontLink for sight in FrontSight}


def _cell(link: BackLink, sight: BackSight) -> str:
    moves, then = BACK_TABLE[link, sight]
    words = ", ".join(move.name.lower().replace("_", " ") for move in moves)
    return f"{words}; {then.name}" if words and then is not link else words or ("" if then is link else then.name)


def test_the_documents_table_is_the_one_of_the_code() -> None:
    rows = [
        "| it sees | " + " | ".join(link.name for link in BackLink) + " |",
        "|---" * (1 + len(BackLink)) + "|",
        *(f"| {sight.name} | " + " | ".join(_cell(link, sight) for link in BackLink) + " |" for sight in BackSight),
    ]
    check_generated("architecture.md", "xen back end", "\n".join(rows) + "\n")


def test_what_is_mapped_is_let_go_whenever_the_link_is_no_longer_connected() -> None:
    for (link, _), (moves, then) in BACK_TABLE.items():
        was = link is BackLink.CONNECTED
        assert (Move.DISCONNECT in moves) == (was and (then is not BackLink.CONNECTED or Move.CONNECT in moves)) or (
            was and Move.CONNECT in moves
        )
        assert (then is BackLink.CONNECTED) == (Move.CONNECT in moves or (was and Move.DISCONNECT not in moves))


def test_the_documented_opening() -> None:
    machine = device()
    assert machine.step(FRESH) == [PublishFeatures(), SetState(X.INIT_WAIT), Bind()]
    assert machine.step(replace(FRESH, back_state=X.INIT_WAIT)) == []
    assert machine.step(replace(READY, back_state=X.INIT_WAIT)) == [Connect(8, 3)]
    assert machine.connected() == [SetState(X.CONNECTED)]
    assert machine.step(connected()) == []
    assert machine.step(connected(front_state=X.CONNECTED)) == []


@pytest.mark.parametrize("state", [X.INITIALISED, X.CONNECTED])
def test_a_front_end_waits_until_the_manager_agrees(state: XenbusState) -> None:
    machine = device()
    early = replace(READY, front_state=state, bound=False)
    assert machine.step(early) == [PublishFeatures(), SetState(X.INIT_WAIT), Bind()]
    assert machine.step(replace(early, back_state=X.INIT_WAIT)) == []
    assert machine.step(replace(early, back_state=X.INIT_WAIT, bound=True)) == [Connect(8, 3)]


def test_a_running_front_end_is_taken_over_and_sees_no_other_state() -> None:
    machine = device()
    running = connected(front_state=X.CONNECTED, bound=False)
    assert machine.step(running) == [PublishFeatures(), Bind()]
    assert machine.step(running) == []
    assert machine.step(replace(running, bound=True)) == [Connect(8, 3)]
    assert machine.connected() == [SetState(X.CONNECTED)]


@pytest.mark.parametrize(
    ("state", "then"),
    [
        (X.CLOSING, X.CLOSING),
        (X.CLOSED, X.INIT_WAIT),
        (X.INITIALISING, X.INIT_WAIT),
        (None, X.CLOSED),
        (X.UNKNOWN, X.INIT_WAIT),
    ],
)
def test_a_front_end_that_stops_is_disconnected_at_once(state: XenbusState | None, then: XenbusState) -> None:
    machine = device(link=BackLink.CONNECTED)
    assert machine.step(connected(front_state=state)) == [Disconnect(), SetState(then)]


def test_a_closed_front_end_may_come_back() -> None:
    machine = device(link=BackLink.CONNECTED)
    machine.step(connected(front_state=X.CLOSING))
    assert machine.step(connected(front_state=X.CLOSED)) != []
    assert machine.link is BackLink.WAITING
    assert machine.step(replace(READY, back_state=X.INIT_WAIT)) == [Connect(8, 3)]


def test_numbers_that_change_mean_a_new_start_and_so_does_the_way_back_from_4_to_3() -> None:
    anew = [Disconnect(), SetState(X.INIT_WAIT), Connect(9, 3)]
    machine = device(link=BackLink.CONNECTED)
    assert machine.step(connected(ring_ref=9)) == anew
    machine = device(link=BackLink.CONNECTED)
    machine.step(connected(front_state=X.CONNECTED))
    assert machine.step(connected(front_state=X.INITIALISED)) == [*anew[:2], Connect(8, 3)]


@pytest.mark.parametrize("changes", [{"ring_ref": None}, {"event_channel": None}, {"feature": None}, {"feature": b"0"}])
def test_half_an_offer_is_refused_before_and_ignored_after_connecting(changes: dict[str, object]) -> None:
    machine = device(link=BackLink.WAITING)
    actions = machine.step(replace(READY, back_state=X.INIT_WAIT, **changes))  # type: ignore[arg-type]
    assert isinstance(actions[0], Complain)
    assert actions[1:] == [SetState(X.CLOSED)]
    assert device(link=BackLink.CONNECTED).step(connected(**changes)) == []


def test_a_connection_that_fails_twice_is_given_up_until_something_else_is_offered() -> None:
    machine = device(link=BackLink.WAITING)
    seen = replace(READY, back_state=X.INIT_WAIT)
    assert machine.step(seen) == [Connect(8, 3)]
    assert machine.connect_failed("no such grant") == [Complain("no such grant")]
    assert machine.step(seen) == [SetState(X.CLOSED)]
    shut = replace(seen, back_state=X.CLOSED)
    assert machine.step(shut) == []
    assert machine.step(replace(shut, ring_ref=9)) == [SetState(X.INIT_WAIT), Connect(9, 3)]
    assert machine.connect_failed("no such grant") == [], "the same complaint is made once"


@pytest.mark.parametrize("link", [BackLink.NEW, BackLink.WAITING, BackLink.CONNECTED])
@pytest.mark.parametrize("own", [False, True])
def test_the_toolstack_gets_its_6_whatever_the_front_end_does(link: BackLink, own: bool) -> None:
    for front in (None, *XenbusState):
        machine = device(link=link, removes_own_node=own)
        actions = machine.step(replace(READY, back_state=X.CLOSING, online=False, front_state=front))
        assert SetState(X.CLOSED) in actions
        assert (RemoveNode() in actions) == own
        assert (Disconnect() in actions) == (link is BackLink.CONNECTED)
        assert (Unbind() in actions) == (link is not BackLink.NEW) or link is BackLink.NEW
        assert machine.link is BackLink.ENDED


def test_a_5_of_the_toolstack_that_we_wrote_over_is_still_obeyed() -> None:
    machine = device(link=BackLink.WAITING)
    assert SetState(X.CLOSED) in machine.step(replace(FRESH, back_state=X.INIT_WAIT, online=False))


def test_a_toolstack_that_comes_after_the_domain_died_gets_its_6_too() -> None:
    machine = device(link=BackLink.CONNECTED)
    assert SetState(X.CLOSED) in machine.step(connected(domain_alive=False))
    late = connected(domain_alive=False, online=False)
    assert machine.step(replace(late, back_state=X.CLOSING)) == [SetState(X.CLOSED)]


def test_told_to_close_while_it_stays_online_it_may_start_anew() -> None:
    machine = device(link=BackLink.CONNECTED)
    assert machine.step(replace(connected(), back_state=X.CLOSING)) == [Disconnect(), SetState(X.CLOSED)]
    assert machine.step(replace(READY, back_state=X.CLOSED, front_state=X.CLOSED)) == [SetState(X.INIT_WAIT)]


@pytest.mark.parametrize("changes", [{"identity": "two"}, {"back_state": X.INITIALISING}])
def test_another_device_at_the_same_place_starts_from_the_beginning(changes: dict[str, object]) -> None:
    machine = device(link=BackLink.CONNECTED)
    actions = machine.step(replace(connected(), **changes))  # type: ignore[arg-type]
    assert actions[:3] == [Disconnect(), Unbind(), PublishFeatures()]
    assert actions[-1] == Bind()
    assert Connect(8, 3) not in actions, "the grant was the other device's"


def test_a_refusal_takes_the_device_away_and_agreement_brings_it_back() -> None:
    machine = device(link=BackLink.CONNECTED)
    assert machine.bind_refused("not this domain") == [Complain("not this domain"), Disconnect(), SetState(X.CLOSED)]
    shut = replace(READY, back_state=X.CLOSED, bound=False)
    assert machine.step(shut) == []
    assert machine.step(replace(shut, front_state=X.CLOSED)) == [], "nobody is told that it works again"
    assert machine.bind_again() == [Bind()]
    assert machine.bind_again() == []
    assert machine.step(replace(shut, bound=True)) == [SetState(X.INIT_WAIT), Connect(8, 3)]


def test_a_lost_connection_is_told_and_the_front_end_may_start_anew() -> None:
    machine = device(link=BackLink.CONNECTED)
    assert machine.disconnected("the page is absurd") == [Complain("the page is absurd"), SetState(X.CLOSED)]
    assert machine.step(replace(READY, back_state=X.CLOSED)) == []
    assert machine.step(replace(READY, back_state=X.CLOSED, front_state=X.CLOSED)) == [SetState(X.INIT_WAIT)]


numbers = st.sampled_from([None, 1, 2])
anything = st.builds(
    Seen,
    back_state=st.sampled_from([None, *XenbusState]),
    online=st.booleans() | st.just(value=True),
    front_state=st.sampled_from([None, *XenbusState, X.INITIALISED, X.CONNECTED]),
    ring_ref=numbers,
    event_channel=numbers,
    feature=st.sampled_from([None, b"1", b"1", b"2"]),
    bound=st.booleans(),
    domain_alive=st.just(value=True) | st.booleans(),
    identity=st.sampled_from(["one", "one", "two"]),
)


@settings(max_examples=150, deadline=None)
@given(seen=st.lists(st.tuples(anything, st.integers(0, 5)), max_size=30), own=st.booleans())
def test_whatever_is_seen_the_actions_fit_each_other(seen: list[tuple[Seen, int]], own: bool) -> None:
    machine = BackDevice(removes_own_node=own)
    mapped = False

    def carry_out(actions: list[Action], now: Seen, luck: int) -> None:
        nonlocal mapped
        assert len(actions) <= 8
        assert machine.link is not BackLink.CONNECTED or mapped or isinstance(actions[-1], Connect)
        for action in actions:
            if isinstance(action, Connect):
                assert action is actions[-1]
                assert now.bound
                assert Unbind() not in actions
                assert (action.ring_ref, action.event_channel, now.feature) == (now.ring_ref, now.event_channel, b"1")
                assert not mapped
                mapped = luck != 0
                carry_out(machine.connected() if mapped else machine.connect_failed("no"), now, luck)
            elif isinstance(action, Disconnect):
                assert mapped
                mapped = False
            elif isinstance(action, RemoveNode):
                assert own
        assert mapped == (machine.link is BackLink.CONNECTED)

    for now, luck in seen:
        carry_out(machine.step(now), now, luck)
        if luck == 1:
            carry_out(machine.bind_refused("no"), now, luck)
        elif luck == 2:
            carry_out(machine.bind_again(), now, luck)
        elif luck == 3 and mapped:
            mapped = False
            carry_out(machine.disconnected("lost"), now, luck)


@pytest.mark.parametrize("value", [b"", b"x", b"-1", b"1.0", b" 1", b"9" * 5000, b"\xb2", b"4294967296", b"+1", b"1_0"])
def test_what_is_no_number_is_none(value: bytes) -> None:
    assert parse_number(value) is None
    assert parse_state(value) is X.UNKNOWN


def test_numbers_and_states_are_read() -> None:
    assert (parse_number(None), parse_number(b"0"), parse_number(b"4294967295")) == (None, 0, 2**32 - 1)
    assert (parse_state(None), parse_state(b"4"), parse_state(b"9")) == (None, X.CONNECTED, X.UNKNOWN)
