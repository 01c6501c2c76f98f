"""Many vTPMs at once: names from a template, records in groups of commits, one write of the durable anchor for all."""

import logging
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Final
from uuid import uuid4

import trio

from frontend_backend.messages_admin import Note
from manager.errors import ConflictError, ManagerError, UsageError
from manager.group_rows import find_group
from manager.labels import parse_labels
from manager.listing import describer
from manager.registry import Registry, check_name, new_record
from manager.services import Arguments, Document, Services
from storage.catalogue_rows import GroupRow, Listed, VtpmRow
from storage.errors import GroupClosed, StorageError
from storage.store_records import PutVtpm

_log = logging.getLogger("vtpm.add")
MAX_COUNT: Final = 100_000  # one request's; each costs about 2 KiB of memory until it is answered
_GROUP: Final = 1000  # records and names in one commit
_NOTES: Final = 10  # on the way, at most
_ENTRY_BYTES: Final = 128  # as manager.committer counts: a record has 93 in the log
_PLACE: Final = re.compile(r"\{(?::0?([1-9]))?\}")  # {} or {:05}


def names_from(template: str, first: int, count: int) -> list[str]:
    """Return `count` names: `template` with its {} replaced by `first` and what follows; {:05} pads with zeros to 5.

    Raises:
        UsageError: not exactly one place for the number, or what comes out is no name.

    """
    places = list(_PLACE.finditer(template))
    if len(places) != 1:
        raise UsageError(f"'{template[:80]}' has no place for a number, or several: write 'web-{{}}' or 'web-{{:05}}'")
    head, tail, width = template[: places[0].start()], template[places[0].end() :], int(places[0][1] or 1)
    for number in (first, first + count - 1):
        check_name(f"{head}{number:0{width}}{tail}", "name")
    return [check_name(f"{head}{number:0{width}}{tail}", "name") for number in range(first, first + count)]


def _plan(registry: Registry, arguments: Arguments) -> tuple[GroupRow, list[VtpmRow]]:
    count, first = arguments["count"], arguments["first"]
    if not 1 <= count <= MAX_COUNT or not 0 <= first <= 10**9:
        raise UsageError(f"--count is 1 to {MAX_COUNT}, --first 0 to 1000000000")
    if arguments["uuid"] is not None or arguments["state_image"] is not None:
        raise UsageError("--uuid and --state-image are for one vTPM, not for --count")
    group = find_group(registry.catalogue, arguments["group"])
    uuids = [uuid4() for _ in range(count)]
    template = arguments["name"]
    names = names_from(template, first, count) if template else [f"vtpm-{vtpm.hex[:12]}" for vtpm in uuids]
    family = arguments["tpm"]
    return group, [VtpmRow(vtpm, name, group.uuid, family) for vtpm, name in zip(uuids, names, strict=True)]


def _refuse_taken(registry: Registry, rows: Sequence[VtpmRow]) -> None:
    wanted = [row.name for row in rows]
    taken = registry.catalogue.names_taken(wanted)
    if taken:
        example = next(name for name in wanted if name in taken)
        raise ConflictError(f"{len(taken)} of these names are in use, '{example}' first; nothing was made")
    if len(set(wanted)) != len(wanted):
        raise ConflictError("two names came out equal; nothing was made. Try again")


async def add_many(services: Services, arguments: Arguments) -> AsyncGenerator[Document | Note]:
    """Make vTPMs; their documents come when all of them are durable and anchored.

    Raises:
        UsageError, NotFoundError, ConflictError: nothing was made. DeniedError: the group is closed, or would have
            more vTPMs than its quota.
        ManagerError: a commit failed on the way; the message says how many were made, and they are kept.

    """
    registry = services.registry
    labels = parse_labels(arguments["label"])
    group, rows = _plan(registry, arguments)
    made: list[VtpmRow] = []
    async with registry.adding:
        _refuse_taken(registry, rows)
        registry.refuse_beyond_quota(group, len(rows))
        size = max(1, min(_GROUP, registry.committer.store.max_commit_bytes // _ENTRY_BYTES))
        try:
            for start in range(0, len(rows), size):
                told = len(made) * _NOTES // len(rows)
                made += await _add_group(registry, group, rows[start : start + size], labels)
                if len(made) < len(rows) and len(made) * _NOTES // len(rows) > told:
                    yield Note(f"{len(made)} of {len(rows)} vTPMs made")
        except GroupClosed as error:
            raise registry.closed_group(group.uuid) from error
        except StorageError as error:
            raise ManagerError(_partly(made, len(rows), error) + await _anchored_all_the_same(registry)) from error
        except BaseException:  # nobody waits for the rest any more
            await _anchored_all_the_same(registry)
            raise
        with trio.CancelScope(shield=True):
            await registry.anchoring.write_durable()
    describe = describer(services)
    for row in made:
        yield describe(Listed(row, None, labels))


async def _add_group(
    registry: Registry, group: GroupRow, rows: Sequence[VtpmRow], labels: Mapping[str, str]
) -> list[VtpmRow]:
    """Make some vTPMs: records first, as with one. A power cut between the two leaves records without names."""
    with trio.CancelScope(shield=True):
        await registry.committer.commit(*(PutVtpm(new_record(row)) for row in rows))
    return registry.catalogue.add_vtpms(rows, "added", f", TPM {rows[0].family}, group {group.name}", labels)


async def _anchored_all_the_same(registry: Registry) -> str:
    """Anchor what was made before something else went wrong; returns what to say if that fails too."""
    try:
        with trio.CancelScope(shield=True):
            await registry.anchoring.write_durable()
    except (ManagerError, StorageError) as error:
        _log.warning("the durable anchor was not written: %s", error)
        return f". The hardware TPM's anchor was not written either: {error}"
    return ""


def _partly(made: Sequence[VtpmRow], wanted: int, error: StorageError) -> str:
    kept = f"{made[0].name} to {made[-1].name}, which are kept" if made else "none"
    return f"{len(made)} of {wanted} vTPMs were made ({kept}), then: {error}"
