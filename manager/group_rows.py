"""What the catalogue copies of a group's record in the store: its name, and to what its key is sealed."""

from uuid import UUID

from manager.keys import GroupSeal
from manager.policy import PcrBranch
from storage.catalogue_rows import GroupRow


def group_row(group: UUID, seal: GroupSeal, created: str = "") -> GroupRow:
    """Return a group's row; when it was made is not in its record."""
    policy = seal.sealed.policy
    bound = next((branch for branch in policy.branches if isinstance(branch, PcrBranch)), None)
    pcrs = "none" if bound is None else "sha256:" + ",".join(map(str, bound.selection))
    return GroupRow(group, seal.name, pcrs, policy.locality or 0, created)


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
