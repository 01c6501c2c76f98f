"""The records of one open group in memory: the plaintext of its leaves and an index. Knows no device and no key.

A leaf is named by its entry number in the map. Which leaf a record is in means nothing: any free row will do.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Final
from uuid import UUID

from storage import store_format as fmt
from storage.errors import StoreDamaged
from storage.secrets import StateKey
from storage.store_records import RecordFlags, VtpmRecord

_ROW: Final = fmt.VtpmRow.size()
_ROWS: Final = fmt.ROWS_PER_LEAF
_pack: Final = fmt.VtpmRow.codec().pack
_PUT: Final = int(fmt.Operation.PUT)
_SIZES: Final = {_PUT: _ROW, int(fmt.Operation.REMOVE): 16}
_GENERATION: Final = struct.Struct(">Q")
_GENERATION_AT: Final = next(field.offset for field in fmt.VtpmRow.table() if field.name == "generation")
_EMPTY_ID: Final = bytes(16)
_EMPTY_ROW: Final = bytes(_ROW)


def pack_row(record: VtpmRecord) -> bytes:
    """Lay a record out as in a leaf."""
    return _pack(record.uuid.bytes, record.key.reveal(), record.digest, record.generation, record.flags)


def unpack_row(raw: bytes | bytearray | memoryview, group: UUID) -> VtpmRecord:
    """Undo `pack_row`."""
    uuid, key, digest, generation, flags = fmt.VtpmRow.codec().unpack(raw)
    return VtpmRecord(UUID(bytes=uuid), group, StateKey(key), digest, generation, RecordFlags(flags))


class GroupTable:
    """Rows by vTPM UUID (16 bytes). `new_leaf` is called for the entry number of each further leaf."""

    def __init__(self, new_leaf: Callable[[], int]) -> None:
        self._new_leaf = new_leaf
        self._leaves: dict[int, bytearray] = {}
        self._index: dict[bytes, int] = {}  # position = entry * rows per leaf + row
        self._free: list[int] = []
        self._used: dict[int, int] = {}  # rows in use by entry
        self.removed = False  # a record was removed, perhaps one that only an unreadable leaf holds
        self.dirty: set[int] = set()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, uuid: bytes) -> bool:
        return uuid in self._index

    def uuids(self) -> Iterator[bytes]:
        """Iterate over the UUIDs of all records."""
        return iter(self._index)

    def row(self, uuid: bytes) -> bytearray:
        """Copy out the row of a vTPM that is in the table."""
        entry, row = divmod(self._index[uuid], _ROWS)
        return self._leaves[entry][row * _ROW : (row + 1) * _ROW]

    def generation(self, uuid: bytes) -> int | None:
        """Return the generation of a vTPM, None if it is not in the table."""
        position = self._index.get(uuid)
        if position is None:
            return None
        entry, row = divmod(position, _ROWS)
        return int(_GENERATION.unpack_from(self._leaves[entry], row * _ROW + _GENERATION_AT)[0])

    # --- leaves ------------------------------------------------------------------------------------

    def load_leaf(self, entry: int, plaintext: bytes) -> None:
        """Take in a leaf as read from disk. Raises StoreDamaged for a row that is neither used nor empty.

        Leaves must come newest first: a UUID that a newer leaf has is stale. A checkpoint that was cut short
        leaves such rows, and a damaged leaf that is whole again.
        """
        leaf = self._leaves[entry] = bytearray(plaintext)
        self._used[entry] = 0
        for row in range(_ROWS):
            position = entry * _ROWS + row
            uuid = plaintext[row * _ROW : row * _ROW + 16]
            if uuid == _EMPTY_ID:
                if plaintext[row * _ROW : (row + 1) * _ROW] != _EMPTY_ROW:
                    raise StoreDamaged(f"leaf {entry}", f"row {row} has content but no UUID")
                self._free.append(position)
            elif uuid in self._index:
                leaf[row * _ROW : (row + 1) * _ROW] = _EMPTY_ROW
                self._free.append(position)
                self.dirty.add(entry)
            else:
                self._index[uuid] = position
                self._used[entry] += 1

    def leaf(self, entry: int) -> bytearray:
        """Give the plaintext of a leaf, to be sealed at once."""
        return self._leaves[entry]

    def entries(self) -> list[int]:
        """List the entry numbers of all leaves."""
        return list(self._leaves)

    def empty_leaves(self) -> list[int]:
        """List leaves without any record."""
        return [entry for entry, used in self._used.items() if not used]

    def drop(self, entries: set[int]) -> None:
        """Forget leaves, which must be empty."""
        self._free = [position for position in self._free if position // _ROWS not in entries]
        for entry in entries:
            del self._leaves[entry], self._used[entry]
        self.dirty -= entries

    def free_rows(self) -> int:
        """Count the records that fit without another leaf."""
        return len(self._free)

    # --- changes -----------------------------------------------------------------------------------

    def put(self, row: bytes | bytearray) -> None:
        """Add or replace the record of the UUID that the row begins with."""
        uuid = bytes(row[:16])
        position = self._index.get(uuid)
        if position is None:
            if not self._free:
                self._add_leaf()
            position = self._index[uuid] = self._free.pop()
            self._used[position // _ROWS] += 1
        self._write(position, row)

    def remove(self, uuid: bytes) -> None:
        """Overwrite the record; one that is not there is no error, as the log is replayed over newer leaves."""
        self.removed = True
        position = self._index.pop(uuid, None)
        if position is None:
            return
        self._used[position // _ROWS] -= 1
        self._free.append(position)
        self._write(position, _EMPTY_ROW)

    def apply(self, part: bytes | bytearray) -> None:
        """Carry out a part's plaintext. Raises StoreDamaged for one that cannot be parsed."""
        position, end = 0, len(part)
        index, leaves, dirty = self._index, self._leaves, self.dirty
        while position < end:
            operation = part[position]
            size = _SIZES.get(operation, 0)
            start, position = position + 1, position + 1 + size
            if not size or position > end:
                raise StoreDamaged("log part", f"operation {operation} at byte {start - 1} cannot be parsed")
            if operation != _PUT:
                self.remove(bytes(part[start:position]))
                continue
            place = index.get(bytes(part[start : start + 16]))
            if place is None:
                self.put(part[start:position])
                continue
            entry, row = divmod(place, _ROWS)  # most of all changes: a save of a vTPM that is there
            leaves[entry][row * _ROW : (row + 1) * _ROW] = part[start:position]
            dirty.add(entry)

    def wipe(self) -> None:
        """Overwrite all leaves with zeros and forget them."""
        for leaf in self._leaves.values():
            leaf[:] = bytes(len(leaf))
        self._leaves.clear()
        self._index.clear()

    def _add_leaf(self) -> None:
        entry = self._new_leaf()
        self._leaves[entry] = bytearray(fmt.PAYLOAD)
        self._used[entry] = 0
        self._free.extend(range(entry * _ROWS + _ROWS - 1, entry * _ROWS - 1, -1))

    def _write(self, position: int, row: bytes | bytearray) -> None:
        entry, index = divmod(position, _ROWS)
        self._leaves[entry][index * _ROW : (index + 1) * _ROW] = row
        self.dirty.add(entry)
