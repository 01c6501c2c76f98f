"""Where requests and answers end, on any cut of the stream; what is said instead of an answer."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vtpm_instance_commands import STARTUP_CLEAR, get_random, pcr_extend

from manager.relay_cutting import (
    FORMS,
    MAX_BODY,
    ControlCutter,
    DataCutter,
    answer_size,
    failure,
    form_of,
    number_of,
)
from manager.relay_errors import StreamCutError
from vtpm_instance.control import Command


def word(number: int) -> bytes:
    return struct.pack(">I", number)


def control_request(number: int, body: int) -> bytes:
    form = FORMS[number]
    payload = bytearray(b"\1" * form.fixed)
    if form.counted_at is not None:
        payload[form.counted_at : form.counted_at + 4] = word(body)
        payload += b"\2" * body
    return word(number) + payload


REQUESTS = st.lists(st.tuples(st.sampled_from(sorted(FORMS)), st.integers(0, 40), st.booleans()), max_size=8)
CUTS = st.lists(st.integers(1, 30), min_size=1, max_size=30)


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    found, at = [], 0
    for size in cuts * (len(stream) // sum(cuts) + 1):
        found.append(stream[at : at + size])
        at += size
    return found


def test_every_control_command_has_a_form() -> None:
    assert set(FORMS) == set(Command)


@given(REQUESTS, CUTS)
def test_control_requests_come_out_as_they_went_in_without_qemus_padding(
    requests: list[tuple[int, int, bool]], cuts: list[int]
) -> None:
    whole = [control_request(number, body) for number, body, _ in requests]
    stream = b"".join(
        request + (bytes(3) if FORMS[number].padded and padded else b"")
        for request, (number, _, padded) in zip(whole, requests, strict=True)
    )
    cutter, found = ControlCutter(), []
    for piece in pieces(stream, cuts):
        cutter.feed(piece)
        while (request := cutter.next()) is not None:
            found.append(request)
    assert found == whole


@given(st.lists(st.sampled_from([STARTUP_CLEAR, get_random(20), pcr_extend(3)]), max_size=6), CUTS, st.booleans())
def test_tpm_commands_come_out_as_they_went_in(commands: list[bytes], cuts: list[int], prefixed: bool) -> None:
    if prefixed:
        commands = [struct.pack(">IBI", 8, 2, len(command)) + command for command in commands]
    cutter, found = DataCutter(), []
    for piece in pieces(b"".join(commands), cuts):
        cutter.feed(piece)
        while (command := cutter.next()) is not None:
            found.append(command)
    assert found == commands


@pytest.mark.parametrize("size", [0, 9, 4097, 0xFFFFFFFF])
def test_a_size_that_cannot_be_ends_the_connection(size: int) -> None:
    cutter = DataCutter()
    cutter.feed(b"\x80\x01" + word(size) + word(0x17B))
    with pytest.raises(StreamCutError):
        cutter.next()


def test_a_body_that_is_too_long_ends_the_connection() -> None:
    cutter = ControlCutter()
    cutter.feed(word(0x0D) + word(0) + word(1) + word(MAX_BODY + 1))
    with pytest.raises(StreamCutError):
        cutter.next()


def test_answers_are_as_long_as_they_say() -> None:
    blob = word(0x0C) + bytes(12)
    assert answer_size(blob, word(0) + bytes(8), control=True) is None
    assert answer_size(blob, word(0) + bytes(8) + word(7), control=True) == 23
    assert answer_size(blob, word(0x800) + bytes(12), control=True) == 16
    assert answer_size(blob, word(9), control=True) == 4
    assert answer_size(word(1), word(0), control=True) == 8
    assert answer_size(get_random(), b"\x80\x01\0\0\0\x2c", control=False) is None
    assert answer_size(get_random(), b"\x80\x01\0\0\0\x2c" + bytes(4), control=False) == 44
    assert answer_size(struct.pack(">IBI", 8, 0, 12) + get_random(), word(44), control=False) == 52


def test_a_failure_is_one_that_its_client_can_read() -> None:
    assert failure(get_random(), control=False) == bytes.fromhex("80010000000a00000101")
    assert failure(bytes.fromhex("00c10000000a000000f1"), control=False) == bytes.fromhex("00c40000000a00000009")
    prefixed = failure(struct.pack(">IBI", 8, 0, 12) + get_random(), control=False)
    assert prefixed == word(10) + bytes.fromhex("80010000000a00000101") + word(0)
    for number, form in FORMS.items():
        answer = failure(word(number) + bytes(16), control=True)
        assert answer[:4] == word(9)
        assert len(answer) == (form.answer if form.whole_failure else 4)


def test_what_changes_a_tpm_is_never_said_twice() -> None:
    changing = {"INIT", "SHUTDOWN", "HASH_START", "HASH_DATA", "HASH_END", "STORE_VOLATILE", "GET_STATEBLOB"}
    changing |= {"SET_STATEBLOB", "CANCEL_TPM_CMD", "SET_DATAFD"}
    assert {Command(number).name for number, form in FORMS.items() if not form.repeatable} == changing
    assert not form_of(word(0x99)).repeatable
    assert number_of(word(0x99)) == 0x99
