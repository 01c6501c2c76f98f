"""A front end in user space against back ends that go, come, lie and do nothing; xenstored is real."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import trio
from xen_instance_rig import Toolstack, store_of
from xen_local_kernel import LocalChannels, LocalGrants, LocalOffers, LocalXen
from xenstored_rig import running_xenstored

from frontend_backend.errors import PageError, RingCancelledError, RingClosedError
from frontend_backend.ring import BackRing, Request
from frontend_backend.xen_front_node_trio import device_path
from frontend_backend.xen_front_trio import XenFront
from frontend_backend.xs_trio import Xenstore

FRONT, BACK, OTHER_BACK = 5, 1, 2
HERE = device_path(FRONT, 0)
QUESTION, ANSWER = b"a question", b"an answer"
Answering = Callable[["HandMade"], Awaitable[None]]


@pytest.fixture
def store() -> Iterator[Path]:
    with running_xenstored() as running:
        yield running.socket


class HandMade:
    """A back end that a test leads by hand."""

    def __init__(self, xen: LocalXen, xs: Xenstore, domain: int) -> None:
        self._xs, self._path = xs, f"/local/domain/{domain}/backend/vtpm/{FRONT}/0"
        self._channels, self._grants = LocalChannels(xen), LocalGrants(xen)
        self._port = 0

    async def connect(self) -> None:
        await self._xs.write(f"{self._path}/feature-protocol-v2", "1")
        await self._xs.write(f"{self._path}/state", "2")
        while await self._xs.read(f"{HERE}/state") != b"3":  # noqa: ASYNC110 - what a watch would do
            await trio.sleep(0.01)
        reference = await self._xs.read(f"{HERE}/ring-ref")
        port = await self._xs.read(f"{HERE}/event-channel")
        assert reference is not None
        assert port is not None
        self.page = self._grants.map(FRONT, [int(reference)]).page
        self.back = BackRing(self.page, lambda why: why.encode())
        self._port = self._channels.bind_interdomain(FRONT, int(port))
        await self._xs.write(f"{self._path}/state", "4")

    async def take(self) -> bytes:
        while not isinstance(taken := self.back.take(), Request):  # noqa: ASYNC110 - it hears no rings
            await trio.sleep(0.01)
        return taken.packet

    def ring(self) -> None:
        self._channels.notify(self._port)

    def answer(self, packet: bytes = ANSWER) -> None:
        self.back.finish(packet)
        self.ring()

    def close(self) -> None:
        if self._port:
            self.back.release()
        self._grants.close()
        self._channels.close()


@asynccontextmanager
async def front_end(xen: LocalXen, store: Path) -> AsyncIterator[tuple[XenFront, Xenstore]]:
    channels, offers = LocalChannels(xen), LocalOffers(xen)
    async with store_of(0, store) as xs, store_of(FRONT, store) as own, trio.open_nursery() as nursery:
        await Toolstack(xs).attach(FRONT, BACK, uuid4())
        front = XenFront(own, channels, offers, HERE)
        await nursery.start(front.run)
        yield front, xs
        nursery.cancel_scope.cancel()
    channels.close()
    offers.close()


def play(store: Path, scenario: Callable[[XenFront, Xenstore, LocalXen], Awaitable[None]]) -> None:
    async def play_it() -> None:
        xen = LocalXen()
        with trio.fail_after(30):
            async with front_end(xen, store) as (front, xs):
                await scenario(front, xs, xen)
            assert (xen.mapped, xen.offered, xen.ports) == (0, 0, {})

    trio.run(play_it)


def test_what_a_back_end_may_answer_and_what_not(store: Path) -> None:
    async def scenario(front: XenFront, xs: Xenstore, xen: LocalXen) -> None:
        back = HandMade(xen, xs, BACK)

        async def meanwhile(act: Callable[[], None]) -> None:
            assert await back.take() == QUESTION
            act()
            back.ring()

        def scribble(at: int, what: bytes) -> Callable[[], None]:
            def act() -> None:
                back.back.finish(ANSWER)
                back.page[at : at + len(what)] = what

            return act

        await back.connect()
        async with trio.open_nursery() as nursery:
            for act, expected in (
                (back.answer, None),
                (scribble(4, b"\7"), PageError),
                (scribble(0, b"\xff\xff\xff\xff"), PageError),
                (back.back.abort, RingCancelledError),
                (back.answer, None),
            ):
                nursery.start_soon(meanwhile, act)
                if expected is None:
                    assert await front.transact(QUESTION) == ANSWER
                else:
                    with pytest.raises(expected):
                        await front.transact(QUESTION)
                    back.page[4:5] = b"\0"  # as one that has come to its senses
        back.close()

    play(store, scenario)


def test_a_command_that_was_given_up_leaves_the_page_before_the_next(store: Path) -> None:
    async def scenario(front: XenFront, xs: Xenstore, xen: LocalXen) -> None:
        back = HandMade(xen, xs, BACK)
        await back.connect()
        async with trio.open_nursery() as nursery:
            impatience = trio.CancelScope()

            async def be_impatient() -> None:
                with impatience:
                    await front.transact(b"nobody will wait for this")

            nursery.start_soon(be_impatient)
            await back.take()
            impatience.cancel()
            while not back.back.cancelled:  # noqa: ASYNC110 - the front end's task makes it true
                await trio.sleep(0.01)
            answers: list[bytes] = []

            async def ask() -> None:
                answers.append(await front.transact(QUESTION))

            nursery.start_soon(ask)
            await trio.sleep(0.1)
            back.answer(b"too late, and for nobody")
            assert await back.take() == QUESTION
            back.answer()
        assert answers == [ANSWER]
        back.close()

    play(store, scenario)


def test_another_back_end_gets_a_page_and_a_channel_of_its_own(store: Path) -> None:
    async def scenario(front: XenFront, xs: Xenstore, xen: LocalXen) -> None:
        first, second = HandMade(xen, xs, BACK), HandMade(xen, xs, OTHER_BACK)
        wishes: list[int] = []
        replaced = trio.Event()
        front.on_wish = lambda: wishes.append(1)
        async with trio.open_nursery() as nursery:
            await first.connect()
            await front.until_connected()
            first.ring()
            while not wishes:  # noqa: ASYNC110 - the front end's task makes it true
                await trio.sleep(0.01)
            reference = await xs.read(f"{HERE}/ring-ref")

            async def replace() -> None:
                await first.take()
                await Toolstack(xs).destroy(FRONT, BACK)
                await Toolstack(xs).attach(FRONT, OTHER_BACK, uuid4())
                replaced.set()

            nursery.start_soon(replace)
            with pytest.raises(RingClosedError):
                await front.transact(QUESTION)
            await replaced.wait()
            first.answer(b"from one that is gone")
            await second.connect()
            await front.until_connected()
            assert await xs.read(f"{HERE}/ring-ref") != reference

            async def serve() -> None:
                assert await second.take() == QUESTION
                second.answer()

            nursery.start_soon(serve)
            assert await front.transact(QUESTION) == ANSWER
        first.close()
        second.close()

    play(store, scenario)


def test_it_leaves_nothing_behind_and_the_next_one_begins_anew(store: Path) -> None:
    async def twice() -> None:
        with trio.fail_after(30):
            for _ in range(2):
                xen = LocalXen()
                async with store_of(0, store) as xs:
                    async with front_end(xen, store) as (front, _):
                        back = HandMade(xen, xs, BACK)
                        await back.connect()
                        await front.until_connected()
                    back.close()
                    assert await xs.read(f"{HERE}/state") == b"6"
                    assert await xs.read(f"{HERE}/ring-ref") is None
                    assert await xs.read(f"{HERE}/event-channel") is None
                assert (xen.mapped, xen.offered, xen.ports) == (0, 0, {})

    trio.run(twice)
