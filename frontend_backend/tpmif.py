"""Xen's vTPM interface, protocol version 2: the head of the shared page, declared once.

What lives here: names and layout of `struct tpmif_shared_page` (xen/include/public/io/tpmif.h).
What must not: who may do what when; that is `ring.py`.
"""

import struct
import sys
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Final, Self

from frontend_backend.errors import PageError

PAGE_SIZE: Final = 4096  # bytes; one grant
GRANT_REFERENCE_SIZE: Final = 4  # bytes; each extra page's reference, between head and packet


class RingState(IntEnum):
    """`enum tpmif_state`. The front end sets SUBMIT and CANCEL, the back end IDLE and FINISH."""

    IDLE = 0
    SUBMIT = 1
    FINISH = 2
    CANCEL = 3


@dataclass(frozen=True, slots=True)
class SharedPage:
    """Fixed head of the ring's page: 8 bytes, little-endian. Source: io/tpmif.h, version 2.

    `length` counts the TPM packet in bytes, not this head; `locality` is the request's (0..4);
    `nr_extra_pages` grant references of 4 bytes stand between the head and the packet.
    """

    length: int
    state: RingState
    locality: int
    nr_extra_pages: int

    CODEC: ClassVar[struct.Struct] = struct.Struct("<IBBxB")
    SIZE: ClassVar[int] = 8
    STATE_OFFSET: ClassVar[int] = 4

    @classmethod
    def unpack(cls, untrusted_head: bytes) -> Self:
        """Read the head from a private copy of its 8 bytes.

        Raises:
            PageError: the state is none of the four, or the bytes are too few.

        """
        if len(untrusted_head) < cls.SIZE:
            raise PageError(f"a page head has {cls.SIZE} bytes, not {len(untrusted_head)}")
        length, state, locality, extra = cls.CODEC.unpack_from(untrusted_head)
        try:
            return cls(length, RingState(state), locality, extra)
        except ValueError:
            raise PageError(f"{state} is not a tpmif state") from None

    def pack(self) -> bytes:
        """Return the 8 bytes of this head."""
        return self.CODEC.pack(self.length, self.state, self.locality, self.nr_extra_pages)

    @property
    def packet_offset(self) -> int:
        """Where the TPM packet starts on the page, in bytes: 8 + 4n."""
        return self.SIZE + GRANT_REFERENCE_SIZE * self.nr_extra_pages


assert SharedPage.CODEC.size == SharedPage.SIZE, "io/tpmif.h: the head is 8 bytes (its own table says 16)"

# The head as one word, as `SharedPage.pack` lays it out: read and written in one access of 8 bytes, and a hot path
# need not make a SharedPage of it.
LENGTH_MASK: Final = 0xFFFF_FFFF
STATE_SHIFT: Final = 32
LOCALITY_SHIFT: Final = 40
EXTRA_PAGES_SHIFT: Final = 56  # the topmost byte
BYTE_MASK: Final = 0xFF
assert sys.byteorder == "little", "the head is little-endian, and read as a word of the processor"

MAX_PACKET: Final = PAGE_SIZE - SharedPage.SIZE  # 4088 bytes: what one page carries without extra pages
