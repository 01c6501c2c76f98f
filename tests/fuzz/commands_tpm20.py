"""TPM 2.0 commands: handles and parameters of each (Part 3), and a generator that fills them from a TPM's answers.

A layout is "handles / parameters". Handles: o object, k hierarchy, s session, n NV index, p PCR, a anything with an
authorisation, q sequence; `!` asks for an authorisation. Parameters: 1 2 4 8 are numbers of so many bytes, b a TPM2B,
others as in `_FIELDS`.
"""

import random
import struct
from collections.abc import Callable
from typing import Final

from hostile_bytes import with_true_size

LAYOUTS: Final[dict[int, str]] = {
    0x11F: "n! k! /", 0x120: "k! o / handle", 0x121: "k! / hierarchy 1", 0x122: "k! n /", 0x124: "k! /",
    0x125: "k! /", 0x126: "k! /", 0x127: "k! / 1", 0x128: "k! / 8", 0x129: "k! / b", 0x12A: "k! / auth nvpublic",
    0x12B: "k! / pcrs", 0x12C: "k! / b alg 4", 0x12D: "k! / ccs ccs", 0x12E: "k! / b alg", 0x130: "k! / 1",
    0x131: "k! / sensitive public b pcrs", 0x132: "k! /", 0x133: "k! o! / b scheme", 0x134: "a! n /",
    0x135: "a! n / 8", 0x136: "a! n / b", 0x137: "a! n / b 2", 0x138: "a! n /", 0x139: "k! /", 0x13A: "k! / 4 4 4",
    0x13B: "n! / b", 0x13C: "p! / b", 0x13D: "p! /", 0x13E: "q! / b hierarchy", 0x13F: "k! / 4",
    0x140: "k! / alg ccs ccs", 0x142: "/ algs", 0x143: "/ 1", 0x144: "/ 2", 0x145: "/ 2", 0x146: "/ b",
    0x147: "o! o! / b b", 0x148: "o! o! / b scheme", 0x149: "a! n s / b 2 2", 0x14A: "o! o / b b scheme ticket",
    0x14B: "o! o / b symdef", 0x14C: "k! o! / b scheme", 0x14D: "k! o! s / b scheme", 0x14E: "a! n / 2 2",
    0x14F: "a! n /", 0x150: "o! o / b", 0x151: "a! s / b b b 4", 0x152: "o! o / b b b",
    0x153: "o! / sensitive public b pcrs", 0x154: "o! / point", 0x155: "o! / b alg",
    0x156: "o! / b public b b symdef", 0x157: "o! / blob", 0x158: "o! / b scheme pcrs", 0x159: "o! / b scheme b",
    0x15B: "o! / b alg", 0x15C: "q! / b", 0x15D: "o! / digest scheme ticket", 0x15E: "o! /",
    0x160: "o s / b b b 4 signature", 0x161: "/ context", 0x162: "o /", 0x163: "o /", 0x164: "o! / 1 alg iv b",
    0x165: "/ flush", 0x167: "/ b public hierarchy", 0x168: "o / b b", 0x169: "n /", 0x16A: "s / b b b ticket",
    0x16B: "s /", 0x16C: "s / cc", 0x16D: "s / b 2 2", 0x16E: "s / b", 0x16F: "s / 1", 0x170: "s / b",
    0x171: "s / digests", 0x172: "s / b b b b ticket", 0x173: "o /", 0x174: "o / b scheme b",
    0x176: "o a / b b type symdef alg", 0x177: "o / b signature", 0x178: "/ curve", 0x17A: "/ cap 4 4", 0x17B: "/ 2",
    0x17C: "/", 0x17D: "/ b alg hierarchy", 0x17E: "/ pcrs", 0x17F: "s / b pcrs", 0x180: "s /", 0x181: "/",
    0x182: "p! / values", 0x183: "p! / b", 0x184: "o! a! n / b scheme 2 2", 0x185: "p! q! / b", 0x186: "/ b alg",
    0x187: "s /", 0x188: "s / b b 1", 0x189: "s /", 0x18A: "/ parms", 0x18B: "o! / point b b", 0x18C: "s /",
    0x18D: "o! / point point alg 2", 0x18E: "/ curve", 0x18F: "s / 1", 0x190: "s / b", 0x191: "o! / sensitive public",
    0x192: "a! n s /", 0x193: "o! / b 1 alg iv", 0x194: "o / 4 4", 0x195: "o! a! o / b", 0x196: "s / b b b 4 1",
    0x197: "o! o! / b scheme b", 0x198: "k! / 4", 0x199: "o / b scheme", 0x19A: "o! / point b b scheme",
    0x20000211: "k! / 4", 0x20000212: "k! /", 0x20000213: "/", 0x20000016: "/ b 4",
}  # fmt: skip
SLOW: Final = frozenset({0x143, 0x142, 0x124, 0x125})  # full self-tests; new seeds, of which new primary keys follow
_MAKES_HANDLE: Final = frozenset({0x131, 0x157, 0x167, 0x161, 0x191, 0x15B, 0x186, 0x176})
_ALGS: Final = (
    0x0B,
    0x0B,
    0x0C,
    4,
    5,
    6,
    1,
    8,
    0x10,
    0x14,
    0x15,
    0x16,
    0x18,
    0x19,
    0x1A,
    0x22,
    0x23,
    0x25,
    0x43,
    0x44,
    0xFFFF,
)
_HIERARCHIES: Final = (0x40000001, 0x40000001, 0x4000000C, 0x4000000B, 0x4000000A, 0x40000007, 0x40000009, 0x40000110)
_TRANSIENT: Final = 0x80000000
_PASSWORD: Final = 0x40000009
_NULL: Final = 0x10


def _sized(content: bytes) -> bytes:
    return struct.pack(">H", len(content)) + content


def _public(kind: int, attributes: int, rest: bytes, unique: bytes) -> bytes:
    return struct.pack(">HHIH", kind, 0xB, attributes, 0) + rest + unique


_NO_POINT: Final = bytes(4)
_AES: Final = struct.pack(">HHH", 6, 128, 0x43)
_PUBLICS: Final = (
    _public(0x23, 0x00030472, _AES + struct.pack(">HHH", _NULL, 3, _NULL), _NO_POINT),  # storage, P-256
    _public(0x23, 0x00040472, struct.pack(">HHHHH", _NULL, 0x18, 0xB, 3, _NULL), _NO_POINT),  # ECDSA
    _public(0x23, 0x00050472, struct.pack(">HHHHH", _NULL, 0x18, 0xB, 3, _NULL), _NO_POINT),  # restricted ECDSA
    _public(0x23, 0x00020472, struct.pack(">HHHH", _NULL, _NULL, 3, _NULL), _NO_POINT),  # ECDH
    _public(0x23, 0x00060472, struct.pack(">HHHH", _NULL, _NULL, 4, _NULL), _NO_POINT),  # both, P-384
    _public(0x23, 0x00040472, struct.pack(">HHHHHH", _NULL, 0x1A, 0xB, 0, 0x10, _NULL), _NO_POINT),  # ECDAA
    _public(0x08, 0x00040472, struct.pack(">HH", 5, 0xB), b"\0\0"),  # HMAC
    _public(0x08, 0x00000040, struct.pack(">H", _NULL), b"\0\0"),  # sealed data
    _public(0x25, 0x00060472, _AES, b"\0\0"),  # AES
    _public(0x08, 0x00020472, struct.pack(">HHHH", 0xA, 0xB, 0x22, 0)[:6], b"\0\0"),  # XOR
    _public(0x01, 0x00060472, struct.pack(">HHHI", _NULL, _NULL, 1024, 0), b"\0\0"),  # RSA, refused at 1024
)
_RSA: Final = _public(0x01, 0x00060472, struct.pack(">HHHI", _NULL, _NULL, 2048, 0), b"\0\0")
_SLOW_KEY: Final = 0.003  # share of keys that are RSA: one takes as long as some thousand other commands


class Generator:
    """Makes well-formed TPM 2.0 commands on handles, blobs and contexts that earlier answers brought."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._fast = [code for code in LAYOUTS if code not in SLOW]
        self.forget()
        self._blobs: list[bytes] = [bytes(4)]
        self._indexes = [0x01500016]
        self._fields: dict[str, Callable[[], bytes]] = {
            "1": lambda: chance.choice((b"\0", b"\1", chance.randbytes(1))),
            "2": lambda: chance.choice((0, 1, 8, 32, 0xFFFF, chance.randrange(65536))).to_bytes(2),
            "4": lambda: chance.choice((0, 1, 32, 0x7FFFFFFF, 0xFFFFFFFF, chance.randrange(2**32))).to_bytes(4),
            "8": lambda: chance.choice((bytes(8), b"\xff" * 8, chance.randbytes(8), bytes(5) + chance.randbytes(3))),
            "b": self._buffer,
            "digest": lambda: _sized(chance.randbytes(32)),
            "iv": lambda: _sized(chance.randbytes(chance.choice((16, 16, 0, 15)))),
            "auth": lambda: _sized(b""),
            "alg": lambda: chance.choice(_ALGS).to_bytes(2),
            "algs": lambda: struct.pack(">IHH", 2, chance.choice(_ALGS), chance.choice(_ALGS)),
            "cc": lambda: chance.choice(self._fast).to_bytes(4),
            "ccs": lambda: struct.pack(">III", 2, chance.choice(self._fast), chance.choice(self._fast)),
            "cap": lambda: chance.choice((*range(10), 0x100)).to_bytes(4),
            "hierarchy": lambda: chance.choice(_HIERARCHIES).to_bytes(4),
            "handle": lambda: chance.choice((0x81000001, 0x81000002, 0x81800001, *self._objects)).to_bytes(4),
            "flush": lambda: chance.choice((*self._objects, *self._sequences, *self._sessions, _TRANSIENT)).to_bytes(4),
            "pcrs": self._pcrs,
            "type": lambda: bytes((chance.choice((0, 1, 1, 1, 3, 2)),)),
            "symdef": lambda: chance.choice((struct.pack(">H", _NULL), _AES, struct.pack(">HH", 0xA, 0xB))),
            "scheme": lambda: chance.choice((struct.pack(">H", _NULL), struct.pack(">HH", chance.choice(_ALGS), 0xB))),
            "sensitive": lambda: _sized(_sized(b"") + _sized(chance.randbytes(chance.choice((0, 0, 0, 16, 32, 128))))),
            "public": lambda: _sized(self._public()),
            "parms": lambda: self._public()[:2] + self._public()[10:22],
            "point": lambda: _sized(_sized(chance.randbytes(32)) + _sized(chance.randbytes(32))),
            "curve": lambda: chance.choice((1, 2, 3, 4, 5, 0x10, 0x11, 0x20, 0)).to_bytes(2),
            "ticket": self._ticket,
            "signature": lambda: (
                struct.pack(">HH", 0x18, 0xB) + _sized(chance.randbytes(32)) + _sized(chance.randbytes(32))
            ),
            "digests": lambda: struct.pack(">I", 2) + _sized(bytes(32)) + _sized(chance.randbytes(32)),
            "values": lambda: struct.pack(">IH", 1, 0xB) + chance.randbytes(32),
            "nvpublic": self._nv_public,
            "blob": lambda: chance.choice(self._blobs),
            "context": lambda: chance.choice(
                self._contexts or [struct.pack(">QII", 1, _TRANSIENT, 0x40000001) + bytes(34)]
            ),
        }

    def forget(self) -> None:
        """Take note that the TPM was reset: what is in its memory is gone."""
        self._objects: list[int] = []
        self._sequences: list[int] = []
        self._sessions: list[int] = []
        self._contexts: list[bytes] = []

    # parameters

    def _buffer(self) -> bytes:
        sizes = (0, 0, 1, 8, 16, 20, 31, 32, 32, 33, 48, 64, 128, 256, 1024, 1025)
        return _sized(self._chance.randbytes(self._chance.choice(sizes)))

    def _pcrs(self) -> bytes:
        chance = self._chance
        banks = [
            struct.pack(">HB", chance.choice((0xB, 0xB, 4, 0xC)), 3) + chance.randbytes(3)
            for _ in range(chance.randint(0, 2))
        ]
        return struct.pack(">I", len(banks)) + b"".join(banks)

    def _public(self) -> bytes:
        if self._chance.random() < _SLOW_KEY:
            return _RSA
        return self._chance.choice(_PUBLICS)

    def _ticket(self) -> bytes:
        tag, content = (
            self._chance.choice((0x8021, 0x8022, 0x8023, 0x8024, 0x8025)),
            self._chance.choice((b"", bytes(32))),
        )
        return struct.pack(">HI", tag, self._chance.choice(_HIERARCHIES)) + _sized(content)

    def _nv_public(self) -> bytes:
        chance = self._chance
        index = chance.choice((0x01500016, 0x01500017, 0x01500018, 0x01500000 + chance.randrange(64), 0x01C00002))
        kind = chance.choice((0, 0, 0x10, 0x20, 0x40, 0x80, 0x90))  # ordinary, counter, bits, extend, PIN fail and pass
        attributes = chance.choice(
            (0x02060006, 0x02060006, 0x42070007, 0x02062006, 0x86068006, chance.randrange(2**32))
        )
        size = (
            8 if kind in (0x10, 0x20, 0x80, 0x90) else 32 if kind == 0x40 else chance.choice((0, 1, 8, 32, 1000, 2048))
        )
        public = struct.pack(">IHI", index, 0xB, attributes & ~0xF0 | kind) + _sized(b"") + struct.pack(">H", size)
        self._indexes = [*self._indexes[-8:], index]
        return _sized(public)

    # handles

    def _handle(self, kind: str) -> int:
        chance = self._chance
        objects = self._objects or [_TRANSIENT]
        kinds: dict[str, list[int]] = {
            "o": [*objects, *objects, 0x81000001, 0x40000007],
            "k": [0x40000001, 0x4000000C] * 5 + list(_HIERARCHIES),
            "s": self._sessions or [0x03000000],
            "n": self._indexes,
            "p": [0, 4, 16, 23, 20, 0x40000007],
            "q": [*(self._sequences or [_TRANSIENT]), _TRANSIENT + 2],
            "a": [*self._indexes, *objects, *_HIERARCHIES],
        }
        if chance.random() < 0.02:
            return chance.randrange(2**32)
        return chance.choice(kinds[kind])

    def _authorisation(self) -> bytes:
        chance = self._chance
        session, nonce, password = _PASSWORD, b"", b""
        if self._sessions and chance.random() < 0.15:
            session, nonce = chance.choice(self._sessions), chance.randbytes(chance.choice((0, 16, 32)))
        if chance.random() < 0.05:
            password = chance.randbytes(chance.choice((4, 32, 64)))
        attributes = chance.choice((0, 0, 1, 1, 0x21, 0x41, 0x80, 0xFF)) if session != _PASSWORD else 0
        return session.to_bytes(4) + _sized(nonce) + bytes((attributes,)) + _sized(password)

    def command(self) -> bytes:
        """Return one command."""
        chance = self._chance
        if len(self._objects) + len(self._sequences) >= 3 and chance.random() < 0.3:
            return self._build(0x165)  # the TPM has room for three
        if not self._objects and chance.random() < 0.3:
            return self._build(0x131)
        if not self._sessions and chance.random() < 0.1:
            return self._build(0x176)
        return self._build(chance.choice(tuple(SLOW)) if chance.random() < 0.002 else chance.choice(self._fast))

    def _build(self, code: int) -> bytes:
        handles, parameters = (part.split() for part in LAYOUTS[code].split("/"))
        area, auths = b"", b""
        for word in handles:
            if word == "n" and len(handles) > 1 and handles[0] == "a!" and self._chance.random() < 0.7:
                area += area[:4] if area[0] == 1 else self._handle("n").to_bytes(4)  # an index authorises itself
            else:
                area += self._handle(word[0]).to_bytes(4)
            auths += self._authorisation() if word.endswith("!") else b""
        body = b"".join(self._fields[word]() for word in parameters)
        if code == 0x165:
            self._drop(int.from_bytes(body))
        if self._chance.random() < 0.02:
            auths += self._authorisation()  # for audit or encryption
        if auths:
            return with_true_size(
                b"\x80\x02" + bytes(4) + code.to_bytes(4) + area + struct.pack(">I", len(auths)) + auths + body
            )
        return with_true_size(b"\x80\x01" + bytes(4) + code.to_bytes(4) + area + body)

    def _drop(self, handle: int) -> None:
        for kept in (self._objects, self._sequences, self._sessions):
            if handle in kept:
                kept.remove(handle)

    def learn(self, command: bytes, answer: bytes) -> None:
        """Take note of handles, key blobs and contexts that an answer brings."""
        if answer[6:10] != bytes(4) or len(answer) < 14:
            return
        code = int.from_bytes(command[6:10])
        if code in _MAKES_HANDLE:
            handle = int.from_bytes(answer[10:14])
            self._drop(handle)
            kept = self._sessions if code == 0x176 else self._sequences if code in (0x15B, 0x186) else self._objects
            kept.append(handle)
            del kept[:-8]
        elif code == 0x162:
            self._contexts = [*self._contexts[-8:], answer[10:]]
        elif code == 0x153 and answer[:2] == b"\x80\x02":
            private = 16 + int.from_bytes(answer[14:16])
            end = private + 2 + int.from_bytes(answer[private : private + 2])
            self._blobs = [*self._blobs[-8:], answer[14:end]]
