"""What the catalogue copies of a group's record in the store: its name, and to what its key is sealed."""

from dataclasses import replace
from uuid import UUID

from manager.keys import GroupSeal
from manager.policy import PcrBranch
from storage.catalogue import Catalogue
from storage.catalogue_rows import GroupRow
from storage.store import Store


def group_row(group: UUID, seal: GroupSeal, created: str = "") -> GroupRow:
    """Return a group's row; when it was made is not in its record."""
    policy = seal.sealed.policy
    bound = next((branch for branch in policy.branches if isinstance(branch, PcrBranch)), None)
    pcrs = "none" if bound is None else "sha256:" + ",".join(map(str, bound.selection))
    return GroupRow(group, seal.name, pcrs, policy.locality or 0, created)


def follow_seals(catalogue: Catalogue, store: Store) -> None:
    """Have the rows say to what the groups' keys are sealed now, after they were sealed anew; names stay."""
    records = store.groups()
    for row in catalogue.groups():
        if row.uuid in records:
            stored = group_row(row.uuid, GroupSeal.unpack(records[row.uuid].blob), row.created)
            catalogue.change_group(replace(stored, name=row.name))


def difference(row: GroupRow, stored: GroupRow) -> str | None:
    """Return what a row says otherwise than the store, None where they agree. What a row does not say agrees."""
    for what, said, is_so in (
        ("name", row.name, stored.name),
        ("PCRs", row.pcrs or stored.pcrs, stored.pcrs),
        ("locality", stored.locality if row.locality is None else row.locality, stored.locality),
    ):
        if said != is_so:
            return f"{what}: {said} in the catalogue, {is_so} in the store"
    return None
