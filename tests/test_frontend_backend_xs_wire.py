"""Xenstore's protocol without I/O: messages in any pieces, hostile lengths, paths, permissions, listings, sessions."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend_backend.xs_replies import (
    MAX_LISTING,
    Listing,
    Permission,
    decode_event,
    decode_number,
    decode_permissions,
    encode_permissions,
)
from frontend_backend.xs_session import MAX_CHANGES, Answer, Changes, Session, ignore
from frontend_backend.xs_wire import (
    ERROR_NAMES,
    HEADER,
    MAX_ABSOLUTE_PATH,
    MAX_ID,
    MAX_PAYLOAD,
    MAX_RELATIVE_PATH,
    Message,
    Operation,
    Splitter,
    XenstoreError,
    XenstoreGoneError,
    XenstoreProtocolError,
    decode_error,
    decode_strings,
    encode_path,
    encode_strings,
)

words = st.integers(0, MAX_ID)
messages = st.builds(Message, words, words, words, st.binary(max_size=64) | st.just(bytes(MAX_PAYLOAD)))


def pieces(draw: Callable[[Any], Any], data: bytes) -> list[bytes]:
    """Cut a stream anywhere, empty pieces included."""
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def test_a_message_is_laid_out_as_xs_wire_h_has_it() -> None:
    message = Message(Operation.WRITE, 0x01020304, 0x0A0B0C0D, b"/a\0value")
    assert message.encode() == bytes.fromhex("0b000000 04030201 0d0c0b0a 08000000") + b"/a\0value"
    assert (Operation.ERROR, Operation.RESET_WATCHES, Operation.DIRECTORY_PART) == (16, 21, 22)
    with pytest.raises(ValueError, match="4097 bytes"):
        Message(Operation.WRITE, 1, 0, bytes(MAX_PAYLOAD + 1)).encode()


@given(st.data(), st.lists(messages, max_size=5))
def test_a_stream_in_any_pieces_gives_the_messages_that_were_sent(data: st.DataObject, sent: list[Message]) -> None:
    splitter, stream = Splitter(), b"".join(message.encode() for message in sent)
    got = [message for piece in pieces(data.draw, stream) for message in splitter.feed(piece)]
    assert got == sent
    assert not splitter.inside


@given(st.data(), st.lists(messages, max_size=2), words, st.integers(MAX_PAYLOAD + 1, MAX_ID))
def test_a_hostile_length_is_refused_before_anything_is_waited_for(
    data: st.DataObject, sent: list[Message], word: int, length: int
) -> None:
    stream = b"".join(message.encode() for message in sent) + HEADER.pack(word, word, word, length)
    splitter, cut = Splitter(), pieces(data.draw, stream)
    with pytest.raises(XenstoreProtocolError, match="at most 4096"):
        list(map(splitter.feed, cut))


@given(messages, st.data())
def test_a_cut_message_is_not_given_and_the_cut_is_known(message: Message, data: st.DataObject) -> None:
    raw, splitter = message.encode(), Splitter()
    end = data.draw(st.integers(1, len(raw) - 1))
    assert splitter.feed(raw[:end]) == []
    assert splitter.inside
    assert splitter.feed(raw[end:]) == [message]


def test_errors_are_found_by_name_and_unknown_ones_kept() -> None:
    for name in ERROR_NAMES:
        error = decode_error(Message(Operation.ERROR, 1, 0, name.encode() + b"\0"), "read", "/a")
        assert error is not None
        assert (error.name, error.operation, error.path) == (name, "read", "/a")
        assert error.errno > 0
    strange = decode_error(Message(Operation.ERROR, 1, 0, b"E\xff\0"), "read", "/a")
    assert strange is not None
    assert strange.name == r"E\xff"
    assert decode_error(Message(Operation.READ, 1, 0, b"EACCES\0"), "read", "/a") is None
    assert len(str(XenstoreError("EACCES", "read", "/" + "a" * 3000))) < 400


PATH = re.compile(r"/|/?[-/_@0-9A-Za-z]*[-_@0-9A-Za-z]")


@given(st.text("ab/-_@ \0é~.:", max_size=12) | st.text(max_size=6))
def test_paths_are_taken_by_xenstoreds_rules(path: str) -> None:
    allowed = PATH.fullmatch(path) is not None and "//" not in path
    try:
        assert encode_path(path) == path.encode() + b"\0"
    except XenstoreError as error:
        assert error.name == "EINVAL"  # noqa: PT017 - both outcomes are right, for different paths
        assert not allowed
    else:
        assert allowed


def test_long_paths_are_refused() -> None:
    encode_path("/" + "a" * (MAX_ABSOLUTE_PATH - 1))
    encode_path("a" * MAX_RELATIVE_PATH)
    for path in ("/" + "a" * MAX_ABSOLUTE_PATH, "a" * (MAX_RELATIVE_PATH + 1)):
        with pytest.raises(XenstoreError, match="EINVAL"):
            encode_path(path)


def test_strings_end_in_nul_and_hold_none() -> None:
    assert encode_strings("a", "", "é") == b"a\0\0\xc3\xa9\0"
    assert decode_strings(b"") == []
    assert decode_strings(b"a\0\0b\0") == ["a", "", "b"]
    assert decode_strings(b"\xff\0")[0].encode("utf-8", "surrogateescape") == b"\xff"
    with pytest.raises(ValueError, match="NUL"):
        encode_strings("a\0b")
    with pytest.raises(XenstoreProtocolError, match="NUL"):
        decode_strings(b"a\0b")


def test_numbers_events_and_permissions_are_checked() -> None:
    assert decode_number(b"4294967295\0") == MAX_ID
    for wrong in (b"", b"\0", b"4294967296\0", b"-1\0", b"1\0002\0", b"1 \0", b"\xd9\xa3\0", b"9" * 4000 + b"\0"):
        with pytest.raises(XenstoreProtocolError):
            decode_number(wrong)
    assert decode_event(b"/a\0007\0") == ("/a", "7")
    assert decode_event(b"@releaseDomain\0007\0003\0") == ("@releaseDomain", "7")
    for wrong in (b"", b"/a\0", b"/a\0007"):
        with pytest.raises(XenstoreProtocolError):
            decode_event(wrong)
    for wrong in (b"x1\0", b"r\0", b"r-1\0", b"r99999\0", b"\0", b"r1"):
        with pytest.raises(XenstoreProtocolError):
            decode_permissions(wrong)


@given(st.lists(st.builds(Permission, st.integers(0, 0x7FEF), st.booleans(), st.booleans()), max_size=6))
def test_permissions_come_back(permissions: list[Permission]) -> None:
    assert decode_permissions(encode_permissions(permissions)) == tuple(permissions)


def test_permissions_are_spelled_as_in_xenstore_txt() -> None:
    spelled = [Permission(3), Permission(3, read=True), Permission(3, write=True), Permission(3, read=True, write=True)]
    assert encode_permissions(spelled) == b"n3\0r3\0w3\0b3\0"


class Directory:
    """A directory as xenstored serves it in parts of `room` bytes (send_directory_part of xenstored_core.c)."""

    def __init__(self, names: list[str], room: int) -> None:
        self.generation, self.names, self.room = 1, names, room

    def part(self, offset: int) -> bytes:
        children = encode_strings(*self.names)
        head = f"{self.generation}\0".encode()
        if offset >= len(children):
            return head + b"\0"
        end = offset
        while end < len(children) and children.index(b"\0", end) + 1 - offset <= self.room:
            end = children.index(b"\0", end) + 1
        return head + children[offset:end] + (b"\0" if end == len(children) else b"")


names = st.lists(st.text("abc", min_size=1, max_size=9), max_size=12, unique=True)


@given(names, st.lists(st.tuples(st.integers(0, 5), names), max_size=3), st.integers(10, 40))
def test_a_directory_in_parts_is_whole_also_when_it_changes_between(
    first: list[str], changes: list[tuple[int, list[str]]], room: int
) -> None:
    directory, listing, asked = Directory(first, room), Listing(), 0
    due = dict(changes)
    while True:
        got = listing.add(directory.part(listing.offset))
        if got is not None:
            break
        asked += 1
        assert asked < 100
        if asked in due:
            directory.names = due.pop(asked)
            directory.generation += 1
    assert got == directory.names


def test_a_listing_that_never_ends_or_is_none_is_refused() -> None:
    for wrong in (b"", b"1", b"\0a\0\0", b"1\0a", b"1\0"):
        with pytest.raises(XenstoreProtocolError):
            Listing().add(wrong)
    listing = Listing()
    with pytest.raises(XenstoreProtocolError, match="more than"):
        list(map(listing.add, [b"1\0" + b"a" * 4000 + b"\0"] * MAX_LISTING))


class Watcher:
    """What a watch was told."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.errors: list[XenstoreGoneError] = []

    def changed(self, path: str) -> None:
        self.paths.append(path)

    def lost(self, error: XenstoreGoneError) -> None:
        self.errors.append(error)


@given(st.data(), st.integers(1, 12))
def test_answers_reach_who_asked_in_whatever_order_they_come(data: st.DataObject, count: int) -> None:
    session, watcher, given_up = Session(), Watcher(), data.draw(st.sets(st.integers(0, count - 1)))
    token = session.open_watch(watcher)
    got: dict[int, list[Answer]] = {}
    late: dict[int, list[Answer]] = {}
    requests = []
    for number in range(count):
        got[number], late[number] = [], []
        request, raw = session.ask(Operation.READ, b"/a\0", got[number].append)
        assert Splitter().feed(raw)[0].request == request
        requests.append(request)
    assert len(set(requests)) == count
    for number in given_up:
        session.hand_over(requests[number], late[number].append)
    order = data.draw(st.permutations(range(count)))
    stream = b""
    for number in order:
        stream += Message(Operation.WATCH_EVENT, 0, 0, encode_strings(f"/{number}", token)).encode()
        stream += Message(Operation.WATCH_EVENT, 9, 9, encode_strings("/x", "nobody")).encode()
        stream += Message(Operation.READ, requests[number], 0, b"%d" % number).encode()
    for piece in pieces(data.draw, stream):
        session.feed(piece)
    assert watcher.paths == [f"/{number}" for number in order]
    for number in range(count):
        expected = [Message(Operation.READ, requests[number], 0, b"%d" % number)]
        assert (late if number in given_up else got)[number] == expected
        assert (got if number in given_up else late)[number] == []


def test_an_answer_nobody_waits_for_and_one_of_another_kind_end_the_connection() -> None:
    session, answers = Session(), list[Answer]()
    request, _ = session.ask(Operation.READ, b"/a\0", answers.append)
    with pytest.raises(XenstoreProtocolError, match="not waiting"):
        session.feed(Message(Operation.READ, request + 1, 0, b"").encode())
    with pytest.raises(XenstoreProtocolError, match="kind"):
        session.feed(Message(Operation.WRITE, request, 0, b"OK\0").encode())
    session.lose(XenstoreGoneError("lost"))
    assert [type(answer) for answer in answers] == [XenstoreGoneError]
    session = Session()
    request, _ = session.ask(Operation.READ, b"/a\0", ignore)
    session.feed(Message(Operation.READ, request, 0, b"").encode())
    with pytest.raises(XenstoreProtocolError, match="not waiting"):
        session.feed(Message(Operation.READ, request, 0, b"").encode())


def test_a_lost_connection_is_told_to_everyone_once() -> None:
    session, watcher, answers = Session(), Watcher(), list[Answer]()
    session.open_watch(watcher)
    closed = Watcher()
    assert session.close_watch(session.open_watch(closed))
    session.ask(Operation.READ, b"/a\0", answers.append)
    refused, _ = session.ask(Operation.READ, b"/a\0", answers.append)
    session.refuse(refused, XenstoreError("E2BIG", "read", "/a"))
    first, second = XenstoreGoneError("first"), XenstoreGoneError("second")
    session.lose(first)
    session.lose(second)
    session.refuse(refused, XenstoreError("E2BIG", "read", "/a"))
    assert [type(answer) for answer in answers] == [XenstoreError, XenstoreGoneError]
    assert answers[1] is first
    assert watcher.errors == [first]
    assert closed.errors == []
    for ask in (lambda: session.ask(Operation.READ, b"/a\0", ignore), lambda: session.open_watch(watcher)):
        with pytest.raises(XenstoreGoneError, match="first"):
            ask()


def test_request_numbers_go_round_and_pass_over_those_in_use() -> None:
    session = Session()
    first, _ = session.ask(Operation.READ, b"/a\0", ignore)
    session._request = MAX_ID - 1  # four thousand million requests later
    numbers = [session.ask(Operation.READ, b"/a\0", ignore)[0] for _ in range(2)]
    assert (first, numbers) == (1, [MAX_ID, 2])


@given(st.lists(st.integers(0, 9)))
def test_changes_come_once_each_in_order(paths: list[int]) -> None:
    changes = Changes("/w")
    for path in paths:
        changes.add(f"/w/{path}")
    taken = iter(changes.take, None)
    assert list(taken) == list(dict.fromkeys(f"/w/{path}" for path in paths))


def test_a_storm_of_changes_becomes_one() -> None:
    changes = Changes("/w")
    for number in range(MAX_CHANGES + 1):
        changes.add(f"/w/{number}")
    changes.add("/w/later")
    assert (changes.take(), changes.take(), changes.take()) == ("/w", "/w/later", None)
