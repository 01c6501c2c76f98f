"""swtpm's file backend: all blobs in one file or block device, behind a table of contents.

swtpm overwrites a blob in place; a power cut in the middle leaves neither the old nor the new one. Here a blob is
written where nothing lives, flushed, and then the table, which is within the first sector, is switched over to it.
swtpm reads and writes such files as its own: it moves sections together by their lengths, so no gap may lie between two
sections, and a gap left by a blob that moved is added to the section before it.

Source: swtpm's swtpm_nvstore_linear.c, swtpm_nvstore_linear_file.c; reference/swtpm-libtpms-qemu.md 3.4.
"""

import fcntl
import os
import stat
import struct
from dataclasses import dataclass, replace
from typing import Final

from storage.swtpm_errors import SwtpmDamaged, SwtpmDiskError, SwtpmForeign, SwtpmNoRoom, SwtpmTooNew
from storage.swtpm_files import DEFAULT_MODE, MAX_IMAGE, NAMES, Where, record_lock, write_all

MAGIC: Final = 0x737774706D6C696E
VERSION: Final = 1
_ENTRIES: Final = 15
_HEAD: Final = struct.Struct("<QBxH")  # magic, version, size of the table
_ENTRY: Final = struct.Struct("<III")  # offset, bytes of the blob, bytes of its section; offset 0: there is none
TABLE_BYTES: Final = _HEAD.size + _ENTRIES * _ENTRY.size
assert TABLE_BYTES == 192, "swtpm_nvstore_linear.h: struct nvram_linear_hdr is packed"


@dataclass(frozen=True, slots=True)
class Section:
    """Where a blob lies; all in bytes."""

    offset: int
    length: int
    room: int

    @property
    def end(self) -> int:
        """Offset behind the section."""
        return self.offset + self.room


Table = dict[int, Section]


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


def unpack_table(untrusted: bytes, path: str) -> Table | None:
    """Return the sections by number; None for a new file (empty, or nothing but zeros).

    Raises:
        SwtpmForeign: something else is in it. SwtpmTooNew. SwtpmDamaged: a section cannot be.

    """
    if not any(untrusted):
        return None
    if len(untrusted) < TABLE_BYTES:
        raise SwtpmForeign(path)
    magic, version, size = _HEAD.unpack_from(untrusted)
    if magic != MAGIC:
        raise SwtpmForeign(path)
    if version > VERSION:
        raise SwtpmTooNew(version)
    if size < TABLE_BYTES:
        raise SwtpmDamaged(f"the table of {path} says that it has {size} bytes, it has {TABLE_BYTES}")
    table: Table = {}
    for number in range(_ENTRIES):
        offset, length, room = _ENTRY.unpack_from(untrusted, _HEAD.size + number * _ENTRY.size)
        if offset:
            if offset < TABLE_BYTES or length > room:
                raise SwtpmDamaged(f"section {number} of {path} cannot be: {length} of {room} bytes at {offset}")
            table[number] = Section(offset, length, room)
    return table


def pack_table(table: Table) -> bytes:
    """Return the first TABLE_BYTES of a file."""
    none = Section(0, 0, 0)
    sections = (table.get(number, none) for number in range(_ENTRIES))
    entries = (_ENTRY.pack(section.offset, section.length, section.room) for section in sections)
    return _HEAD.pack(MAGIC, VERSION, TABLE_BYTES) + b"".join(entries)


def placed(table: Table, number: int, length: int) -> Table:
    """Return the table with blob `number` in `length` bytes where no blob of `table` lives, its own old one included.

    The first gap that is large enough is taken, be it the unused end of another section. No gap is left between two
    sections. What the last one has beyond its blob is for `fitted` to settle.
    """
    lives = sorted((section.offset, section.offset + section.length) for section in table.values())
    offset = TABLE_BYTES
    for begin, end in lives:
        if begin - offset >= length:
            break
        offset = max(offset, end)
    return joined(table | {number: Section(offset, length, next_power_of_2(length))})


def joined(table: Table) -> Table:
    """Return the table with each section reaching up to the next one, and the last one as long as swtpm makes it."""
    order = sorted(table, key=lambda number: table[number].offset)
    result: Table = {}
    for number, after in zip(order, [*order[1:], None], strict=True):
        section = table[number]
        room = next_power_of_2(section.length) if after is None else table[after].offset - section.offset
        result[number] = replace(section, room=room)
    return result


def fitted(table: Table, size: int) -> Table:
    """Return the table with no section reaching beyond `size`, the bytes there are: swtpm maps them and no more."""
    return {
        number: replace(section, room=min(section.room, max(section.length, size - section.offset)))
        for number, section in table.items()
    }


class SwtpmLinear:
    """The state of one TPM in one file. Made, but not formatted, where it is missing; formatted by the first store."""

    def __init__(self, where: Where) -> None:
        """Open the file of `where`. Raises SwtpmDiskError, SwtpmForeign, SwtpmTooNew, SwtpmDamaged."""
        self.where = where
        self._locked = False
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            self._file = os.open(where.path, flags, DEFAULT_MODE if where.mode is None else where.mode)
        except OSError as error:
            raise SwtpmDiskError(f"open {where.path}", error) from error
        try:
            kind = os.fstat(self._file).st_mode
            if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
                raise SwtpmForeign(where.path)
            self._is_device = stat.S_ISBLK(kind)
            if where.mode is not None and not self._is_device:
                os.fchmod(self._file, where.mode)
            self._table()
        except OSError as error:
            os.close(self._file)
            raise SwtpmDiskError(f"use {where.path}", error) from error
        except BaseException:
            os.close(self._file)
            raise

    def _table(self) -> Table:
        return unpack_table(os.pread(self._file, TABLE_BYTES, 0), self.where.path) or {}

    # locking

    def lock(self, retries: int = 0) -> None:
        """Take the lock where one is wanted. Raises SwtpmLocked, SwtpmDiskError."""
        if not self.locked:
            record_lock(self._file, self.where.path, retries)
            self._locked = True

    def unlock(self) -> None:
        """Let the lock go."""
        if self._locked:
            fcntl.lockf(self._file, fcntl.LOCK_UN)
            self._locked = False

    @property
    def locked(self) -> bool:
        """Whether the lock is ours, or none was wanted: that is what swtpm does unless told to lock."""
        return self._locked or not self.where.lock

    # blobs

    def load(self, name: str) -> bytes | None:
        """Return an image."""
        try:
            section = self._table().get(NAMES.index(name))
            if section is None:
                return None
            if section.length > MAX_IMAGE:
                raise SwtpmDamaged(f"{name} in {self.where.path} has more than {MAX_IMAGE} bytes")
            image = os.pread(self._file, section.length, section.offset)
        except OSError as error:
            raise SwtpmDiskError(f"read {self.where.path}", error) from error
        if len(image) != section.length:
            raise SwtpmDamaged(f"{self.where.path} was cut short: {name} ends behind its end")
        return image

    def store(self, name: str, image: bytes) -> None:
        """Write an image where nothing lives, flush, switch the table over to it, flush."""
        try:
            number = NAMES.index(name)
            table = placed(self._table(), number, len(image))
            size = self._make_room(table)
            write_all(self._file, image, table[number].offset)
            self._flush()
            write_all(self._file, pack_table(fitted(table, size)))
            self._flush()
        except OSError as error:
            raise SwtpmDiskError(f"store {name} in {self.where.path}", error) from error

    def delete(self, name: str) -> bool:
        """Take an image away: only the table is written."""
        try:
            table = self._table()
            if table.pop(NAMES.index(name), None) is None:
                return False
            write_all(self._file, pack_table(fitted(joined(table), self._size())))
            self._flush()
        except OSError as error:
            raise SwtpmDiskError(f"delete {name} in {self.where.path}", error) from error
        return True

    def _size(self) -> int:
        return os.lseek(self._file, 0, os.SEEK_END)

    def _make_room(self, table: Table) -> int:
        """Make the file as long as its sections; return its size. A device must have room for the blobs."""
        size = self._size()
        wanted = max(section.end for section in table.values())
        if size < wanted and not self._is_device:
            os.posix_fallocate(self._file, size, wanted - size)
            return wanted
        needed = max(section.offset + section.length for section in table.values())
        if size < needed:
            raise SwtpmNoRoom(self.where.path, needed, size)
        return size

    def _flush(self) -> None:
        if self.where.fsync:
            os.fsync(self._file)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each image there is."""
        table = self._table()
        return {name: table[number].length for number, name in enumerate(NAMES) if number in table}

    def backup(self) -> bytes | None:
        """There are no backups in a file."""
        return None

    def recover(self) -> bool:
        """There are no backups in a file."""
        return False

    def close(self) -> None:
        """Let lock and file go. May be repeated."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._locked = False
