"""Header, boot area and roots: what an image is found by, and the A/B switches in it."""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

from cryptography.exceptions import InvalidTag

from storage import store_format as fmt
from storage.disk import Device
from storage.errors import BootAreaTooLarge, NotAStore, StoreDamaged, StoreTooNew
from storage.secrets import StoreKey
from storage.store_crypto import Purpose, key_check, seal, unseal

_CHECKED: Final = fmt.UNIT - fmt.DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class Root:
    """A root as read or to be written; `digest` is SHA-256 of its two sectors."""

    sequence: int
    body: fmt.RootBody
    maps: Sequence[fmt.SectorRef]
    slot: int
    digest: bytes = b""

    @property
    def needs_log(self) -> bool:
        """Whether it is of a checkpoint that had not ended: written in one flush with the sectors it leads to."""
        return self.body.log_previous != self.body.log_head

    def continues(self, other: "Root") -> bool:
        """Tell whether both replay the log from the same frame."""
        mine, its = self.body, other.body
        return (mine.log_first, mine.log_unit, mine.log_previous) == (its.log_first, its.log_unit, its.log_previous)


@dataclass(frozen=True, slots=True)
class BootCopy:
    """One intact boot copy; `place` is 0 or 1."""

    place: int
    sequence: int
    content: bytes


# --- header ----------------------------------------------------------------------------------------


def pack_header(store: UUID, key: StoreKey) -> bytes:
    """Build the content of sector 0: 512 bytes."""
    header = fmt.StoreHeader(
        fmt.STORE_MAGIC,
        fmt.FORMAT_VERSION,
        fmt.FORMAT_VERSION,
        fmt.SECTOR,
        store,
        fmt.BOOT_SECTORS[0],
        fmt.ROOT_SECTORS[0],
        fmt.POOL_FIRST,
        0,
        key_check(key, store),
        b"",
        b"",
    )
    checked = header.pack()[:_CHECKED]
    return checked + hashlib.sha256(checked).digest()


def read_header(device: Device) -> fmt.StoreHeader:
    """Read and check sector 0. Raises: NotAStore, StoreTooNew (only on an intact header), StoreDamaged, DeviceError."""
    raw = device.read(fmt.SECTOR, 0)
    if len(raw) < fmt.SECTOR:
        raise NotAStore(f"only {len(raw)} bytes long")
    if not any(raw):
        raise NotAStore("the header is all zero, as left by a creation that did not end")
    header = fmt.StoreHeader.unpack(raw)
    if header.magic != fmt.STORE_MAGIC:
        raise NotAStore("another magic")
    if hashlib.sha256(raw[:_CHECKED]).digest() != header.checksum:
        raise StoreDamaged("header", "the checksum is wrong")
    if header.min_version > fmt.FORMAT_VERSION:
        raise StoreTooNew("the header", header.min_version, fmt.FORMAT_VERSION)
    layout = (header.sector_bytes, header.boot_first, header.root_first, header.pool_first)
    if layout != (fmt.SECTOR, fmt.BOOT_SECTORS[0], fmt.ROOT_SECTORS[0], fmt.POOL_FIRST):
        raise StoreDamaged("header", f"layout {layout} is not of version 1")
    if any(raw[fmt.UNIT :]):
        raise StoreDamaged("header", "its filling is not zero")
    return header


# --- boot area -------------------------------------------------------------------------------------


def write_boot_copy(device: Device, store: UUID, copy: BootCopy) -> None:
    """Write one copy, not yet durable. Raises: BootAreaTooLarge, DeviceError."""
    if len(copy.content) > fmt.MAX_BOOT_BYTES:
        raise BootAreaTooLarge(len(copy.content), fmt.MAX_BOOT_BYTES)
    head = fmt.BootHeader(
        fmt.BOOT_MAGIC, fmt.FORMAT_VERSION, fmt.FORMAT_VERSION, len(copy.content), copy.sequence, store
    )
    checked = (head.pack() + copy.content).ljust(fmt.SECTOR - fmt.DIGEST_BYTES, b"\0")
    device.write(checked + hashlib.sha256(checked).digest(), fmt.BOOT_SECTORS[copy.place] * fmt.SECTOR)


def read_boot(device: Device, store: UUID, digest: bytes | None = None) -> BootCopy:
    """Read the boot copy whose content has this SHA-256; without a digest the intact one with the higher sequence.

    Raises: StoreTooNew, StoreDamaged (there is none), DeviceError.
    """
    copies = [copy for place in (0, 1) if (copy := _read_boot_copy(device, store, place)) is not None]
    if not copies:
        raise StoreDamaged("boot area", "neither copy is intact")
    if digest is not None:
        copies = [copy for copy in copies if hashlib.sha256(copy.content).digest() == digest]
        if not copies:
            raise StoreDamaged("boot area", "neither copy is the one that the store wrote last")
    return max(copies, key=lambda copy: copy.sequence)


def _read_boot_copy(device: Device, store: UUID, place: int) -> BootCopy | None:
    raw = device.read(fmt.SECTOR, fmt.BOOT_SECTORS[place] * fmt.SECTOR)
    if len(raw) < fmt.SECTOR or hashlib.sha256(raw[: -fmt.DIGEST_BYTES]).digest() != raw[-fmt.DIGEST_BYTES :]:
        return None
    head = fmt.BootHeader.unpack(raw)
    if head.magic != fmt.BOOT_MAGIC or head.store != store:
        return None
    if head.min_version > fmt.FORMAT_VERSION:
        raise StoreTooNew("the boot area", head.min_version, fmt.FORMAT_VERSION)
    if head.length > fmt.MAX_BOOT_BYTES:
        return None
    return BootCopy(place, head.sequence, raw[head.size() : head.size() + head.length])


# --- roots -----------------------------------------------------------------------------------------


def write_root(device: Device, store: UUID, key: StoreKey, root: Root) -> Root:
    """Write a root into its slot, not yet durable; return it with its digest. Raises DeviceError."""
    header = _root_header(root.sequence)
    body = root.body.pack() + b"".join(ref.pack() for ref in root.maps)
    sealed = seal(key, Purpose.ROOT, body.ljust(fmt.ROOT_PAYLOAD, b"\0"), _root_context(store, root.slot, header))
    raw = header + sealed
    device.write(raw, fmt.ROOT_SECTORS[root.slot] * fmt.SECTOR)
    return replace(root, digest=hashlib.sha256(raw).digest())


def read_roots(device: Device, store: UUID, key: StoreKey) -> list[Root]:
    """Read the authentic roots, one or two, the one with the higher sequence first.

    A missing one may never have been written, or was torn by a power cut; if it was newer and is damaged now,
    the log tells (see `Log.replay`). Raises: StoreTooNew, StoreDamaged (neither is authentic), DeviceError.
    """
    roots = [root for slot in (0, 1) if (root := _read_root_slot(device, store, key, slot)) is not None]
    if not roots:
        raise StoreDamaged("roots", "neither root A nor root B is authentic")
    return sorted(roots, key=lambda root: root.sequence, reverse=True)


def _read_root_slot(device: Device, store: UUID, key: StoreKey, slot: int) -> Root | None:
    raw = device.read(fmt.ROOT_BYTES, fmt.ROOT_SECTORS[slot] * fmt.SECTOR)
    if len(raw) < fmt.ROOT_BYTES:
        return None
    header = fmt.RootHeader.unpack(raw)
    clear = raw[: header.size()]
    if header.magic != fmt.ROOT_MAGIC or header.check != zlib.crc32(replace(header, check=0).pack()):
        return None
    if header.min_version > fmt.FORMAT_VERSION:
        raise StoreTooNew(f"root {'AB'[slot]}", header.min_version, fmt.FORMAT_VERSION)
    try:
        plaintext = unseal(key, Purpose.ROOT, raw[header.size() :], _root_context(store, slot, clear))
    except InvalidTag:
        return None
    body = fmt.RootBody.unpack(plaintext)
    if body.map_sectors > fmt.MAX_MAPS or body.volatile_length > fmt.MAX_VOLATILE_BYTES:
        raise StoreDamaged(f"root {'AB'[slot]}", "authentic but out of bounds")
    refs = [fmt.SectorRef.unpack(plaintext, body.size() + index * 32) for index in range(body.map_sectors)]
    return Root(header.sequence, body, refs, slot, hashlib.sha256(raw).digest())


def _root_header(sequence: int) -> bytes:
    header = fmt.RootHeader(fmt.ROOT_MAGIC, fmt.FORMAT_VERSION, fmt.FORMAT_VERSION, 0, sequence)
    return replace(header, check=zlib.crc32(header.pack())).pack()


def _root_context(store: UUID, slot: int, header: bytes) -> bytes:
    sequence = fmt.RootHeader.unpack(header).sequence
    return fmt.SealContext(store, fmt.ROOT_SECTORS[slot], sequence).pack() + header
