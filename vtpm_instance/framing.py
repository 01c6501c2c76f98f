"""Cuts the byte stream of a data connection into TPM commands by their size field.

swtpm passes on whatever one read returned, so that split or pipelined commands fail there; here both work.
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


class CommandStream:
    """Bytes in, commands out. Holds at most what was fed last beyond one incomplete command."""

    def __init__(self) -> None:
        """Start with nothing received."""
        self._buffer = b""

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
        (size,) = announced(buffer)
        if not HEADER_SIZE <= size <= MAX_COMMAND:
            raise FramingError(size)
        if len(buffer) == size:
            self._buffer = b""
            return buffer
        if len(buffer) < size:
            return None
        self._buffer = buffer[size:]
        return buffer[:size]
