"""What the verbs about quotes do. Documents out; errors are ManagerError."""

from functools import partial
from typing import Final

from manager.attest_enrolment import Challenge
from manager.errors import UsageError
from manager.policy import parse_any_pcrs
from manager.services import Arguments, Caller, Document, Handler, Services
from manager.verb_table import SCHEMA_VERSION

_ALL: Final = "all"


async def quote(services: Services, caller: Caller, arguments: Arguments) -> list[Document]:
    """Quote a vTPM."""
    row = services.registry.find(arguments["vtpm"])
    nonce = _nonce(arguments["nonce"])
    pcrs = range(24) if arguments["pcrs"] == _ALL else parse_any_pcrs(arguments["pcrs"])
    selection = sum(1 << pcr for pcr in pcrs)
    services.quotes.refuse(row, nonce, selection)
    async with services.attachments.lock(row.uuid):  # it stays as it is until the bundle is made
        awake = partial(services.hibernation.awake, row)
        bundle = await services.quotes.of(row, awake, nonce, selection)
    group = services.registry.group_name(row.group)
    services.registry.catalogue.log("quoted", row.uuid, f"{row.name}, by user {caller.uid}")
    return [
        {
            "schema": SCHEMA_VERSION,
            "uuid": str(row.uuid),
            "name": row.name,
            "group": group,
            "nonce": nonce.hex(),
            "bytes": len(bundle),
            "bundle": bundle.hex(),
        }
    ]


def _nonce(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise UsageError(f"the nonce '{text[:80]}' is not hexadecimal. Nothing was quoted") from None


async def enroll(services: Services, _caller: Caller, arguments: Arguments) -> list[Document]:
    """Enrol a group's attestation key: its request, or its proof."""
    row = services.groups.find(arguments["group"])
    if arguments["challenge"] is None:
        request, how = await services.attestation.request(row, fresh=arguments["renew"])
        text, step, name = request.to_text(), "request", request.attestation.name.hex()
    elif arguments["renew"]:
        raise UsageError("a challenge is for the key that there is: --renew belongs to the request. Nothing was done")
    else:
        proof = await services.attestation.prove(row, Challenge.from_text(arguments["challenge"]))
        text, step, name, how = proof.to_text(), "proof", proof.attestation_name, "kept"
    return [
        {
            "schema": SCHEMA_VERSION,
            "uuid": str(row.uuid),
            "name": row.name,
            "step": step,
            "ak": name,
            "key": how,
            "document": text,
        }
    ]


QUOTE_HANDLERS: Final[dict[str, Handler]] = {"quote": quote, "group-enroll": enroll}
