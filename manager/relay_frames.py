"""The frames of a relay's stream, sans-IO: many conversations on one authenticated connection.

A frame is a 12-byte head and at most 32 KiB. A message (one request of a client, or its answer) is one frame or
several; all but the last say that more follows, so that a long one does not keep the others waiting. A channel is one
connection of a client; it has one request under way at most, named by a sequence number: so both sides can tell after
a new connection which requests the other one has seen. docs/relay.md describes the conversation.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Final, Self

from manager.relay_errors import RelayProtocolError

VERSION: Final = 1
MAX_PAYLOAD: Final = 32 * 1024  # bytes of a frame: a millisecond of a slow link, so that nobody waits long for another
MAX_MESSAGE: Final = 640 * 1024  # bytes: a state blob has at most 512 KiB (swtpm's own limit), and its head
MAX_UNFINISHED: Final = 4 * 1024 * 1024  # bytes of messages that a peer has begun, over all channels of a stream
MAX_CHANNELS: Final = 256  # of one stream: a vTPM under QEMU takes two
MAX_LINES: Final = 8  # of these to one vTPM: as many connections as an instance takes on a port
NO_LOCALITY: Final = 0xFF
SEQUENCES: Final = 1 << 32


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1  # near, first: who it is, and which far side it knew
    WELCOME = 2  # far, then: who it is, and whether it still has what it knew of this near side
    REFUSED = 3  # far, instead: why not; a text
    OPEN = 4  # near: a client has come
    CLOSE = 5  # either: it has gone, or cannot be served
    REQUEST = 6  # near
    REPLY = 7  # far, with the sequence number of the request
    NAMES = 8  # near: which vTPMs are there for me? far: these, one a line
    PING = 9
    PONG = 10
    LEAVING = 11  # far: no new requests, please; what is under way is answered, then the stream ends


class ChannelKind(IntEnum):
    """What a channel is at the far side."""

    CONTROL = 1  # a connection to the control socket
    DATA = 2  # one to the data socket
    PASSED = 3  # what SET_DATAFD hands over on a control connection


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame."""

    kind: Kind
    channel: int = 0
    sequence: int = 0
    payload: bytes = b""
    more: bool = False

    HEAD: ClassVar[struct.Struct] = struct.Struct(">BBHII")  # kind, 1: more follows, channel, sequence, length

    def pack(self) -> bytes:
        """Return its bytes."""
        return self.HEAD.pack(self.kind, self.more, self.channel, self.sequence, len(self.payload)) + self.payload


assert Frame.HEAD.size == 12


@dataclass(frozen=True, slots=True)
class Hello:
    """HELLO. `session` names this near side as long as it lives; `known` is the far side it spoke to last, or zero."""

    session: bytes
    known: bytes

    CODEC: ClassVar[struct.Struct] = struct.Struct(">8sH16s16s")
    MAGIC: ClassVar[bytes] = b"vtprelay"

    def pack(self) -> bytes:
        """Return its bytes."""
        return self.CODEC.pack(self.MAGIC, VERSION, self.session, self.known)

    @classmethod
    def unpack(cls, untrusted: bytes) -> Self:
        """Read them. Raises RelayProtocolError."""
        magic, version, session, known = _unpack(cls.CODEC, untrusted)
        if magic != cls.MAGIC:
            raise RelayProtocolError("the peer is no relay")
        if version != VERSION:
            raise RelayProtocolError(f"the peer speaks version {version}, this relay {VERSION}")
        return cls(session, known)


assert Hello.CODEC.size == 42


@dataclass(frozen=True, slots=True)
class Welcome:
    """WELCOME. `run` names this far side as long as it lives; `resumed`: it has the channels and what they had done."""

    run: bytes
    resumed: bool

    CODEC: ClassVar[struct.Struct] = struct.Struct(">H16sB")

    def pack(self) -> bytes:
        """Return its bytes."""
        return self.CODEC.pack(VERSION, self.run, self.resumed)

    @classmethod
    def unpack(cls, untrusted: bytes) -> Self:
        """Read them. Raises RelayProtocolError."""
        version, run, resumed = _unpack(cls.CODEC, untrusted)
        if version != VERSION:
            raise RelayProtocolError(f"the peer speaks version {version}, this relay {VERSION}")
        return cls(run, bool(resumed))


assert Welcome.CODEC.size == 19


@dataclass(frozen=True, slots=True)
class Opening:
    """OPEN. `parent`: of PASSED, its control connection's channel. `locality`: the one set last, or NO_LOCALITY."""

    kind: ChannelKind
    parent: int
    locality: int
    name: str

    CODEC: ClassVar[struct.Struct] = struct.Struct(">BHB")  # then the vTPM's name, ASCII
    MAX_NAME: ClassVar[int] = 64

    def pack(self) -> bytes:
        """Return its bytes."""
        return self.CODEC.pack(self.kind, self.parent, self.locality) + self.name.encode("ascii")

    @classmethod
    def unpack(cls, untrusted: bytes) -> Self:
        """Read them. Raises RelayProtocolError."""
        size = cls.CODEC.size
        code, parent, locality = _unpack(cls.CODEC, untrusted[:size])
        try:
            kind, name = ChannelKind(code), untrusted[size:].decode("ascii")
        except (ValueError, UnicodeDecodeError):
            raise RelayProtocolError("a channel of an unknown kind, or for a name that is none") from None
        if not 0 < len(name) <= cls.MAX_NAME or not name.isprintable():
            raise RelayProtocolError("a channel for a name that is none")
        return cls(kind, parent, locality, name)


assert Opening.CODEC.size == 4


def _unpack(codec: struct.Struct, untrusted: bytes) -> tuple[Any, ...]:
    if len(untrusted) != codec.size:
        raise RelayProtocolError(f"{codec.size} bytes were due, not {len(untrusted)}")
    return codec.unpack(untrusted)


def frames_of(kind: Kind, channel: int, sequence: int, message: bytes) -> Iterator[Frame]:
    """Cut a message into frames."""
    for begin in range(0, max(len(message), 1), MAX_PAYLOAD):
        end = begin + MAX_PAYLOAD
        yield Frame(kind, channel, sequence, message[begin:end], more=end < len(message))


class FrameReader:
    """Bytes in, frames out. Holds at most what was fed last beyond one unfinished frame."""

    def __init__(self) -> None:
        """Start with nothing received."""
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray) -> None:
        """Add what was received."""
        self._buffer += data

    def next(self) -> Frame | None:
        """Return the next whole frame, None until more is fed.

        Raises:
            RelayProtocolError: it is none; nothing after it can be read either.

        """
        size = Frame.HEAD.size
        if len(self._buffer) < size:
            return None
        code, more, channel, sequence, length = Frame.HEAD.unpack_from(self._buffer)
        if length > MAX_PAYLOAD or more > 1 or channel >= MAX_CHANNELS:
            raise RelayProtocolError("a frame that is too long, or for a channel that cannot be")
        if len(self._buffer) < size + length:
            return None
        payload = bytes(self._buffer[size : size + length])
        del self._buffer[: size + length]
        try:
            return Frame(Kind(code), channel, sequence, payload, bool(more))
        except ValueError:
            raise RelayProtocolError(f"a frame of the unknown kind {code}") from None


@dataclass(slots=True)
class Assembler:
    """Puts the frames of messages together again, one message a channel at a time."""

    _parts: dict[int, tuple[int, list[bytes]]] = field(default_factory=dict)  # by channel: sequence, what has come
    _size: int = 0

    def add(self, frame: Frame) -> bytes | None:
        """Take a REQUEST or REPLY in; returns the message when it is whole.

        Raises:
            RelayProtocolError: too long, too many at once, or the parts of two mixed up.

        """
        sequence, parts = self._parts.setdefault(frame.channel, (frame.sequence, []))
        if sequence != frame.sequence:
            raise RelayProtocolError("the parts of two messages on one channel")
        parts.append(frame.payload)
        self._size += len(frame.payload)
        if sum(map(len, parts)) > MAX_MESSAGE or self._size > MAX_UNFINISHED:
            raise RelayProtocolError("a message that is too long, or too many of them unfinished")
        if frame.more:
            return None
        del self._parts[frame.channel]
        self._size -= sum(map(len, parts))
        return b"".join(parts)

    def forget(self, channel: int) -> None:
        """Drop what has come on a channel that is closed."""
        _, parts = self._parts.pop(channel, (0, []))
        self._size -= sum(map(len, parts))
