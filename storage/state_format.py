# ruff: noqa: RUF009 - wire() is dataclasses.field with our metadata
"""Layout of a state image: header, slot header, blob records, where chunks lie. Pure: no device, no key.

    0       header, 4096 bytes: one 512-byte sector of content, the rest zero
    4096    slot 0 chunk 0, slot 1 chunk 0, slot 0 chunk 1, ...   (CHUNK bytes each)

Both slots grow by appending chunks, so nothing ever moves.
"""

import hashlib
from collections.abc import ItemsView, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Final
from uuid import UUID

from storage.errors import BlobsRefused, ImageDamaged, ImageTooNew, NotAnImage
from storage.layout import WireRecord, wire

FORMAT_VERSION: Final = 1
HEADER_BYTES: Final = 4096
SECTOR_BYTES: Final = 512  # what a power cut leaves whole
CHUNK: Final = 16 * 1024
MAX_SLOT_BYTES: Final = 512 * 1024  # a TPM 2.0 state can reach 173 KiB (design section 6)
MAX_CHUNKS: Final = MAX_SLOT_BYTES // CHUNK
TAG_BYTES: Final = 16
DIGEST_BYTES: Final = 32
MAX_GENERATION: Final = 2**64 - 1

IMAGE_MAGIC: Final = b"VTPMSIMG"
SLOT_MAGIC: Final = b"VTPMSLOT"


class Family(Enum):
    """TPM family; the value is the wire value."""

    TPM12 = 0x0102
    TPM20 = 0x0200

    def __str__(self) -> str:
        return "1.2" if self is Family.TPM12 else "2.0"


@dataclass(frozen=True, slots=True)
class ImageHeader(WireRecord):
    """First sector of a state image. The place of magic, versions and checksum is the same in all versions."""

    magic: bytes = wire("8s", "`VTPMSIMG`")
    version: int = wire("H", "format version of the writer")
    min_version: int = wire("H", "a reader below this version must refuse")
    header_bytes: int = wire("I", "size of this header with its zero filling: 4096")
    vtpm: UUID = wire("U", "UUID of the vTPM")
    store: UUID = wire("U", "UUID of the store whose manager made the image")
    family: int = wire("H", "TPM family: 0x0102 or 0x0200")
    reserved: int = wire("H", "zero")
    chunk_bytes: int = wire("I", "size of a chunk: 16384")
    filling: bytes = wire("424s", "zero")
    checksum: bytes = wire("32s", "SHA-256 of the 480 bytes before it")


@dataclass(frozen=True, slots=True)
class SlotHeader(WireRecord):
    """Start of a slot, in clear; it is the associated data of the ciphertext that follows at once."""

    magic: bytes = wire("8s", "`VTPMSLOT`")
    version: int = wire("H", "format version of the writer")
    min_version: int = wire("H", "a reader below this version must refuse")
    family: int = wire("H", "TPM family: 0x0102 or 0x0200")
    reserved: int = wire("H", "zero")
    vtpm: UUID = wire("U", "UUID of the vTPM")
    generation: int = wire("Q", "counter of durable states of this vTPM")
    emulator: bytes = wire("16s", "emulator that made the state, ASCII, zero-filled")
    emulator_version: bytes = wire("16s", "its version, ASCII, zero-filled")
    plaintext_bytes: int = wire("I", "length of the plaintext; ciphertext has the same, then a 16-byte tag")
    filling: bytes = wire("20s", "zero")


@dataclass(frozen=True, slots=True)
class BlobHeader(WireRecord):
    """Before each blob in the plaintext, which starts with the number of blobs (1 byte)."""

    kind: int = wire("B", "1 permall, 2 savestate, 3 volatilestate, 4 resumption; each at most once, ascending")
    length: int = wire("I", "bytes that follow")


assert ImageHeader.size() == SECTOR_BYTES, "the header's content fits one sector, so that creation is atomic"
assert SlotHeader.size() == 96
assert BlobHeader.size() == 5

# every save waits for these: making the dataclass first takes longer
_pack_slot_header: Final = SlotHeader.codec().pack
_pack_blob_header: Final = BlobHeader.codec().pack
_CHECKED_BYTES: Final = SECTOR_BYTES - DIGEST_BYTES
# names: libtpms tpm_nvfilename.h; `resumption` is ours, of a hibernated vTPM (vtpm_instance.slumber)
_KINDS: Final = {"permall": 1, "savestate": 2, "volatilestate": 3, "resumption": 4}
_NAMES: Final = {kind: name for name, kind in _KINDS.items()}
_BLOB_OVERHEAD: Final = 1 + len(_KINDS) * BlobHeader.size()
SLOT_OVERHEAD: Final = SlotHeader.size() + TAG_BYTES + _BLOB_OVERHEAD
MAX_BLOB_BYTES: Final = MAX_SLOT_BYTES - SLOT_OVERHEAD


@dataclass(frozen=True, slots=True)
class Emulator:
    """Name and version of the TPM implementation that made a state; ASCII, at most 16 bytes each."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


UNKNOWN_EMULATOR: Final = Emulator("unknown", "")


class Blobs(Mapping[str, bytes]):
    """State blobs of a vTPM by libtpms' names; prints sizes only. `permall` is always there."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, bytes]) -> None:
        """Copy the blobs. Raises BlobsRefused for an unknown name or a missing `permall`."""
        for name in items:
            if name not in _KINDS:
                raise BlobsRefused(f"no blob is called {name!r}")
        if "permall" not in items:
            raise BlobsRefused("without permall it is not a TPM's state")
        self._items = {name: bytes(items[name]) for name in _KINDS if name in items}

    def __getitem__(self, name: str) -> bytes:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def items(self) -> ItemsView[str, bytes]:
        """Give names and blobs in ascending kind."""
        return self._items.items()

    def __repr__(self) -> str:
        return f"<Blobs {', '.join(f'{name} {len(data)} bytes' for name, data in self._items.items())}>"

    @property
    def size(self) -> int:
        """Bytes in all blobs together, the measure of `StateImage.room`."""
        return sum(map(len, self._items.values()))


def pack_blobs(blobs: Blobs) -> bytes:
    """Plaintext of a slot: count, then header and content of each blob in ascending kind."""
    parts = [len(blobs).to_bytes(1, "big")]
    for name, data in blobs.items():
        parts += [_pack_blob_header(_KINDS[name], len(data)), data]
    return b"".join(parts)


def unpack_blobs(plaintext: bytes) -> Blobs:
    """Parse a slot's plaintext. Raises BlobsRefused unless it is exactly what `pack_blobs` writes."""
    if not plaintext:
        raise BlobsRefused("the plaintext is empty")
    position, last, found = 1, 0, dict[str, bytes]()
    for _ in range(plaintext[0]):
        if len(plaintext) - position < BlobHeader.size():
            raise BlobsRefused("the plaintext ends inside a blob's header")
        head = BlobHeader.unpack(plaintext, position)
        position += BlobHeader.size()
        if head.kind not in _NAMES or head.kind <= last:
            raise BlobsRefused(f"blob kind {head.kind} after {last}")
        if head.length > len(plaintext) - position:
            raise BlobsRefused(f"blob {_NAMES[head.kind]} is longer than the plaintext")
        found[_NAMES[head.kind]] = plaintext[position : position + head.length]
        position, last = position + head.length, head.kind
    if position != len(plaintext):
        raise BlobsRefused("bytes after the last blob")
    return Blobs(found)


def chunk_offset(slot: int, chunk: int) -> int:
    """Byte offset of a slot's chunk in the image."""
    return HEADER_BYTES + (2 * chunk + slot) * CHUNK


def image_bytes(chunks: int) -> int:
    """Size of an image whose slots have `chunks` chunks each."""
    return chunk_offset(0, chunks)


def chunks_for(blob_bytes: int) -> int:
    """How many chunks a slot needs for blobs of this size together."""
    return -(-(blob_bytes + SLOT_OVERHEAD) // CHUNK)


def pack_image_header(vtpm: UUID, store: UUID, family: Family) -> bytes:
    """Build the 512 bytes of content of a version 1 header."""
    header = ImageHeader(
        IMAGE_MAGIC, FORMAT_VERSION, FORMAT_VERSION, HEADER_BYTES, vtpm, store, family.value, 0, CHUNK, b"", b""
    )
    checked = header.pack()[:_CHECKED_BYTES]
    return checked + hashlib.sha256(checked).digest()


def unpack_image_header(raw: bytes) -> tuple[ImageHeader, Family]:
    """Check and parse the first 4096 bytes.

    Raises: NotAnImage, ImageTooNew (only on an intact header), ImageDamaged.
    """
    if len(raw) < HEADER_BYTES:
        raise NotAnImage(f"only {len(raw)} bytes long")
    if not any(raw):
        raise NotAnImage("the header is all zero, as left by a creation that did not end")
    header = ImageHeader.unpack(raw)
    if header.magic != IMAGE_MAGIC:
        raise NotAnImage("another magic")
    if hashlib.sha256(raw[:_CHECKED_BYTES]).digest() != header.checksum:
        raise ImageDamaged("header", "the checksum is wrong")
    if header.min_version > FORMAT_VERSION:
        raise ImageTooNew("this state image", header.min_version, FORMAT_VERSION)
    if header.header_bytes != HEADER_BYTES or header.chunk_bytes != CHUNK:
        raise ImageDamaged("header", f"sizes {header.header_bytes}, {header.chunk_bytes} are not of version 1")
    if any(raw[SECTOR_BYTES:HEADER_BYTES]):
        raise ImageDamaged("header", "its filling is not zero")
    return header, parse_family(header.family, "header")


def parse_family(value: int, where: str) -> Family:
    """Family of a wire value. Raises ImageDamaged for any other value."""
    try:
        return Family(value)
    except ValueError:
        raise ImageDamaged(where, f"TPM family {value:#06x}") from None


def pack_slot_header(vtpm: UUID, family: Family, generation: int, emulator: Emulator, plaintext_bytes: int) -> bytes:
    """Build a slot's header, the associated data of its ciphertext.

    Raises BlobsRefused for an emulator text that does not fit.
    """
    name, version = _emulator_fields(emulator)
    return _pack_slot_header(
        SLOT_MAGIC,
        FORMAT_VERSION,
        FORMAT_VERSION,
        family.value,
        0,
        vtpm.bytes,
        generation,
        name,
        version,
        plaintext_bytes,
        b"",
    )


@lru_cache(maxsize=4)
def _emulator_fields(emulator: Emulator) -> tuple[bytes, bytes]:
    return _text16(emulator.name), _text16(emulator.version)


def _text16(text: str) -> bytes:
    raw = text.encode("ascii", "replace")
    if len(raw) > 16 or raw != text.encode() or b"\0" in raw:
        raise BlobsRefused(f"{text!r} does not fit a field of 16 ASCII bytes")
    return raw


def unpack_slot_header(raw: bytes, slot: int, room: int) -> SlotHeader:
    """Parse as far as is needed to find the slot's end; `room` is the slot's size in bytes.

    Everything else in the header counts only after the slot's digest was found right.
    Raises: ImageTooNew, ImageDamaged.
    """
    where = f"slot {slot}"
    header = SlotHeader.unpack(raw)
    if header.magic != SLOT_MAGIC:
        raise ImageDamaged(where, "another magic")
    if header.min_version > FORMAT_VERSION:
        raise ImageTooNew(where, header.min_version, FORMAT_VERSION)
    if header.plaintext_bytes > room - SlotHeader.size() - TAG_BYTES:
        raise ImageDamaged(where, f"{header.plaintext_bytes} bytes of state do not fit the {room} bytes there are")
    return header


def emulator_of(header: SlotHeader) -> Emulator:
    """Emulator fields as text; bytes that are not ASCII are shown as escapes."""
    texts = (
        raw.rstrip(b"\0").decode("ascii", "backslashreplace") for raw in (header.emulator, header.emulator_version)
    )
    return Emulator(*texts)
