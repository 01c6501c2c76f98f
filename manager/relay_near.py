"""The near side of a relay, beside QEMU: the connection to the far side, and what waits for it."""

import itertools
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from math import inf
from typing import Final

import trio

from manager.relay_cutting import (
    SET_LOCALITY,
    failure,
    form_of,
    locality_of,
    number_of,
    succeeded,
)
from manager.relay_errors import RelayError, RelayProtocolError
from manager.relay_frames import (
    MAX_CHANNELS,
    MAX_LINES,
    NO_LOCALITY,
    SEQUENCES,
    Assembler,
    ChannelKind,
    Frame,
    Hello,
    Kind,
    Opening,
    Welcome,
    frames_of,
)
from manager.relay_ledger import AfterLink, Asked
from manager.relay_link import Link, first_frame, say

_log = logging.getLogger("vtpm.relay")
HANDSHAKE_SECONDS: Final = 10.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0  # seconds between attempts to connect
_LAST_WORDS_SECONDS: Final = 2.0
_LOOK_AGAIN: Final = 0.01
_ASK_NAMES_SECONDS: Final = 5.0  # between questions for new vTPMs

Dial = Callable[[], Awaitable[trio.abc.Stream]]


@dataclass(eq=False)
class NearChannel:
    """One client's connection, and the request that it waits for. `generation` tells it from others of its number."""

    number: int
    generation: int
    kind: ChannelKind
    name: str
    parent: "NearChannel | None"
    asked: Asked
    changed: trio.Event = field(default_factory=trio.Event)
    answer: bytes | None = None
    children: list["NearChannel"] = field(default_factory=list)  # that are being handed over on it
    refused: bool = False  # the far side does not serve it
    established: bool = False  # of one that was handed over: the far side's instance has taken it

    @property
    def control(self) -> bool:
        """Whether it carries control commands."""
        return self.kind is ChannelKind.CONTROL

    @property
    def settled(self) -> bool:
        """Whether it need not wait any more."""
        return self.refused or self.answer is not None

    def result(self) -> bytes | None:
        """Return the answer, None where the far side does not serve this client."""
        return None if self.refused else self.answer

    def notify(self) -> None:
        """Have its client look again."""
        changed, self.changed = self.changed, trio.Event()
        changed.set()

    def settle(self, answer: bytes) -> None:
        """Have its client told an answer."""
        self.answer = answer
        self.notify()


class Near:
    """All channels, and the link while there is one."""

    def __init__(self, dial: Dial, patience: float, on_names: Callable[[list[str]], None]) -> None:
        """Connect by `dial`; a request waits `patience` seconds for a connection, then it is answered with failure."""
        self._dial, self._patience, self._on_names = dial, patience, on_names
        self._session, self._far = os.urandom(16), bytes(16)
        self._channels: dict[int, NearChannel] = {}
        self._used = 0  # numbers below this one the far side may know
        self._generations, self._sequences = itertools.count(1), itertools.count(1)
        self._localities: dict[str, int] = {}
        self._link: Link | None = None
        self._senders: trio.Nursery | None = None

    # channels

    def open(self, name: str, kind: ChannelKind, parent: NearChannel | None = None) -> NearChannel:
        """Take a new client on. Raises RelayError where there is no room."""
        if sum(each.name == name for each in self._channels.values()) >= MAX_LINES:
            raise RelayError(f"more than {MAX_LINES} clients of one vTPM at once: the far side would end the stream")
        number = next((number for number in range(MAX_CHANNELS) if number not in self._channels), None)
        if number is None:
            raise RelayError(f"more than {MAX_CHANNELS} clients at once")
        control = kind is ChannelKind.CONTROL
        asked = Asked(lambda request: control and form_of(request).repeatable)
        channel = NearChannel(number, next(self._generations), kind, name, parent, asked)
        self._channels[number] = channel
        self._used = max(self._used, number + 1)
        return channel

    def close(self, channel: NearChannel) -> None:
        """Forget a client that has gone."""
        if self._channels.get(channel.number) is channel:
            del self._channels[channel.number]
            link, senders = self._link, self._senders
            if link is not None and senders is not None:
                link.opened.discard(channel.number)
                senders.start_soon(say, link, Frame(Kind.CLOSE, channel.number, channel.generation))

    async def ask(self, channel: NearChannel, request: bytes) -> bytes | None:
        """Return the far side's answer, or failure where nobody knows it; None when it does not serve this client."""
        channel.answer = None
        # a number of its own: the answer to one who has gone may be on its way to whoever has his channel now
        channel.asked.ask(request, next(self._sequences) % SEQUENCES)
        self._start_sending(channel)
        while not channel.settled:
            with trio.move_on_after(inf if self._link else self._patience) as waiting:
                await channel.changed.wait()
            if waiting.cancelled_caught and not channel.settled:
                self._give_up(channel, f"no far side for {self._patience:g} s")
        answer = channel.result()
        if answer is not None and channel.control and number_of(request) == SET_LOCALITY and succeeded(answer):
            self._localities[channel.name] = locality_of(request)
        return answer

    @staticmethod
    def _give_up(channel: NearChannel, why: str) -> None:
        request = channel.asked.give_up()
        if request is not None:
            _log.warning("vTPM %s: %s; a request is answered with failure", channel.name, why)
            channel.settle(failure(request, control=channel.control))

    async def leave(self) -> None:
        """Tell the far side that all clients go: their machines' TPMs need not wait for them."""
        link = self._link
        if link is None:
            return
        for number in list(link.opened):
            await say(link, Frame(Kind.CLOSE, number))
        with trio.move_on_after(_LAST_WORDS_SECONDS):
            while not link.drained:  # noqa: ASYNC110 - the writer tells nobody
                await trio.sleep(_LOOK_AGAIN)

    # the link

    async def run(self) -> None:
        """Keep a connection for ever."""
        pause = _FIRST_PAUSE
        while True:
            try:
                link = await self._connected()
            except (OSError, RelayError, trio.BrokenResourceError, trio.TooSlowError) as error:
                _log.warning("no far side: %s", str(error) or type(error).__name__)
            else:
                pause = _FIRST_PAUSE
                await self._serve(link)
            await trio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _connected(self) -> Link:
        """Return a new connection, having decided what becomes of everything that is under way."""
        with trio.fail_after(HANDSHAKE_SECONDS):
            stream = await self._dial()
            try:
                link = Link(stream)
                await link.write_now(Frame(Kind.HELLO, payload=Hello(self._session, self._far).pack()))
                welcome = Welcome.unpack((await first_frame(link, Kind.WELCOME)).payload)
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
        if self._far not in (welcome.run, bytes(16)) or not welcome.resumed:
            _log.info("the far side is new to us")
        self._far = welcome.run
        for channel in self._channels.values():
            if channel.asked.on_link(resumed=welcome.resumed) is AfterLink.FAIL:
                self._give_up(channel, "the far side was restarted and does not know this request")
        return link

    async def _serve(self, link: Link) -> None:
        parts = Assembler()
        try:
            async with trio.open_nursery() as nursery:
                self._link, self._senders = link, nursery
                nursery.start_soon(self._catch_up, link)
                await link.run(lambda frame: self._on_frame(link, frame, parts))
                nursery.cancel_scope.cancel()
        except* (RelayProtocolError, trio.BrokenResourceError, trio.TooSlowError) as group:
            _log.warning("the connection to the far side ended: %s", group.exceptions[0])
        finally:
            self._link = self._senders = None
            for channel in self._channels.values():
                channel.notify()

    async def _catch_up(self, link: Link) -> None:
        """Say on a new connection what is open and what is waited for, then go on asking for new vTPMs."""
        for number in range(self._used):
            now = self._channels.get(number)
            if now is None or not now.asked.sequence:  # who had it may be gone, and this one says nothing for long
                await say(link, Frame(Kind.CLOSE, number))
        for channel in list(self._channels.values()):
            channel.notify()
            if channel.asked.sequence:
                await self._send(link, channel)
        while True:
            await say(link, Frame(Kind.NAMES))
            await trio.sleep(_ASK_NAMES_SECONDS)

    def _start_sending(self, channel: NearChannel) -> None:
        link, senders = self._link, self._senders
        if link is not None and senders is not None and not link.leaving:
            senders.start_soon(self._send, link, channel)

    async def _send(self, link: Link, channel: NearChannel) -> None:
        """Say on this connection that a client is there, and what it asks, each once."""
        if self._channels.get(channel.number) is not channel:
            return
        if channel.parent is not None:
            await self._open_on(link, channel.parent)
        for each in (channel, *channel.children):
            await self._open_on(link, each)
        request, sequence = channel.asked.request, channel.asked.sequence
        if request is None or link.asked.get(channel.number) == sequence:
            return
        link.asked[channel.number] = sequence
        channel.asked.sent = True
        await say(link, *frames_of(Kind.REQUEST, channel.number, sequence, request))

    async def _open_on(self, link: Link, channel: NearChannel) -> None:
        if channel.number in link.opened:
            return
        link.opened.add(channel.number)
        link.asked.pop(channel.number, None)
        if channel.kind is ChannelKind.PASSED:
            locality = 0 if channel.established else NO_LOCALITY
        else:
            locality = self._localities.get(channel.name, NO_LOCALITY)
        parent = 0 if channel.parent is None else channel.parent.number
        opening = Opening(channel.kind, parent, locality, channel.name)
        await say(link, Frame(Kind.OPEN, channel.number, channel.generation, opening.pack()))

    def _on_frame(self, link: Link, frame: Frame, parts: Assembler) -> None:
        channel = self._channels.get(frame.channel)
        match frame.kind:
            case Kind.NAMES:
                message = parts.add(frame)
                if message is not None:
                    self._on_names([name for name in message.decode("ascii", errors="replace").split("\n") if name])
            case Kind.LEAVING:
                link.leaving = True
            case Kind.CLOSE:
                if channel is not None and channel.generation == frame.sequence:
                    channel.refused = True
                    channel.notify()
            case Kind.REPLY:
                message = parts.add(frame)
                if message is not None and channel is not None and channel.asked.take(frame.sequence):
                    channel.settle(message)
            case _:
                raise RelayProtocolError(f"{frame.kind.name} is nothing that a far side says")
