# ruff: noqa: RUF009 - wire() is dataclasses.field with our metadata
"""Layout of the store image: every struct and size. Pure: no device, no key, no state.

    sector 0      header, in clear, written once
    sectors 1-2   boot area, two copies, in clear: what is needed to get at the store key
    sectors 3-6   root A and root B, two sectors each
    sectors 7-    pool: the log (one contiguous run), map sectors, leaves, group records, spare

A root names the log and the map sectors; a map sector names leaves, group records and carried parts,
each by place, sequence and digest. Only roots, boot areas and log are ever overwritten while in use.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final
from uuid import UUID

from storage.layout import WireRecord, wire

FORMAT_VERSION: Final = 2  # 2: tombstones, which a reader of version 1 would take for vTPMs
SECTOR: Final = 4096
UNIT: Final = 512  # log frames begin at multiples of this; what a power cut leaves whole
SALT_BYTES: Final = 32
TAG_BYTES: Final = 16
DIGEST_BYTES: Final = 32
PAYLOAD: Final = SECTOR - SALT_BYTES - TAG_BYTES

BOOT_SECTORS: Final = (1, 2)
ROOT_SECTORS: Final = (3, 5)
ROOT_BYTES: Final = 2 * SECTOR
POOL_FIRST: Final = 7

STORE_MAGIC: Final = b"VTPMSTOR"
BOOT_MAGIC: Final = b"VTPMBOOT"
ROOT_MAGIC: Final = b"VTPMROOT"
FRAME_MAGIC: Final = b"VFRM"

MAX_VOLATILE_BYTES: Final = 96  # three digests
MAX_GROUP_BLOB: Final = 3900  # with its head it fits one sector
DEFAULT_SIZE: Final = 2 * 1024 * 1024
MIN_LOG_SECTORS: Final = 24  # a frame of 1,000 records is 93 KiB: 23 sectors
MAX_LOG_SECTORS: Final = 256
MIN_SPARE: Final = 12  # copy-on-write needs room in every checkpoint round, also when the image is full


@dataclass(frozen=True, slots=True)
class StoreHeader(WireRecord):
    """First 512 bytes of sector 0, the rest is zero. Magic, versions and checksum keep their place in all versions."""

    magic: bytes = wire("8s", "`VTPMSTOR`")
    version: int = wire("H", "format version of the writer")
    min_version: int = wire("H", "a reader below this version must refuse")
    sector_bytes: int = wire("I", "4096")
    store: UUID = wire("U", "UUID of the store")
    boot_first: int = wire("I", "first sector of the boot area: 1")
    root_first: int = wire("I", "first sector of root A: 3")
    pool_first: int = wire("I", "first sector of the pool: 7")
    reserved: int = wire("I", "zero")
    key_check: bytes = wire("16s", "tells a wrong store key from damage: HKDF(store key, store UUID, 'check')")
    filling: bytes = wire("416s", "zero")
    checksum: bytes = wire("32s", "SHA-256 of the 480 bytes before it")


@dataclass(frozen=True, slots=True)
class BootHeader(WireRecord):
    """Start of each boot copy; content follows, zero filling, and in the last 32 bytes SHA-256 of all before."""

    magic: bytes = wire("8s", "`VTPMBOOT`")
    version: int = wire("H", "format version of the writer")
    min_version: int = wire("H", "a reader below this version must refuse")
    length: int = wire("I", "bytes of content")
    sequence: int = wire("Q", "the copy with the higher one counts")
    store: UUID = wire("U", "UUID of the store")


@dataclass(frozen=True, slots=True)
class RootHeader(WireRecord):
    """Clear start of a root; salt, ciphertext of RootBody with its references, and tag fill the two sectors."""

    magic: bytes = wire("8s", "`VTPMROOT`")
    version: int = wire("H", "format version of the writer")
    min_version: int = wire("H", "a reader below this version must refuse")
    check: int = wire("I", "CRC-32 of this header with zero here, so that a newer version is told from damage")
    sequence: int = wire("Q", "the authentic root with the higher one counts")


@dataclass(frozen=True, slots=True)
class RootBody(WireRecord):
    """Plaintext of a root, followed by `map_sectors` references to map sectors and zero filling."""

    total_sectors: int = wire("I", "sectors of the image in use by the format")
    log_first: int = wire("I", "first sector of the log")
    log_sectors: int = wire("I", "sectors of the log")
    log_unit: int = wire("I", "where the first frame after this root begins, in 512-byte units of the log")
    log_previous: bytes = wire("32s", "digest that this frame must name as `previous`")
    log_head: bytes = wire("32s", "digest of the last frame when the root was written; a replay must meet it")
    checkpoints: int = wire("Q", "roots written since the store was made")
    map_sectors: int = wire("I", "references that follow")
    volatile_length: int = wire("I", "bytes in use of the next field")
    volatile: bytes = wire("96s", "what the manager notes of its anchors, opaque")
    anchored: bytes = wire("32s", "digest that the durable anchor is known to hold")
    boot: bytes = wire("32s", "SHA-256 of the boot area's content: what it says counts only if it is this")


@dataclass(frozen=True, slots=True)
class SectorRef(WireRecord):
    """A reference to one sector of the pool, in roots (to map sectors) and in map sectors."""

    location: int = wire("I", "sector number; 0: unused entry")
    owner: int = wire(
        "H", "kind (3 high bits: 0 leaf, 1 group record, 2 carried parts, 3 map, 4 lost leaf), group number (13 bits)"
    )
    sequence: int = wire("Q", "sequence of the checkpoint that wrote it, part of the associated data")
    digest: bytes = wire("18s", "first 18 bytes of the sector's SHA-256, so that it is checked without a key")


@dataclass(frozen=True, slots=True)
class VtpmRow(WireRecord):
    """One vTPM in a leaf (44 to a sector) or in a log part; an unused place is all zero."""

    vtpm: bytes = wire("16s", "UUID of the vTPM")
    key: bytes = wire("32s", "key of its state")
    digest: bytes = wire("32s", "SHA-256 of the slot of its state image")
    generation: int = wire("Q", "counter of its durable states")
    flags: int = wire("I", "record flags in the low 8 bits, attachment epoch above them")


@dataclass(frozen=True, slots=True)
class GroupHead(WireRecord):
    """Start of a group record and of a group change in a frame; the blob follows."""

    group: UUID = wire("U", "UUID of the group")
    number: int = wire("H", "number by which map entries name it")
    blob_length: int = wire("H", "bytes of the manager's blob that follows")
    flags: int = wire("I", "the manager's flags")
    key_check: bytes = wire("16s", "tells a wrong group key from damage: HKDF(group key, group UUID, 'check')")


@dataclass(frozen=True, slots=True)
class CarryHead(WireRecord):
    """Start of a sector with carried parts: log parts of a group that is closed, kept as they were sealed."""

    piece: int = wire("I", "index of this piece of the stream")
    pieces: int = wire("I", "pieces in all")
    length: int = wire("I", "bytes of the stream in this piece")


@dataclass(frozen=True, slots=True)
class CarriedPart(WireRecord):
    """Before each part in the stream of carried parts."""

    sequence: int = wire("Q", "sequence of the frame that it came in")
    length: int = wire("I", "bytes of the sealed part: salt, ciphertext, tag")


@dataclass(frozen=True, slots=True)
class FrameHeader(WireRecord):
    """Clear start of a log frame; envelope ciphertext and tag follow, then the parts, then zero filling."""

    magic: bytes = wire("4s", "`VFRM`")
    version: int = wire("H", "format version of the writer")
    reserved: int = wire("H", "zero")
    sequence: int = wire("Q", "sequence of this commit")
    envelope_bytes: int = wire("I", "ciphertext of the envelope, without its tag")
    parts_bytes: int = wire("I", "all parts together")
    previous: bytes = wire("32s", "SHA-256 of the frame before this one, or of the root")
    salt: bytes = wire("32s", "salt of the envelope's key")


@dataclass(frozen=True, slots=True)
class EnvelopeHead(WireRecord):
    """Start of a frame's envelope; group changes follow (operation byte, GroupHead, blob)."""

    anchored: bytes = wire("32s", "as in the root")
    volatile_length: int = wire("B", "bytes in use of the next field")
    volatile: bytes = wire("96s", "as in the root")
    boot: bytes = wire("32s", "as in the root")
    group_changes: int = wire("H", "number of group changes")


@dataclass(frozen=True, slots=True)
class PartHead(WireRecord):
    """Before each sealed part of a frame."""

    group: UUID = wire("U", "group whose key sealed it")
    length: int = wire("I", "bytes that follow: salt, ciphertext, tag")


@dataclass(frozen=True, slots=True)
class SealContext(WireRecord):
    """Associated data of sealed sectors; roots and frames append their clear header, frames the parts' SHA-256."""

    store: UUID = wire("U", "UUID of the store")
    place: int = wire("I", "sector number, or 512-byte unit of the log")
    sequence: int = wire("Q", "sequence of the write")


@dataclass(frozen=True, slots=True)
class PartContext(WireRecord):
    """Associated data of a sealed part."""

    store: UUID = wire("U", "UUID of the store")
    group: UUID = wire("U", "UUID of the group")
    sequence: int = wire("Q", "sequence of the frame")


class Kind(IntEnum):
    """What a reference leads to. LOST: a damaged leaf that must not come back, as records were removed since."""

    LEAF = 0
    GROUP = 1
    CARRY = 2
    MAP = 3
    LOST = 4


class Operation(IntEnum):
    """First byte of each change in a part (PUT: VtpmRow, REMOVE: UUID) and in an envelope (GroupHead and blob)."""

    PUT = 1
    REMOVE = 2


_GROUP_BITS: Final = 13
MAX_GROUPS: Final = 1 << _GROUP_BITS
ROWS_PER_LEAF: Final = PAYLOAD // VtpmRow.size()
REFS_PER_MAP: Final = PAYLOAD // SectorRef.size()
ROOT_PAYLOAD: Final = ROOT_BYTES - RootHeader.size() - SALT_BYTES - TAG_BYTES
MAX_MAPS: Final = (ROOT_PAYLOAD - RootBody.size()) // SectorRef.size()
MAX_BOOT_BYTES: Final = SECTOR - BootHeader.size() - DIGEST_BYTES
CARRY_BYTES: Final = PAYLOAD - CarryHead.size()
REF_DIGEST_BYTES: Final = 18

assert StoreHeader.size() == 512, "one device sector, so that creation is atomic"
assert BootHeader.size() == 40
assert RootHeader.size() == 24
assert RootBody.size() == 256
assert SectorRef.size() == 32
assert VtpmRow.size() == 92
assert ROWS_PER_LEAF * VtpmRow.size() == PAYLOAD, "44 records fill a sector (design section 5)"
assert REFS_PER_MAP == 126
assert MAX_MAPS * REFS_PER_MAP * ROWS_PER_LEAF >= 1_000_000, "issue 3: to 1,000,000 vTPMs"
assert GroupHead.size() + MAX_GROUP_BLOB <= PAYLOAD
assert FrameHeader.size() == 88


def owner(kind: Kind, group_number: int = 0) -> int:
    """Pack the owner field of a reference."""
    return kind << _GROUP_BITS | group_number


def kind_and_group(owner_field: int) -> tuple[Kind, int]:
    """Unpack the owner field of a reference: kind and group number. Raises ValueError for an unknown kind."""
    return Kind(owner_field >> _GROUP_BITS), owner_field & (MAX_GROUPS - 1)


def known_kind(owner_field: int) -> bool:
    """Tell whether the owner field of a reference says a kind that this version knows."""
    return owner_field >> _GROUP_BITS <= max(Kind)


def units(byte_count: int) -> int:
    """Log units that so many bytes take."""
    return -(-byte_count // UNIT)


def log_sectors(total: int) -> int:
    """Sectors of the log in an image of `total` sectors; 2 MiB keeps the least, to hold 20,000 vTPMs."""
    return max(MIN_LOG_SECTORS, min((total - DEFAULT_SIZE // SECTOR) // 16, MAX_LOG_SECTORS))
