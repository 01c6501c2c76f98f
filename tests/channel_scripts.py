"""Byte streams for both channels of a TPM: the same ones are played to swtpm and to us.

A step is what is sent where, and what is compared of the answer: all of it, or only what is no draw of a random number
or a clock. Names of steps are what `docs/control-channel.md` lists as different.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vtpm_instance_commands import (
    SHUTDOWN_CLEAR,
    SHUTDOWN_STATE,
    STARTUP_CLEAR,
    STARTUP_STATE,
    command12,
    get_random,
    nv_define,
    nv_read,
    nv_write,
    pcr_extend,
    pcr_read,
)

INDEX = 0x01500001
TEST_RESULT = bytes.fromhex("8001 0000000a 0000017c")
Compare = Callable[[bytes], object]


@dataclass(frozen=True)
class Step:
    """One piece to send on a channel ("control" or "data"), and how its answer is looked at."""

    name: str
    channel: str
    request: bytes
    compare: Compare = bytes
    passes: bool = False  # with a new data channel


def control(name: str, number: int, payload: bytes = b"", compare: Compare = bytes, *, passes: bool = False) -> Step:
    """A control command."""
    return Step(name, "control", struct.pack(">I", number) + payload, compare, passes)


def data(name: str, packet: bytes, compare: Compare = bytes) -> Step:
    """A TPM command."""
    return Step(name, "data", packet, compare)


def size_and_code(answer: bytes) -> object:
    """What is no draw: how long, and the code."""
    return len(answer), answer[:2], answer[6:10]


def head(answer: bytes) -> object:
    """The head of a state blob's answer; the volatile part's length may differ by what is random."""
    return answer[:8], answer[8:12] == answer[12:16], len(answer) == 16 + int.from_bytes(answer[12:16])


def established(answer: bytes) -> object:
    """All but the padding."""
    return answer[:5], len(answer)


WORD = struct.Struct(">I")
WORDS = struct.Struct(">III")


def probes() -> Iterator[Step]:
    """What comes before INIT."""
    yield control("GET_CAPABILITY", 0x01, compare=len)
    yield control("SET_DATAFD without a descriptor", 0x10)
    yield control("SET_DATAFD", 0x10, passes=True)
    yield control("SET_DATAFD again", 0x10, passes=True)
    yield data("a TPM 2.0 command before INIT", bytes.fromhex("8001 0000000a 00000181"))
    yield data("a TPM 1.2 command before INIT", bytes.fromhex("00c1 0000000a 000000f1"))
    for name, number in (("GET_TPMESTABLISHED", 4), ("HASH_START", 6), ("HASH_END", 8), ("CANCEL", 9)):
        yield control(f"{name} while it is off", number)
    yield control("STORE_VOLATILE while it is off", 0x0A)
    yield control("RESET_TPMESTABLISHED while it is off", 0x0B, b"\3\0\0\0")
    yield control("GET_STATEBLOB while it is off", 0x0C, WORDS.pack(0, 1, 0))
    yield control("GET_CONFIG", 0x0F)
    for locality in (0, 1, 2, 3, 4, 5, 255):
        yield control(f"SET_LOCALITY {locality}", 0x05, bytes([locality]))
        yield control(f"SET_LOCALITY {locality}, padded", 0x05, bytes([locality, 0, 0, 0]))
    yield control("SET_LOCALITY 0", 0x05, b"\0")
    for size in (0, 100, 3000, 9999, 0):
        yield control(f"SET_BUFFERSIZE {size}", 0x11, WORD.pack(size))
    yield control("an unknown command", 0x63)
    yield control("STOP while it is off", 0x0E)
    for kind, text in ((1, b"abcd"), (2, b"abcd" * 20)):  # none: an empty one leaves swtpm with a TPM without PCR banks
        yield control(f"SET_STATEBLOB {kind} of {len(text)} wrong bytes", 0x0D, WORDS.pack(0, kind, len(text)) + text)


def power(family: str) -> Iterator[Step]:
    """INIT, STOP and what is refused while it runs."""
    startup = STARTUP_CLEAR if family == "2.0" else command12(0x99, b"\0\1")
    yield control("INIT", 0x02, bytes(4))
    yield data("a command before Startup", get_random(8) if family == "2.0" else command12(0x46, WORD.pack(8)))
    yield data("Startup", startup)
    yield data("Startup again", startup)
    yield control("SET_BUFFERSIZE while it runs", 0x11, WORD.pack(3000))
    yield control("SET_BUFFERSIZE 0 while it runs", 0x11, WORD.pack(0))
    for flags in (1, 0):
        yield control(f"INIT with flags {flags} while it runs", 0x02, WORD.pack(flags))
        yield data("Startup after INIT", startup)
    yield control("STOP", 0x0E)
    yield control("STOP again", 0x0E)
    yield data("a command after STOP", startup)
    yield control("INIT after STOP", 0x02, WORD.pack(1))
    yield data("Startup after STOP", startup)


def measurements() -> Iterator[Step]:
    """HASH_* and the established bit, with what the PCRs are then."""
    yield control("GET_TPMESTABLISHED", 0x04, compare=established)
    yield control("HASH_END without HASH_START", 0x08)
    yield control("HASH_START", 0x06)
    for size in (0, 1, 5, 4000):
        yield control(f"HASH_DATA {size}", 0x07, WORD.pack(size) + b"x" * size)
    yield control("HASH_END", 0x08)
    yield control("GET_TPMESTABLISHED after HASH_END", 0x04, compare=established)
    for locality in (0, 1, 2, 5, 3):
        yield control(f"RESET_TPMESTABLISHED {locality}", 0x0B, bytes([locality, 0, 0, 0]))
        yield control("GET_TPMESTABLISHED after the reset", 0x04, compare=established)


def guest() -> Iterator[Step]:
    """What a TPM 2.0 guest does, at several localities, behind the TCG's head, and by the driver's command."""
    for index in (0, 7, 16, 17, 20):
        yield data(f"PCR_Read {index}", pcr_read(index))
    for locality in (0, 2, 3, 4):
        yield control(f"SET_LOCALITY {locality}", 0x05, bytes([locality, 0, 0, 0]))
        yield data(f"PCR_Extend 20 at locality {locality}", pcr_extend(20))
        yield data(f"PCR_Read 20 at locality {locality}", pcr_read(20))
    yield control("SET_LOCALITY 0", 0x05, b"\0")
    packet = pcr_extend(20)
    yield data("PCR_Extend behind the TCG's head", struct.pack(">IBI", 8, 2, len(packet)) + packet)
    yield data("PCR_Read 20 after it", pcr_read(20))
    yield control("SET_LOCALITY 0", 0x05, b"\0")
    yield data("the driver's set locality", bytes.fromhex("8001 0000000b 20001000 03"))
    yield data("NV_DefineSpace", nv_define(INDEX, 8))
    yield data("NV_Write", nv_write(INDEX, b"contents"))
    yield data("NV_Read", nv_read(INDEX, 8))
    yield data("GetRandom", get_random(16), size_and_code)
    yield data("an unknown TPM command", bytes.fromhex("8001 0000000a 20000000"))
    yield data("a header and nothing", bytes.fromhex("8001 0000000a 00000144"))
    yield control("CANCEL", 0x09)
    yield control("LOCK_STORAGE", 0x13, WORD.pack(0))
    for flags in (1, 2, 4):
        yield control(f"GET_INFO {flags}", 0x12, struct.pack(">QII", flags, 0, 0))
    for offset in (5, 62, 63, 500):
        yield control(f"GET_INFO from {offset}", 0x12, struct.pack(">QII", 1, offset, 0))


def blobs(family: str) -> Iterator[Step]:
    """State blobs out, and what is refused of those that come in."""
    yield control("STORE_VOLATILE", 0x0A)
    for kind in (1, 2, 3):
        yield control(f"GET_STATEBLOB {kind}", 0x0C, WORDS.pack(1, kind, 0), head)
    yield control("GET_STATEBLOB 9", 0x0C, WORDS.pack(1, 9, 0))
    yield control("GET_STATEBLOB from beyond its end", 0x0C, WORDS.pack(1, 1, 1_000_000))
    yield control("LOCK_STORAGE after the blobs", 0x13, WORD.pack(300))
    if family == "2.0":
        yield data("NV_Read after the blobs", nv_read(INDEX, 8))
        yield data("Shutdown(STATE)", SHUTDOWN_STATE)
        yield control("INIT after Shutdown(STATE)", 0x02, WORD.pack(1))
        yield data("Startup(STATE)", STARTUP_STATE)
        yield data("PCR_Read 17 after Startup(STATE)", pcr_read(17))
        yield data("GetTestResult", TEST_RESULT, size_and_code)
        yield data("Shutdown(CLEAR)", SHUTDOWN_CLEAR)
    yield control("INIT", 0x02, WORD.pack(1))


def script(family: str) -> list[Step]:
    """All of it, in an order in which each part finds what it needs."""
    steps = [*probes(), *power(family), *measurements()]
    steps += guest() if family == "2.0" else ()
    return [*steps, *blobs(family), control("SHUTDOWN", 0x03)]
