"""What the verbs about groups do. Documents out; errors are ManagerError."""

from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Final

import trio

from frontend_backend.messages_admin import Note
from manager.approval_key import ApproverPublic
from manager.errors import ManagerError, NotFoundError, UsageError
from manager.group_terms import Terms, Wanted
from manager.keys import GroupSeal
from manager.services import Arguments, Caller, Document, Handler, Services
from manager.verb_table import SCHEMA_VERSION
from manager.verbs_approval import install, predict, refuse_mixed, target_fields, unapproved
from storage.catalogue_rows import GroupRow


def describe_group(services: Services, row: GroupRow) -> Document:
    """Return the document of a group: one flat object, every field always there (null where it has no value).

    Of a closed group the vTPMs are those that the catalogue names; how many tombstones it has is not known.
    """
    store = services.registry.committer.store
    seal = services.groups.seal(row.uuid)
    is_open = store.is_open(row.uuid)
    terms: Terms | None = None
    with suppress(ManagerError):  # a key in the record that this version cannot read: the rest is told all the same
        terms = services.groups.terms(seal)
    return {
        "schema": SCHEMA_VERSION,
        "uuid": str(row.uuid),
        "name": row.name,
        "state": "open" if is_open else "closed",
        "reason": None if is_open else services.groups.closed.get(row.uuid),
        "pcrs": row.pcrs,
        "locality": seal.sealed.policy.locality or 0,
        "vtpms": store.count(row.uuid) if is_open else services.registry.catalogue.count_vtpms(row.uuid),
        "tombstones": store.count_tombstones(row.uuid) if is_open else None,
        "quota": seal.quota,
        "export": seal.exportable,
        "saa": ApproverPublic.parse(seal.saa.encode()).fingerprint.hex() if seal.saa else None,
        "recovery": terms.recovery.signing_fingerprint if terms is not None and terms.recovery is not None else None,
        "own_recovery": bool(seal.recovery),
        "approvals": len(seal.approvals),
        **target_fields(services, row.uuid),
        "ak": _attestation_key(seal),
        "store": str(store.uuid),
        "created": row.created or None,
    }


def _attestation_key(seal: GroupSeal) -> str | None:
    name = None if seal.ak is None else seal.ak.get("name")
    return None if name is None else str(name)


def _wanted(arguments: Arguments) -> Wanted:
    return Wanted(
        name=arguments["name"],
        pcrs=arguments["pcrs"],
        recovery=arguments["recovery"],
        saa=arguments["saa"],
        quota=arguments["quota"],
        exportable=None if arguments.get("allow_export") is None else arguments["allow_export"] == "yes",
    )


async def add(services: Services, _caller: Caller, arguments: Arguments) -> AsyncGenerator[Document | Note]:
    """Make a group."""
    row = await services.groups.add(arguments["name"], _wanted(arguments))
    if arguments["saa"] is not None:
        yield Note(unapproved(row.name))
    yield describe_group(services, row)


async def list_groups(services: Services, _caller: Caller, _arguments: Arguments) -> AsyncGenerator[Document]:
    """List groups by name, each in a millisecond or two, between which others get their turn."""
    for row in sorted(services.registry.catalogue.groups(), key=lambda row: row.name):
        with suppress(NotFoundError):  # it was removed meanwhile
            yield describe_group(services, row)
        await trio.lowlevel.checkpoint()


async def show(services: Services, _caller: Caller, arguments: Arguments) -> list[Document]:
    """Show one group."""
    return [describe_group(services, services.groups.find(arguments["group"]))]


async def update(services: Services, _caller: Caller, arguments: Arguments) -> AsyncGenerator[Document | Note]:
    """Change a group."""
    row, wanted = services.groups.find(arguments["group"]), _wanted(arguments)
    refuse_mixed(arguments)
    if arguments["approval"] is not None:
        done = await install(services, arguments, row.uuid)
        yield describe_group(services, row) | {"installed": done["sequence"], "holds": done["holds"]}
        return
    if wanted == Wanted():
        raise UsageError(
            "nothing was asked to be changed: give --name, --pcrs, --recovery, --saa, --quota, --allow-export "
            "or an approval"
        )
    updated = await services.groups.update(row, wanted)
    if arguments["saa"] is not None and not services.groups.seal(row.uuid).approvals:
        yield Note(unapproved(updated.name))
    yield describe_group(services, updated)


async def open_group(services: Services, _caller: Caller, arguments: Arguments) -> list[Document]:
    """Try to open a closed group; its attached vTPMs are started."""
    row = services.groups.find(arguments["group"])
    await services.groups.open(row)
    await services.start_group(row.uuid)  # also where an open that was cut short did not come to it
    return [describe_group(services, row)]


async def rotate(services: Services, _caller: Caller, arguments: Arguments) -> list[Document]:
    """Give a group a new master key."""
    row = services.groups.find(arguments["group"])
    await services.groups.rotate(row)
    return [describe_group(services, row)]


async def remove(services: Services, _caller: Caller, arguments: Arguments) -> list[Document]:
    """Remove a group."""
    row = services.groups.find(arguments["group"])
    if arguments["yes"] is not True:
        raise UsageError(
            f"this removes group {row.name} ({row.uuid}), its key and the escrow of it, for good; nothing was done. "
            f"Say --yes if that is wanted"
        )
    document = describe_group(services, row)
    await services.groups.remove(row)
    return [document | {"state": "removed"}]


GROUP_HANDLERS: Final[dict[str, Handler]] = {
    "group-add": add,
    "group-list": list_groups,
    "group-show": show,
    "group-update": update,
    "group-predict": predict,
    "group-open": open_group,
    "group-rotate": rotate,
    "group-remove": remove,
}
