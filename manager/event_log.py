"""A vTPM's event log: what its guest's boot was measured by, in the TCG's formats, and what PCRs come of it.

TPM 2.0: the crypto-agile format (TCG PC Client Platform Firmware Profile 1.05, 10.2: a TCG_PCClientPCREvent with
TCG_EfiSpecIDEvent, then TCG_PCR_EVENT2s). TPM 1.2: TCG_PCClientPCREvents alone (TCG PC Client Implementation for
Conventional BIOS 1.21, 11.1.1). Little-endian. Events are EV_IPL, their data the name of what was measured.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from frontend_backend.errors import MessageError
from frontend_backend.measurements import ALGORITHMS, Measurement

EV_NO_ACTION: Final = 0x03
EV_IPL: Final = 0x0D
_OLD: Final = struct.Struct("<II20sI")  # TCG_PCClientPCREvent: PCR, type, SHA-1, size of the data
assert _OLD.size == 32
_HEAD: Final = struct.Struct("<III")  # TCG_PCR_EVENT2: PCR, type, count of digests
_SPEC: Final = struct.Struct("<16sIBBBBI")  # signature, platform class, minor, major, errata, size of UINTN, count
_SIGNATURE: Final = b"Spec ID Event03\0"
_CLIENT, _UINTN_64 = 0, 2
MAX_LOG: Final = 64 * 1024  # bytes; one of ours has less than 1 KiB


@dataclass(frozen=True, slots=True)
class Event:
    """One event as a log has it: digests by the names of frontend_backend.measurements.ALGORITHMS."""

    pcr: int
    kind: int
    digests: dict[str, bytes]
    data: bytes


def event_log(family: str, measured: Iterable[Measurement]) -> bytes:
    """Return the log of a boot."""
    if family == "1.2":
        return b"".join(_old_event(one.pcr, EV_IPL, one.digests["sha1"], one.what.encode()) for one in measured)
    sizes = b"".join(struct.pack("<HH", number, hashlib.new(name).digest_size) for name, number in ALGORITHMS.items())
    spec = _SPEC.pack(_SIGNATURE, _CLIENT, 0, 2, 0, _UINTN_64, len(ALGORITHMS)) + sizes + b"\0"
    return _old_event(0, EV_NO_ACTION, bytes(20), spec) + b"".join(map(_event, measured))


def _old_event(pcr: int, kind: int, digest: bytes, data: bytes) -> bytes:
    return _OLD.pack(pcr, kind, digest, len(data)) + data


def _event(one: Measurement) -> bytes:
    digests = b"".join(struct.pack("<H", number) + one.digests[name] for name, number in ALGORITHMS.items())
    data = one.what.encode()
    return _HEAD.pack(one.pcr, EV_IPL, len(ALGORITHMS)) + digests + struct.pack("<I", len(data)) + data


class _Reader:
    def __init__(self, untrusted: bytes) -> None:
        self.data, self.at = untrusted, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise MessageError(f"the event log ends in the middle of an event: {count} bytes wanted at {self.at}")
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack(self.take(form.size))


def read_log(untrusted: bytes) -> list[Event]:
    """Return the events of a log in either format; that of the header is not one.

    Raises:
        MessageError: it is no log, or one with a hash that is not known here.

    """
    if len(untrusted) > MAX_LOG:
        raise MessageError(f"an event log of {len(untrusted)} bytes; at most {MAX_LOG} are read")
    reader = _Reader(untrusted)
    events: list[Event] = []
    first = _read_old(reader) if untrusted else None
    if first is not None and first.kind == EV_NO_ACTION and first.data.startswith(_SIGNATURE):
        banks = dict(_banks(first.data))
        while reader.at < len(untrusted):
            events.append(_read_event(reader, banks))
        return events
    if first is not None:
        events.append(first)
    while reader.at < len(untrusted):
        events.append(_read_old(reader))
    return events


def _read_old(reader: _Reader) -> Event:
    pcr, kind, digest, size = _OLD.unpack(reader.take(_OLD.size))
    return Event(pcr, kind, {"sha1": digest}, reader.take(size))


def _banks(spec: bytes) -> Iterator[tuple[int, tuple[str, int]]]:
    names = {number: name for name, number in ALGORITHMS.items()}
    reader = _Reader(spec)
    *_, count = _SPEC.unpack(reader.take(_SPEC.size))
    for _ in range(count):
        number, size = reader.unpack(struct.Struct("<HH"))
        name = names.get(number)
        if name is None or hashlib.new(name).digest_size != size:
            raise MessageError(f"the event log has digests of algorithm 0x{number:04x}, {size} bytes, unknown here")
        yield number, (name, size)


def _read_event(reader: _Reader, banks: dict[int, tuple[str, int]]) -> Event:
    pcr, kind, count = reader.unpack(_HEAD)
    digests: dict[str, bytes] = {}
    for _ in range(count):
        (number,) = reader.unpack(struct.Struct("<H"))
        if number not in banks:
            raise MessageError(f"an event with a digest of algorithm 0x{number:04x}, which the log does not announce")
        name, size = banks[number]
        digests[name] = reader.take(size)
    (size,) = reader.unpack(struct.Struct("<I"))
    return Event(pcr, kind, digests, reader.take(size))


def replay(events: Iterable[Event], bank: str) -> dict[int, bytes]:
    """Return the values of a bank's PCRs that were extended by these events and nothing else since Startup(CLEAR).

    Raises:
        MessageError: an event has no digest of that bank, or is for a PCR that does not begin with zeros.

    """
    values: dict[int, bytes] = {}
    for event in events:
        if event.kind == EV_NO_ACTION:
            continue
        if bank not in event.digests or not 0 <= event.pcr <= 15:
            raise MessageError(f"an event for PCR {event.pcr} with no {bank} digest that can be replayed")
        before = values.get(event.pcr, bytes(hashlib.new(bank).digest_size))
        values[event.pcr] = hashlib.new(bank, before + event.digests[bank]).digest()
    return values
