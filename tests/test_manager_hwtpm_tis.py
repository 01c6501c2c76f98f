from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tpm_registers import ByteRegisters, Faults, FifoModel, Hostile, run_to_end

from manager.hwtpm_errors import TpmError
from manager.hwtpm_tis import FifoExchange, FifoState
from manager.hwtpm_tis_errors import (
    CommandCancelled,
    CommandRefused,
    LocalityHeld,
    LocalityLost,
    LocalityRefused,
    NoTpmAtPage,
    RegistersInvalid,
    ResponseCut,
    ResponseTooLong,
    TpmStuck,
    WrongInterface,
)
from manager.hwtpm_tis_place import Place
from manager.hwtpm_tis_registers import BURST_HIGH, BURST_LOW
from manager.hwtpm_tis_table import Limit
from manager.hwtpm_transport import HEADER

PLACE = Place("tis", 0xFED40000, 2)
COMMAND_SECONDS = 20.0


def packet(length: int, code: int = 0) -> bytes:
    return HEADER.pack(0x8001, length, code) + bytes(index % 251 for index in range(length - HEADER.size))


def exchange(model: ByteRegisters, command: bytes | None = packet(40), **more: Any) -> FifoExchange:
    return FifoExchange(model, PLACE, command, command_end=COMMAND_SECONDS, command_seconds=COMMAND_SECONDS, **more)


def faulty(faults: Faults, response: bytes = packet(300)) -> FifoModel:
    return FifoModel(lambda _: response, Random(1), faults)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(HEADER.size, 4096),
    st.integers(HEADER.size, 4096),
    st.integers(),
    st.sampled_from(["", "lower", "brief"]),
)
def test_any_timing_gives_the_command_to_the_tpm_and_its_response_to_us(
    sent: int, received: int, seed: int, holder: str
) -> None:
    seen: list[bytes] = []

    def answer(command: bytes) -> bytes:
        seen.append(command)
        return packet(received)

    model = FifoModel(answer, Random(seed), Faults(holder=holder))
    machine = exchange(model, packet(sent))
    run_to_end(machine)
    assert seen == [packet(sent)]
    assert machine.response == packet(received)
    assert not model.active
    assert not model.requested


@settings(max_examples=300, deadline=None)
@given(st.integers(), st.lists(st.integers(0, 0xFF), min_size=1, max_size=6), st.booleans())
def test_whatever_the_registers_say_it_ends_in_an_error_or_a_whole_response(
    seed: int, values: list[int], may_seize: bool
) -> None:
    useful = [0xA0, 0xA8, 0x90, 0x88, 0x80, 0x40, 0xD0, 0xF0, 0x00]
    machine = exchange(Hostile(Random(seed), values + useful), may_seize=may_seize)
    try:
        run_to_end(machine)
    except (TpmError, TimeoutError):
        machine.abandon()
    else:
        assert HEADER.unpack_from(machine.response)[1] == len(machine.response)


@pytest.mark.parametrize(
    ("faults", "error", "says"),
    [
        (Faults(nobody=True), NoTpmAtPage, "no TPM answers at 0xfed42000"),
        (Faults(invalid=True), RegistersInvalid, "do not become valid in 0.75 s"),
        (Faults(interface=1), WrongInterface, "Use `crb:`"),
        (Faults(holder="higher"), LocalityHeld, "does not give it back"),
        (Faults(ready=False), TpmStuck, "does not get ready"),
        (Faults(burst=False), TpmStuck, "burst count stays 0"),
        (Faults(takes=17), CommandRefused, "it wants no more after"),
        (Faults(greedy=True), CommandRefused, "wants more than the 40 bytes"),
        (Faults(cuts=2), ResponseCut, "when asked again"),
        (Faults(cuts=1), None, ""),
        (Faults(extra=3), ResponseTooLong, "more bytes follow the 300"),
        (Faults(seized_after=20), LocalityLost, "taken from us by a higher one"),
        (Faults(seized_after=50), LocalityLost, "taken from us by a higher one"),
        (Faults(answers=False), CommandCancelled, "it was cancelled"),
    ],
    ids=str,
)
def test_each_way_to_fail_has_an_error_that_says_so(faults: Faults, error: type[TpmError] | None, says: str) -> None:
    model = faulty(faults)
    machine = exchange(model)
    if error is None:
        run_to_end(machine)
        assert machine.response == packet(300)
        return
    with pytest.raises(error) as refused:
        run_to_end(machine)
    assert says in str(refused.value)
    assert refused.value.code == 7
    if not faults.nobody:
        machine.abandon()
        assert not model.active


def test_a_locality_that_no_other_holds_and_is_not_granted_is_refused() -> None:
    class Deaf(FifoModel):
        def _write_access(self, _value: int) -> None:
            return

    with pytest.raises(LocalityRefused, match=r"neither requested nor seized.*0xfed42000"):
        run_to_end(exchange(Deaf(lambda _: b"", Random(1))))


@pytest.mark.parametrize("length", [0, 9, 4097, 0xFFFFFFFF])
def test_a_header_with_an_impossible_length_is_refused(length: int) -> None:
    response = HEADER.pack(0x8001, length, 0) + bytes(90)
    with pytest.raises(ResponseTooLong, match=f"tells {length} bytes"):
        run_to_end(exchange(faulty(Faults(), response)))


def test_nothing_is_written_where_no_registers_are_valid() -> None:
    model = faulty(Faults(invalid=True))
    with pytest.raises(RegistersInvalid):
        run_to_end(exchange(model))
    assert model.writes == 0


def test_a_burst_count_that_shrinks_while_it_is_read_is_read_again() -> None:
    class Shrinking(FifoModel):
        """Between the two halves of 0x010f the count becomes 15: a driver that joins them would move 271 bytes."""

        torn = 0

        def read8(self, offset: int) -> int:
            if offset not in {BURST_HIGH, BURST_LOW}:
                return super().read8(offset)
            self.credit = 15 if self.phase != "completion" else len(self.response) - self.given
            if offset == BURST_LOW:
                return self.credit & 0xFF
            self.torn += 1
            return 1 if self.torn % 4 == 1 else self.credit >> 8

    machine = exchange(Shrinking(lambda command: command, Random(1)), packet(600))
    run_to_end(machine)
    assert machine.response == packet(600)


def test_a_tpm_that_ignores_the_cancel_is_a_time_out() -> None:
    machine = exchange(faulty(Faults(answers=False, cancels=False)))
    with pytest.raises(TimeoutError):
        run_to_end(machine)


def test_the_kernels_driver_is_waited_for_and_not_seized() -> None:
    model = faulty(Faults(holder="lower"))
    machine = exchange(model, may_seize=False)
    with pytest.raises(LocalityHeld, match=r"20 s .*kernel's driver"):
        run_to_end(machine)
    assert model.requested
    machine.abandon()
    assert not model.requested, "granted later, to nobody"
    assert not model.active


def test_a_lower_locality_that_keeps_the_tpm_is_seized_after_a_while() -> None:
    machine = exchange(faulty(Faults(holder="lower")))
    assert run_to_end(machine) >= Limit.A.seconds
    assert machine.seized


def test_without_a_command_the_locality_is_taken_and_given_back() -> None:
    model = faulty(Faults())
    machine = exchange(model, None)
    run_to_end(machine)
    assert not model.active
    assert model.writes == 3  # request, command ready, relinquish


def test_what_a_dead_owner_left_running_is_ended() -> None:
    model = faulty(Faults())
    model.active, model.phase, model.been_seized = True, "execution", True
    machine = exchange(model)
    run_to_end(machine)
    assert machine.response == packet(300)
    assert not model.been_seized


def test_every_state_has_a_row_and_every_row_names_methods() -> None:
    assert set(FifoExchange.TABLE) == set(FifoState) - {FifoState.DONE}
    for row in FifoExchange.TABLE.values():
        for name in (row.holds, row.then, row.late):
            method: Callable[..., Any] = getattr(FifoExchange, name)
            assert callable(method)
