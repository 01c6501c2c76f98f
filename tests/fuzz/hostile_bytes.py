"""Bytes that parsers trip over: interesting numbers, damaged copies of a packet, packets whose sizes lie."""

import random
import struct
from collections.abc import Sequence
from typing import Final

HEADER: Final = 10  # bytes: tag, size, code
MAX_COMMAND: Final = 4096
_SIZE: Final = slice(2, 6)
_BYTES: Final = (0, 1, 2, 0x7F, 0x80, 0xFF)
_WORDS: Final = (0, 1, 2, 4, 9, 0x0A, 0x40, 0x41, 0x80, 0x100, 0x400, 0x401, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF)
_LONGS: Final = (0, 1, 2, 8, 0x40, 0x100, 0x1000, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFF0, 0xFFFFFFFF)
_HANDLES: Final = (
    0, 23, 24, 0x01500016, 0x01400000, 0x02000000, 0x03000000, 0x40000001, 0x40000007, 0x40000009, 0x4000000A,
    0x4000000B, 0x4000000C, 0x4000000D, 0x40000110, 0x80000000, 0x80000001, 0x80000002, 0x80000003, 0x80FFFFFF,
    0x81000000, 0x81800000, 0x90000000, 0xFFFFFFFF,
)  # fmt: skip


def with_true_size(packet: bytes) -> bytes:
    """Return the packet with the size it has, at least a header and at most what is accepted."""
    packet = packet.ljust(HEADER, b"\0")[:MAX_COMMAND]
    return packet[:2] + struct.pack(">I", len(packet)) + packet[6:]


def _flip(packet: bytearray, chance: random.Random, _others: Sequence[bytes]) -> bytearray:
    for _ in range(chance.randint(1, 4)):
        packet[chance.randrange(len(packet))] ^= 1 << chance.randrange(8)
    return packet


def _overwrite(packet: bytearray, chance: random.Random, _others: Sequence[bytes]) -> bytearray:
    form, values = chance.choice((("B", _BYTES), (">H", _WORDS), (">I", _LONGS), (">I", _HANDLES)))
    size = struct.calcsize(form)
    if len(packet) - HEADER >= size:
        at = chance.randrange(HEADER, len(packet) - size + 1)
        struct.pack_into(form, packet, at, chance.choice(values))
    return packet


def _nudge(packet: bytearray, chance: random.Random, _others: Sequence[bytes]) -> bytearray:
    """Make a number, most likely a length, a little wrong."""
    if len(packet) > HEADER + 2:
        at = chance.randrange(HEADER, len(packet) - 1)
        number = int.from_bytes(packet[at : at + 2]) + chance.choice((-2, -1, 1, 2, 16))
        packet[at : at + 2] = (number & 0xFFFF).to_bytes(2)
    return packet


def _truncate(packet: bytearray, chance: random.Random, _others: Sequence[bytes]) -> bytearray:
    return packet[: chance.randint(HEADER, len(packet))]


def _delete(packet: bytearray, chance: random.Random, _others: Sequence[bytes]) -> bytearray:
    at = chance.randrange(HEADER, len(packet) + 1)
    del packet[at : at + chance.choice((1, 2, 4, 8, 32))]
    return packet


def _insert(packet: bytearray, chance: random.Random, _others: Sequence[bytes]) -> bytearray:
    at = chance.randrange(HEADER, len(packet) + 1)
    packet[at:at] = chance.randbytes(chance.choice((1, 2, 4, 8, 64, 1024)))
    return packet


def _repeat(packet: bytearray, chance: random.Random, _others: Sequence[bytes]) -> bytearray:
    start = chance.randrange(HEADER, len(packet) + 1)
    end = chance.randrange(start, len(packet) + 1)
    packet[end:end] = packet[start:end] * chance.choice((1, 3, 30))
    return packet


def _splice(packet: bytearray, chance: random.Random, others: Sequence[bytes]) -> bytearray:
    other = chance.choice(others)
    cut = chance.randrange(HEADER, len(packet) + 1)
    return packet[:cut] + other[chance.randrange(HEADER, len(other) + 1) :]


def _retag(packet: bytearray, chance: random.Random, _others: Sequence[bytes]) -> bytearray:
    packet[0:2] = chance.choice((0x8001, 0x8002, 0xC1, 0xC2, 0xC3, 0xC4, 0, 0xFFFF)).to_bytes(2)
    return packet


def _recode(packet: bytearray, chance: random.Random, others: Sequence[bytes]) -> bytearray:
    packet[6:10] = chance.choice((chance.choice(others)[6:10], chance.randbytes(4), (0x20000211).to_bytes(4)))
    return packet


def _fill(packet: bytearray, chance: random.Random, _others: Sequence[bytes]) -> bytearray:
    return packet + chance.choice((b"\0", b"\xff", chance.randbytes(64))) * MAX_COMMAND


_WAYS: Final = (
    _flip, _flip, _overwrite, _overwrite, _overwrite, _nudge, _nudge, _truncate, _delete, _insert, _repeat, _splice,
    _retag, _recode, _fill,
)  # fmt: skip


def damaged(packet: bytes, others: Sequence[bytes], chance: random.Random) -> bytes:
    """Return a damaged copy of a command whose header still tells its true size, so that it reaches the TPM."""
    copy = bytearray(packet)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        copy = bytearray(with_true_size(bytes(chance.choice(_WAYS)(copy, chance, others))))
    return bytes(copy)


def lying(packet: bytes, chance: random.Random) -> bytes:
    """Return a stream that framing has to deal with: wrong sizes, pieces, several commands in one."""
    way = chance.randrange(5)
    if way == 0:
        return packet[:2] + chance.choice(_LONGS).to_bytes(4) + packet[6:]
    if way == 1:
        return packet[: chance.randrange(len(packet))]
    if way == 2:
        return chance.randbytes(chance.choice((1, 9, 10, 11, 100, 5000)))
    if way == 3:
        return packet * chance.randint(2, 5) + packet[: chance.randrange(len(packet))]
    return packet + chance.randbytes(chance.randint(1, 20))
