"""One connected device of Xen: an instance that never stops ringing costs its bridge no more than a guest may."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from vtpm_instance_commands import get_random
from xen_bridge_party import SharedChannel, SharedGrants

from frontend_backend.bridge import Wake
from frontend_backend.doorbell import PipeDoorbell
from frontend_backend.local import LocalRing, map_page
from frontend_backend.ring import BackRing, FrontRing, Request
from frontend_backend.tpmif import PAGE_SIZE
from frontend_backend.xen_connection_trio import RINGS_AT_ONCE, Link
from frontend_backend.xen_ledger import Connection, Ledgers
from frontend_backend.xen_pace import Voice
from frontend_backend.xen_terms import Place, Terms

ANSWER = bytes.fromhex("80010000000a00000000")


@pytest.fixture
def memfd() -> Iterator[int]:
    made = os.memfd_create("guest")
    os.ftruncate(made, PAGE_SIZE)
    yield made
    os.close(made)


class Counted:
    """How often a bridge looks at its instance's page."""

    def __init__(self, link: Link) -> None:
        self.looks, self._look = 0, link.bridge.on_front
        link.bridge.on_front = self.look  # type: ignore[method-assign]

    def look(self, rings: int = 1) -> Wake:
        self.looks += 1
        return self._look(rings)


async def test_an_instance_that_floods_its_doorbell_is_paced(
    memfd: int, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    heard, rung = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    ours, theirs = LocalRing.pair(map_page, PipeDoorbell.pair)
    link = Link(
        Place(0, 1, 0),
        Connection(1, 0, 1, 1),
        Terms,
        lambda: SharedChannel(heard, rung),
        lambda: SharedGrants(memfd),
        Ledgers(tmp_path / "marks"),
        Voice(logging.getLogger("vtpm.xen"), "1/0"),
    )
    counted = Counted(link)

    async def ring() -> LocalRing:
        return ours

    with theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run, ring)
            for _ in range(int(RINGS_AT_ONCE) * 3):  # no time passes meanwhile: somebody always has something to do
                theirs.ring()
                for _ in range(3):
                    await trio.lowlevel.checkpoint()
            assert 0 < counted.looks <= RINGS_AT_ONCE + 1
            guest, back = FrontRing(map_page(memfd)), BackRing(theirs.page, lambda _reason: b"")
            guest.submit(get_random())  # its guest, alone, waits until it is heard again
            os.eventfd_write(heard, 1)
            while not isinstance(taken := back.take(), Request):  # noqa: ASYNC110
                await trio.sleep(0.01)
            assert taken.packet == get_random()
            back.finish(ANSWER)
            theirs.ring()
            while (answer := guest.poll()) is None:  # noqa: ASYNC110
                await trio.sleep(0.01)
            assert answer == ANSWER
            nursery.cancel_scope.cancel()
    guest.release()
    link.leave()
    for descriptor in (heard, rung):
        os.close(descriptor)
