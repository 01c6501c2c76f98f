"""What may be asked of an open store; nothing here changes it."""

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final
from uuid import UUID

from storage import store_format as fmt
from storage.errors import DeviceError, GroupClosed, NoSuchGroup, StoreClosed, StoreFailed, VtpmRemoved
from storage.secrets import GroupKey
from storage.store_commit import max_commit_bytes
from storage.store_head import BootCopy
from storage.store_plan import find_group, missing_vtpm
from storage.store_records import Damage, GroupRecord, Statistics, Tombstone, VtpmRecord
from storage.store_state import State
from storage.store_table import GroupTable, unpack_row, unpack_tombstone


class StoreReading:
    """The reading half of `storage.store.Store`. Every method raises StoreFailed after a failed write or flush."""

    def __init__(self, state: State, boot: BootCopy) -> None:
        self._state = state
        self._boot = boot
        self._failed = ""
        self._closed = False
        self._applying = threading.RLock()  # held while the state in memory is between two commits
        self.uuid: Final = state.store

    def groups(self) -> Mapping[UUID, GroupRecord]:
        """All groups, closed ones too, by UUID."""
        return MappingProxyType({uuid: group.record for uuid, group in self._open_state().groups.items()})

    def group(self, group: UUID) -> GroupRecord:
        """Return a group's record, also of a closed one. Raises NoSuchGroup."""
        found = self._open_state().groups.get(group)
        if found is None:
            raise NoSuchGroup(group)
        return found.record

    def is_open(self, group: UUID) -> bool:
        """Tell whether the group's key has been given. Raises NoSuchGroup."""
        found = self._open_state().groups.get(group)
        if found is None:
            raise NoSuchGroup(group)
        return found.table is not None

    def group_key(self, group: UUID) -> GroupKey:
        """Return a copy of an open group's key, for whoever seals it anew. Raises NoSuchGroup, GroupClosed."""
        found = self._open_state().groups.get(group)
        if found is None:
            raise NoSuchGroup(group)
        if found.key is None:
            raise GroupClosed([group])
        return GroupKey(found.key.view)

    def get(self, vtpm: UUID) -> VtpmRecord:
        """Look a vTPM up.

        Raises: NoSuchVtpm when no group has it (VtpmRemoved: but its tombstone); GroupClosed when a closed group
        might; StoreDamaged when a damaged leaf might have had it.
        """
        uuid = vtpm.bytes
        with self._applying:
            groups = self._open_state().groups
            group = find_group(uuid, groups)
            if group is None or group.table is None:
                raise missing_vtpm(vtpm, groups)
            row = group.table.row(uuid)
            if uuid in group.table.tombstones:
                raise VtpmRemoved(vtpm, unpack_tombstone(row, group.record.uuid).removed)
            return unpack_row(row, group.record.uuid, vtpm)

    def tombstone(self, vtpm: UUID) -> Tombstone | None:
        """Return the tombstone of a vTPM, None where no open group has one."""
        with self._applying:
            group = find_group(vtpm.bytes, self._open_state().groups)
            if group is None or group.table is None or vtpm.bytes not in group.table.tombstones:
                return None
            return unpack_tombstone(group.table.row(vtpm.bytes), group.record.uuid)

    def tombstones(self, group: UUID | None = None) -> list[Tombstone]:
        """List the tombstones of a group, or of all groups that are open. Raises NoSuchGroup, GroupClosed.

        Takes 3 us for each; commits and other readers get their turn between two of them.
        """
        found = []
        for owner, table in self._tables(group):
            for uuid in list(table.tombstones):
                with self._applying:
                    if uuid in table.tombstones:  # some were taken away meanwhile
                        found.append(unpack_tombstone(table.row(uuid), owner))
        return found

    def removed_by(self, moment: float) -> list[UUID]:
        """List the tombstones, of groups that are open, of vTPMs that were removed until then (seconds since 1970)."""
        with self._applying:
            removals = [removal for _, table in self._tables(None) for removal in table.removals()]
        return [UUID(bytes=uuid) for uuid, removed in removals if removed <= moment]

    def first_removal(self) -> int | None:
        """Return when the one was removed whose tombstone is the oldest (seconds since 1970), None for none."""
        with self._applying:
            return min((removed for _, table in self._tables(None) for _, removed in table.removals()), default=None)

    def vtpms(self, group: UUID | None = None) -> Iterator[VtpmRecord]:
        """Iterate over the vTPMs of a group, or of all groups that are open. Raises NoSuchGroup, GroupClosed."""
        for owner, table in self._tables(group):
            for uuid in list(table.uuids()):
                with self._applying:
                    if uuid not in table or uuid in table.tombstones:  # some were removed meanwhile
                        continue
                    row = table.row(uuid)
                yield unpack_row(row, owner)

    def _tables(self, group: UUID | None) -> list[tuple[UUID, GroupTable]]:
        groups = self._open_state().groups
        if group is not None:
            if group not in groups:
                raise NoSuchGroup(group)
            if groups[group].table is None:
                raise GroupClosed([group])
        chosen = list(groups.values()) if group is None else [groups[group]]
        return [(item.record.uuid, item.table) for item in chosen if item.table is not None]

    def __len__(self) -> int:
        return sum(len(group.table) for group in self._open_state().groups.values() if group.table is not None)

    def count(self, group: UUID) -> int:
        """Count the vTPMs of a group. Raises NoSuchGroup, GroupClosed."""
        return sum(len(table) for _, table in self._tables(group))

    def count_tombstones(self, group: UUID) -> int:
        """Count the tombstones of a group. Raises NoSuchGroup, GroupClosed."""
        return sum(len(table.tombstones) for _, table in self._tables(group))

    @property
    def damage(self) -> Sequence[Damage]:
        """Sectors that failed their check at open; they are kept as they are, their vTPMs are not readable."""
        return tuple(self._state.damage)

    @property
    def sequence(self) -> int:
        """Counter of commits and checkpoints, only ever going up."""
        return self._open_state().sequence

    def digest(self) -> bytes:
        """SHA-256 over root, head of the log and sequence (design section 7): 32 bytes, the same after a reopen."""
        state = self._open_state()
        return hashlib.sha256(state.root.digest + state.log.head + state.sequence.to_bytes(8, "big")).digest()

    @property
    def max_commit_bytes(self) -> int:
        """What one commit may take in the log; a vTPM record takes 93 bytes, a group about 50 and its blob."""
        return max_commit_bytes(self._open_state())

    def statistics(self) -> Statistics:
        """Figures for status and benchmarks."""
        state = self._open_state()
        used = state.tree.needed()
        pool = state.tree.total - fmt.POOL_FIRST - state.log.sectors
        return Statistics(
            bytes=state.tree.total * fmt.SECTOR,
            sectors=state.tree.total,
            sectors_used=used,
            sectors_spare=pool - used,
            log_units=state.log.units,
            log_units_used=state.log.used,
            vtpms=len(self),
            tombstones=sum(len(table.tombstones) for _, table in self._tables(None)),
            groups=len(state.groups),
            groups_closed=sum(1 for group in state.groups.values() if group.table is None),
            sequence=state.sequence,
            checkpoints=state.root.body.checkpoints,
            commits=state.commits,
            flushes=state.flushes,
        )

    @property
    def anchored(self) -> bytes:
        """Digest that the durable anchor is known to hold (32 bytes), as of the newest frame or root."""
        return self._open_state().carried.anchored

    @property
    def volatile_expected(self) -> bytes:
        """Value expected in the volatile anchor, opaque, as of the newest frame or root; empty at first."""
        return self._open_state().carried.volatile

    @property
    def boot_area(self) -> bytes:
        """The boot area that the store wrote last; other than what `read_boot_area` gives, this is authentic."""
        return self._boot.content

    # --- inside ------------------------------------------------------------------------------------

    def _open_state(self) -> State:
        with self._applying:
            if self._closed:
                raise StoreClosed
            if self._failed:
                raise StoreFailed(self._failed)
            return self._state

    def _note_failure(self, error: DeviceError) -> None:
        if self._state.device.broken:
            self._failed = str(error)
