"""Cuts the byte stream of a data connection into TPM commands by their size field.

swtpm passes on whatever one read returned, so that split or pipelined commands fail there; here both work. A command
may stand behind the TCG's head (the simulator's TPM_SEND_COMMAND): u32 8, u8 locality, u32 size; its answer then
stands between a u32 size and a u32 zero.
Source: TPM 2.0 Part 1, 18.2 (header); reference/swtpm-libtpms-qemu.md 1.7.
"""

import struct
from typing import Final

from frontend_backend.tpmhdr import HEADER_SIZE, MAX_COMMAND
from vtpm_instance.errors import FramingError

_SIZE: Final = struct.Struct(">2xI")  # the tag, then the size of the whole packet
# Of at least HEADER_SIZE bytes: a tuple of one, the size that the packet says it has. A function of Python's own round
# it would cost as much again, and it is called for each command.
announced: Final = _SIZE.unpack_from
_PREFIX: Final = struct.Struct(">IBI")  # TPM_SEND_COMMAND, locality, size
_SEND_COMMAND: Final = 8
_PREFIX_MARK: Final = _SEND_COMMAND.to_bytes(4)  # no TPM 2.0 command begins with a zero byte
_ANSWER_HEAD: Final = struct.Struct(">I")
_ANSWER_END: Final = bytes(4)
assert _PREFIX.size == 9


def with_prefix(answer: bytes) -> bytes:
    """Return an answer as one that stood behind the TCG's head is given."""
    return _ANSWER_HEAD.pack(len(answer)) + answer + _ANSWER_END


class CommandStream:
    """Bytes in, commands out. Holds at most what was fed last beyond one incomplete command."""

    def __init__(self, *, prefixes: bool = False) -> None:
        """Start with nothing received; `prefixes`: commands may stand behind the TCG's head."""
        self._buffer = b""
        self._prefixes = prefixes
        self.locality: int | None = None  # what the head of the last command said, None where it had none

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._buffer = self._buffer + data if self._buffer else data

    @property
    def pending(self) -> bool:
        """Whether bytes are there that were not returned."""
        return bool(self._buffer)

    def next_command(self) -> bytes | None:
        """Return the next whole command (10 to 4096 bytes), or None until more is fed.

        Raises:
            FramingError: the size field cannot be; nothing after it can be read either.

        """
        buffer = self._buffer
        if len(buffer) < HEADER_SIZE:
            return None
        begin, self.locality = 0, None
        if self._prefixes and buffer.startswith(_PREFIX_MARK):
            begin = _PREFIX.size
            _, self.locality, size = _PREFIX.unpack_from(buffer)
        else:
            (size,) = announced(buffer)
        if not HEADER_SIZE <= size <= MAX_COMMAND:
            raise FramingError(size)
        end = begin + size
        if len(buffer) < end:
            return None
        self._buffer = buffer[end:]
        return buffer[begin:end]
