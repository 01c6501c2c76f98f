"""What of a hibernated vTPM is kept beside its permanent state, and which of it goes into which blob. No I/O.

The volatile part of a TPM (sessions, transient objects, PCRs, clock, timers, the state of its random generator) is
libtpms' own blob `volatilestate`. What we know of the guest besides is the blob `resumption`: three bytes, and two more
in version 2, which is written where the guest's platform has set the size of the command buffer. Both lie in the
state's slot, encrypted like the rest; neither is ever among the blobs that libtpms' next save writes.
Source: libtpms 0.9.2, VolatileAll_Store; docs/architecture.md, "Hibernation".
"""

import struct
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import ClassVar, Final, Self

from vtpm_instance.errors import SlumberUnreadableError

RESUMPTION: Final = "resumption"
VOLATILE: Final = "volatilestate"
_VERSION: Final = 1
_VERSION_SIZED: Final = 2
_SHUT_DOWN, _FIRMWARE = 1, 2


@dataclass(frozen=True, slots=True)
class Slumber:
    """The volatile part and what goes with it.

    `shut_down`: the guest's last command was a Shutdown; `firmware`: the guest's firmware does the Startup after a
    platform reset; `locality` that of the data channel (0 to 255); `buffer_size` that of the command buffer in bytes, 0
    where nobody has set it.
    """

    volatile: bytes = field(repr=False)
    shut_down: bool
    firmware: bool
    locality: int
    buffer_size: int = 0

    CODEC: ClassVar[struct.Struct] = struct.Struct("=BBB")  # version, flags, locality
    SIZED: ClassVar[struct.Struct] = struct.Struct("<BBBH")  # and the buffer's size

    def blobs(self) -> dict[str, bytes]:
        """Return what is saved beside the permanent state."""
        flags = _SHUT_DOWN * self.shut_down | _FIRMWARE * self.firmware
        if self.buffer_size:
            resumption = self.SIZED.pack(_VERSION_SIZED, flags, self.locality, self.buffer_size)
        else:
            resumption = self.CODEC.pack(_VERSION, flags, self.locality)
        return {VOLATILE: self.volatile, RESUMPTION: resumption}

    @classmethod
    def taken_from(cls, blobs: MutableMapping[str, bytes]) -> Self | None:
        """Take the two blobs out of a loaded state; None where it is not that of a hibernated vTPM.

        Raises:
            SlumberUnreadableError: one is there without the other, or is of another version.

        """
        found: Mapping[str, bytes] = {name: blobs.pop(name) for name in (VOLATILE, RESUMPTION) if name in blobs}
        if not found:
            return None
        resumption = found.get(RESUMPTION, b"")
        known = cls._FORMATS.get((len(resumption), resumption[:1]))
        if known is None or VOLATILE not in found:
            raise SlumberUnreadableError
        _, flags, locality, *sizes = known.unpack(resumption)
        if flags & ~(_SHUT_DOWN | _FIRMWARE):
            raise SlumberUnreadableError
        return cls(found[VOLATILE], bool(flags & _SHUT_DOWN), bool(flags & _FIRMWARE), locality, *sizes)

    _FORMATS: ClassVar[Mapping[tuple[int, bytes], struct.Struct]] = {
        (CODEC.size, bytes([_VERSION])): CODEC,
        (SIZED.size, bytes([_VERSION_SIZED])): SIZED,
    }


assert (Slumber.CODEC.size, Slumber.SIZED.size) == (3, 5)
