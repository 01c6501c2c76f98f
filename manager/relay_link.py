"""One stream between two relays while it lasts: frames out by one task, frames in by another, a sign of life."""

from collections.abc import Callable, Sequence
from typing import Final

import trio

from manager.relay_errors import RelayProtocolError
from manager.relay_frames import Frame, FrameReader, Kind
from manager.task_errors import expected_error

_READ: Final = 64 * 1024  # bytes received at once: two full frames
_QUEUE: Final = 32  # frames on their way out: at most 1 MiB; who has more waits
PING_SECONDS: Final = 5.0
MAX_WAITING: Final = 2048  # messages that wait for the peer to read: each channel has one or two
DEAD_SECONDS: Final = 20.0  # without a byte: the other machine may be gone without a word


class Link:
    """A stream with frames on it."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        """Speak on `stream`, which becomes ours."""
        self._stream = stream
        self._frames = FrameReader()
        self._out, self._queue = trio.open_memory_channel[Frame](_QUEUE)
        self._scope = trio.CancelScope()
        self._unsent = self._saying = 0
        self._long = trio.Lock()  # whose message is under way that has several frames: a peer keeps one such at a time
        self.opened: set[int] = set()  # near: channels that were said to be open on this connection
        self.asked: dict[int, int] = {}  # near: the number of the last request of each
        self.leaving = False
        self.telling_names = False  # far

    async def send(self, frame: Frame) -> None:
        """Put a frame on its way. Raises trio.BrokenResourceError once the stream has ended."""
        self._unsent += 1
        await self._out.send(frame)

    def send_if_room(self, frame: Frame) -> None:
        """Put a frame on its way that may get lost."""
        try:
            self._out.send_nowait(frame)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            return
        self._unsent += 1

    @property
    def drained(self) -> bool:
        """Whether everything was handed to the operating system."""
        return not self._unsent and not self._saying

    async def say(self, frames: Sequence[Frame]) -> None:
        """Send one message, or not: what matters is asked for again on the next connection.

        A peer that has many said and reads none loses the stream.
        """
        if self._saying >= MAX_WAITING:
            self.end()
            return
        self._saying += 1
        try:
            if len(frames) == 1:
                await self.send(frames[0])
                return
            async with self._long:
                for frame in frames:
                    await self.send(frame)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        finally:
            self._saying -= 1

    async def write_now(self, frame: Frame) -> None:
        """Send before `run`."""
        await self._stream.send_all(frame.pack())

    async def read_now(self) -> Frame:
        """Receive before `run`.

        Raises:
            RelayProtocolError: no frame. trio.BrokenResourceError: the stream has ended.

        """
        while (frame := self._frames.next()) is None:
            data = await self._stream.receive_some(_READ)
            if not data:
                raise trio.BrokenResourceError("the peer ended the connection")
            self._frames.feed(data)
        return frame

    async def run(self, on_frame: Callable[[Frame], None]) -> None:
        """Pass what comes on until the stream ends or `end` is called.

        Raises:
            RelayProtocolError: the peer does not speak as it must. trio.BrokenResourceError: the stream broke.
            trio.TooSlowError: nothing was heard for long.

        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._ping)
                    await self._read(on_frame)
                    nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # one stream: what went wrong first is why
            first = expected_error(group, (RelayProtocolError, trio.BrokenResourceError, trio.TooSlowError))
            if first is None:
                raise
            raise first from None
        finally:
            self._queue.close()
            await trio.aclose_forcefully(self._stream)

    def end(self) -> None:
        """End it from this side."""
        self._scope.cancel()

    async def _read(self, on_frame: Callable[[Frame], None]) -> None:
        while True:
            while (frame := self._frames.next()) is not None:
                if frame.kind is Kind.PING:
                    self.send_if_room(Frame(Kind.PONG))
                elif frame.kind is not Kind.PONG:
                    on_frame(frame)
            with trio.fail_after(DEAD_SECONDS):
                data = await self._stream.receive_some(_READ)
            if not data:
                return
            self._frames.feed(data)

    async def _write(self) -> None:
        async for frame in self._queue:
            await self._stream.send_all(frame.pack())
            self._unsent -= 1

    async def _ping(self) -> None:
        while True:
            await trio.sleep(PING_SECONDS)
            self.send_if_room(Frame(Kind.PING))


async def first_frame(link: Link, kind: Kind) -> Frame:
    """Return the first frame of a peer, which must be of this kind, or REFUSED. Raises RelayProtocolError."""
    frame = await link.read_now()
    if frame.kind is Kind.REFUSED:
        said = frame.payload[:200].decode(errors="replace")
        raise RelayProtocolError(f"the far side refused: {''.join(c if c.isprintable() else '?' for c in said)}")
    if frame.kind is not kind:
        raise RelayProtocolError(f"{frame.kind.name} where {kind.name} is due")
    return frame


async def say(link: Link, *frames: Frame) -> None:
    """Say the frames of one message, as `Link.say`."""
    await link.say(frames)
