"""What the verbs about migration do. Documents out; errors are ManagerError."""

import re
import time
from collections.abc import Sequence
from typing import Final
from uuid import UUID

from manager.errors import UsageError
from manager.group_rows import find_group
from manager.listing import describe
from manager.migration_identity import parse_certificate
from manager.migration_state import Peer
from manager.registry import check_name
from manager.removed import describe_removed
from manager.services import Arguments, Caller, Document, Handler, Services
from manager.tombstones import iso
from manager.verb_table import SCHEMA_VERSION
from manager.verb_table_migration import MIGRATION_VERBS

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION: Final = re.compile(r"([0-9]{1,9})([smhd])")
_LONGEST: Final = 3650 * 86400


async def identity(services: Services, caller: Caller, arguments: Arguments) -> list[Document]:
    """Print who this manager is for others."""
    if arguments["anew"]:
        _confirmed(arguments, "this forgets every paired manager, what was to come, and who claimed what is frozen")
        await services.migration.begin_anew(caller.uid)
    made = await services.migration.identity()
    _, fingerprint, store = parse_certificate(made.certificate)
    return [
        {
            "schema": SCHEMA_VERSION,
            "store": str(store),
            "fingerprint": fingerprint,
            "listen": services.config.migration.listen or None,
            "certificate": made.certificate,
        }
    ]


async def authorise(services: Services, caller: Caller, arguments: Arguments) -> list[Document]:
    """Pair with another manager, or change what it may."""
    name = check_name(arguments["peer"], "name of a peer")
    before = services.migration.box.state.peers.get(name)
    certificate = arguments["certificate"] or (before.certificate if before else None)
    if certificate is None:
        raise UsageError(f"{name} is not known yet: give the file that its vtpm-migrate-identity wrote, --certificate")
    certificate, fingerprint, _ = parse_certificate(certificate)
    wanted = (arguments["fingerprint"] or fingerprint).replace(":", "").lower()
    if wanted != fingerprint:
        raise UsageError(f"this certificate has the fingerprint {fingerprint}, not {wanted[:80]}. Nothing was done")
    seconds = parse_duration(arguments["valid"])
    registry, now = services.registry, int(time.time())
    groups = [find_group(registry.catalogue, text).uuid for text in arguments["leave_group"]]
    peer = Peer(
        name=name,
        certificate=certificate,
        fingerprint=fingerprint,
        address=(before.address if before else "") if arguments["address"] is None else arguments["address"],
        leave_vtpms=tuple(dict.fromkeys(registry.find(text).uuid for text in arguments["leave"])),
        leave_groups=tuple(dict.fromkeys(groups)),
        come_vtpms=tuple(dict.fromkeys(map(_uuid, arguments["come"]))),
        come_groups=tuple(find_group(registry.catalogue, text).uuid for text in arguments["come_group"]),
        until=now + seconds,
        made=now,
        by=caller.uid,
    )
    await services.migration.authorise(peer)
    return [_describe(services, peer)]


async def peers(services: Services, _caller: Caller, _arguments: Arguments) -> list[Document]:
    """List paired managers."""
    known = services.migration.box.state.peers
    return [_describe(services, known[name]) for name in sorted(known)]


async def revoke(services: Services, caller: Caller, arguments: Arguments) -> list[Document]:
    """Forget another manager."""
    return [_describe(services, await services.migration.revoke(arguments["peer"], caller.uid))]


async def expect(services: Services, caller: Caller, arguments: Arguments) -> list[Document]:
    """Make an incoming vTPM."""
    peer = services.migration.peer(arguments["peer"])
    row = await services.migration.arrivals.expect(
        peer, _uuid(arguments["uuid"]), arguments["name"], arguments["group"], arguments["tpm"], caller.uid
    )
    return [describe(services, row)]


async def release(services: Services, caller: Caller, arguments: Arguments) -> list[Document]:
    """Remove a frozen vTPM."""
    row = services.registry.find(arguments["vtpm"])
    _confirmed(
        arguments, f"this removes vTPM {row.name} ({row.uuid}) and its key: only the other manager may have it then"
    )
    document = describe(services, row)
    await services.migration.departures.release(row, caller.uid)
    tombstone = services.registry.tombstones.find(str(row.uuid))
    return [describe_removed(services, tombstone) if tombstone else document | {"state": "removed"}]


async def reclaim(services: Services, caller: Caller, arguments: Arguments) -> list[Document]:
    """Take a frozen vTPM back."""
    row = services.registry.find(arguments["vtpm"])
    unasked = arguments["destination_is_gone"]
    what = f"this takes vTPM {row.name} ({row.uuid}) back"
    if unasked:
        what += " WITHOUT asking the manager that claimed it: if that one or a copy of it ever runs it, there are two"
    _confirmed(arguments, what)
    await services.migration.departures.reclaim(row, caller.uid, unasked=unasked)
    return [describe(services, row)]


MIGRATION_HANDLERS: Final[dict[str, Handler]] = {
    "migrate-identity": identity,
    "migrate-authorise": authorise,
    "migrate-list": peers,
    "migrate-revoke": revoke,
    "migrate-expect": expect,
    "migrate-release": release,
    "migrate-reclaim": reclaim,
}
assert MIGRATION_HANDLERS.keys() == {verb.name for verb in MIGRATION_VERBS}


def _describe(services: Services, peer: Peer) -> Document:
    return {
        "schema": SCHEMA_VERSION,
        "peer": peer.name,
        "fingerprint": peer.fingerprint,
        "store": str(parse_certificate(peer.certificate)[2]),
        "address": peer.address or None,
        "leave": _words(services, peer.leave_vtpms, peer.leave_groups),
        "come": _words(services, peer.come_vtpms, peer.come_groups),
        "until": iso(peer.until),
        "expired": time.time() >= peer.until,
        "authorised": iso(peer.made),
        "by": peer.by,
    }


def _words(services: Services, vtpms: Sequence[UUID], groups: Sequence[UUID]) -> str | None:
    """Return vTPMs and groups in one text; a vTPM that is not here (yet) by its UUID."""
    rows = {vtpm: services.registry.catalogue.find_vtpm(vtpm) for vtpm in vtpms}
    parts = [row.name if row else str(vtpm) for vtpm, row in rows.items()]
    return ", ".join([*parts, *(f"group {services.registry.group_name(group)}" for group in groups)]) or None


def parse_duration(text: str) -> int:
    """Return the seconds of a time like 90s, 30m, 12h or 7d. Raises UsageError."""
    found = _DURATION.fullmatch(text)
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 0 < seconds <= _LONGEST:
        raise UsageError(f"--valid {text[:40]}: a number and s, m, h or d, ten years at most. Nothing was done")
    return seconds


def _uuid(text: str) -> UUID:
    try:
        vtpm = UUID(text)
    except ValueError:
        raise UsageError(f"'{text[:80]}' is no UUID: 'vtpm-show' at the source says it. Nothing was done") from None
    if not vtpm.int:
        raise UsageError("the zero UUID names no vTPM. Nothing was done")
    return vtpm


def _confirmed(arguments: Arguments, what: str) -> None:
    if arguments["yes"] is not True:
        raise UsageError(f"{what}; nothing was done. Say --yes if that is wanted")
