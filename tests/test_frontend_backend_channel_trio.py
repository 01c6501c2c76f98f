import os
import socket
from collections.abc import Iterator

import pytest
import trio
import trio.testing
from descriptor_leaks import no_descriptor_leaks, open_descriptors

from frontend_backend.channel_trio import receive_message_trio, send_message_trio, wait_doorbell
from frontend_backend.descriptors import MAX_DATAGRAM, close_all
from frontend_backend.errors import ChannelClosedError, MessageTruncatedError
from frontend_backend.local import LocalRing

DEADLINE = 10.0
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here.setblocking(False)
    there.setblocking(False)
    with here, there:
        yield here, there


async def test_a_receiver_waits_for_the_message(pair: Pair, nursery: trio.Nursery) -> None:
    here, there = pair
    with trio.fail_after(DEADLINE):
        nursery.start_soon(send_message_trio, here, b"hello")
        assert await receive_message_trio(there) == (b"hello", [])


async def test_descriptors_travel_and_are_copies(pair: Pair) -> None:
    here, there = pair
    with trio.fail_after(DEADLINE), no_descriptor_leaks():
        await send_message_trio(here, b"two", (here.fileno(), there.fileno()))
        data, descriptors = await receive_message_trio(there, max_descriptors=2)
        assert data == b"two"
        assert [os.fstat(descriptor).st_ino for descriptor in descriptors] == [
            os.fstat(here.fileno()).st_ino,
            os.fstat(there.fileno()).st_ino,
        ]
        close_all(descriptors)


@pytest.mark.parametrize("allowed", range(4))
async def test_one_descriptor_too_many_is_refused_and_closed(allowed: int, pair: Pair) -> None:
    here, there = pair
    with trio.fail_after(DEADLINE):
        await send_message_trio(here, b"many", (here.fileno(),) * (allowed + 1))
        before = open_descriptors()
        with pytest.raises(MessageTruncatedError):
            await receive_message_trio(there, max_descriptors=allowed)
        assert open_descriptors() == before


async def test_a_sender_waits_for_room_and_nothing_is_lost(pair: Pair, nursery: trio.Nursery) -> None:
    here, there = pair
    count = 20
    with trio.fail_after(DEADLINE):

        async def send_all() -> None:
            for number in range(count):
                await send_message_trio(here, bytes([number]) * MAX_DATAGRAM)

        nursery.start_soon(send_all)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(count):
            data, _ = await receive_message_trio(there)
            assert data == bytes([number]) * MAX_DATAGRAM


async def test_a_closed_peer_is_said_to_be_closed(pair: Pair, nursery: trio.Nursery) -> None:
    here, there = pair
    with trio.fail_after(DEADLINE):

        async def close_when_waited_for() -> None:
            await trio.testing.wait_all_tasks_blocked()
            here.close()

        nursery.start_soon(close_when_waited_for)
        with pytest.raises(ChannelClosedError):
            await receive_message_trio(there)
        with pytest.raises(BrokenPipeError):
            await send_message_trio(there, b"anyone?")


async def test_a_peer_that_never_pauses_does_not_starve_other_tasks(pair: Pair) -> None:
    here, there = pair
    with trio.fail_after(DEADLINE):
        for _ in range(20):
            await send_message_trio(here, b"again")
        received = 0
        with trio.CancelScope() as scope:
            scope.cancel()
            while received < 20:
                await receive_message_trio(there)
                received += 1
        assert received == 0
        with trio.CancelScope() as scope:
            scope.cancel()
            await send_message_trio(there, b"not sent")
        assert scope.cancelled_caught
        assert await receive_message_trio(there) == (b"again", [])


async def test_a_doorbell_wakes_a_task_and_tells_when_the_peer_is_gone(nursery: trio.Nursery) -> None:
    front, back = LocalRing.pair()
    with front, back, trio.fail_after(DEADLINE):

        async def ring_when_waited_for() -> None:
            await trio.testing.wait_all_tasks_blocked()
            front.ring()

        nursery.start_soon(ring_when_waited_for)
        assert await wait_doorbell(back)
        front.close()
        assert not await wait_doorbell(back)


async def test_waiting_for_a_doorbell_can_be_cancelled() -> None:
    front, back = LocalRing.pair()
    with front, back:
        with trio.move_on_after(0) as scope:
            await wait_doorbell(back)
        assert scope.cancelled_caught
