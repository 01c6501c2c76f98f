"""What the keeper keeps: for each instance its manager-side ring ends, pidfd and listening sockets.

Descriptors are plain numbers here, not socket objects: a forked child closes them all by number, and an object
whose number is used again for something else must not close that when it goes away.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

from frontend_backend.descriptors import close_all
from frontend_backend.messages_keeper import Kept
from vtpm_instance.errors import AlreadyKeptError, NoSuchInstanceError, StillRunningError


@dataclass(slots=True)
class KeptInstance:
    """One instance. `status` is its wait status (waitpid(2)) once it has ended, None before."""

    vtpm: UUID
    lease: int
    pid: int
    pidfd: int
    frontend: str
    page: int
    doorbell: int
    listeners: dict[str, int]
    status: int | None = None

    @property
    def alive(self) -> bool:
        """Whether the instance has not been seen to end."""
        return self.status is None

    @property
    def descriptors(self) -> list[int]:
        """What Fetch hands over: page, manager's doorbell, pidfd, listeners in their order."""
        return [self.page, self.doorbell, self.pidfd, *self.listeners.values()]

    def describe(self) -> Kept:
        """Return the entry for a list."""
        return Kept(
            self.vtpm.bytes, self.lease, self.pid, self.frontend, tuple(self.listeners), self.alive, self.status
        )

    def reap(self) -> None:
        """Collect the wait status of an instance that has ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.status = status


class Keeping:
    """All kept instances, by vTPM and lease."""

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._instances: dict[tuple[UUID, int], KeptInstance] = {}

    def __len__(self) -> int:
        return len(self._instances)

    def __iter__(self) -> Iterator[KeptInstance]:
        return iter(list(self._instances.values()))

    def refuse_second(self, vtpm: UUID, lease: int) -> None:
        """Check that an instance of `vtpm` may be started.

        Raises:
            AlreadyKeptError: one runs, or an ended one has the same lease.

        """
        for kept in self._instances.values():
            if kept.vtpm == vtpm and (kept.alive or kept.lease == lease):
                raise AlreadyKeptError(vtpm, kept.lease)

    def add(self, kept: KeptInstance) -> None:
        """Keep one more."""
        self._instances[kept.vtpm, kept.lease] = kept

    def get(self, vtpm: UUID, lease: int) -> KeptInstance:
        """Return one.

        Raises:
            NoSuchInstanceError: it is not kept.

        """
        try:
            return self._instances[vtpm, lease]
        except KeyError:
            raise NoSuchInstanceError(vtpm, lease) from None

    def forget(self, vtpm: UUID, lease: int) -> int | None:
        """Drop an ended instance, close what was kept of it, return its wait status.

        Raises:
            NoSuchInstanceError: it is not kept.
            StillRunningError: it runs.

        """
        kept = self.get(vtpm, lease)
        if kept.alive:
            raise StillRunningError(vtpm, kept.pid)
        del self._instances[vtpm, lease]
        close_all(kept.descriptors)
        return kept.status
