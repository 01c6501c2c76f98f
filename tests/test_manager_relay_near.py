"""The near side on its own: numbers, patience, and no room."""

import pytest
import trio

from manager.relay_errors import RelayError
from manager.relay_frames import MAX_CHANNELS, ChannelKind
from manager.relay_near import Near

GET_RANDOM = bytes.fromhex("80010000000c0000017b0008")
CAPABILITY = bytes.fromhex("00000001")


async def nobody() -> trio.abc.Stream:
    raise OSError("nobody is there")


def alone(patience: float = 30.0) -> Near:
    return Near(nobody, patience, lambda _names: None)


async def test_no_two_requests_have_one_number_not_even_on_one_channel_of_two_clients() -> None:
    near, seen = alone(), []
    for _ in range(5):
        channel = near.open("web", ChannelKind.DATA)
        assert channel.number == 0, "the test is about a number that is used again"
        with trio.move_on_after(0.01):
            await near.ask(channel, GET_RANDOM)
        seen.append((channel.generation, channel.asked.sequence))
        near.close(channel)
    assert len({generation for generation, _ in seen}) == len({sequence for _, sequence in seen}) == 5


async def test_patience_without_a_far_side_ends_with_failure() -> None:
    near = alone(0.05)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.run)
        data, control = near.open("web", ChannelKind.DATA), near.open("web", ChannelKind.CONTROL)
        assert await near.ask(data, GET_RANDOM) == bytes.fromhex("80010000000a00000101")
        assert await near.ask(control, CAPABILITY) == bytes.fromhex("0000000900000000")
        nursery.cancel_scope.cancel()


def test_there_are_so_many_channels_and_no_more() -> None:
    near = alone()
    channels = [near.open("web", ChannelKind.DATA) for _ in range(MAX_CHANNELS)]
    with pytest.raises(RelayError):
        near.open("web", ChannelKind.DATA)
    near.close(channels[7])
    assert near.open("web", ChannelKind.DATA).number == 7
