"""Documents of vTPMs: of one, and of as many as there are, from one query and one look at the store for each."""

from collections.abc import AsyncGenerator, Callable
from typing import Final
from uuid import UUID

import trio

from manager.errors import NotFoundError
from manager.running import Running
from manager.services import Arguments, Caller, Document, Services
from manager.sockets import SocketFolder
from manager.verb_table import SCHEMA_VERSION
from storage.catalogue_rows import AttachmentRow, Filter, VtpmRow
from storage.errors import GroupClosed, StorageError
from storage.store_records import RecordFlags

_AT_ONCE: Final = 250  # rows between which others get a turn: about 10 ms


def state_of(running: Running | None, flags: RecordFlags, attached: bool) -> str:
    """Return a vTPM's state in one word, as users see it (docs/states.md); `flags` are its record's."""
    if running is not None:
        return running.stage.value
    if flags & RecordFlags.QUARANTINED:
        return "quarantined"
    if attached:
        return "down"
    return "added" if flags & RecordFlags.FRESH else "detached"


def describe(services: Services, row: VtpmRow) -> Document:
    """Return the document of one vTPM: one flat object, every field always there (null where it has no value)."""
    registry = services.registry
    return describer(services)(row, registry.catalogue.find_attachment(row.uuid))


def describer(services: Services) -> Callable[[VtpmRow, AttachmentRow | None], Document]:
    """Return what makes documents out of rows; it has read the groups' names once."""
    registry, store = services.registry, services.registry.committer.store
    names = {row.uuid: row.name for row in registry.catalogue.groups()}

    def look(vtpm: UUID, running: Running | None, attached: bool) -> tuple[str, int | None]:
        try:
            record = store.get(vtpm)
        except GroupClosed:
            return "closed" if running is None else running.stage.value, None
        except StorageError:  # no record, or its sector is damaged: vtpm-verify tells which
            return "missing" if running is None else running.stage.value, None
        return state_of(running, record.flags, attached), record.generation

    def describe_one(row: VtpmRow, attachment: AttachmentRow | None) -> Document:
        running = services.attachments.running(row.uuid)
        state, generation = look(row.uuid, running, attachment is not None)
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
            "pid": running.pid if running else None,
            "reason": services.attachments.reason(row.uuid),
            "startup": attachment.startup if attachment else None,
            "generation": generation,
            "state_image": str(registry.image_path(row)),
            "created": row.created,
        }
        return document | _places(services, row.uuid, attachment) if attachment else document

    return describe_one


def _places(services: Services, vtpm: UUID, attachment: AttachmentRow) -> Document:
    folder = SocketFolder(services.sockets, vtpm, attachment.frontend)
    if attachment.frontend != "socket":
        return {"endpoint": str(folder.endpoint)}
    control = str(folder.socket_path("control"))
    return {"endpoint": str(folder.endpoint), "tcti": f"swtpm:path={folder.endpoint}", "control": control}


async def list_vtpms(services: Services, _caller: Caller, arguments: Arguments) -> AsyncGenerator[Document]:
    """List vTPMs by name, those that the filters let pass.

    Raises:
        NotFoundError: no such group.

    """
    catalogue = services.registry.catalogue
    group = arguments["group"]
    found = catalogue.find_group_by_name(group) if group is not None else None
    if group is not None and found is None:
        raise NotFoundError(f"there is no group '{group[:80]}'")
    only = Filter(None if found is None else found.uuid, arguments["tpm"], arguments["guest"])
    make, after = describer(services), ""
    while page := catalogue.listing(only, after, _AT_ONCE):
        for row, attachment in page:
            document = make(row, attachment)
            if arguments["state"] in (None, document["state"]):
                yield document
        after = page[-1][0].name
        await trio.lowlevel.checkpoint()
