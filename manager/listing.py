"""Documents of vTPMs: of one, and of as many as there are, from one query and one look at the store for each."""

from collections.abc import AsyncGenerator, Callable
from typing import Final

import trio

from manager.attachment_epochs import staleness
from manager.attachment_words import rest_after
from manager.boot_measurements import shown as measured_words
from manager.connection_help import libvirt_xml, qemu_arguments
from manager.group_rows import find_group
from manager.labels import flat, parse_filters
from manager.migration_records import is_frozen, is_incoming
from manager.ports import PROXY
from manager.proxy_device import ProxyDevice
from manager.removed import list_removed
from manager.running import Running
from manager.services import Arguments, Caller, Document, Services
from manager.sockets import LOOPBACK, SocketFolder
from manager.tombstones import iso
from manager.verb_table import SCHEMA_VERSION
from manager.xen_listing import xen_terms
from storage.catalogue_rows import AttachmentRow, Filter, Listed, VtpmRow
from storage.errors import StorageError
from storage.store_records import RecordFlags, VtpmRecord

_AT_ONCE: Final = 250  # rows between which others get a turn: about 10 ms
# of the 15 connections that the catalogue has at once: the event loop, which would wait for one, always finds one
READERS: Final = trio.CapacityLimiter(4)


def state_of(
    running: Running | None, flags: RecordFlags, attached: bool, asleep: bool = False, elsewhere: bool = False
) -> str:
    """Return a vTPM's state in one word, as users see it (docs/states.md); `flags` are its record's.

    `elsewhere`: it is attached, and its instance lives in a domain of its own.
    """
    if running is not None:
        return running.stage.value
    if asleep:
        return "hibernated"
    told = (
        ("frozen", is_frozen(flags)),
        ("quarantined", flags & RecordFlags.QUARANTINED),
        ("waiting", elsewhere),
        ("down", attached),
        ("incoming", is_incoming(flags)),
        ("added", flags & RecordFlags.FRESH),
    )
    return next((state for state, is_so in told if is_so), "detached")


def describe(services: Services, row: VtpmRow) -> Document:
    """Return the document of one vTPM: one flat object, every field always there (null where it has no value)."""
    catalogue = services.registry.catalogue
    return describer(services)(Listed(row, catalogue.find_attachment(row.uuid), catalogue.labels(row.uuid)))


def describer(services: Services) -> Callable[[Listed], Document]:
    """Return what makes documents out of rows; it has read the groups' names once."""
    registry = services.registry
    names = {row.uuid: row.name for row in registry.catalogue.groups()}

    def describe_one(listed: Listed) -> Document:
        row, attachment = listed.vtpm, listed.attachment
        running = services.attachments.running(row.uuid)
        state, record = _look(services, row, running, attachment)
        document: Document = {
            "schema": SCHEMA_VERSION,
            "uuid": str(row.uuid),
            "name": row.name,
            "group": names.get(row.group, str(row.group)),
            "tpm": row.family,
            "state": state,
            "guest": attachment.guest if attachment else None,
            "frontend": attachment.frontend if attachment else None,
            "endpoint": None,
            "tcti": None,
            "control": None,
            "owner": attachment.owner if attachment else None,
            "mode": attachment.mode if attachment else None,
            "qemu": None,
            "libvirt_xml": None,
            "device": None,
            "device_numbers": None,
            "resource_manager_numbers": None,
            "pid": (running.pid or None) if running else None,
            "reason": registry.closed.get(row.group) if state == "closed" else services.attachments.reason(row.uuid),
            "release": services.attachments.release(row.uuid),
            "outdated": running is not None and services.attachments.is_outdated(row.uuid),
            **_terms(services, attachment),
            **xen_terms(attachment, services.attachments.bindings.of(row.uuid)),
            "hibernated_since": _moment(services.attachments.sleepers.since(row.uuid)),
            "generation": record and record.generation,
            "restore": record and services.restores.policy(row.uuid, record.flags).value,
            "restore_refused": services.imports.refused.get(row.uuid),
            "state_image": str(registry.image_path(row)),
            "created": row.created,
            "labels": flat(listed.labels),
            **_elsewhere(services, row, record),
            "removed": None,
            "removed_by": None,
            "kept_until": None,
        }
        if attachment:
            document |= _places(services, row, attachment)
        if row.family != "2.0":
            document["tcti"] = None  # tpm2-tss knows TPM 2.0 only
        return document

    return describe_one


def _look(
    services: Services, row: VtpmRow, running: Running | None, attachment: AttachmentRow | None
) -> tuple[str, VtpmRecord | None]:
    """Return a vTPM's state in one word, and its record, None where it cannot be read."""
    registry, vtpm = services.registry, row.uuid
    try:
        record = registry.committer.store.get(vtpm)
    except StorageError:
        if running is not None:
            return running.stage.value, None
        if row.group in registry.closed:
            return "closed", None
        # no record, or its sector is damaged: vtpm-verify tells which
        return "missing", None
    if running is None and attachment is not None and staleness(record, attachment):
        attachment = registry.catalogue.find_attachment(vtpm)  # the listing read it some time ago
        if attachment is not None and staleness(record, attachment):
            return "stale", record
    asleep = vtpm in services.attachments.sleepers
    elsewhere = attachment is not None and bool(attachment.instance_domain)
    return state_of(running, record.flags, attachment is not None, asleep, elsewhere), record


def _terms(services: Services, attachment: AttachmentRow | None) -> Document:
    """Return how a vTPM is attached, beside what a guest reaches it by."""
    return {
        "startup": attachment.startup if attachment else None,
        "hwinitpcrs": (attachment.hw_pcrs or None) if attachment else None,
        "measure": measured_words(attachment.measure) if attachment else None,
        "measured": measured_words(attachment.measured) if attachment else None,
        "late_attach": attachment.ran_before if attachment else None,
        "hibernate_after": rest_after(attachment, services.config.instance) if attachment else None,
        "commands_per_second": attachment.commands_per_second or None if attachment else None,
        "saves_per_second": attachment.saves_per_second or None if attachment else None,
        "nv_bytes": attachment.nv_bytes or None if attachment else None,
    }


def _elsewhere(services: Services, row: VtpmRow, record: VtpmRecord | None) -> Document:
    """Return which other manager claimed a vTPM, and since when; or from which one it is to come."""
    departure = services.migration.departures.of(row.uuid) if record and is_frozen(record.flags) else None
    arrival = services.migration.arrivals.of(row.uuid)
    return {
        "claimed_by": departure and departure.peer,
        "frozen_since": departure and iso(departure.since),
        "comes_from": arrival and arrival.peer,
        "migrated_to": None,
    }


def _moment(seconds: float) -> str | None:
    return iso(seconds) if seconds else None


def _places(services: Services, row: VtpmRow, attachment: AttachmentRow) -> Document:
    if attachment.instance_domain:
        return {"state_image": None}  # that domain has it
    if attachment.frontend == PROXY:
        return _device(services.attachments.sleepers.ports.device(attachment))
    if attachment.tcp_port:
        return _tcp_places(attachment)
    folder = SocketFolder(services.sockets, row.uuid, attachment.frontend)
    places: Document = {"endpoint": str(folder.endpoint)}
    if "control" in folder.names:
        control = str(folder.socket_path("control"))
        places |= {"tcti": f"swtpm:path={folder.socket_path('data')}", "control": control}
        if attachment.frontend == "qemu":
            places |= {
                "qemu": qemu_arguments(control, row.uuid, row.family),
                "libvirt_xml": libvirt_xml(control, row.family),
            }
    return places


def _tcp_places(attachment: AttachmentRow) -> Document:
    port = attachment.tcp_port
    kind = "mssim" if attachment.frontend == "mssim" else "swtpm"
    return {
        "endpoint": f"{LOOPBACK}:{port}",
        "tcti": f"{kind}:host={LOOPBACK},port={port}",
        "control": f"{LOOPBACK}:{port + 1}",
    }


def _device(device: ProxyDevice | None) -> Document:
    """Return what tells of a device: its own numbers, and those of the kernel's resource manager where it has one."""
    if device is None:
        return {}
    best = device.paths[-1]
    return {
        "endpoint": str(best),
        "tcti": f"device:{best}",
        "device": str(device.path),
        "device_numbers": f"{device.major}:{device.minor}",
        "resource_manager_numbers": device.manager_numbers,
    }


async def list_vtpms(services: Services, _caller: Caller, arguments: Arguments) -> AsyncGenerator[Document]:
    """List vTPMs by name, those that the filters let pass.

    Raises:
        NotFoundError: no such group. UsageError: no label.

    """
    if arguments["removed"]:
        async for document in list_removed(services, arguments):
            yield document
        return
    catalogue = services.registry.catalogue
    group = arguments["group"]
    found = find_group(catalogue, group) if group is not None else None
    labels = parse_filters(arguments["label"])
    only = Filter(None if found is None else found.uuid, arguments["tpm"], arguments["guest"], labels)
    make, after = describer(services), ""
    # in a thread: a filter that few vTPMs pass looks at all of them, seconds where there are 200,000
    while page := await trio.to_thread.run_sync(catalogue.listing, only, after, _AT_ONCE, limiter=READERS):
        for listed in page:
            document = make(listed)
            if arguments["state"] in (None, document["state"]):
                yield document
        after = page[-1].vtpm.name
