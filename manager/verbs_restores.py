"""What the verb about older states does. Documents out; errors are ManagerError."""

from typing import Final

from manager.errors import UsageError
from manager.listing import describe
from manager.restores import Policy
from manager.services import Arguments, Caller, Document, Handler, Services


async def allow_restore(services: Services, caller: Caller, arguments: Arguments) -> list[Document]:
    """Permit that an older state of a vTPM is put in place of its newest one, or take that back."""
    row = services.registry.find(arguments["vtpm"])
    asked = [policy for policy in Policy if arguments[policy.value]]
    if len(asked) > 1:
        raise UsageError("say one of --once, --always and --never. Nothing was changed")
    async with services.attachments.lock(row.uuid):
        await services.restores.permit(row, asked[0] if asked else Policy.ONCE, caller.uid)
    return [describe(services, row)]


RESTORE_HANDLERS: Final[dict[str, Handler]] = {"allow-restore": allow_restore}
