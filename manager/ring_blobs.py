"""What a ring's server asks of whoever deals with state blobs. Who does: `imports`."""

from typing import Protocol

from frontend_backend import messages_instance as m
from frontend_backend.messages_blobs import Export, Import
from manager.running import Running
from storage.store_records import VtpmRecord


class Blobs(Protocol):
    """Deals with state blobs."""

    def export(self, running: Running, request: Export) -> m.Reply:
        """Answer an instance that wants to let its vTPM's state out."""

    async def take_in(self, running: Running, request: Import) -> m.Reply:
        """Answer an instance that was given a state to start from."""

    def objection(self, record: VtpmRecord, commit: m.Commit) -> m.Refusal | None:
        """Return why a state that came in may not be made the record's, None where it may."""

    def committed(self, record: VtpmRecord, commit: m.Commit) -> None:
        """Take note that it is durable; `record` is the one that was replaced."""

    def noted(self, running: Running, report: m.Report) -> None:
        """Take note of what an instance says of a blob that it refused by itself."""


class NoBlobs:
    """Refuses whatever is asked."""

    _REFUSAL = m.Refusal(m.RefusalCode.DENIED, "this manager takes no state blobs")

    def export(self, _running: Running, _request: Export) -> m.Reply:
        """Refuse."""
        return self._REFUSAL

    async def take_in(self, _running: Running, _request: Import) -> m.Reply:
        """Refuse."""
        return self._REFUSAL

    def objection(self, _record: VtpmRecord, _commit: m.Commit) -> m.Refusal | None:
        """Refuse."""
        return self._REFUSAL

    def committed(self, _record: VtpmRecord, _commit: m.Commit) -> None:
        """Nothing was to be committed."""

    def noted(self, _running: Running, _report: m.Report) -> None:
        """Nobody looks."""
