"""A new key for a group: its record and all its leaves under the new key, by one root.

A power cut leaves the group under the old key or under the new one, whole; so there is nothing to be taken up again.
What the image held before stays in free sectors, under the old key, until they are used again or scrubbed.
"""

from storage.errors import CommitRefused, GroupClosed, NoSuchGroup, StoreDamaged
from storage.secrets import GroupKey
from storage.store_checkpoint import seal_anew
from storage.store_crypto import key_check
from storage.store_records import GroupRecord
from storage.store_state import State


def rotate(state: State, record: GroupRecord, key: GroupKey) -> None:
    """Replace an open group's record and key. Others may read meanwhile: no record changes.

    Raises, with every record kept: NoSuchGroup, GroupClosed, StoreDamaged (leaves that nobody can seal anew),
    CommitRefused (the same key), StorageFull; DeviceError.
    """
    group = state.groups.get(record.uuid)
    if group is None:
        raise NoSuchGroup(record.uuid)
    if group.table is None:
        raise GroupClosed([record.uuid])
    if group.damaged:
        raise StoreDamaged(f"group {record.uuid}", "it has damaged leaves, which cannot be sealed anew")
    if key_check(key, record.uuid) == group.check:
        raise CommitRefused(f"group {record.uuid} has this key already")

    seal_anew(state, group, lambda: group.rekey(record, key))
