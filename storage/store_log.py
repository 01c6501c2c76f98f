"""The circular log: where the next frame goes, and which frames an image holds after its root.

Frames are chained by digest, not by place: the next frame begins where the last one ended or, when it did not
fit there, at unit 0. Units are 512 bytes.
"""

import hashlib
from collections.abc import Iterator
from typing import Final
from uuid import UUID

from storage import store_format as fmt
from storage.disk import Device
from storage.errors import StoreDamaged
from storage.secrets import StoreKey
from storage.store_frame import Frame, pack_frame, unpack_frame


class Log:
    """Position and chain of the log of an open store. `head` is the digest of the last frame."""

    def __init__(self, device: Device, first: int, sectors: int, start: int, head: bytes) -> None:
        self._device = device
        self.first: Final = first
        self.sectors: Final = sectors
        self.units: Final = sectors * fmt.SECTOR // fmt.UNIT
        self._start = start  # first unit that a replay needs
        self.next = start  # unit behind the last frame
        self.head = head

    @property
    def used(self) -> int:
        """Units that the next checkpoint will free, gaps at the end included."""
        return (self.next - self._start) % self.units

    def place(self, size: int) -> int | None:
        """Find the unit for a frame of `size` bytes; None: not before a checkpoint.

        One unit always stays free, so that `next` meets `start` only when the log is empty.
        """
        count = fmt.units(size)
        if self.next < self._start:
            return self.next if count < self._start - self.next else None
        if count < self.units - self.next or (count == self.units - self.next and self._start > 0):
            return self.next
        return 0 if count < self._start else None

    def restart(self, size: int) -> int:
        """Where a log that was just emptied goes on, so that a frame of `size` bytes has its place."""
        return self.next if fmt.units(size) < self.units - self.next else 0

    def emptied(self, start: int) -> None:
        """Note that a durable root needs no frame before `start`."""
        self._start = self.next = start

    def fits(self, size: int) -> bool:
        """Tell whether an empty log takes a frame of `size` bytes."""
        return fmt.units(size) < self.units

    def write(self, frame: Frame, unit: int, key: StoreKey, store: UUID) -> bytes:
        """Write a frame at `unit`, not yet durable; return its digest. Raises DeviceError."""
        raw = pack_frame(frame, key, store, unit)
        count = fmt.units(len(raw))
        self._device.write(raw.ljust(count * fmt.UNIT, b"\0"), self.first * fmt.SECTOR + unit * fmt.UNIT)
        digest = hashlib.sha256(raw).digest()
        self._advance(unit, count, digest)
        return digest

    def replay(self, key: StoreKey, store: UUID, sequence: int, must_meet: bytes) -> Iterator[Frame]:
        """Yield the frames after the root of `sequence`, oldest first, moving `next` and `head` along.

        A frame that was torn by a power cut ends the log: it was never acknowledged. Raises StoreDamaged
        when it was not the last one, as an authentic later frame or the root's `must_meet` shows;
        StoreTooNew; DeviceError.
        """
        raw = self._device.read(self.sectors * fmt.SECTOR, self.first * fmt.SECTOR)
        if len(raw) != self.sectors * fmt.SECTOR:
            raise StoreDamaged("log", "the image ends inside it")
        met = self.head == must_meet
        while True:
            found = self._next_frame(raw, key, store)
            if found is None:
                break
            unit, frame, count, digest = found
            self._advance(unit, count, digest)
            sequence = max(sequence, frame.sequence)
            met = met or digest == must_meet
            yield frame
        if not met:
            raise StoreDamaged(f"log, unit {self.next}", "a frame that the root needs is unreadable")
        self._check_nothing_after(raw, key, store, sequence)

    def _advance(self, unit: int, count: int, digest: bytes) -> None:
        self.next = (unit + count) % self.units
        self.head = digest

    def _next_frame(self, raw: bytes, key: StoreKey, store: UUID) -> tuple[int, Frame, int, bytes] | None:
        for unit in dict.fromkeys((self.next, 0)):
            found = unpack_frame(raw, unit * fmt.UNIT, key, store)
            if found is not None and found[0].previous == self.head:
                frame, length, digest = found
                return unit, frame, fmt.units(length), digest
        return None

    def _check_nothing_after(self, raw: bytes, key: StoreKey, store: UUID, sequence: int) -> None:
        for unit in range(self.units):
            start = unit * fmt.UNIT
            if raw[start : start + 4] != fmt.FRAME_MAGIC or fmt.FrameHeader.unpack(raw, start).sequence <= sequence:
                continue
            found = unpack_frame(raw, start, key, store)
            if found is not None:
                raise StoreDamaged(
                    f"log, unit {self.next}",
                    f"unreadable after sequence {sequence}, but a later frame ({found[0].sequence}) is there",
                )
