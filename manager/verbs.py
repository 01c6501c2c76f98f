"""What each verb of verb_table does. Documents out; errors are ManagerError."""

import os
import stat
import time
from datetime import UTC, datetime
from typing import Final

from manager.attach_options import AttachOptions
from manager.bulk import add_many
from manager.errors import ConflictError, UsageError
from manager.labels import parse_labels
from manager.listing import describe, describer, list_vtpms
from manager.named_path import UNUSED_BYTES, is_unused
from manager.removal_words import event_text
from manager.removed import describe_removed
from manager.services import Answer, Arguments, Caller, Document, Handler, Services
from manager.tpm_status import tpm_status
from manager.verb_table import SCHEMA_VERSION
from manager.verb_table_xen import XEN_OPTIONS
from manager.verbs_approval import approve
from manager.verbs_backup import backup
from manager.verbs_catalogue import events, label
from manager.verbs_groups import GROUP_HANDLERS
from manager.verbs_measurements import MEASUREMENT_HANDLERS
from manager.verbs_migration import MIGRATION_HANDLERS
from manager.verbs_quotes import QUOTE_HANDLERS
from manager.verbs_restores import RESTORE_HANDLERS
from manager.verbs_store import compact, scrub
from manager.verbs_swtpm import SWTPM_HANDLERS
from manager.verbs_verify import verify
from manager.xen_attach import XenOptions
from storage.catalogue_rows import Listed


def add(services: Services, caller: Caller, arguments: Arguments) -> Answer:
    """Make a vTPM, or many."""
    if arguments["count"] is not None:
        return add_many(services, arguments)
    return _add_one(services, caller, arguments)


async def _add_one(services: Services, caller: Caller, arguments: Arguments) -> list[Document]:
    state_image = arguments["state_image"] or ""
    if state_image:
        _check_state_image(caller, state_image)
    labels = parse_labels(arguments["label"])
    row = await services.registry.add(
        arguments["name"], arguments["uuid"], arguments["group"], arguments["tpm"], state_image, labels
    )
    return [describe(services, row)]


def _check_state_image(caller: Caller, path: str) -> None:
    """Check that what we will open later is the very file that the caller could open."""
    if not os.path.isabs(path):
        raise UsageError(f"the state image {path[:200]!r} is no absolute path")
    if len(caller.descriptors) != 1:
        raise UsageError("the state image's descriptor did not come with the request")
    try:
        ours, theirs = os.stat(path), os.fstat(caller.descriptors[0])
    except (OSError, ValueError) as error:
        raise UsageError(f"the state image {path[:200]!r} cannot be used: {error}") from error
    if not stat.S_ISREG(theirs.st_mode) and not stat.S_ISBLK(theirs.st_mode):
        raise UsageError(f"the state image {path[:200]!r} is no regular file and no block device")
    if (ours.st_dev, ours.st_ino) != (theirs.st_dev, theirs.st_ino):
        raise UsageError(f"{path} is not the file that was opened for it")
    if not is_unused(caller.descriptors[0]):
        raise ConflictError(
            f"{path} holds something already. Nothing was made or changed: a state image needs an empty file, or a "
            f"device whose first {UNUSED_BYTES} bytes are zero"
        )


async def attach(services: Services, caller: Caller, arguments: Arguments) -> list[Document]:
    """Start a vTPM for a guest."""
    row = services.registry.find(arguments["vtpm"])
    options = AttachOptions(
        guest=arguments["guest"],
        frontend=arguments["frontend"],
        owner=arguments["owner"],
        mode=arguments["mode"],
        startup=arguments["startup"],
        hwinitpcrs=arguments["hwinitpcrs"],
        measure=arguments["measure"],
        hibernate=arguments["hibernate"],
        tcp=arguments["tcp"],
        quota=(arguments["commands_per_second"], arguments["saves_per_second"], arguments["nv_bytes"]),
        xen=XenOptions(**{option.name: arguments[option.name] for option in XEN_OPTIONS}),
    )
    attachment = await services.attachments.attach(row, options, caller.uid)
    return [describer(services)(Listed(row, attachment, services.registry.catalogue.labels(row.uuid)))]


async def detach(services: Services, _caller: Caller, arguments: Arguments) -> list[Document]:
    """Stop a vTPM and take it from its guest."""
    row = services.registry.find(arguments["vtpm"])
    await services.attachments.detach(row)
    return [describe(services, row)]


async def reset_platform(services: Services, _caller: Caller, arguments: Arguments) -> list[Document]:
    """Do what the reset of a guest's platform does."""
    row = services.registry.find(arguments["vtpm"])
    await services.attachments.reset_platform(row)
    return [describe(services, row)]


async def hibernate(services: Services, _caller: Caller, arguments: Arguments) -> list[Document]:
    """Hibernate a vTPM now."""
    row = services.registry.find(arguments["vtpm"])
    await services.hibernation.hibernate(row)
    return [describe(services, row)]


async def show(services: Services, _caller: Caller, arguments: Arguments) -> list[Document]:
    """Show one vTPM."""
    removed = services.registry.tombstones.find(arguments["vtpm"])
    if removed is not None and services.registry.catalogue.find_vtpm(removed.uuid) is None:
        return [describe_removed(services, removed)]
    return [describe(services, services.registry.find(arguments["vtpm"]))]


async def reset(services: Services, _caller: Caller, arguments: Arguments) -> list[Document]:
    """Throw a vTPM's state away."""
    row = services.registry.find(arguments["vtpm"])
    _confirmed(arguments, f"this throws the state of vTPM {row.name} ({row.uuid}) away")
    async with services.attachments.lock(row.uuid):  # an attach that has begun ends first
        services.restores.used(row.uuid)
        await services.registry.reset(row)
    return [describe(services, row)]


async def remove(services: Services, caller: Caller, arguments: Arguments) -> list[Document]:
    """Remove a vTPM."""
    row = services.registry.find(arguments["vtpm"])
    _confirmed(arguments, f"this removes vTPM {row.name} ({row.uuid}), its key, and with it everything it holds")
    document = describe(services, row)
    async with services.attachments.lock(row.uuid):
        services.restores.used(row.uuid)
        event = event_text(row.name, caller.uid)
        if not await services.migration.arrivals.forget(row, f"by user {caller.uid}"):
            await services.registry.remove(row, event)
    tombstone = services.registry.tombstones.find(str(row.uuid))
    return [describe_removed(services, tombstone) if tombstone else document | {"state": "removed"}]


async def status(services: Services, _caller: Caller, _arguments: Arguments) -> list[Document]:
    """Show the manager itself."""
    return [services.status()]


async def stop(services: Services, _caller: Caller, _arguments: Arguments) -> list[Document]:
    """Stop everything cleanly; the answer comes before it is done."""
    services.stop()
    return [{"schema": SCHEMA_VERSION, "state": "stopping", "pid": os.getpid()}]


async def upgrade(services: Services, _caller: Caller, _arguments: Arguments) -> list[Document]:
    """Hand over to the installed code; the answer comes before it is done."""
    return [await services.upgrade()]


HANDLERS: Final[dict[str, Handler]] = {
    "add": add,
    "attach": attach,
    "detach": detach,
    "list": list_vtpms,
    "show": show,
    "hibernate": hibernate,
    "reset-platform": reset_platform,
    "reset": reset,
    "remove": remove,
    "verify": verify,
    **GROUP_HANDLERS,
    **QUOTE_HANDLERS,
    **MEASUREMENT_HANDLERS,
    **RESTORE_HANDLERS,
    **MIGRATION_HANDLERS,
    **SWTPM_HANDLERS,
    "label": label,
    "events": events,
    "status": status,
    "tpm-status": tpm_status,
    "backup": backup,
    "scrub": scrub,
    "compact": compact,
    "approve": approve,
    "stop": stop,
    "upgrade": upgrade,
}


def _confirmed(arguments: Arguments, what: str) -> None:
    if arguments["yes"] is not True:
        raise UsageError(f"{what}, for good; nothing was done. Say --yes if that is wanted")


def timestamp(seconds: float) -> str | None:
    """Return a point in time as ISO 8601 in UTC, None for never (0)."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if seconds else None


def uptime(started: float) -> int:
    """Return whole seconds since `started` (time.monotonic())."""
    return int(time.monotonic() - started)
