"""What both halves of migration work with."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from frontend_backend import messages_migration as m
from manager.attachments import Attachments
from manager.instances import Instances
from manager.migration_box import MigrationBox
from manager.migration_records import frozen
from manager.migration_state import Departure, Peer
from manager.registry import Registry
from storage.catalogue_rows import VtpmRow
from storage.store_records import PutVtpm, VtpmRecord

Ask = Callable[[Peer, m.MigrationRequest], Awaitable[m.MigrationReply]]


class NotAsItWasError(Exception):
    """The vTPM was used meanwhile."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The data about migration, the vTPMs, their instances, and the way to other managers."""

    box: MigrationBox
    registry: Registry
    attachments: Attachments
    instances: Instances
    ask: Ask

    async def freeze(self, row: VtpmRow, departure: Departure, is_so: Callable[[VtpmRecord], bool]) -> None:
        """Freeze a vTPM, whose lock the caller holds, if its record is then still as wanted: durable, not yet anchored.

        Its instance is heard no more first: what it wants to save now is not saved, and what it does not save it does
        not answer. Who claims is durable before the record, so that a frozen one always says for whom.

        Raises:
            NotAsItWasError: it was used meanwhile; it goes on. StorageError, OSError: the disk.

        """
        running = self.attachments.running(row.uuid)
        if running is not None:
            await self.instances.silence(running)
        done = False
        try:
            if not is_so(self.registry.record(row.uuid)):
                raise NotAsItWasError
            await self.box.save(lambda state: state.with_departure(departure))
            await self.registry.committer.commit(PutVtpm(frozen(self.registry.record(row.uuid))))
            done = True
        finally:
            if running is not None and not done:
                self.instances.hear(running)
        await self.attachments.let_go(row, f"frozen, claimed by {departure.peer}")
