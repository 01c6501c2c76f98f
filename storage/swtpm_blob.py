"""swtpm's blob image: a 10-byte header, then tag-length-value parts. Pure: bytes in, bytes out.

Two forms: what lies in a state file (`pack_stored`), and what goes over the control channel (`pack_transfer`), which
wraps the first kind of content once more, under the migration key where there is one. Both are big-endian.

Source: swtpm's swtpm_nvstore.c and tlv.h; reference/swtpm-libtpms-qemu.md 3.5.
"""

import struct
from collections.abc import Iterator
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

from storage import swtpm_crypto as crypto
from storage.swtpm_crypto import SwtpmKey, SwtpmKey256
from storage.swtpm_errors import (
    SwtpmBadHeader,
    SwtpmBadHeaderSize,
    SwtpmDamaged,
    SwtpmKeyMissing,
    SwtpmNotEncrypted,
    SwtpmTooNew,
    SwtpmWrongKeySize,
)

_HEADER: Final = struct.Struct(">BBHHI")  # version, least version of a reader, header's size, flags, size of it all
_PART: Final = struct.Struct(">HI")  # tag, length
HEADER_BYTES: Final = _HEADER.size
assert HEADER_BYTES == 10, "swtpm_nvstore.c: blobheader is packed"
assert _PART.size == 6, "tlv.h: tlv_header is packed"
_VERSION: Final = 2
_LEAST_READER: Final = 1


class BlobFlag(IntFlag):
    """BLOB_FLAG_* of swtpm_nvstore.c."""

    ENCRYPTED = 1  # with the file key
    MIGRATION_ENCRYPTED = 2
    MIGRATION_DATA = 4
    KEY_256 = 8  # of the file key
    MIGRATION_KEY_256 = 16


class Tag(IntEnum):
    """TAG_* of tlv.h."""

    DATA = 1
    ENCRYPTED_DATA = 2
    HMAC = 3
    MIGRATION_DATA = 4
    ENCRYPTED_MIGRATION_DATA = 5
    IV = 6
    MIGRATION_IV = 7


class _Layer(NamedTuple):
    """One of the two layers of encryption: its tags, its flags, and the option that gives its key."""

    plain: Tag
    encrypted: Tag
    vector: Tag
    flag: BlobFlag
    flag_256: BlobFlag
    option: str


_FILE: Final = _Layer(Tag.DATA, Tag.ENCRYPTED_DATA, Tag.IV, BlobFlag.ENCRYPTED, BlobFlag.KEY_256, "--key")
_MIGRATION: Final = _Layer(
    Tag.MIGRATION_DATA,
    Tag.ENCRYPTED_MIGRATION_DATA,
    Tag.MIGRATION_IV,
    BlobFlag.MIGRATION_ENCRYPTED,
    BlobFlag.MIGRATION_KEY_256,
    "--migration-key",
)


class _Opened(NamedTuple):
    version: int
    flags: BlobFlag
    content: bytes


def pack_stored(blob: bytes, key: SwtpmKey | None) -> bytes:
    """Return what a state file holds: 16 bytes more than the blob without a key."""
    flags, content = _wrap(_FILE, blob, key)
    return _with_header(flags, content)


def unpack_stored(image: bytes, key: SwtpmKey | None) -> bytes:
    """Return the blob of a state file. With a key a file in clear is not taken, as swtpm does not.

    Raises:
        SwtpmStateError: one of its kinds, see storage.swtpm_errors.

    """
    opened = _open(image)
    if key is None:
        if opened.flags & BlobFlag.ENCRYPTED:
            raise SwtpmKeyMissing(_FILE.option)
        return _plain(_FILE, opened)
    return _decrypted(_FILE, opened, key)


def pack_transfer(
    blob: bytes, file_key: SwtpmKey | None, migration_key: SwtpmKey | None, *, decrypted: bool
) -> tuple[bytes, bool]:
    """Return what GET_STATEBLOB hands out, and whether the file key still wraps it: not if `decrypted` is asked for."""
    inner_flags, inner = _wrap(_FILE, blob, None if decrypted else file_key)
    outer_flags, outer = _wrap(_MIGRATION, inner, migration_key)
    flags = inner_flags | outer_flags | BlobFlag.MIGRATION_DATA
    return _with_header(flags, outer), bool(flags & BlobFlag.ENCRYPTED)


def unpack_transfer(
    image: bytes, file_key: SwtpmKey | None, migration_key: SwtpmKey | None, *, encrypted: bool
) -> bytes | None:
    """Return the blob in what SET_STATEBLOB was given, None where it holds none (that takes a blob away).

    `encrypted`: the request said that the file key wraps it; the header may say so too. A blob that no migration key
    wraps is taken although there is one, as swtpm does: so a machine can begin to use one.

    Raises:
        SwtpmStateError: one of its kinds.

    """
    if not image:
        return None
    opened = _open(image)
    if not opened.content:
        return None
    if opened.flags & BlobFlag.MIGRATION_ENCRYPTED:
        if migration_key is None:
            raise SwtpmKeyMissing(_MIGRATION.option)
        inner = _decrypted(_MIGRATION, opened, migration_key)
    else:
        inner = _plain(_MIGRATION, opened)
    opened = opened._replace(content=inner)
    if not encrypted and not opened.flags & BlobFlag.ENCRYPTED:
        return _plain(_FILE, opened)
    if file_key is None:
        raise SwtpmKeyMissing(_FILE.option)
    return _decrypted(_FILE, opened, file_key)


def is_encrypted(image: bytes) -> bool:
    """Tell whether a state file says that it is encrypted. Raises SwtpmStateError for what is none."""
    return bool(_open(image).flags & BlobFlag.ENCRYPTED)


def _with_header(flags: BlobFlag, content: bytes) -> bytes:
    return _HEADER.pack(_VERSION, _LEAST_READER, HEADER_BYTES, flags, HEADER_BYTES + len(content)) + content


def _open(image: bytes) -> _Opened:
    if len(image) < HEADER_BYTES:
        raise SwtpmBadHeader(f"{len(image)} bytes, a header alone has {HEADER_BYTES}")
    version, least, header_bytes, flags, total = _HEADER.unpack_from(image)
    if total != len(image):
        raise SwtpmBadHeader(f"it says that it has {total} bytes, there are {len(image)}")
    if least > _VERSION:
        raise SwtpmTooNew(least)
    if header_bytes != HEADER_BYTES:
        raise SwtpmBadHeaderSize(f"its header has {header_bytes} bytes, {HEADER_BYTES} are known")
    if version not in (1, _VERSION):
        raise SwtpmTooNew(version)
    return _Opened(version, BlobFlag(flags), image[HEADER_BYTES:])


def _wrap(layer: _Layer, content: bytes, key: SwtpmKey | None) -> tuple[BlobFlag, bytes]:
    if key is None:
        return BlobFlag(0), _part(layer.plain, content)
    encrypted, mac, vector = crypto.encrypt(key, content)
    flags = layer.flag | (layer.flag_256 if isinstance(key, SwtpmKey256) else BlobFlag(0))
    return flags, _part(layer.encrypted, encrypted) + _part(Tag.HMAC, mac) + _part(layer.vector, vector)


def _plain(layer: _Layer, opened: _Opened) -> bytes:
    if opened.version == 1:
        return opened.content
    found = _find(opened.content, layer.plain)
    if found is None:
        if _find(opened.content, layer.encrypted) is not None:
            raise SwtpmKeyMissing(layer.option)
        raise SwtpmDamaged("Could not find plain data in byte stream")
    return found


def _decrypted(layer: _Layer, opened: _Opened, key: SwtpmKey) -> bytes:
    if opened.version == 1:
        return crypto.decrypt_version_1(key, opened.content)
    encrypted, mac = _find(opened.content, layer.encrypted), _find(opened.content, Tag.HMAC)
    if encrypted is None and _find(opened.content, layer.plain) is not None:
        raise SwtpmNotEncrypted
    wanted = 32 if opened.flags & layer.flag_256 else 16
    if wanted != key.size:
        raise SwtpmWrongKeySize(8 * wanted)
    if encrypted is None or mac is None:
        raise SwtpmDamaged(f"Could not find HMAC or encrypted data (tag {int(layer.encrypted)}) in byte stream")
    return crypto.decrypt(key, encrypted, mac, _find(opened.content, layer.vector))


def _part(tag: Tag, content: bytes) -> bytes:
    return _PART.pack(tag, len(content)) + content


def _find(content: bytes, tag: Tag) -> bytes | None:
    return next((part for found, part in _parts(content) if found == tag), None)


def _parts(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the parts as far as they are whole: what comes after a cut is not looked for, like in swtpm."""
    offset = 0
    while len(content) - offset >= _PART.size:
        tag, length = _PART.unpack_from(content, offset)
        offset += _PART.size
        if length > len(content) - offset:
            return
        yield tag, content[offset : offset + length]
        offset += length
