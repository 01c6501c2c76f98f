"""One vTPM's state on disk: two encrypted slots, of which the store's record names one.

Works on a descriptor that the caller opened, locked and closes; never on a path. Only `save` and
`ensure_room` (and `create`) write, and none of them touches the live slot. Nothing here decides
which state is right: that is the record's (key, digest, generation), given to `load`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, Self
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storage import state_format as fmt
from storage.disk import Device, Disk
from storage.errors import (
    DeviceError,
    GenerationError,
    ImageDamaged,
    ImageExists,
    ImageFailed,
    ImageForeign,
    ImageTooNew,
    KeyMismatch,
    NoMatchingSlot,
    NothingSaved,
    SlotMismatch,
    SlotsInUse,
    StateTooLarge,
)
from storage.secrets import StateKey
from storage.state_format import UNKNOWN_EMULATOR, Blobs, Emulator, Family

__all__ = ["UNKNOWN_EMULATOR", "Blobs", "Emulator", "Family", "Saved", "SlotInfo", "SlotState", "StateImage"]

# Every save has its own random key, so a key meets exactly one nonce and this one serves (SP 800-38D, 8.2).
_NONCE: Final = bytes(12)


class SlotState(Enum):
    """What a slot looks like without a key."""

    BLANK = "blank"
    WRITTEN = "written"
    UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class SlotInfo:
    """What a slot says of itself; nothing of it is proven before `load`. Sizes in bytes.

    `digest` is SHA-256 over header, ciphertext and tag, computed from the bytes there. Fields are
    None where the slot is blank or unreadable; `problem` then says why.
    """

    slot: int
    state: SlotState
    problem: str | None = None
    generation: int | None = None
    vtpm: UUID | None = None
    emulator: Emulator | None = None
    plaintext_bytes: int | None = None
    digest: bytes | None = None

    def __str__(self) -> str:
        if self.state is SlotState.WRITTEN:
            return f"slot {self.slot} claims generation {self.generation}"
        return f"slot {self.slot} is {self.problem or self.state.value}"


@dataclass(frozen=True, slots=True)
class Saved:
    """What the record must hold for a save: the key, SHA-256 of the slot (32 bytes), the generation."""

    key: StateKey
    digest: bytes
    generation: int


@dataclass(frozen=True, slots=True)
class _Slot:
    info: SlotInfo
    header: fmt.SlotHeader | None = None
    raw: bytes = b""
    too_new: ImageTooNew | None = None


class StateImage:
    """An open state image; one object per image at a time, used from one thread. Make it by `create` or `open`."""

    def __init__(self, device: Device, header: fmt.ImageHeader, family: Family, chunks: int) -> None:
        self._device = device
        self.vtpm: Final = header.vtpm
        self.store: Final = header.store
        self.family: Final = family
        self._chunks = chunks
        self._live: int | None = None
        self._saved: int | None = None
        self._saved_generation = 0
        self._live_generation = 0
        self._ready = False
        self._failed = False
        self._ahead: list[_Slot] = []

    # --- making and opening ------------------------------------------------------------------------

    @classmethod
    def create(cls, disk: int | Disk, vtpm: UUID, store: UUID, family: Family) -> Self:
        """Make an image in an empty file, or where header and first chunks are all zero.

        Room for both first chunks is reserved before anything is written; durable on return, but for
        the directory entry, which is the caller's. A crash inside leaves all zero, or the whole image
        (the header's content is one sector).
        Raises: ImageExists, StorageFull, DeviceError.
        """
        device = Device(disk)
        size = fmt.image_bytes(1)
        present = device.read(size, 0)
        if any(present):
            raise ImageExists(next(index for index, byte in enumerate(present) if byte))
        device.reserve(size)
        device.flush()
        device.write(fmt.pack_image_header(vtpm, store, family), 0)
        device.flush()
        return cls.open(disk, vtpm)

    @classmethod
    def open(cls, disk: int | Disk, expect_vtpm: UUID, expect_store: UUID | None = None) -> Self:
        """Open the image of `expect_vtpm`; writes nothing.

        Raises: NotAnImage, ImageTooNew, ImageDamaged (also when cut short), ImageForeign, DeviceError.
        """
        device = Device(disk)
        header, family = fmt.unpack_image_header(device.read(fmt.HEADER_BYTES, 0))
        if header.vtpm != expect_vtpm:
            raise ImageForeign("vTPM", expect_vtpm, header.vtpm)
        if expect_store is not None and header.store != expect_store:
            raise ImageForeign("store", expect_store, header.store)
        chunks = (device.size() - fmt.HEADER_BYTES) // (2 * fmt.CHUNK)
        if chunks < 1:
            raise ImageDamaged("image", f"cut short: {device.size()} bytes, at least {fmt.image_bytes(1)} expected")
        return cls(device, header, family, min(chunks, fmt.MAX_CHUNKS))

    # --- reading -----------------------------------------------------------------------------------

    def read_ahead(self) -> None:
        """Read both slots for the `load` that comes next, while its key is not known yet. Raises DeviceError."""
        self._ahead = [self._read_slot(slot) for slot in (0, 1)]

    def load(self, key: StateKey, digest: bytes, generation: int) -> Blobs:
        """Read the state that the record names: the slot whose SHA-256 is `digest`, whichever it is.

        That slot is live from now on. Writes nothing, and after an error the object is as before.
        Raises: NoMatchingSlot, ImageTooNew, SlotMismatch, KeyMismatch, BlobsRefused, DeviceError.
        """
        slots, self._ahead = self._ahead or [self._read_slot(slot) for slot in (0, 1)], []
        found = next((slot for slot in slots if slot.info.digest == digest), None)
        if found is None or found.header is None:
            for slot in slots:
                if slot.too_new is not None:
                    raise slot.too_new
            raise NoMatchingSlot(generation, [str(slot.info) for slot in slots])
        header, index = found.header, found.info.slot
        for field, expected, claimed in (
            ("vTPM", self.vtpm, header.vtpm),
            ("generation", generation, header.generation),
            ("TPM family", self.family.value, header.family),
        ):
            if expected != claimed:
                raise SlotMismatch(index, field, expected, claimed)
        start = fmt.SlotHeader.size()
        try:
            plaintext = AESGCM(key.view).decrypt(_NONCE, found.raw[start:], found.raw[:start])
        except InvalidTag:
            raise KeyMismatch(index) from None
        blobs = fmt.unpack_blobs(plaintext)
        self._live, self._live_generation = index, generation
        self._saved, self._ready = None, True
        return blobs

    def assume_fresh(self) -> None:
        """Declare that no record covers either slot (record flag FRESH), so that a save may overwrite them."""
        self._live, self._live_generation, self._saved, self._ready, self._ahead = None, 0, None, True, []

    def describe(self) -> list[SlotInfo]:
        """Tell what both slots claim, without a key; for show and verify. Raises DeviceError."""
        return [self._read_slot(slot).info for slot in (0, 1)]

    @property
    def live_slot(self) -> int | None:
        """0 or 1, None before anything was loaded or switched to."""
        return self._live

    @property
    def room(self) -> int:
        """Bytes of blobs, all together, that a save can take now."""
        return self._chunks * fmt.CHUNK - fmt.SLOT_OVERHEAD

    # --- writing -----------------------------------------------------------------------------------

    def save(self, blobs: Mapping[str, bytes], generation: int, emulator: Emulator = UNKNOWN_EMULATOR) -> Saved:
        """Encrypt under a fresh key into the slot that is not live; durable on return.

        Does not switch: until `switch`, another save takes the same slot again. What it returns is
        for the record; only when that is durable too may the guest be answered (design section 6).
        Raises: GenerationError unless `generation` is above the live one; StateTooLarge (ensure_room
        first); SlotsInUse; BlobsRefused; StorageFull or DeviceError, with the live slot untouched;
        ImageFailed after a failed flush.
        """
        self._check_writable()
        if not self._live_generation < generation <= fmt.MAX_GENERATION:
            raise GenerationError(f"vTPM {self.vtpm}", self._live_generation, generation)
        checked = Blobs(blobs)
        if checked.size > self.room:
            raise StateTooLarge(checked.size, self.room)
        self._check_slots_free()
        plaintext = fmt.pack_blobs(checked)
        header = fmt.pack_slot_header(self.vtpm, self.family, generation, emulator, len(plaintext))
        key = StateKey.new()
        raw = header + AESGCM(key.view).encrypt(_NONCE, plaintext, header)
        saved = Saved(key, hashlib.sha256(raw).digest(), generation)  # now: a flush leaves caches cold
        target = 0 if self._live is None else 1 - self._live
        self._saved = None
        for chunk in range(-(-len(raw) // fmt.CHUNK)):
            self._device.write(raw[chunk * fmt.CHUNK : (chunk + 1) * fmt.CHUNK], fmt.chunk_offset(target, chunk))
        self._flush()
        self._saved, self._saved_generation = target, generation
        return saved

    def switch(self) -> None:
        """Make the last saved slot the live one: the record that names it is durable. Raises NothingSaved."""
        if self._saved is None:
            raise NothingSaved
        self._live, self._live_generation, self._saved = self._saved, self._saved_generation, None

    def ensure_room(self, blob_bytes: int) -> None:
        """Grow both slots until blobs of this size together fit; durable on return. Call it between commands.

        Raises: StateTooLarge above the format's 512 KiB a slot; StorageFull or DeviceError with the
        image unchanged; ImageFailed after a failed flush.
        """
        self._check_writable()
        if blob_bytes <= self.room:
            return
        if blob_bytes > fmt.MAX_BLOB_BYTES:
            raise StateTooLarge(blob_bytes, fmt.MAX_BLOB_BYTES)
        chunks = fmt.chunks_for(blob_bytes)
        self._device.reserve(fmt.image_bytes(chunks))
        self._flush()
        self._chunks = chunks

    # --- inside ------------------------------------------------------------------------------------

    def _check_writable(self) -> None:
        if self._failed:
            raise ImageFailed

    def _flush(self) -> None:
        try:
            self._device.flush()
        except DeviceError:
            self._failed = True
            raise

    def _check_slots_free(self) -> None:
        if self._ready:
            return
        slots = self.describe()
        if any(slot.state is not SlotState.BLANK for slot in slots):
            raise SlotsInUse([str(slot) for slot in slots])
        self._ready = True

    def _read_slot(self, slot: int) -> _Slot:
        first = self._device.read(fmt.CHUNK, fmt.chunk_offset(slot, 0))
        head = first[: fmt.SlotHeader.size()]
        if not any(head):
            return _Slot(SlotInfo(slot, SlotState.BLANK))
        try:
            header = fmt.unpack_slot_header(head, slot, self._chunks * fmt.CHUNK)
        except ImageDamaged as error:
            return _Slot(SlotInfo(slot, SlotState.UNREADABLE, error.problem))
        except ImageTooNew as error:
            problem = f"written in format version {error.needs}"
            return _Slot(SlotInfo(slot, SlotState.UNREADABLE, problem), too_new=error)
        length = len(head) + header.plaintext_bytes + fmt.TAG_BYTES
        more = range(1, -(-length // fmt.CHUNK))
        rest = b"".join(self._device.read(fmt.CHUNK, fmt.chunk_offset(slot, chunk)) for chunk in more)
        raw = (first + rest)[:length]
        info = SlotInfo(
            slot,
            SlotState.WRITTEN,
            generation=header.generation,
            vtpm=header.vtpm,
            emulator=fmt.emulator_of(header),
            plaintext_bytes=header.plaintext_bytes,
            digest=hashlib.sha256(raw).digest(),
        )
        return _Slot(info, header, raw)
