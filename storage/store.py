"""The store image: the manager's groups and one record per vTPM, durable and authenticated. The public face.

Works on a descriptor that the caller opened, locked and closes. A commit is one frame in
the log and one flush; everything else (`store_checkpoint`) only moves what is already durable.

One thread at a time may change a store. While it does, others may call `get`, `digest` and the other readers: they
see what was before the commit or what is after it.
"""

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final, Self
from uuid import UUID

from storage import store_format as fmt
from storage.disk import Device, Disk
from storage.errors import (
    CommitRefused,
    CommitTooLarge,
    DeviceError,
    GroupClosed,
    NoSuchGroup,
    StoreClosed,
    StoreDamaged,
    StoreExists,
    StoreFailed,
    WrongGroupKey,
    WrongStoreKey,
)
from storage.secrets import GroupKey, StoreKey
from storage.store_checkpoint import checkpoint, ensure_room
from storage.store_create import write_new_store
from storage.store_crypto import key_check, seal_part
from storage.store_frame import Frame, GroupChange, frame_bytes
from storage.store_head import BootCopy, read_boot, read_header, write_boot_copy
from storage.store_plan import Plan, Planner, find_group, missing_vtpm
from storage.store_records import (
    Change,
    Damage,
    GroupRecord,
    PutGroup,
    PutVtpm,
    RecordFlags,
    RemoveGroup,
    RemoveVtpm,
    Statistics,
    VtpmRecord,
)
from storage.store_state import State, drop_groups, load, put_groups
from storage.store_table import unpack_row

__all__ = [
    "Change",
    "Damage",
    "GroupRecord",
    "PutGroup",
    "PutVtpm",
    "RecordFlags",
    "RemoveGroup",
    "RemoveVtpm",
    "Statistics",
    "Store",
    "VtpmRecord",
]


class Store:
    """An open store; make it by `create` or `open`. Every method raises StoreFailed after a failed write or flush."""

    def __init__(self, state: State, boot: BootCopy) -> None:
        self._state = state
        self._boot = boot
        self._failed = ""
        self._closed = False
        self._applying = threading.RLock()  # held while the state in memory is between two commits
        self.uuid: Final = state.store

    # --- making and opening ------------------------------------------------------------------------

    @classmethod
    def create(
        cls, disk: int | Disk, store: UUID, key: StoreKey, boot_area: bytes, size: int = fmt.DEFAULT_SIZE
    ) -> Self:
        """Make a store of `size` bytes in an empty file, or where the first seven sectors are zero.

        Durable on return, but for the directory entry, which is the caller's. The header is written last,
        so a creation that was cut short is not a store.
        Raises: StoreExists, BootAreaTooLarge, CommitRefused (size), StorageFull, DeviceError.
        """
        device = Device(disk)
        head = device.read(fmt.POOL_FIRST * fmt.SECTOR, 0)
        if any(head):
            raise StoreExists(next(index for index, byte in enumerate(head) if byte))
        write_new_store(device, store, key, boot_area, size)
        return cls.open(disk, key)

    @staticmethod
    def read_boot_area(disk: int | Disk) -> tuple[UUID, bytes]:
        """Read store UUID and boot area, without any key; nothing but a checksum speaks for them.

        Raises: NotAStore, StoreTooNew, StoreDamaged, DeviceError.
        """
        device = Device(disk)
        device.settle()
        header = read_header(device)
        return header.store, read_boot(device, header.store).content

    @classmethod
    def open(cls, disk: int | Disk, key: StoreKey) -> Self:
        """Open a store, verify every sector, replay its log. All groups are closed. Changes no byte.

        A frame that a power cut tore was never acknowledged and is dropped. Damaged leaves do not keep the
        store from opening; they are listed in `damage`.
        Raises: NotAStore, StoreTooNew, WrongStoreKey, StoreDamaged, DeviceError.
        """
        device = Device(disk)
        device.settle()
        header = read_header(device)
        if header.key_check != key_check(key, header.store):
            raise WrongStoreKey(header.store)
        state = load(device, header.store, StoreKey(key.view))
        return cls(state, read_boot(device, header.store, state.carried.boot))

    def reopen(self, disk: int | Disk) -> Self:
        """Open the image that `disk` holds beside this store, with the same keys; groups stay closed. For verify.

        Nothing may be committed meanwhile. Raises what `open` does.
        """
        return type(self).open(disk, self._open_state().key)

    def unlock_in(self, other: "Store", group: UUID) -> None:
        """Unlock a group of `other` with the key it has here. Raises GroupClosed, and what `unlock_group` does."""
        found = self._open_state().groups.get(group)
        if found is None or found.key is None:
            raise GroupClosed([group])
        other.unlock_group(group, found.key)

    def close(self) -> None:
        """Overwrite all keys and records in memory. Writes nothing: call `checkpoint` first for a clean stop."""
        if not self._closed:
            for group in self._state.groups.values():
                group.close()
            self._state.key.wipe()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- reading -----------------------------------------------------------------------------------

    def groups(self) -> Mapping[UUID, GroupRecord]:
        """All groups, closed ones too, by UUID."""
        return MappingProxyType({uuid: group.record for uuid, group in self._open_state().groups.items()})

    def is_open(self, group: UUID) -> bool:
        """Tell whether the group's key has been given. Raises NoSuchGroup."""
        found = self._open_state().groups.get(group)
        if found is None:
            raise NoSuchGroup(group)
        return found.table is not None

    def get(self, vtpm: UUID) -> VtpmRecord:
        """Look a vTPM up.

        Raises: NoSuchVtpm when no group has it; GroupClosed when a closed group might; StoreDamaged when a
        damaged leaf might have had it.
        """
        with self._applying:
            groups = self._open_state().groups
            group = find_group(vtpm.bytes, groups)
            if group is None or group.table is None:
                raise missing_vtpm(vtpm, groups)
            return unpack_row(group.table.row(vtpm.bytes), group.record.uuid)

    def vtpms(self, group: UUID | None = None) -> Iterator[VtpmRecord]:
        """Iterate over the vTPMs of a group, or of all groups that are open. Raises NoSuchGroup, GroupClosed."""
        groups = self._open_state().groups
        if group is not None:
            if group not in groups:
                raise NoSuchGroup(group)
            if groups[group].table is None:
                raise GroupClosed([group])
        chosen = list(groups.values()) if group is None else [groups[group]]
        for item in chosen:
            if item.table is not None:
                for uuid in list(item.table.uuids()):
                    yield unpack_row(item.table.row(uuid), item.record.uuid)

    def __len__(self) -> int:
        return sum(len(group.table) for group in self._open_state().groups.values() if group.table is not None)

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
        return (self._open_state().log.units - 1) * fmt.UNIT

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
            groups=len(state.groups),
            groups_closed=sum(1 for group in state.groups.values() if group.table is None),
            sequence=state.sequence,
            checkpoints=state.root.body.checkpoints,
            commits=state.commits,
            flushes=state.flushes,
        )

    # --- anchors -----------------------------------------------------------------------------------

    @property
    def anchored(self) -> bytes:
        """Digest that the durable anchor is known to hold (32 bytes), as of the newest frame or root."""
        return self._open_state().carried.anchored

    def note_anchored(self, digest: bytes) -> None:
        """Have every following frame and root say that the durable anchor holds `digest`. Writes nothing itself."""
        if len(digest) != 32:
            raise CommitRefused(f"an anchored digest has 32 bytes, not {len(digest)}")
        state = self._open_state()
        state.carried = replace(state.carried, anchored=digest)

    @property
    def volatile_expected(self) -> bytes:
        """Value expected in the volatile anchor, opaque, as of the newest frame or root; empty at first."""
        return self._open_state().carried.volatile

    def note_volatile(self, value: bytes) -> None:
        """Have every following frame and root carry `value`, at most 96 bytes. Writes nothing itself."""
        if len(value) > fmt.MAX_VOLATILE_BYTES:
            raise CommitRefused(f"a volatile anchor has at most {fmt.MAX_VOLATILE_BYTES} bytes, not {len(value)}")
        state = self._open_state()
        state.carried = replace(state.carried, volatile=value)

    # --- changing ----------------------------------------------------------------------------------

    def unlock_group(self, group: UUID, key: GroupKey) -> None:
        """Decrypt and verify the records of a group and keep its key. No effect on an open group.

        Raises: NoSuchGroup, WrongGroupKey, StoreDamaged, DeviceError; the group then stays as it was.
        """
        state = self._open_state()
        found = state.groups.get(group)
        if found is None:
            raise NoSuchGroup(group)
        if found.table is not None:
            if key_check(key, group) != found.check:
                raise WrongGroupKey(group)
            return
        table = found.unlock(key, state.tree, state.store)
        others = {uuid: other for uuid, other in state.groups.items() if other is not found}
        twice = next((uuid for uuid in table.uuids() if find_group(uuid, others) is not None), None)
        if twice is not None:
            self._failed = "a vTPM is in two groups"
            raise StoreDamaged(f"vTPM {UUID(bytes=twice)}", "it is in two groups")

    def commit(self, changes: Sequence[Change], *, notes: bool = False) -> None:
        """Make all changes durable with one flush, or none. An empty sequence does nothing.

        With `notes` a frame is written even for an empty sequence, so that what note_anchored and note_volatile
        were told is durable.

        A checkpoint comes first when the log is full, and the image grows when it must.
        Raises, with nothing changed: NoSuchGroup, NoSuchVtpm, GroupClosed, GroupNotEmpty, GenerationError,
        WrongGroupKey, CommitRefused, CommitTooLarge, StorageFull. Raises DeviceError for a failed write or
        flush: whether the commit is durable is then known only after opening again.
        """
        state = self._open_state()
        if not changes and not notes:
            return
        plan = Planner(state.groups, state.numbers).plan(changes)
        try:
            self._make_durable(plan)
        except DeviceError as error:
            self._note_failure(error)
            raise
        finally:
            plan.wipe()

    def checkpoint(self) -> None:
        """Move what the log holds into leaves and a new root. Changes `digest`, not the content.

        Raises: StorageFull, with everything kept; DeviceError.
        """
        state = self._open_state()
        try:
            checkpoint(state)
        except DeviceError as error:
            self._note_failure(error)
            raise

    def write_boot_area(self, content: bytes) -> None:
        """Replace the boot area durably; a power cut leaves the old or the new one.

        The new copy is written first, then a frame that makes it the one that counts.
        Raises: BootAreaTooLarge, StorageFull, DeviceError.
        """
        state = self._open_state()
        copy = BootCopy(1 - self._boot.place, self._boot.sequence + 1, content)
        before = state.carried
        try:
            write_boot_copy(state.device, state.store, copy)
            state.flush()
            state.carried = replace(before, boot=hashlib.sha256(content).digest())
            self.commit([], notes=True)
        except DeviceError as error:
            state.carried = before
            self._note_failure(error)
            raise
        self._boot = copy

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

    def _make_durable(self, plan: Plan) -> None:
        state = self._state
        changes: list[GroupChange] = [*plan.puts, *plan.drops]
        size = frame_bytes(changes, [len(part) for part in plan.parts.values()])
        if not state.log.fits(size):
            raise CommitTooLarge(size, self.max_commit_bytes)
        ensure_room(state, plan.new_entries(state.groups))
        unit = state.log.place(size)
        if unit is None:
            checkpoint(state, size)
            unit = state.log.place(size)
            assert unit is not None, "an empty log takes any frame that fits it"
        sequence = state.sequence + 1
        parts = []
        for uuid, part in plan.parts.items():
            group = state.groups.get(uuid)
            key = plan.keys[uuid] if group is None else group.key
            assert key is not None, "the plan lets only open groups pass"
            parts.append((uuid, seal_part(key, state.store, uuid, sequence, part)))
        state.log.write(Frame(sequence, state.log.head, state.carried, changes, parts), unit, state.key, state.store)
        state.flush()
        with self._applying:
            self._apply(plan, sequence)

    def _apply(self, plan: Plan, sequence: int) -> None:
        """Take what the log holds now into memory."""
        state = self._state
        self._failed = "its memory does not match its image"  # until all of it is applied
        state.sequence = sequence
        put_groups(state, plan.puts, plan.keys)
        for uuid, part in plan.parts.items():
            table = state.groups[uuid].table
            assert table is not None, "the plan lets only open groups pass"
            table.apply(part)
        drop_groups(state, plan.drops)
        state.commits += 1
        self._failed = ""
