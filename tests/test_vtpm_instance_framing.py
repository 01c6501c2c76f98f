"""The data channel's framing, sans-IO."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm_instance.errors import FramingError
from vtpm_instance.framing import CommandStream


def packet(body: bytes) -> bytes:
    return struct.pack(">HII", 0x8001, 10 + len(body), 0x17B) + body


def taken(stream: CommandStream) -> list[bytes]:
    out = []
    while (command := stream.next_command()) is not None:
        out.append(command)
    return out


@given(st.lists(st.binary(max_size=40)), st.lists(st.integers(1, 30), min_size=1))
def test_commands_come_out_whole_however_they_are_cut(bodies: list[bytes], cuts: list[int]) -> None:
    packets = [packet(body) for body in bodies]
    data = b"".join(packets)
    stream, out, turn = CommandStream(), [], 0
    while data:
        piece, data = data[: cuts[turn % len(cuts)]], data[cuts[turn % len(cuts)] :]
        stream.feed(piece)
        out += taken(stream)
        turn += 1
    assert out == packets


@given(st.binary(max_size=64))
def test_any_bytes_give_commands_of_their_own_size_or_one_error(data: bytes) -> None:
    stream = CommandStream()
    stream.feed(data)
    try:
        commands = taken(stream)
    except FramingError:
        commands = []
    assert all(10 <= len(command) == int.from_bytes(command[2:6]) <= 4096 for command in commands)


@pytest.mark.parametrize("size", [0, 1, 9, 4097, 1 << 31])
def test_an_impossible_size_is_refused_again_and_again(size: int) -> None:
    stream = CommandStream()
    stream.feed(struct.pack(">HII", 0x8001, size, 0x17B))
    for _ in range(2):
        with pytest.raises(FramingError):
            stream.next_command()


def test_the_largest_command_passes() -> None:
    stream = CommandStream()
    stream.feed(packet(bytes(4086)))
    assert len(stream.next_command() or b"") == 4096
