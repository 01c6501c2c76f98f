"""The instance's end of the ring to the manager, against a manager in a thread."""

import os
import threading
from collections.abc import Iterator
from uuid import uuid4

import pytest
from vtpm_instance_manager import DEADLINE, Record, SmallManager, until

from frontend_backend.local import LocalRing
from frontend_backend.messages_instance import (
    Commit,
    CommitReply,
    InstanceState,
    Load,
    LoadReply,
    Random,
    RefusalCode,
    Report,
)
from frontend_backend.orders import Orders
from frontend_backend.ring import BackRing, Request
from vtpm_instance.errors import ManagerConfusedError, ManagerGoneError, ManagerRefusedError, ManagerSilentError
from vtpm_instance.managerlink import STOP_GRACE, ManagerLink

READY = Report(InstanceState.READY)
COMMIT = Commit(1, b"k" * 32, b"d" * 32, 1)


@pytest.fixture
def ends() -> Iterator[tuple[ManagerLink, SmallManager]]:
    front, back = LocalRing.pair()
    link, manager = ManagerLink(front), SmallManager(back, Record(uuid4()))
    yield link, manager
    manager.close()
    link.close()


def test_a_request_is_answered(ends: tuple[ManagerLink, SmallManager]) -> None:
    link, manager = ends
    reply = link.ask(Load(), DEADLINE)
    assert isinstance(reply, LoadReply)
    assert reply.vtpm == manager.record.vtpm.bytes


def test_what_is_done_meanwhile_is_done_once_and_its_failure_leaves_the_link_as_it_was(
    ends: tuple[ManagerLink, SmallManager],
) -> None:
    link, _ = ends
    done: list[int] = []
    assert isinstance(link.ask(COMMIT, DEADLINE, lambda: done.append(1)), CommitReply)
    with pytest.raises(ZeroDivisionError):
        link.ask(Load(), DEADLINE, lambda: done.append(1 // 0))
    assert done == [1]
    assert isinstance(link.ask(COMMIT, DEADLINE), CommitReply), "the answer that was dropped is not taken for this one"
    with pytest.raises(ManagerSilentError):
        link.ask(Random(8), 0.6, lambda: done.append(2))
    assert done == [1, 2], "once, though it was asked for again and again"


def test_a_refusal_is_raised_with_its_reason(ends: tuple[ManagerLink, SmallManager]) -> None:
    link, manager = ends
    manager.refuse = RefusalCode.STALE_LEASE
    with pytest.raises(ManagerRefusedError) as raised:
        link.ask(COMMIT, DEADLINE)
    assert raised.value.code == "stale-lease"


def test_unavailable_for_the_whole_time_is_silence(ends: tuple[ManagerLink, SmallManager]) -> None:
    link, _ = ends
    with pytest.raises(ManagerSilentError):
        link.ask(Random(8), 0.3)


def test_orders_travel_with_any_answer_and_are_taken_once(ends: tuple[ManagerLink, SmallManager]) -> None:
    link, manager = ends
    manager.orders = Orders.STOP
    link.ask(Load(), DEADLINE)
    assert link.take_orders() is Orders.STOP
    assert link.take_orders() is Orders.NONE


def test_the_answer_to_an_abandoned_request_is_not_taken_for_the_next_ones(
    ends: tuple[ManagerLink, SmallManager],
) -> None:
    link, manager = ends
    manager.set_mute(mute=True)
    with pytest.raises(ManagerSilentError):
        link.ask(Load(), 0.1)
    manager.set_mute(mute=False)
    assert link.ask(COMMIT, DEADLINE) == CommitReply(1)


def test_a_request_that_nobody_took_is_withdrawn(ends: tuple[ManagerLink, SmallManager]) -> None:
    link, manager = ends
    manager.set_silent(True)
    with pytest.raises(ManagerSilentError):
        link.ask(COMMIT, 0.1)
    manager.set_silent(False)
    assert isinstance(link.ask(Load(), DEADLINE), LoadReply)
    assert manager.record.commits == 0


def test_a_request_that_was_given_back_is_sent_again() -> None:
    front, back = LocalRing.pair()
    record = Record(uuid4())
    with front, back:
        link = ManagerLink(front)

        def give_back_once() -> None:
            ring = BackRing(back.page, lambda _why: b"")
            taken = ring.take()
            assert isinstance(taken, Request)
            ring.abort()
            back.ring()

        asking = threading.Thread(target=lambda: link.ask(COMMIT, DEADLINE))
        asking.start()
        until(lambda: back.page[4] == 1, "the request")
        give_back_once()
        until(lambda: back.page[4] == 1, "the request again")
        manager = SmallManager(LocalRing.adopt(*[os.dup(fd) for fd in back.descriptors()]), record)
        asking.join(DEADLINE)
        manager.close()
    assert record.commits == 1


def test_reports_do_not_wait_and_the_newest_is_sent(ends: tuple[ManagerLink, SmallManager]) -> None:
    link, manager = ends
    manager.set_silent(True)
    link.report(READY)
    link.report(Report(InstanceState.NEEDS_RESET, "first"))
    link.report(Report(InstanceState.NEEDS_RESET, "second"))
    manager.set_silent(False)

    def both_there() -> bool:
        link.on_doorbell()
        return [report.reason for report in manager.record.reports] == ["", "second"]

    until(both_there, "the reports")
    assert isinstance(link.ask(Load(), DEADLINE), LoadReply)


def test_a_ring_beyond_the_answers_is_a_wish_for_a_report(ends: tuple[ManagerLink, SmallManager]) -> None:
    link, manager = ends
    for _ in range(50):
        link.ask(Load(), DEADLINE)
    assert not link.take_asked()
    manager.ring.ring()

    def asked() -> bool:
        link.on_doorbell()
        return link.take_asked()

    until(asked, "the wish")
    assert not link.take_asked()


def test_a_ring_together_with_an_answer_is_not_lost(ends: tuple[ManagerLink, SmallManager]) -> None:
    link, manager = ends
    manager.ring.ring()
    link.ask(Load(), DEADLINE)

    def asked() -> bool:
        link.on_doorbell()
        return link.take_asked()

    until(asked, "the wish")
    assert not link.take_asked()


def test_a_peer_that_is_gone_is_noticed_at_once() -> None:
    front, back = LocalRing.pair()
    link = ManagerLink(front)
    back.close()
    with pytest.raises(ManagerGoneError):
        link.ask(Load(), 60.0)
    with pytest.raises(ManagerGoneError):
        link.on_doorbell()
    link.close()


def test_an_unreadable_answer_is_an_error_and_the_next_request_works(ends: tuple[ManagerLink, SmallManager]) -> None:
    link, manager = ends
    manager.garbage = b"\0" * 20
    with pytest.raises(ManagerConfusedError):
        link.ask(Load(), DEADLINE)
    assert isinstance(link.ask(Load(), DEADLINE), LoadReply)


def test_a_page_with_an_impossible_state_is_an_error_for_the_caller() -> None:
    front, back = LocalRing.pair()
    link = ManagerLink(front)
    back.page[4] = 99
    with pytest.raises(ManagerConfusedError):
        link.ask(Load(), DEADLINE)
    link.close()
    back.close()


def test_a_wish_to_stop_shortens_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    assert STOP_GRACE < 30.0  # seconds the keeper waits for a clean stop
    monkeypatch.setattr("vtpm_instance.managerlink.STOP_GRACE", 0.1)
    front, back = LocalRing.pair()
    link = ManagerLink(front)
    reader, writer = os.pipe()
    link.watch_for_stop(reader)
    os.write(writer, b"x")
    with pytest.raises(ManagerSilentError):
        link.ask(Load(), 3600.0)
    assert os.read(reader, 9) == b"x"
    os.close(reader)
    os.close(writer)
    link.close()
    back.close()
