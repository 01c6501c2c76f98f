"""TPM 1.2 commands: the layout of each ordinal (TPM 1.2 Part 3), and a generator that fills it.

A layout is words: 1 2 4 are numbers of so many bytes, n a nonce or digest (20), e encrypted authorisation (20),
v bytes with a length in 32 bits, c in 16 bits; h a key handle, s a session's, P a PCR selection, K a key, k key
parameters, N an NV public area; |1 and |2 end with one or two authorisations.
"""

import random
import struct
from collections.abc import Callable
from typing import Final

from hostile_bytes import with_true_size

LAYOUTS: Final[dict[int, str]] = {
    0x0A: "", 0x0B: "2 4 n", 0x11: "2 h n v", 0x0C: "h 2 e 2 v |2", 0x0D: "2 v v K |1", 0x0E: "h n k",
    0x0F: "h h 2 e v e n |1", 0x10: "2 e 2 |1", 0x12: "n K |1", 0x13: "h e K n n |1", 0x14: "4 n", 0x15: "4",
    0x16: "h n P |1", 0x17: "h e v v |1", 0x18: "h S |2", 0x19: "4 n |1", 0x1A: "4", 0x1B: "n |1", 0x1C: "4 |1",
    0x1D: "c h v |1", 0x1E: "h v |1", 0x1F: "h e e K |1", 0x20: "h K |1", 0x21: "h |1", 0x22: "h", 0x23: "h K 4 1 |1",
    0x24: "h K v v v |1", 0x25: "h h v |1", 0x28: "h 2 v 2 v |2", 0x29: "h 1 v v |1", 0x2A: "h v v |1",
    0x2B: "2 K |1", 0x2C: "c", 0x2F: "h", 0x31: "h 1 v v |1", 0x32: "h h n |2", 0x33: "h h n n |2", 0x3C: "h v |1",
    0x3D: "h e v v |1", 0x3E: "h n P 1 |1", 0x3F: "4 v v |1", 0x40: "|1", 0x41: "h K |1", 0x46: "4", 0x47: "v",
    0x50: "", 0x51: "", 0x52: "h n |1", 0x53: "", 0x54: "", 0x5A: "", 0x5B: "|1", 0x5C: "|1", 0x5D: "", 0x5E: "",
    0x64: "h n 4 v |1", 0x65: "4 v", 0x66: "|1", 0x6E: "1 |1", 0x6F: "", 0x70: "", 0x71: "1", 0x72: "1", 0x73: "",
    0x74: "n", 0x75: "2 4", 0x78: "n k", 0x79: "e n K |2", 0x7A: "h v |2", 0x7C: "n", 0x7D: "|1", 0x7E: "|1",
    0x7F: "n k 1 n", 0x80: "n", 0x81: "h |1", 0x82: "4", 0x83: "h 4 n |1", 0x85: "4", 0x86: "h 1 n |1", 0x8C: "4",
    0x8D: "4 1 |1", 0x96: "s", 0x97: "", 0x98: "", 0x99: "2", 0x9A: "h 4 v |1", 0xA0: "", 0xA1: "v", 0xA2: "v",
    0xA3: "4 v", 0xAA: "v |1", 0xB4: "h", 0xB5: "v", 0xB6: "s", 0xB7: "v", 0xB8: "h 4 b", 0xB9: "h 1 v", 0xBA: "h 4",
    0xC8: "P", 0xCC: "N e |1", 0xCD: "4 4 v |1", 0xCE: "4 4 v |1", 0xCF: "4 4 4 |1", 0xD0: "4 4 4 |1", 0xD1: "v |1",
    0xD2: "4 4 v |1", 0xD4: "h v e |1", 0xD5: "1 v e |1", 0xD6: "v", 0xD8: "4 4 v |1", 0xDB: "", 0xDC: "e 4 |1",
    0xDD: "h |1", 0xDE: "h", 0xDF: "h |1", 0xE0: "h |1", 0xE6: "h v v |1", 0xE7: "v |1", 0xE8: "h n |1", 0xF1: "",
    0xF2: "h n n |1", 0x4000000A: "2", 0x4000000B: "",
}  # fmt: skip
SLOW: Final = frozenset({0x78, 0x7F, 0x1F, 0x79, 0x0D, 0x50})  # they make RSA keys, or test everything
_HANDLES: Final = (0x40000000, 0x40000001, 0x40000004, 0x40000006, 0x40000002, 0, 1, 0x01000000, 0x02000000, 0xFFFFFFFF)
_KEY_PARMS: Final = struct.pack(">IHHIIII", 1, 3, 1, 12, 2048, 2, 0)
_KEY: Final = bytes((1, 1, 0, 0)) + struct.pack(">HIB", 0x11, 0, 0) + _KEY_PARMS + bytes(12)
_LIFETIME_LOCKS: Final = (
    0x0380  # of TSC_PhysicalPresence: nothing undoes them, and they take the rest of the tests away
)


class Generator:
    """Makes well-formed TPM 1.2 commands; handles come from answers."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._handles: list[int] = []
        self._fast = [code for code in LAYOUTS if code not in SLOW]
        self._fields: dict[str, Callable[[], bytes]] = {
            "1": lambda: chance.choice((b"\0", b"\1", chance.randbytes(1))),
            "2": lambda: chance.choice((0, 1, 2, 4, 5, chance.randrange(65536))).to_bytes(2),
            "4": self._number,
            "n": lambda: chance.choice((bytes(20), chance.randbytes(20))),
            "e": lambda: chance.choice((bytes(20), chance.randbytes(20))),
            "b": lambda: chance.randbytes(16),
            "v": lambda: self._sized(">I"),
            "c": lambda: self._sized(">H"),
            "h": self._handle,
            "s": self._handle,
            "P": lambda: chance.choice((b"\0\3\xff\0\0", b"\0\2\1\0", b"\0\0", b"\0\3" + chance.randbytes(3))),
            "K": lambda: _KEY,
            "k": lambda: _KEY_PARMS,
            "S": lambda: b"\1\1\0\0" + bytes(4) + self._sized(">I"),
            "N": self._nv_public,
        }

    def _number(self) -> bytes:
        values = (
            0,
            1,
            2,
            4,
            5,
            6,
            7,
            16,
            23,
            24,
            0x10,
            0x20,
            0x1000,
            0x10000001,
            0xF000,
            0xFFFFFFFF,
            *range(0x100, 0x120),
        )
        return self._chance.choice((self._chance.choice(values), self._chance.randrange(2**32))).to_bytes(4)

    def _sized(self, form: str) -> bytes:
        chance = self._chance
        content = chance.choice(
            (b"", bytes(4), (0x10F).to_bytes(4), chance.randbytes(chance.choice((1, 4, 20, 64, 256, 300))))
        )
        return struct.pack(form, len(content)) + content

    def _handle(self) -> bytes:
        return self._chance.choice((*_HANDLES, *self._handles[-6:])).to_bytes(4)

    def _nv_public(self) -> bytes:
        chance = self._chance
        nothing = b"\0\3\0\0\0\x1f" + bytes(20)
        index = chance.choice((0x1000, 0x1001, 0x1002, 0xFFFFFFFF, 0, chance.randrange(2**32)))
        attributes = struct.pack(
            ">HI", 0x17, chance.choice((0, 1, 0x2000, 0x8000, 0x10000, 0x40000, chance.randrange(2**32)))
        )
        size = chance.choice((0, 1, 20, 1024, 0xFFFFFFFF))
        return struct.pack(">HI", 0x18, index) + nothing * 2 + attributes + bytes(3) + struct.pack(">I", size)

    def _authorisation(self) -> bytes:
        return self._handle() + self._chance.choice((bytes(20), self._chance.randbytes(20))) + b"\1" + bytes(20)

    def command(self) -> bytes:
        """Return one command."""
        chance = self._chance
        code = chance.choice(tuple(SLOW)) if chance.random() < 0.002 else chance.choice(self._fast)
        layout, auths = LAYOUTS[code], 0
        body = b""
        for word in layout.split():
            if word[0] == "|":
                auths = chance.choice((0, int(word[1]), int(word[1])))
                body += b"".join(self._authorisation() for _ in range(auths))
            else:
                body += self._fields[word]()
        if code == 0x4000000A:
            body = (int.from_bytes(body) & ~_LIFETIME_LOCKS).to_bytes(2)
        return with_true_size((0xC1 + auths).to_bytes(2) + bytes(4) + code.to_bytes(4) + body)

    def learn(self, command: bytes, answer: bytes) -> None:
        """Take note of a handle that an answer brings."""
        if answer[6:10] == bytes(4) and command[6:10] in (
            b"\0\0\0\x0a",
            b"\0\0\0\x0b",
            b"\0\0\0\x11",
            b"\0\0\0\x41",
            b"\0\0\0\xdc",
        ):
            self._handles = [*self._handles[-20:], int.from_bytes(answer[10:14])]

    def forget(self) -> None:
        """Take note that the TPM was reset."""
        self._handles.clear()
