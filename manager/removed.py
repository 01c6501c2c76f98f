"""Documents of removed vTPMs: what their tombstones say, and, where an event still tells, their name and by whom."""

from collections.abc import AsyncGenerator, Iterator
from operator import attrgetter
from typing import Final

import trio

from manager.errors import UsageError
from manager.group_rows import find_group
from manager.removal_words import EVENT, MIGRATED, where_to, who_removed
from manager.services import Arguments, Document, Services
from manager.tombstones import iso
from manager.verb_table import SCHEMA_VERSION
from manager.xen_listing import XEN_FIELDS
from storage.store_records import RecordFlags, Tombstone

_AT_ONCE: Final = 250  # tombstones between which others get a turn
_NOT_OF_REMOVED: Final = ("state", "guest", "label")


def describe_removed(services: Services, tombstone: Tombstone) -> Document:
    """Return the document of one removed vTPM: the fields of any vTPM, most of them null."""
    return next(_documents(services, [tombstone]))


async def list_removed(services: Services, arguments: Arguments) -> AsyncGenerator[Document]:
    """List removed vTPMs whose tombstones are there, those first that were removed first.

    Raises:
        UsageError: a filter that says nothing of removed vTPMs. NotFoundError: no such group.

    """
    for name in _NOT_OF_REMOVED:
        if arguments.get(name):
            raise UsageError(
                f"--removed goes with --group and --tpm, not with --{name}: nothing is known of it any more"
            )
    registry = services.registry
    everything = await trio.to_thread.run_sync(registry.committer.store.tombstones)
    chosen = sorted(everything, key=attrgetter("removed", "uuid.int"))
    if arguments["group"] is not None:
        group = find_group(registry.catalogue, arguments["group"])
        chosen = [found for found in chosen if found.group == group.uuid]
    for start in range(0, len(chosen), _AT_ONCE):
        for document in _documents(services, chosen[start : start + _AT_ONCE]):
            if arguments["tpm"] in (None, document["tpm"]):
                yield document
        await trio.lowlevel.checkpoint()


_OF_ATTACHED: Final = (
    *(
        "guest",
        "frontend",
        "endpoint",
        "tcti",
        "control",
        "owner",
        "mode",
        "qemu",
        "libvirt_xml",
        "device",
        "device_numbers",
        "resource_manager_numbers",
        "pid",
        "release",
        "outdated",
        "reason",
        "startup",
        "hwinitpcrs",
    ),
    *("measure", "measured", "late_attach"),
    *("restore", "restore_refused"),
    *("claimed_by", "frozen_since", "comes_from"),
    *XEN_FIELDS,
    *("hibernate_after", "hibernated_since", "commands_per_second", "saves_per_second", "nv_bytes"),
)


def _documents(services: Services, tombstones: list[Tombstone]) -> Iterator[Document]:
    catalogue = services.registry.catalogue
    groups = {row.uuid: row.name for row in catalogue.groups()}
    events = catalogue.last_events(EVENT, [found.uuid for found in tombstones])
    moves = catalogue.last_events(MIGRATED, [found.uuid for found in tombstones])
    for found in tombstones:
        name, user = who_removed(events.get(found.uuid))
        yield {
            "schema": SCHEMA_VERSION,
            "uuid": str(found.uuid),
            "name": name,
            "group": groups.get(found.group, str(found.group)),
            "tpm": "1.2" if found.flags & RecordFlags.TPM12 else "2.0",
            "state": "removed",
            **dict.fromkeys(_OF_ATTACHED),
            "generation": found.generation,
            **dict.fromkeys(("state_image", "created", "labels")),
            "removed": iso(found.removed),
            "removed_by": user,
            "kept_until": services.registry.tombstones.kept_until(found),
            "migrated_to": where_to(moves.get(found.uuid)),
        }
