"""What the verbs `import` and `export` do: states of swtpm's become vTPMs, and the way out.

What is in a blob is libtpms' business: whether it takes the state is found out when the vTPM is first attached. Blobs
come and go in memory of the command's (memfd), which only it and root can look into.
"""

import os
import stat
from collections.abc import AsyncGenerator
from typing import Final

import trio

from frontend_backend.messages_admin import Note
from manager import migration_records
from manager.adoption import adopt, stored_blobs
from manager.errors import ConflictError, DeniedError, IntegrityError, UsageError
from manager.labels import parse_labels
from manager.listing import describe
from manager.services import Arguments, Caller, Document, Handler, Services
from storage.catalogue import VtpmRow
from storage.errors import BlobsRefused
from storage.state_format import MAX_BLOB_BYTES, Blobs, pack_blobs, unpack_blobs
from storage.store_records import RecordFlags

_KEPT_NAMES: Final = ("permall", "savestate")  # a volatile state is used once, where it was made


async def import_state(services: Services, caller: Caller, arguments: Arguments) -> list[Document]:
    """Adopt a TPM's state as a new vTPM."""
    blobs = _handed_in(caller)
    if arguments["tpm"] is None:
        raise UsageError("the request does not say of which family the TPM is")
    row, generation = await adopt(
        services.registry,
        arguments["name"],
        arguments["uuid"],
        arguments["group"],
        arguments["tpm"],
        parse_labels(arguments["label"]),
        blobs,
        f"a state of swtpm's, by user {caller.uid}",
    )
    return [describe(services, row) | {"generation": generation}]


def _memory(caller: Caller) -> int:
    """Return the descriptor of the memory that came with the request. Raises UsageError."""
    if len(caller.descriptors) != 1:
        raise UsageError("no state came with the request: use the command of this verb")
    status = os.fstat(caller.descriptors[0])
    if not stat.S_ISREG(status.st_mode) or status.st_nlink:
        raise UsageError("a state travels in memory without a name, not in a file")
    return caller.descriptors[0]


def _handed_in(caller: Caller) -> Blobs:
    content = os.pread(_memory(caller), MAX_BLOB_BYTES + 1, 0)
    if len(content) > MAX_BLOB_BYTES:
        raise UsageError(f"a state has at most {MAX_BLOB_BYTES} bytes; nothing was made")
    try:
        blobs = unpack_blobs(content)
    except BlobsRefused as error:
        raise IntegrityError(f"what came is no state: {error}; nothing was made") from error
    return Blobs({name: blobs[name] for name in _KEPT_NAMES if name in blobs})


async def export_state(services: Services, caller: Caller, arguments: Arguments) -> AsyncGenerator[Document | Note]:
    """Let a detached vTPM's state out, where its group allows it; it stays a vTPM here."""
    row, memory = services.registry.find(arguments["vtpm"]), _memory(caller)
    _refuse(services, row, services.registry.record(row.uuid).flags)
    if arguments["yes"] is not True:
        raise UsageError(f"{_given_up(row)} Nothing was done. Say --yes if that is wanted")
    async with services.attachments.lock(row.uuid):  # it is not started, claimed or removed meanwhile
        row = services.registry.find(str(row.uuid))
        record = services.registry.record(row.uuid)
        _refuse(services, row, record.flags)
        blobs = await trio.to_thread.run_sync(stored_blobs, services.registry.image_path(row), record)
        text = f"{row.name}: state of generation {record.generation} handed out as swtpm's files, by user {caller.uid}"
        services.registry.catalogue.log("exported", row.uuid, text)  # whatever becomes of it there
        os.pwrite(memory, pack_blobs(Blobs({name: blobs[name] for name in _KEPT_NAMES if name in blobs})), 0)
    yield Note(_given_up(row))
    yield describe(services, row) | {"generation": record.generation}


def _given_up(row: VtpmRow) -> str:
    return (
        f"the exported files of {row.name} are not sealed to this machine, and an older copy cannot be told from the "
        f"newest. The same TPM also stays here: 'vtpm-remove {row.name}' before the other one runs, or there are two "
        "with the same keys."
    )


def _refuse(services: Services, row: VtpmRow, flags: RecordFlags) -> None:
    """Raise DeniedError, ConflictError or IntegrityError unless the state may go out."""
    group = services.groups.find(str(row.group))
    if not services.groups.seal(row.group).exportable:
        raise DeniedError(
            f"group {group.name} allows no exports; nothing was written. Whoever administers it may allow them: "
            f"'vtpm-group-update {group.name} --allow-export yes'"
        )
    attachment = services.registry.catalogue.find_attachment(row.uuid)
    if attachment is not None:
        raise ConflictError(
            f"vTPM {row.name} is attached to guest {attachment.guest}: run 'vtpm-detach {row.name}' first"
        )
    if flags & RecordFlags.FRESH:
        raise ConflictError(f"vTPM {row.name} was never started: there is no state that could be exported")
    if flags & RecordFlags.QUARANTINED:
        raise IntegrityError(f"vTPM {row.name} is quarantined; nothing was written")
    away = migration_records.objection(flags, claimed=False)
    if away is not None:
        raise ConflictError(f"vTPM {row.name}: {away}; nothing was written")


SWTPM_HANDLERS: Final[dict[str, Handler]] = {"import": import_state, "export": export_state}
