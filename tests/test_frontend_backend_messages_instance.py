import struct
from typing import Any

import pytest
from generated_docs import check_generated
from hypothesis import given, settings
from hypothesis import strategies as st
from message_conformance import check_protocol
from message_tables import table

from frontend_backend import messages_instance
from frontend_backend.errors import MessageError
from frontend_backend.messages_instance import (
    TAG_ANSWER,
    TAG_REQUEST,
    Commit,
    CommitReply,
    Load,
    LoadReply,
    QuoteReply,
    RandomReply,
    Refusal,
    RefusalCode,
    Report,
    ReportReply,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
    refusal_for_malformed,
)
from frontend_backend.orders import Orders
from frontend_backend.ring import Answered, BackRing, FrontRing
from frontend_backend.tpmhdr import CommandHeader
from frontend_backend.tpmif import MAX_PACKET, PAGE_SIZE, RingState, SharedPage

KEY = bytes(range(200, 232))
DIGEST = bytes(range(32))
LOAD_REPLY = LoadReply(
    bytes(16), "2.0", 1, fresh=False, key=KEY, digest=DIGEST, generation=9, startup="clear", commit_timeout=5.0
)
ALL_ORDERS = [Orders.NONE, Orders.STOP, Orders.RESET, Orders.STOP | Orders.RESET]


def framed(tag: int, body: bytes, code: int = 0) -> bytes:
    return CommandHeader(tag, 10 + len(body), code).pack() + body


def failure(untrusted: bytes) -> BaseException | None:
    try:
        decode_reply(untrusted)
    except MessageError as error:
        return error
    return None


def reply_alone(untrusted: bytes) -> Any:
    return decode_reply(untrusted)[0]


def test_requests_travel_unharmed_and_nothing_else_is_one() -> None:
    check_protocol(messages_instance._REQUESTS, encode_request, decode_request, lambda body: framed(TAG_REQUEST, body))


def test_replies_travel_unharmed_and_nothing_else_is_one() -> None:
    check_protocol(messages_instance._REPLIES, encode_reply, reply_alone, lambda body: framed(TAG_ANSWER, body))


@pytest.mark.parametrize("orders", ALL_ORDERS)
def test_orders_travel_with_every_reply(orders: Orders) -> None:
    assert decode_reply(encode_reply(ReportReply(), orders)) == (ReportReply(), orders)
    assert decode_reply(encode_reply(Refusal(RefusalCode.LIMIT, "later"), orders))[1] is orders


@pytest.mark.parametrize("code", [16, 17, 32, 0x101, 2**31, 2**32 - 1])
def test_unknown_orders_are_refused(code: int) -> None:
    packet = bytearray(encode_reply(ReportReply()))
    packet[6:10] = code.to_bytes(4, "big")
    with pytest.raises(MessageError, match=f"unknown orders {code:#x}"):
        decode_reply(bytes(packet))


def test_packets_carry_the_tags_and_sizes_of_vtpmmgr() -> None:
    for packet, tag in ((encode_request(Load()), 0x01C1), (encode_reply(ReportReply()), 0x01C4)):
        assert CommandHeader.unpack(packet) == CommandHeader(tag, len(packet), 0)


def test_a_request_is_no_reply_and_a_reply_no_request() -> None:
    with pytest.raises(MessageError, match="packet with tag 0x01c1"):
        decode_reply(encode_request(Load()))
    with pytest.raises(MessageError, match="packet with tag 0x01c4"):
        decode_request(encode_reply(ReportReply()))
    with pytest.raises(MessageError, match="unknown kind of message 'LoadReply'"):
        decode_request(framed(TAG_REQUEST, encode_reply(LOAD_REPLY)[10:]))


@pytest.mark.parametrize("size", [0, 9, 10, 11, 2**32 - 1])
def test_a_size_that_is_not_the_packets_is_refused(size: int) -> None:
    packet = bytearray(encode_request(Load()))
    packet[2:6] = size.to_bytes(4, "big")
    with pytest.raises(MessageError):
        decode_request(bytes(packet))
    with pytest.raises(MessageError):
        decode_request(encode_request(Load()) + b"\0")


@pytest.mark.parametrize("length", range(10))
def test_a_packet_shorter_than_its_header_is_refused(length: int) -> None:
    with pytest.raises(MessageError, match="TPM header has 10 bytes"):
        decode_request(encode_request(Load())[:length])


def test_a_message_that_does_not_fit_a_page_is_not_encoded() -> None:
    room = MAX_PACKET - len(encode_reply(QuoteReply(bytes(1000)))) + 1000
    assert len(encode_reply(QuoteReply(bytes(room)))) == MAX_PACKET
    with pytest.raises(MessageError, match="message of 4089 bytes does not fit one page"):
        encode_reply(QuoteReply(bytes(room + 1)))
    with pytest.raises(MessageError, match="does not fit one page"):
        encode_request(Report(messages_instance.InstanceState.READY, text="x" * MAX_PACKET))


@pytest.mark.parametrize("message", [LOAD_REPLY, Commit(9, KEY, DIGEST, 1), RandomReply(KEY)])
def test_a_message_with_a_key_does_not_print_it(message: object) -> None:
    for text in (repr(message), str(message), f"{message}", repr([message])):
        assert KEY.hex() not in text
        assert repr(KEY)[2:10] not in text
        assert "key=" not in text
    assert repr(DIGEST)[2:10] in repr(Commit(9, KEY, DIGEST, 1)), "the test can see bytes where they are printed"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.binary(min_size=1, max_size=8))
def test_an_error_about_a_damaged_message_does_not_print_its_key(position: int, junk: bytes) -> None:
    packet = bytearray(encode_reply(LOAD_REPLY))
    position %= len(packet)
    packet[position : position + len(junk)] = junk
    del packet[len(encode_reply(LOAD_REPLY)) :]
    error = failure(bytes(packet))
    while error is not None:
        assert repr(KEY)[2:40] not in repr(error)
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("reason", ["", "short", "x" * 5000, "\u20ac" * 5000])
def test_the_answer_to_a_malformed_request_always_fits(reason: str) -> None:
    message, orders = decode_reply(refusal_for_malformed(reason))
    assert isinstance(message, Refusal)
    assert (message.code, message.text, orders) == (RefusalCode.MALFORMED, reason[:200], Orders.NONE)


def test_a_malformed_page_is_answered_with_a_refusal_the_instance_can_read() -> None:
    page = memoryview(bytearray(PAGE_SIZE))
    page[: SharedPage.SIZE] = SharedPage(5000, RingState.SUBMIT, 0, 0).pack()
    assert isinstance(BackRing(page, refusal_for_malformed).take(), Answered)
    answer = FrontRing(page).poll()
    assert answer is not None
    assert "5000 bytes announced" in decode_reply(answer)[0].text  # type: ignore[union-attr]


def test_keys_leave_the_page_on_their_way_up_and_down() -> None:
    memory = bytearray(PAGE_SIZE)
    front, back = FrontRing(memoryview(memory)), BackRing(memoryview(memory), refusal_for_malformed)
    front.submit(encode_request(Commit(9, KEY, DIGEST, 1)))
    assert KEY in memory, "the test can see a key on a page"
    back.take()
    back.finish(encode_reply(CommitReply(9)))
    assert KEY not in memory
    front.poll()
    front.submit(encode_request(Load()))
    back.take()
    back.finish(encode_reply(LOAD_REPLY))
    assert KEY in memory
    front.poll()
    assert KEY not in memory


def test_the_messages_in_the_documents_are_those_in_the_code() -> None:
    check_generated("protocol.md", "instance requests", table(messages_instance._REQUESTS))
    check_generated("protocol.md", "instance replies", table(messages_instance._REPLIES))


def test_a_report_of_an_instance_that_knows_no_quotes_says_so() -> None:
    import msgpack

    body = msgpack.packb([1, "Report", {"state": "ready", "reason": "", "text": ""}])
    packet = struct.pack(">HII", messages_instance.TAG_REQUEST, 10 + len(body), 0) + body
    assert decode_request(packet) == Report(messages_instance.InstanceState.READY, quotes=False)


def test_a_commit_of_every_day_is_what_earlier_managers_read() -> None:
    """`restored` is sent only by who was given a state blob, which an earlier manager never answered."""
    usual = Commit(9, KEY, DIGEST, 1)
    assert b"restored" not in encode_request(usual)
    assert decode_request(encode_request(usual)) == usual
    restored = Commit(9, KEY, DIGEST, 1, restored=b"h" * 160)
    assert decode_request(encode_request(restored)) == restored
