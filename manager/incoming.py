"""Records of vTPMs whose state is to come from another manager: made, and removed while nothing has come."""

from collections.abc import Awaitable, Callable
from uuid import UUID

from manager import state_files
from manager.errors import BusyError, DeniedError
from manager.migration_records import is_incoming
from manager.registry import Registry, check_name
from storage.catalogue_rows import GroupRow, Happened, VtpmRow
from storage.errors import GroupClosed, NoSuchVtpm, VtpmRemoved
from storage.store_records import ForgetVtpm, RecordFlags, RemoveVtpm


async def add_incoming(
    registry: Registry,
    name: str | None,
    vtpm: UUID,
    group: GroupRow,
    family: str,
    announced: Callable[[], Awaitable[object]],
) -> VtpmRow:
    """Make an incoming vTPM's record, durable and anchored.

    The UUID may be that of one that was removed here: what comes is not its old state, but the same vTPM's newest. That
    is so where one moves back. `announced` is awaited when nothing speaks against it, before anything is made.

    Raises what `Registry.add` raises.
    """
    name = check_name(name, "name") if name is not None else f"vtpm-{vtpm.hex[:12]}"
    row = VtpmRow(uuid=vtpm, name=name, group=group.uuid, family=family)
    async with registry.adding:
        removed = _was_removed(registry, vtpm)
        registry.refuse_in_use(vtpm)
        registry.refuse_taken(vtpm, name, "")
        registry.refuse_beyond_quota(group, 1)
        await announced()
        if removed:
            await registry.committer.commit(ForgetVtpm(vtpm))
        return await registry.make(row, group, {}, RecordFlags.AWAY)


def _was_removed(registry: Registry, vtpm: UUID) -> bool:
    """Tell whether there is a tombstone. Raises DeniedError: a closed group may have the vTPM itself."""
    try:
        registry.committer.store.get(vtpm)
    except GroupClosed as error:
        raise DeniedError(
            f"group {registry.group_name(error.groups[0])} is closed, so it cannot be seen whether it has vTPM {vtpm}. "
            f"Nothing was made. Open the group first"
        ) from error
    except NoSuchVtpm as error:
        return isinstance(error, VtpmRemoved)
    return False


def never_had(registry: Registry, vtpm: UUID) -> bool:
    """Tell whether the store has neither a state of a vTPM that no name leads to, nor its tombstone.

    Raises BusyError: a closed group may have either.
    """
    try:
        record = registry.committer.store.get(vtpm)
    except GroupClosed as error:
        raise BusyError("a closed group there may have had it: open it first") from error
    except NoSuchVtpm as error:
        return not isinstance(error, VtpmRemoved)
    return is_incoming(record.flags)


async def remove_incoming(registry: Registry, row: VtpmRow, why: str) -> None:
    """Remove a detached vTPM that never got its state, without a tombstone: it may be expected again."""
    registry.refuse_attached(row)
    await registry.committer.commit(RemoveVtpm(row.uuid))
    await registry.anchoring.write_durable()
    state_files.discard(registry.image_path(row), row.uuid, ours=not row.state_image)
    registry.catalogue.remove_vtpm(row.uuid, Happened("removed", f"{row.name}: {why}"))
