"""One group of an open store: its record, and its vTPM records once its key is there.

While it is closed, parts of the log that concern it are kept sealed (`pending`) and, when the log is emptied,
carried in sectors of their own until the key comes.
"""

from collections.abc import Iterator, Mapping
from typing import Final
from uuid import UUID

from cryptography.exceptions import InvalidTag

from storage import store_format as fmt
from storage.errors import StorageError, StoreDamaged, WrongGroupKey
from storage.secrets import GroupKey
from storage.store_crypto import Purpose, key_check, unseal_part
from storage.store_frame import GroupPut
from storage.store_records import GroupRecord
from storage.store_table import GroupTable
from storage.store_tree import Tree


class Group:
    """Record, number and state of a group. `leaves` lists its entries while it is closed."""

    def __init__(self, record: GroupRecord, number: int, check: bytes, entry: int) -> None:
        self.record = record
        self.number: Final = number
        self.check = check
        self.entry = entry
        self.dirty = True
        self.key: GroupKey | None = None
        self.table: GroupTable | None = None
        self.leaves: list[int] = []
        self.damaged: list[int] = []
        self.carry: list[int] = []
        self.pending: dict[int, bytes] = {}

    @classmethod
    def unpack(cls, plaintext: bytes, entry: int) -> "Group":
        """Parse a group record's sector. Raises StoreDamaged."""
        head = fmt.GroupHead.unpack(plaintext)
        if head.blob_length > fmt.MAX_GROUP_BLOB:
            raise StoreDamaged(f"group record (entry {entry})", "its blob is too long")
        blob = plaintext[head.size() : head.size() + head.blob_length]
        group = cls(GroupRecord(head.group, head.flags, blob), head.number, head.key_check, entry)
        group.dirty = False
        return group

    def stored(self) -> GroupPut:
        """Build the record as it is stored."""
        record = self.record
        head = fmt.GroupHead(record.uuid, self.number, len(record.blob), record.flags, self.check)
        return GroupPut(head, record.blob)

    def pack(self) -> bytes:
        """Build the record's sector payload."""
        stored = self.stored()
        return (stored.head.pack() + stored.blob).ljust(fmt.PAYLOAD, b"\0")

    def open_empty(self, key: GroupKey, tree: Tree) -> None:
        """Open a group that was just made."""
        self.key = GroupKey(key.view)
        self.table = self._new_table(tree)

    def unlock(self, key: GroupKey, tree: Tree, store: UUID) -> GroupTable:
        """Read all leaves, then carry out what the log and the carried parts hold for this group.

        Damaged leaves are left out. Raises WrongGroupKey, StoreDamaged, DeviceError; then it stays closed.
        """
        if key_check(key, self.record.uuid) != self.check:
            raise WrongGroupKey(self.record.uuid)
        table = self._new_table(tree)
        try:
            self._fill(table, key, tree, store)
        except StorageError:
            for entry in set(table.entries()).difference(self.leaves):
                tree.drop(entry)
            table.wipe()
            raise
        self.table, self.key = table, GroupKey(key.view)
        self.pending.clear()
        return table

    def _fill(self, table: GroupTable, key: GroupKey, tree: Tree, store: UUID) -> None:
        for entry in sorted(self.leaves, key=tree.written_at, reverse=True):
            if entry not in self.damaged:
                table.load_leaf(entry, tree.read(entry, key, Purpose.LEAF))
        parts = dict(self._carried(tree)) | self.pending
        for sequence in sorted(parts):
            try:
                plaintext = unseal_part(key, store, self.record.uuid, sequence, parts[sequence])
            except InvalidTag:
                raise StoreDamaged(f"log part {sequence} of group {self.record.uuid}", "it does not open") from None
            table.apply(plaintext)

    def rekey(self, record: GroupRecord, key: GroupKey) -> None:
        """Go on under another key, in memory only: nothing that is on disk opens with it yet."""
        assert self.key is not None, "only an open group has a key to be replaced"
        self.key.wipe()
        self.key, self.check, self.record = GroupKey(key.view), key_check(key, record.uuid), record

    def renumber(self, moves: Mapping[int, int]) -> None:
        """Follow entries whose numbers have changed."""
        self.entry = moves.get(self.entry, self.entry)
        for entries in (self.leaves, self.damaged, self.carry):
            entries[:] = [moves.get(entry, entry) for entry in entries]
        if self.table is not None:
            self.table.renumber(moves)

    def close(self) -> None:
        """Overwrite keys and records in memory."""
        if self.table is not None:
            self.table.wipe()
        if self.key is not None:
            self.key.wipe()

    def _new_table(self, tree: Tree) -> GroupTable:
        return GroupTable(lambda: tree.allocate(fmt.owner(fmt.Kind.LEAF, self.number)))

    # --- carried parts -----------------------------------------------------------------------------

    def carry_pieces(self) -> list[bytes]:
        """Lay the pending parts out as payloads of sectors."""
        stream = b"".join(
            fmt.CarriedPart(sequence, len(sealed)).pack() + sealed for sequence, sealed in self.pending.items()
        )
        pieces = [stream[start : start + fmt.CARRY_BYTES] for start in range(0, len(stream), fmt.CARRY_BYTES)]
        return [
            (fmt.CarryHead(index, len(pieces), len(piece)).pack() + piece).ljust(fmt.PAYLOAD, b"\0")
            for index, piece in enumerate(pieces)
        ]

    def _carried(self, tree: Tree) -> Iterator[tuple[int, bytes]]:
        """Read all streams back; the pieces of one stream were written by the same checkpoint."""
        streams: dict[int, dict[int, bytes]] = {}
        for entry in self.carry:
            ref = tree.entries[entry]
            assert ref is not None, "carry lists allocated entries"
            plaintext = tree.read(entry, tree.key, Purpose.CARRY)
            head = fmt.CarryHead.unpack(plaintext)
            piece = plaintext[head.size() : head.size() + head.length]
            streams.setdefault(ref.sequence, {})[head.piece] = piece
        for _, pieces in sorted(streams.items()):
            stream = b"".join(pieces[index] for index in sorted(pieces))
            position = 0
            while position < len(stream):
                part = fmt.CarriedPart.unpack(stream, position)
                position += part.size()
                yield part.sequence, stream[position : position + part.length]
                position += part.length
