"""Who permitted that an older state of a vTPM is put in place of its newest.

*Always* is a flag of the vTPM's record: in the store, so that nobody can forge it or put it back, and anchored before
it is answered. *Once* is kept in this process and nowhere else: whatever was written for it could be put back after it
was used. It ends with the first state that uses it, and with the manager (docs/adr/0011).
"""

import time
from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from manager.errors import ConflictError
from manager.registry import Registry
from storage.catalogue_rows import VtpmRow
from storage.store_records import RecordFlags


class Policy(StrEnum):
    """Whether an older state may be put in; the values are what users see."""

    NEVER = "never"
    ONCE = "once"
    ALWAYS = "always"


@dataclass(slots=True)
class _Once:
    """A permission: whose (user id), since when (seconds since 1970), for which export once it was asked for."""

    uid: int
    since: float
    export: bytes = b""


class Restores:
    """The permissions of every vTPM."""

    def __init__(self, registry: Registry) -> None:
        """Keep them in `registry`'s records, or here."""
        self._registry, self._once = registry, dict[UUID, _Once]()

    def policy(self, vtpm: UUID, flags: RecordFlags) -> Policy:
        """Return what is permitted for a vTPM whose record has these flags."""
        if flags & RecordFlags.ANY_AGE:
            return Policy.ALWAYS
        return Policy.ONCE if vtpm in self._once else Policy.NEVER

    async def permit(self, row: VtpmRow, policy: Policy, uid: int) -> None:
        """Set what is permitted, durably, and keep an event of who did it; the caller holds the vTPM's lock.

        Raises:
            ConflictError: once, where it is always permitted. DeniedError, IntegrityError, TpmError.

        """
        always = bool(self._registry.record(row.uuid).flags & RecordFlags.ANY_AGE)
        if policy is Policy.ONCE:
            if always:
                raise ConflictError(
                    f"older states of vTPM {row.name} may be restored at any time already; nothing was changed. "
                    f"'vtpm-allow-restore {row.name} --never' ends that"
                )
            self._registry.catalogue.log("restore-allowed", row.uuid, f"{row.name}: once, by user {uid}")
            self._once[row.uuid] = _Once(uid, time.time())
            return
        if policy is Policy.ALWAYS:  # the event comes first: nothing is permitted that is not told of
            self._registry.catalogue.log("restore-allowed", row.uuid, f"{row.name}: always, by user {uid}")
        self._once.pop(row.uuid, None)
        if policy is Policy.ALWAYS:
            await self._registry.flag(row.uuid, add=RecordFlags.ANY_AGE)
        else:
            await self._registry.flag(row.uuid, drop=RecordFlags.ANY_AGE)
        await self._registry.anchoring.write_durable()
        if policy is Policy.NEVER:
            self._registry.catalogue.log("restore-forbidden", row.uuid, f"{row.name}: by user {uid}")

    def may_use(self, vtpm: UUID, flags: RecordFlags, export: bytes) -> Policy:
        """Return by what an export that is not the newest state may be put in now, NEVER if it may not.

        A permission for once is for the export that asks first, as often as it asks until it was put in.
        """
        policy = self.policy(vtpm, flags)
        if policy is Policy.ONCE:
            once = self._once[vtpm]
            once.export = once.export or export
            return Policy.ONCE if once.export == export else Policy.NEVER
        return policy

    def used(self, vtpm: UUID) -> None:
        """Take away what was permitted once: it was used."""
        self._once.pop(vtpm, None)

    def words(self, vtpm: UUID) -> str:
        """Say who permitted it, for an event."""
        once = self._once.get(vtpm)
        return "as is always permitted" if once is None else f"as user {once.uid} permitted once"
