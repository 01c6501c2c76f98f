"""Frames of a relay's stream: as they went in on any cut, bounded, and no garbage taken for one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.relay_errors import RelayProtocolError
from manager.relay_frames import (
    MAX_CHANNELS,
    MAX_MESSAGE,
    MAX_PAYLOAD,
    MAX_UNFINISHED,
    Assembler,
    ChannelKind,
    Frame,
    FrameReader,
    Hello,
    Kind,
    Opening,
    Welcome,
    frames_of,
)

FRAMES = st.builds(
    Frame,
    st.sampled_from(Kind),
    st.integers(0, MAX_CHANNELS - 1),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=50),
    st.booleans(),
)


@given(st.lists(FRAMES, max_size=10), st.integers(1, 40))
def test_frames_come_out_as_they_went_in(frames: list[Frame], step: int) -> None:
    stream = b"".join(frame.pack() for frame in frames)
    reader, found = FrameReader(), []
    for begin in range(0, len(stream), step):
        reader.feed(stream[begin : begin + step])
        while (frame := reader.next()) is not None:
            found.append(frame)
    assert found == frames


@given(st.binary(max_size=300))
def test_garbage_is_refused_or_is_a_frame_and_nothing_else_happens(garbage: bytes) -> None:
    reader = FrameReader()
    reader.feed(garbage)
    try:
        while (frame := reader.next()) is not None:
            assert len(frame.payload) <= MAX_PAYLOAD
            for kind in (Hello, Welcome, Opening):
                try:
                    kind.unpack(frame.payload)
                except RelayProtocolError:
                    continue
    except RelayProtocolError:
        pass


@pytest.mark.parametrize(
    "head",
    [(12, 0, 0, 0, 0), (0, 0, 0, 0, 0), (6, 2, 0, 0, 0), (6, 0, MAX_CHANNELS, 0, 0), (6, 0, 0, 0, MAX_PAYLOAD + 1)],
)
def test_heads_that_cannot_be_are_refused(head: tuple[int, ...]) -> None:
    reader = FrameReader()
    reader.feed(Frame.HEAD.pack(*head))
    with pytest.raises(RelayProtocolError):
        reader.next()


@given(st.integers(0, 3 * MAX_PAYLOAD))
def test_a_message_is_put_together_again(size: int) -> None:
    message = bytes(range(256)) * (size // 256 + 1)
    message = message[:size]
    frames = list(frames_of(Kind.REPLY, 3, 9, message))
    assert all(len(frame.payload) <= MAX_PAYLOAD for frame in frames)
    parts = Assembler()
    outcome = [parts.add(frame) for frame in frames]
    assert outcome == [None] * (len(frames) - 1) + [message]


def test_messages_are_bounded_one_by_one_and_together() -> None:
    part = Frame(Kind.REQUEST, 0, 1, bytes(MAX_PAYLOAD), more=True)
    with pytest.raises(RelayProtocolError, match="too long"):
        _fill(Assembler(), [part] * (MAX_MESSAGE // MAX_PAYLOAD + 1))
    many = [Frame(Kind.REQUEST, n, 1, bytes(MAX_PAYLOAD), more=True) for n in range(MAX_CHANNELS)]
    assert len(many) * MAX_PAYLOAD > MAX_UNFINISHED
    with pytest.raises(RelayProtocolError, match="too many"):
        _fill(Assembler(), many)


def _fill(parts: Assembler, frames: list[Frame]) -> None:
    for frame in frames:
        parts.add(frame)


def test_what_is_forgotten_counts_no_more() -> None:
    parts = Assembler()
    for _ in range(3 * MAX_UNFINISHED // MAX_PAYLOAD):
        parts.add(Frame(Kind.REQUEST, 0, 1, bytes(MAX_PAYLOAD), more=True))
        parts.forget(0)


def test_parts_of_two_messages_do_not_mix() -> None:
    parts = Assembler()
    parts.add(Frame(Kind.REQUEST, 0, 1, b"a", more=True))
    with pytest.raises(RelayProtocolError, match="two messages"):
        parts.add(Frame(Kind.REQUEST, 0, 2, b"b"))


def test_greetings_and_openings_say_what_they_said() -> None:
    hello = Hello(bytes(range(16)), bytes(16))
    assert Hello.unpack(hello.pack()) == hello
    welcome = Welcome(bytes(range(16)), resumed=True)
    assert Welcome.unpack(welcome.pack()) == welcome
    opening = Opening(ChannelKind.PASSED, 7, 0xFF, "web-1")
    assert Opening.unpack(opening.pack()) == opening


@pytest.mark.parametrize("name", [b"", b"x" * 65, b"\xff", b"a\nb", b"\0"])
def test_a_name_that_is_none_is_refused(name: bytes) -> None:
    with pytest.raises(RelayProtocolError):
        Opening.unpack(bytes([1, 0, 0, 0xFF]) + name)


def test_another_version_and_another_program_are_refused() -> None:
    with pytest.raises(RelayProtocolError, match="version"):
        Hello.unpack(Hello.CODEC.pack(Hello.MAGIC, 2, bytes(16), bytes(16)))
    with pytest.raises(RelayProtocolError, match="no relay"):
        Hello.unpack(Hello.CODEC.pack(b"GET / HT", 1, bytes(16), bytes(16)))
