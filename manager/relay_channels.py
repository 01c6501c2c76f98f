"""What the far side has of one near side: its channels, their lines to instances, and the note left with the holder."""

import os
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Self

import trio

from manager.relay_asking import Places
from manager.relay_errors import RelayProtocolError
from manager.relay_frames import MAX_LINES, NO_LOCALITY, ChannelKind, Opening
from manager.relay_ledger import Executed, Kept
from manager.relay_lines import ControlLine, DataLine, Find, Line, Locality, PassedLine
from manager.relay_link import Link

_SESSION_BYTES: Final = 16
_CHANNEL: Final = struct.Struct(">H")
# busy, wanted, a sequence number is there, it, generation; the client's identity's length; that; the OPEN's bytes
_NOTE: Final = struct.Struct(">BBBIIB")

FindByName = Callable[[str], Awaitable[Places]]
SessionName = tuple[str, bytes]  # the client's identity, and what the near side calls itself


@dataclass(eq=False)
class Channel:
    """One connection of a client."""

    number: int
    generation: int
    opening: Opening
    line: Line
    executed: Executed = field(default_factory=Executed)
    turn: trio.Lock = field(default_factory=trio.Lock)
    busy: bool = False
    telling: tuple[Link, int] | None = None  # the answer that is being said once more: where, and its number
    kept: tuple[int, ...] | None = None  # inode numbers of the descriptors that the holder has; None: knows nothing

    def descriptors(self) -> tuple[int, ...]:
        """Return the descriptors that must outlive this process."""
        if isinstance(self.line, ControlLine):
            own = (self.line.sock, self.line.presence)
        elif isinstance(self.line, PassedLine):
            own = (self.line.sock, None)
        else:
            own = (None, None)
        return tuple(sock.fileno() for sock in own if sock is not None)

    def note(self, identity: str) -> bytes:
        """Return what a successor has to know."""
        wanted = isinstance(self.line, PassedLine) and self.line.wanted
        known = identity.encode()
        numbered = self.executed.sequence is not None
        head = _NOTE.pack(self.busy, wanted, numbered, self.executed.sequence or 0, self.generation, len(known))
        return head + known + self.opening.pack()


@dataclass(eq=False)
class Session:
    """One near side."""

    name: SessionName
    find: FindByName
    patience: float
    channels: dict[int, Channel] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)
    localities: dict[str, Locality] = field(default_factory=dict)
    link: Link | None = None
    left: float = 0.0  # since when there is no link (trio.current_time)

    def key(self, channel: int) -> bytes:
        """Return under which name the holder has a channel."""
        return self.name[1] + _CHANNEL.pack(channel)

    def open(self, number: int, generation: int, opening: Opening) -> Channel:
        """Take a new client on; no connection is made before it says something.

        Raises:
            RelayProtocolError: its parent is none, its number is taken, or there are too many.

        """
        known = self.channels.get(number)
        if known is not None:
            if known.generation == generation:
                return known  # said again on a new connection
            raise RelayProtocolError(f"channel {number} is another client's")
        if sum(each.opening.name == opening.name for each in self.channels.values()) >= MAX_LINES:
            raise RelayProtocolError(f"more than {MAX_LINES} connections to vTPM {opening.name}")
        locality = self.localities.setdefault(opening.name, Locality())
        if opening.kind is not ChannelKind.PASSED and opening.locality != NO_LOCALITY:
            locality.value = opening.locality
        made = Channel(number, generation, opening, self._line(opening, locality))
        self.channels[number] = made
        self.kept.channels[number] = made.executed
        return made

    def _line(self, opening: Opening, locality: Locality) -> Line:
        find: Find = lambda: self.find(opening.name)  # noqa: E731 - a closure, typed
        if opening.kind is ChannelKind.CONTROL:
            return ControlLine(find, locality, self.patience)
        if opening.kind is ChannelKind.DATA:
            return DataLine(find, locality, self.patience)
        parent = self.channels.get(opening.parent)
        if parent is None or not isinstance(parent.line, ControlLine) or parent.opening.name != opening.name:
            raise RelayProtocolError("a data connection that was handed over on no control connection")
        if parent.line.passed is not None:
            raise RelayProtocolError("a second data connection handed over on one control connection")
        made = PassedLine(parent.line, self.patience, wanted=opening.locality != NO_LOCALITY)
        parent.line.passed = made
        return made

    def relatives(self, channel: Channel) -> list[Channel]:
        """Return a channel with the one that it was handed over on, or that was handed over on it."""
        if channel.opening.kind is ChannelKind.DATA:
            return [channel]
        root = channel.opening.parent if channel.opening.kind is ChannelKind.PASSED else channel.number
        return [
            each
            for each in self.channels.values()
            if each.number == root or (each.opening.kind is ChannelKind.PASSED and each.opening.parent == root)
        ]

    @property
    def drained(self) -> bool:
        """Whether nothing is under way."""
        idle = not any(each.executed.waiting for each in self.channels.values())
        return idle and (self.link is None or self.link.drained)

    def take_over(self, left: "Left", descriptors: list[int]) -> None:
        """Go on with what a predecessor left. Raises RelayProtocolError."""
        channel = self.open(left.number, left.generation, left.opening)
        channel.executed = self.kept.channels[left.number] = left.executed
        channel.kept = inodes(tuple(descriptors))
        adopt(channel, descriptors, left)

    def close(self, number: int) -> Channel | None:
        """End a channel's line; returns what it was."""
        channel = self.channels.pop(number, None)
        self.kept.channels.pop(number, None)
        if channel is not None:
            channel.line.close()
        return channel


@dataclass(frozen=True, slots=True)
class Left:
    """What a predecessor wrote down of one channel."""

    identity: str
    session: bytes
    number: int
    generation: int
    opening: Opening
    executed: Executed
    busy: bool
    wanted: bool

    @classmethod
    def read(cls, key: bytes, note: bytes) -> Self:
        """Read it. Raises RelayProtocolError, struct.error, UnicodeDecodeError."""
        (number,) = _CHANNEL.unpack(key[_SESSION_BYTES:])
        busy, wanted, numbered, sequence, generation, length = _NOTE.unpack_from(note)
        rest = note[_NOTE.size :]
        # what was executed, or was about to be, is answered with failure if it is asked for again
        executed = Executed(sequence if numbered else None, dropped=bool(numbered))
        opening = Opening.unpack(rest[length:])
        identity = rest[:length].decode()
        return cls(identity, key[:_SESSION_BYTES], number, generation, opening, executed, bool(busy), bool(wanted))


def adopt(channel: Channel, descriptors: list[int], left: Left) -> None:
    """Go on with a predecessor's connections.

    One that it was speaking on is out of step: of a control connection it is kept, silently; a data connection ends,
    and another one is handed over in its place.
    """
    socks = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    line = channel.line
    if isinstance(line, ControlLine) and socks:
        first, *more = socks
        if more:
            line.presence = more.pop()
        if left.busy and line.presence is None:
            line.presence = first
        elif left.busy:
            first.close()
        else:
            line.sock = trio.socket.from_stdlib_socket(first)
        socks = more
    elif isinstance(line, PassedLine):
        line.wanted = left.wanted
        if socks and not left.busy:
            line.sock = trio.socket.from_stdlib_socket(socks.pop())
    for sock in socks:
        sock.close()


def inodes(descriptors: tuple[int, ...]) -> tuple[int, ...]:
    """Return what tells sockets apart whose numbers may be used again."""
    return tuple(os.fstat(descriptor).st_ino for descriptor in descriptors)
