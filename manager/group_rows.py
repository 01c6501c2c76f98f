"""What the catalogue copies of a group's record in the store: its name, and to what its key is sealed."""

from contextlib import suppress
from dataclasses import replace
from uuid import UUID

from manager.errors import IntegrityError, NotFoundError
from manager.keys import GroupSeal
from manager.policy import PcrBranch
from storage.catalogue import Catalogue
from storage.catalogue_rows import Filter, GroupRow, Happened
from storage.errors import NameTaken
from storage.store import Store


def group_row(group: UUID, seal: GroupSeal, created: str = "") -> GroupRow:
    """Return a group's row; when it was made is not in its record."""
    policy = seal.sealed.policy
    bound = next((branch for branch in policy.branches if isinstance(branch, PcrBranch)), None)
    pcrs = "none" if bound is None else "sha256:" + ",".join(map(str, bound.selection))
    pcrs = "approved" if policy.approver_point is not None else pcrs
    return GroupRow(group, seal.name, pcrs, policy.locality or 0, created)


def find_group(catalogue: Catalogue, text: str) -> GroupRow:
    """Return the group with this UUID or name. Raises NotFoundError."""
    with suppress(ValueError):
        wanted = UUID(text)
        for row in catalogue.groups():
            if row.uuid == wanted:
                return row
    named = catalogue.find_group_by_name(text)
    if named is None:
        raise NotFoundError(f"there is no group '{text[:80]}'; 'vtpm-group-list' shows what there is")
    return named


def follow_seals(catalogue: Catalogue, store: Store) -> None:
    """Have the rows say to what the groups' keys are sealed now, after they were sealed anew; names stay."""
    records = store.groups()
    for row in catalogue.groups():
        if row.uuid in records:
            stored = group_row(row.uuid, GroupSeal.unpack(records[row.uuid].blob), row.created)
            if stored != row:
                catalogue.change_group(replace(stored, name=row.name))


def follow_store(catalogue: Catalogue, store: Store) -> list[str]:
    """Have the rows be those of the store's groups: a change of a group that was cut short left them behind.

    A row whose group the store does not have goes, unless vTPMs are named in it. Returns what was done, in words.
    """
    done, rows = [], {row.uuid: row for row in catalogue.groups()}
    for uuid in rows.keys() - store.groups().keys():
        if not catalogue.listing(Filter(group=uuid), "", 1):
            catalogue.remove_group(uuid, Happened("group-removed", f"{rows[uuid].name}: the store does not have it"))
            done.append(f"group {rows[uuid].name} was removed")
            del rows[uuid]
    seals = {}
    for uuid, record in store.groups().items():
        with suppress(IntegrityError):  # whoever opens it, and vtpm-verify, say so
            seals[uuid] = GroupSeal.unpack(record.blob)
    owner = {seal.name: uuid for uuid, seal in seals.items()}
    for said in rows.values():
        if (
            owner.get(said.name, said.uuid) != said.uuid
        ):  # somebody swapped them: vTPMs would be added to another's group
            catalogue.change_group(replace(said, name=str(said.uuid)))
    for uuid, seal in seals.items():
        stored = group_row(uuid, seal)
        row = rows.get(uuid)
        try:
            if row is None:
                catalogue.add_group(stored, Happened("group-added", f"{stored.name}, found in the store"))
                done.append(f"group {stored.name} was added")
            elif difference(row, stored) is not None:
                catalogue.change_group(replace(stored, created=row.created))
                done.append(f"group {stored.name} was changed")
        except NameTaken:
            done.append(f"group {uuid} was left as it is: another one's row has its name {stored.name}")
    return done


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
