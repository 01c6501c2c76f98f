"""The near side on its own: numbers, patience, and no room."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from manager.relay_cutting import MAX_BODY
from manager.relay_errors import RelayError
from manager.relay_frames import MAX_CHANNELS, MAX_LINES, Assembler, ChannelKind, Frame, Kind, Welcome
from manager.relay_link import Link, first_frame
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
    channels = [near.open(f"vtpm-{number // 8}", ChannelKind.DATA) for number in range(MAX_CHANNELS)]
    with pytest.raises(RelayError):
        near.open("web", ChannelKind.DATA)
    near.close(channels[7])
    assert near.open("web", ChannelKind.DATA).number == 7


@asynccontextmanager
async def joined() -> AsyncIterator[tuple[Near, Link, trio.Nursery]]:
    """A near side that runs, and the far end of its connection, greeted; nothing reads there but the test."""
    ours, theirs = map(trio.SocketStream, trio.socket.socketpair())
    streams = [ours]

    async def dial() -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        if not streams:
            raise OSError("nobody is there")
        return streams.pop()

    near, far = Near(dial, 30.0, lambda _names: None), Link(theirs)
    near.close(near.open("web", ChannelKind.CONTROL))  # a number that the far side may know
    idle = near.open("db", ChannelKind.DATA)
    assert idle.number == 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.run)
        with trio.fail_after(20):
            await first_frame(far, Kind.HELLO)
            await far.write_now(Frame(Kind.WELCOME, payload=Welcome(b"f" * 16, resumed=True).pack()))
            yield near, far, nursery
        nursery.cancel_scope.cancel()
    await theirs.aclose()


async def test_a_machine_that_went_while_there_was_no_connection_is_missed() -> None:
    """Also where another client has its number and says nothing: else the TPM of one that has gone stays on."""
    async with joined() as (_, far, _):
        assert await far.read_now() == Frame(Kind.CLOSE, 0)


async def test_one_vtpms_clients_cannot_have_the_stream_ended_for_all() -> None:
    near = alone()
    for _ in range(MAX_LINES):
        near.open("web", ChannelKind.DATA)
    with pytest.raises(RelayError):
        near.open("web", ChannelKind.DATA)
    near.open("db", ChannelKind.DATA)


async def test_many_long_requests_at_once_are_no_reason_to_end_the_stream() -> None:
    blob = bytes.fromhex("0000000d") + bytes(8) + MAX_BODY.to_bytes(4, "big") + bytes(MAX_BODY)
    parts, whole = Assembler(), 0
    async with joined() as (near, far, nursery):
        for number in range(12):
            channel = near.open(f"vtpm-{number}", ChannelKind.CONTROL)
            nursery.start_soon(near.ask, channel, blob)
        while whole < 12:
            frame = await far.read_now()
            whole += frame.kind is Kind.REQUEST and parts.add(frame) == blob


async def test_last_words_are_said_while_clients_come_and_go() -> None:
    async with joined() as (near, far, nursery):
        channels = [near.open(f"vtpm-{number}", ChannelKind.DATA) for number in range(100)]
        for channel in channels:
            nursery.start_soon(near.ask, channel, GET_RANDOM)
        asked = 0
        while asked < 100:
            asked += (await far.read_now()).kind is Kind.REQUEST
        nursery.start_soon(near.leave)
        await trio.testing.wait_all_tasks_blocked()
        near.close(channels[70])
        closed: set[int] = set()
        while len(closed) < 100:
            frame = await far.read_now()
            closed |= {frame.channel} if frame.kind is Kind.CLOSE else set()
