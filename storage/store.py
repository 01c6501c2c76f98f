"""The store image: the manager's groups and one record per vTPM, durable and authenticated. The public face.

Works on a descriptor that the caller opened, locked and closes. A commit is one frame in
the log and one flush; everything else (`store_checkpoint`) only moves what is already durable.

One thread at a time may change a store. While it does, others may call `get`, `digest` and the other readers: they
see what was before the commit or what is after it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Self
from uuid import UUID

from storage import store_format as fmt
from storage.disk import Device, Disk
from storage.errors import (
    CommitRefused,
    DeviceError,
    GroupClosed,
    NoSuchGroup,
    StorageError,
    StoreDamaged,
    StoreExists,
    WrongGroupKey,
    WrongStoreKey,
)
from storage.secrets import GroupKey, StoreKey
from storage.store_checkpoint import checkpoint
from storage.store_commit import apply, make_durable
from storage.store_compact import Compacted, cut, gather, leaves, renumber
from storage.store_create import write_new_store
from storage.store_crypto import key_check
from storage.store_head import BootCopy, read_boot, read_header, write_boot_copy
from storage.store_plan import Planner, plan_save
from storage.store_reading import StoreReading
from storage.store_records import (
    BuryVtpm,
    Change,
    Damage,
    ForgetVtpm,
    GroupRecord,
    PutGroup,
    PutVtpm,
    RecordFlags,
    RemoveGroup,
    RemoveVtpm,
    Statistics,
    Tombstone,
    VtpmRecord,
)
from storage.store_rotate import rotate
from storage.store_scrub import Scrubbed, scrub
from storage.store_state import drop_doubtful_tombstones, load

__all__ = [
    "BuryVtpm",
    "Change",
    "Damage",
    "ForgetVtpm",
    "GroupRecord",
    "PutGroup",
    "PutVtpm",
    "RecordFlags",
    "RemoveGroup",
    "RemoveVtpm",
    "Statistics",
    "Store",
    "Tombstone",
    "VtpmRecord",
]


class Store(StoreReading):
    """An open store; make it by `create` or `open`. Every method raises StoreFailed after a failed write or flush."""

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

    # --- anchors -----------------------------------------------------------------------------------

    def note_anchored(self, digest: bytes) -> None:
        """Have every following frame and root say that the durable anchor holds `digest`. Writes nothing itself."""
        if len(digest) != 32:
            raise CommitRefused(f"an anchored digest has 32 bytes, not {len(digest)}")
        state = self._open_state()
        state.carried = replace(state.carried, anchored=digest)

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
        found.unlock(key, state.tree, state.store)
        twice = drop_doubtful_tombstones(found, state.groups)
        if twice is not None:
            self._failed = "a vTPM is in two groups"
            raise StoreDamaged(f"vTPM {twice}", "it is in two groups")

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
        plan = plan_save(changes[0], state.groups) if len(changes) == 1 else None
        if plan is None:
            plan = Planner(state.groups, state.numbers).plan(changes)
        try:
            sequence = make_durable(state, plan)
            with self._applying:
                self._failed = "its memory does not match its image"  # until all of it is applied
                apply(state, plan, sequence)
                self._failed = ""
        except DeviceError as error:
            self._note_failure(error)
            raise
        finally:
            plan.wipe()

    def rotate_group(self, record: GroupRecord, key: GroupKey) -> None:
        """Replace an open group's record and key, its vTPM records sealed anew, with one root: `store_rotate.rotate`.

        Raises, with every record kept: NoSuchGroup, GroupClosed, StoreDamaged, CommitRefused, StorageFull; DeviceError.
        """
        try:
            rotate(self._open_state(), record, key)
        except DeviceError as error:
            self._note_failure(error)
            raise
        except StorageError:
            raise
        except BaseException:
            self._failed = "its memory may not match its image"
            raise

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

    def scrub(self) -> Iterator[Scrubbed]:
        """Overwrite everything in the image that is not live, a part with each step; commits may come between them.

        Raises: StorageFull in the first step, with nothing overwritten; DeviceError; StoreFailed, StoreClosed.
        """
        steps = scrub(self._open_state(), self._boot)
        while True:
            self._open_state()
            try:
                progress = next(steps, None)
            except DeviceError as error:
                self._note_failure(error)
                raise
            if progress is None:
                return
            yield progress

    def compact(self, floor: int) -> Compacted:
        """Gather the records, and cut an image that is a file to what it needs, `floor` bytes at least.

        Changes `digest`, not the content. Raises: StorageFull, with everything kept; DeviceError.
        """
        state = self._open_state()
        before, leaves_before = state.tree.total * fmt.SECTOR, leaves(state)
        try:
            checkpoint(state)
            for change in (gather, renumber):
                with self._applying:
                    change(state)
                checkpoint(state)
            kept = cut(state, floor)
        except DeviceError as error:
            self._note_failure(error)
            raise
        closed = [uuid for uuid, group in state.groups.items() if group.table is None]
        return Compacted(before, state.tree.total * fmt.SECTOR, leaves_before, leaves(state), closed, kept)

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
