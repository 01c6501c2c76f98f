"""One commit as a log frame: building and opening. Pure; `store_log` knows where frames lie.

The envelope (anchors, group changes) is sealed under the store key and covers the parts by their SHA-256;
each part (vTPM changes of one group) is sealed under that group's key.
"""

import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storage import store_format as fmt
from storage.errors import StoreDamaged, StoreTooNew
from storage.secrets import StoreKey
from storage.store_crypto import Purpose, derive, sector_context

_NONCE: Final = bytes(12)
_GROUP_HEAD: Final = fmt.GroupHead.size()
_EMPTY_FRAME: Final = fmt.FrameHeader.size() + fmt.EnvelopeHead.size() + fmt.TAG_BYTES
_PART_EXTRA: Final = fmt.PartHead.size() + fmt.SALT_BYTES + fmt.TAG_BYTES
_pack_header: Final = (
    fmt.FrameHeader.codec().pack
)  # every save waits for these: making the dataclass first takes longer
_pack_envelope_head: Final = fmt.EnvelopeHead.codec().pack
_pack_part_head: Final = fmt.PartHead.codec().pack


@dataclass(frozen=True, slots=True)
class Carried:
    """What every frame and root carries: notes on the hardware anchors (design section 7), SHA-256 of the boot area."""

    anchored: bytes = bytes(32)
    volatile: bytes = b""
    boot: bytes = bytes(32)


@dataclass(frozen=True, slots=True)
class GroupPut:
    """A group record as it is stored: head and blob."""

    head: fmt.GroupHead
    blob: bytes


@dataclass(frozen=True, slots=True)
class GroupDrop:
    """Removal of a group."""

    group: UUID


GroupChange = GroupPut | GroupDrop


class Frame(NamedTuple):
    """A commit: sequence, the frame before it, anchors, group changes, sealed parts in order of their groups.

    A tuple, as every save waits for it: a dataclass that is frozen takes three times as long to make.
    """

    sequence: int
    previous: bytes
    carried: Carried
    groups: Sequence[GroupChange]
    parts: Sequence[tuple[UUID, bytes]]


def frame_bytes(groups: Sequence[GroupChange], part_sizes: Sequence[int]) -> int:
    """Size of a frame with these group changes and parts of these plaintext sizes."""
    size = _EMPTY_FRAME + sum(part_sizes) + len(part_sizes) * _PART_EXTRA
    for change in groups:
        size += 1 + (_GROUP_HEAD + len(change.blob) if isinstance(change, GroupPut) else len(change.group.bytes))
    return size


def pack_frame(frame: Frame, key: StoreKey, store: UUID, unit: int) -> bytes:
    """Seal a frame for its place in the log, without the filling up to the next unit."""
    parts = b"".join([_pack_part_head(group.bytes, len(sealed)) + sealed for group, sealed in frame.parts])
    envelope = _pack_envelope(frame.carried, frame.groups)
    salt = os.urandom(fmt.SALT_BYTES)
    header = _pack_header(
        fmt.FRAME_MAGIC, fmt.FORMAT_VERSION, 0, frame.sequence, len(envelope), len(parts), frame.previous, salt
    )
    cipher = AESGCM(derive(key, salt, Purpose.FRAME))
    return header + cipher.encrypt(_NONCE, envelope, _context(header, parts, store, unit, frame.sequence)) + parts


def unpack_frame(raw: bytes, start: int, key: StoreKey, store: UUID) -> tuple[Frame, int, bytes] | None:
    """Open the frame at byte `start` of the log: frame, its length in bytes, its digest.

    None if no whole frame of ours begins there: what was never written, is of an earlier lap and overwritten
    in part, or was torn. Raises StoreTooNew; StoreDamaged for authentic content that cannot be parsed.
    """
    if len(raw) - start < fmt.FrameHeader.size():
        return None
    header = fmt.FrameHeader.unpack(raw, start)
    room = len(raw) - start - fmt.FrameHeader.size() - fmt.TAG_BYTES
    if header.magic != fmt.FRAME_MAGIC or header.envelope_bytes > room:
        return None
    if header.parts_bytes > room - header.envelope_bytes:
        return None
    clear_end = start + fmt.FrameHeader.size()
    sealed_end = clear_end + header.envelope_bytes + fmt.TAG_BYTES
    end = sealed_end + header.parts_bytes
    parts = raw[sealed_end:end]
    context = _context(raw[start:clear_end], parts, store, start // fmt.UNIT, header.sequence)
    try:
        envelope = AESGCM(derive(key, header.salt, Purpose.FRAME)).decrypt(_NONCE, raw[clear_end:sealed_end], context)
    except InvalidTag:
        return None
    if header.version > fmt.FORMAT_VERSION:
        raise StoreTooNew("a log frame", header.version, fmt.FORMAT_VERSION)
    try:
        carried, groups = _unpack_envelope(envelope)
        frame = Frame(header.sequence, header.previous, carried, groups, _unpack_parts(parts))
    except (IndexError, struct.error, ValueError) as error:
        raise StoreDamaged("log frame", f"authentic but not to be parsed: {error}") from error
    return frame, end - start, hashlib.sha256(raw[start:end]).digest()


def _context(header: bytes, parts: bytes, store: UUID, unit: int, sequence: int) -> bytes:
    return sector_context(store, unit, sequence) + header + hashlib.sha256(parts).digest()


def _pack_envelope(carried: Carried, groups: Sequence[GroupChange]) -> bytes:
    head = _pack_envelope_head(carried.anchored, len(carried.volatile), carried.volatile, carried.boot, len(groups))
    if not groups:
        return head
    items = [head]
    for change in groups:
        if isinstance(change, GroupPut):
            items += [bytes([fmt.Operation.PUT]), change.head.pack(), change.blob]
        else:
            items += [bytes([fmt.Operation.REMOVE]), change.group.bytes]
    return b"".join(items)


def _unpack_envelope(envelope: bytes) -> tuple[Carried, list[GroupChange]]:
    head = fmt.EnvelopeHead.unpack(envelope)
    changes: list[GroupChange] = []
    position = head.size()
    for _ in range(head.group_changes):
        operation, position = envelope[position], position + 1
        if operation == fmt.Operation.PUT:
            group = fmt.GroupHead.unpack(envelope, position)
            position += group.size()
            changes.append(GroupPut(group, envelope[position : position + group.blob_length]))
            position += group.blob_length
        elif operation == fmt.Operation.REMOVE:
            changes.append(GroupDrop(UUID(bytes=envelope[position : position + 16])))
            position += 16
        else:
            raise StoreDamaged("log frame", f"group operation {operation}")
    if position != len(envelope):
        raise StoreDamaged("log frame", "its envelope has another length than its content")
    return Carried(head.anchored, head.volatile[: head.volatile_length], head.boot), changes


def _unpack_parts(parts: bytes) -> list[tuple[UUID, bytes]]:
    found: list[tuple[UUID, bytes]] = []
    position = 0
    while position < len(parts):
        head = fmt.PartHead.unpack(parts, position)
        position += head.size()
        found.append((head.group, parts[position : position + head.length]))
        position += head.length
    if position != len(parts):
        raise StoreDamaged("log frame", "its parts have another length than they say")
    return found
