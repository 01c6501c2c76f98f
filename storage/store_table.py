"""The records of one open group in memory: the plaintext of its leaves and an index. Knows no device and no key.

A leaf is named by its entry number in the map. Which leaf a record is in means nothing: any free row will do.
"""

import struct
from collections.abc import Callable, KeysView, Mapping
from typing import Final
from uuid import UUID

from storage import store_format as fmt
from storage.errors import StoreDamaged
from storage.secrets import StateKey
from storage.store_records import RecordFlags, Tombstone, VtpmRecord

_ROW: Final = fmt.VtpmRow.size()
_ROWS: Final = fmt.ROWS_PER_LEAF
_codec: Final = fmt.VtpmRow.codec()
_pack_put: Final = struct.Struct(f">B{fmt.VtpmRow.codec().format[1:]}").pack  # operation and row
_PUT: Final = int(fmt.Operation.PUT)
_SIZES: Final = {_PUT: _ROW, int(fmt.Operation.REMOVE): 16}
_GENERATION: Final = struct.Struct(">Q")
_REMOVED: Final = struct.Struct(">Q24x")  # the digest of a tombstone
_removed_at: Final = _REMOVED.unpack_from
_NO_KEY: Final = bytes(StateKey.size)
_LAST_FLAGS: Final = _ROW - 1  # the byte of the flags that tells a tombstone
_EPOCH_SHIFT: Final = 8  # the epoch is in the upper bits of the flags' word
_FLAGS: Final = 0xFF
_TOMBSTONE: Final = int(RecordFlags.TOMBSTONE)
_ONLY_TOMBSTONE: Final = bytes(byte & _TOMBSTONE for byte in range(256))  # for bytes.translate
_KEPT_FLAGS: Final = int(RecordFlags.TPM12)  # of a vTPM, in its tombstone
_REMOVED_AT: Final = next(field.offset for field in fmt.VtpmRow.table() if field.name == "digest")
_GENERATION_AT: Final = next(field.offset for field in fmt.VtpmRow.table() if field.name == "generation")
_EMPTY_ID: Final = bytes(16)
_EMPTY_ROW: Final = bytes(_ROW)
_PUT_CHANGE: Final = struct.Struct(f">B16s{_ROW - 16}s")  # operation, UUID, rest of the row


def pack_put(record: VtpmRecord, uuid: bytes) -> bytes:
    """Lay out the change that puts a record: operation, and the row as in a leaf. `uuid` is the record's."""
    word = record.epoch << _EPOCH_SHIFT | int(record.flags)  # an IntFlag keeps every value it ever had
    return _pack_put(_PUT, uuid, record.key.reveal(), record.digest, record.generation, word)


def unpack_row(raw: bytes | bytearray | memoryview, group: UUID, known: UUID | None = None) -> VtpmRecord:
    """Parse a row; `known` is its UUID, where somebody has that already: to make one takes a while."""
    uuid, key, digest, generation, word = _codec.unpack(raw)
    flags, epoch = RecordFlags(word & _FLAGS), word >> _EPOCH_SHIFT
    return VtpmRecord(known or UUID(bytes=uuid), group, StateKey(key), digest, generation, flags, epoch)


def pack_tombstone(row: bytes | bytearray, removed: int) -> bytes:
    """Make the row of a tombstone out of the row of the vTPM that was removed; `removed`: seconds since 1970."""
    uuid, _, _, generation, flags = _codec.unpack(row)
    return _codec.pack(uuid, _NO_KEY, _REMOVED.pack(removed), generation, flags & _KEPT_FLAGS | _TOMBSTONE)


def unpack_tombstone(raw: bytes | bytearray, group: UUID) -> Tombstone:
    """Undo `pack_tombstone`."""
    uuid, _, digest, generation, flags = _codec.unpack(raw)
    return Tombstone(UUID(bytes=uuid), group, _REMOVED.unpack(digest)[0], generation, RecordFlags(flags))


def _moved(position: int, moves: Mapping[int, int]) -> int:
    entry, row = divmod(position, _ROWS)
    return moves.get(entry, entry) * _ROWS + row


class GroupTable:
    """Rows by vTPM UUID (16 bytes). `new_leaf` is called for the entry number of each further leaf."""

    def __init__(self, new_leaf: Callable[[], int]) -> None:
        self._new_leaf = new_leaf
        self._leaves: dict[int, bytearray] = {}
        self._index: dict[bytes, int] = {}  # position = entry * rows per leaf + row
        self._free: list[int] = []
        self._used: dict[int, int] = {}  # rows in use by entry
        self._emptied: set[int] = set()  # leaves without a record, and some that have one again
        self.tombstones: set[bytes] = set()  # those of the UUIDs in the index that are of removed vTPMs
        self.removed = False  # a record was removed, perhaps one that only an unreadable leaf holds
        self.dirty: set[int] = set()

    def __len__(self) -> int:
        """Count the vTPMs, without tombstones."""
        return len(self._index) - len(self.tombstones)

    def __contains__(self, uuid: bytes) -> bool:
        """Tell whether there is a record of this UUID, a tombstone included."""
        return uuid in self._index

    def in_both(self, other: "GroupTable") -> list[bytes]:
        """List the UUIDs of records, tombstones included, that another table has, too."""
        mine, its = self.uuids(), other.uuids()
        return [] if mine.isdisjoint(its) else sorted(mine & its)

    def uuids(self) -> KeysView[bytes]:
        """Give the UUIDs of all records, tombstones included."""
        return self._index.keys()

    def row(self, uuid: bytes) -> bytearray:
        """Copy out the row of a vTPM that is in the table."""
        entry, row = divmod(self._index[uuid], _ROWS)
        return self._leaves[entry][row * _ROW : (row + 1) * _ROW]

    def live_generation(self, uuid: bytes) -> int | None:
        """Return the generation of a vTPM, None if there is none or only its tombstone."""
        position = self._index.get(uuid)
        if position is None or uuid in self.tombstones:
            return None
        entry, row = divmod(position, _ROWS)
        return _GENERATION.unpack_from(self._leaves[entry], row * _ROW + _GENERATION_AT)[0]  # type: ignore[no-any-return]

    def generation(self, uuid: bytes) -> int | None:
        """Return the generation of a vTPM, None if it is not in the table."""
        position = self._index.get(uuid)
        if position is None:
            return None
        entry, row = divmod(position, _ROWS)
        return int(_GENERATION.unpack_from(self._leaves[entry], row * _ROW + _GENERATION_AT)[0])

    def removals(self) -> list[tuple[bytes, int]]:
        """List UUID and time of all tombstones, in a quarter of the time that `unpack_tombstone` of each takes."""
        index, leaves = self._index, self._leaves
        places = [(uuid, *divmod(index[uuid], _ROWS)) for uuid in self.tombstones]
        return [(uuid, _removed_at(leaves[entry], row * _ROW + _REMOVED_AT)[0]) for uuid, entry, row in places]

    # --- leaves ------------------------------------------------------------------------------------

    def load_leaf(self, entry: int, plaintext: bytes) -> None:
        """Take in a leaf as read from disk. Raises StoreDamaged for a row that is neither used nor empty.

        Leaves must come newest first: a UUID that a newer leaf has is stale. A checkpoint that was cut short
        leaves such rows, and a damaged leaf that is whole again.
        """
        leaf = self._leaves[entry] = bytearray(plaintext)
        uuids = [plaintext[at : at + 16] for at in range(0, fmt.PAYLOAD, _ROW)]
        if (
            len(set(uuids)) == _ROWS
            and _EMPTY_ID not in uuids
            and self._index.keys().isdisjoint(uuids)
            and not any(plaintext[_LAST_FLAGS::_ROW].translate(_ONLY_TOMBSTONE))
        ):  # most leaves, and most of the time that a large store takes to open
            self._index.update(zip(uuids, range(entry * _ROWS, (entry + 1) * _ROWS), strict=True))
            self._used[entry] = _ROWS
            return
        self._used[entry] = 0
        self._emptied.add(entry)
        for row, uuid in enumerate(uuids):
            position = entry * _ROWS + row
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
                if plaintext[row * _ROW + _LAST_FLAGS] & _TOMBSTONE:
                    self.tombstones.add(uuid)

    def leaf(self, entry: int) -> bytearray:
        """Give the plaintext of a leaf, to be sealed at once."""
        return self._leaves[entry]

    def entries(self) -> list[int]:
        """List the entry numbers of all leaves."""
        return list(self._leaves)

    def empty_leaves(self) -> list[int]:
        """List leaves without any record."""
        self._emptied = {entry for entry in self._emptied if self._used.get(entry) == 0}
        return list(self._emptied)

    def drop(self, entries: set[int]) -> None:
        """Forget leaves, which must be empty."""
        if not entries:
            return
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
        if row[_LAST_FLAGS] & _TOMBSTONE:
            self.tombstones.add(uuid)
            self.removed = True
        else:
            self.tombstones.discard(uuid)

    def remove(self, uuid: bytes) -> None:
        """Overwrite the record; one that is not there is no error, as the log is replayed over newer leaves."""
        self.removed = True
        self.tombstones.discard(uuid)
        position = self._index.pop(uuid, None)
        if position is None:
            return
        entry = position // _ROWS
        self._used[entry] -= 1
        if not self._used[entry]:
            self._emptied.add(entry)
        self._free.append(position)
        self._write(position, _EMPTY_ROW)

    def apply(self, part: bytes | bytearray) -> None:
        """Carry out a part's plaintext. Raises StoreDamaged for one that cannot be parsed."""
        position, end = 0, len(part)
        index, leaves, dirty, tombstones = self._index, self._leaves, self.dirty, self.tombstones
        while position < end:
            if end - position >= _PUT_CHANGE.size:  # most of all changes: a save of a vTPM that is there
                operation, uuid, rest = _PUT_CHANGE.unpack_from(part, position)
                place = index.get(uuid)
                if operation == _PUT and place is not None and not rest[-1] & _TOMBSTONE and uuid not in tombstones:
                    entry, row = divmod(place, _ROWS)
                    leaves[entry][row * _ROW + 16 : (row + 1) * _ROW] = rest
                    dirty.add(entry)
                    position += _PUT_CHANGE.size
                    continue
            operation = part[position]
            size = _SIZES.get(operation, 0)
            start, position = position + 1, position + 1 + size
            if not size or position > end:
                raise StoreDamaged("log part", f"operation {operation} at byte {start - 1} cannot be parsed")
            if operation == _PUT:
                self.put(part[start:position])
            else:
                self.remove(bytes(part[start:position]))

    # --- compaction --------------------------------------------------------------------------------

    def gather(self) -> int:
        """Move the records into as few leaves as hold them, the fullest; return how many leaves became empty.

        A leaf is emptied whole or not at all, and gives out no place any more: so the next checkpoint drops it in
        its last round, when those that its records went to are written, and never writes it without them.
        """
        kept = -(-len(self._index) // _ROWS)
        fullest = sorted(self._used, key=self._used.__getitem__, reverse=True)
        emptied = {entry for entry in fullest[kept:] if self._used[entry]}
        room = set(fullest[:kept])
        self._free = [position for position in self._free if position // _ROWS in room]
        for uuid, position in self._index.items() if emptied else ():
            if position // _ROWS in emptied:
                entry, row = divmod(position, _ROWS)
                content = self._leaves[entry][row * _ROW : (row + 1) * _ROW]
                place = self._index[uuid] = self._free.pop()
                self._used[place // _ROWS] += 1
                self._write(place, content)
        for entry in emptied:
            self._leaves[entry][:] = bytes(fmt.PAYLOAD)
            self._used[entry] = 0
        self._emptied |= emptied
        self.dirty -= emptied
        return len(emptied)

    def renumber(self, moves: Mapping[int, int]) -> None:
        """Follow leaves whose entry numbers have changed."""
        mine = [entry for entry in self._leaves if entry in moves]
        for old, leaf, used in [(entry, self._leaves.pop(entry), self._used.pop(entry)) for entry in mine]:
            self._leaves[moves[old]], self._used[moves[old]] = leaf, used
        self.dirty = {moves.get(entry, entry) for entry in self.dirty}
        self._emptied = {moves.get(entry, entry) for entry in self._emptied}
        self._free = [_moved(position, moves) for position in self._free]
        self._index = {uuid: _moved(position, moves) for uuid, position in self._index.items()}

    def wipe(self) -> None:
        """Overwrite all leaves with zeros and forget them."""
        for leaf in self._leaves.values():
            leaf[:] = bytes(len(leaf))
        self._leaves.clear()
        self._index.clear()
        self.tombstones.clear()

    def _add_leaf(self) -> None:
        entry = self._new_leaf()
        self._leaves[entry] = bytearray(fmt.PAYLOAD)
        self._used[entry] = 0
        self._free.extend(range(entry * _ROWS + _ROWS - 1, entry * _ROWS - 1, -1))

    def _write(self, position: int, row: bytes | bytearray) -> None:
        entry, index = divmod(position, _ROWS)
        self._leaves[entry][index * _ROW : (index + 1) * _ROW] = row
        self.dirty.add(entry)
