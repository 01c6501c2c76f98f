"""What the verbs about boot measurements do. Documents out; errors are ManagerError."""

from typing import Final

from frontend_backend.measurements import all_from_text
from manager.boot_measurements import shown
from manager.errors import ConflictError
from manager.event_log import event_log, read_log, replay
from manager.listing import describe
from manager.measure_option import parse
from manager.services import Arguments, Caller, Document, Handler, Services
from manager.verb_table import SCHEMA_VERSION
from storage.catalogue_rows import AttachmentRow, VtpmRow

_BANK: Final = {"2.0": "sha256", "1.2": "sha1"}  # whose values are shown
_FORMAT: Final = {"2.0": "crypto-agile", "1.2": "tcg-1.2"}


async def measure(services: Services, caller: Caller, arguments: Arguments) -> list[Document]:
    """Set what the next boots of a vTPM's guest are measured by."""
    row = services.registry.find(arguments["vtpm"])
    wanted = parse(arguments["measure"])
    async with services.attachments.lock(row.uuid):
        attachment = _attachment(services, row)
        services.attachments.boots.change(attachment, services.attachments.running(row.uuid), wanted)
        text = f"{row.name}: {shown(wanted) or 'nothing'} from the next boot on, by user {caller.uid}"
        services.registry.catalogue.log("measure", row.uuid, text)
    return [describe(services, row)]


async def show_log(services: Services, _caller: Caller, arguments: Arguments) -> list[Document]:
    """Show the event log of the present boot."""
    row = services.registry.find(arguments["vtpm"])
    attachment = _attachment(services, row)
    log = event_log(row.family, all_from_text(attachment.measured))
    values = replay(read_log(log), _BANK[row.family])
    return [
        {
            "schema": SCHEMA_VERSION,
            "uuid": str(row.uuid),
            "name": row.name,
            "guest": attachment.guest,
            "format": _FORMAT[row.family],
            "measured": shown(attachment.measured),
            "late_attach": attachment.ran_before,
            "bank": _BANK[row.family],
            "pcr4": values[4].hex() if 4 in values else None,
            "pcr5": values[5].hex() if 5 in values else None,
            "event_log": log.hex(),
        }
    ]


def _attachment(services: Services, row: VtpmRow) -> AttachmentRow:
    attachment = services.registry.catalogue.find_attachment(row.uuid)
    if attachment is None:
        raise ConflictError(
            f"vTPM {row.name} is not attached, so it has no guest to be measured; nothing was done. "
            f"'vtpm-attach {row.name} GUEST --measure ...' attaches it"
        )
    return attachment


MEASUREMENT_HANDLERS: Final[dict[str, Handler]] = {"measure": measure, "event-log": show_log}
