"""What the keeper keeps: for each instance its manager-side ring ends, pidfd and listening sockets.

Descriptors are plain numbers here, not socket objects: they are passed on and closed by number.
"""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final
from uuid import UUID

from frontend_backend.descriptors import close_all
from frontend_backend.messages_keeper import Kept, ListReply
from vtpm_instance.errors import AlreadyKeptError, BadRequestError, NoSuchInstanceError, StillRunningError
from vtpm_instance.handover import Handed
from vtpm_instance.journal import note

_LIST_CHUNK: Final = 400  # instances an answer, below 128 KiB
_CORE_DUMPED: Final = 0x80  # the bit of a wait status (waitpid(2), WCOREDUMP)


@dataclass(slots=True, eq=False)
class KeptInstance:
    """One instance. `status` is its wait status (waitpid(2)) once it has ended, None before.

    One that is `asleep` is a hibernated vTPM: there is no process and no ring (-1), but the connections it had.
    """

    vtpm: UUID
    lease: int
    pid: int
    pidfd: int
    frontend: str
    page: int
    doorbell: int
    listeners: dict[str, int]
    status: int | None = None
    asleep: bool = False
    connections: list[Handed] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        """Whether the instance has not been seen to end."""
        return self.status is None

    @property
    def descriptors(self) -> list[int]:
        """What Fetch hands over: page, manager's doorbell, pidfd, listeners in their order."""
        return [self.page, self.doorbell, self.pidfd, *self.listeners.values()]

    @property
    def all_descriptors(self) -> list[int]:
        """Everything that is open of it."""
        connected = (descriptor for each in self.connections for descriptor in each.descriptors)
        return [*(descriptor for descriptor in self.descriptors if descriptor >= 0), *connected]

    def describe(self) -> Kept:
        """Return the entry for a list; process 0 says that it is hibernated."""
        pid = 0 if self.asleep else self.pid
        return Kept(self.vtpm.bytes, self.lease, pid, self.frontend, tuple(self.listeners), self.alive, self.status)

    def reap(self) -> None:
        """Collect the wait status of an instance that has ended."""
        ended = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        if ended is not None:
            self.status = _wait_status(ended)
            if os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGSYS:
                note(
                    f"the instance of {self.vtpm} was ended over a system call that it must not make; the kernel's log "
                    "(dmesg, type=1326) names it; was it taken over? Its acknowledged state is kept"
                )


def _wait_status(ended: os.waitid_result) -> int:
    """Return what waitpid(2) would have told."""
    if ended.si_code == os.CLD_EXITED:
        return ended.si_status << 8
    return ended.si_status | (_CORE_DUMPED if ended.si_code == os.CLD_DUMPED else 0)


class Keeping:
    """All kept instances, by vTPM and lease."""

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._instances: dict[tuple[UUID, int], KeptInstance] = {}
        self._leases: dict[UUID, list[int]] = {}

    def __len__(self) -> int:
        return len(self._instances)

    def __iter__(self) -> Iterator[KeptInstance]:
        return iter(self._instances.values())

    def refuse_second(self, vtpm: UUID, lease: int) -> None:
        """Check that an instance of `vtpm` may be started.

        Raises:
            AlreadyKeptError: one runs, or an ended one has the same lease.

        """
        for kept in (self._instances[vtpm, known] for known in self._leases.get(vtpm, ())):
            if kept.alive or kept.asleep or kept.lease == lease:
                raise AlreadyKeptError(vtpm, kept.lease)

    def add(self, kept: KeptInstance) -> None:
        """Keep one more."""
        self._instances[kept.vtpm, kept.lease] = kept
        self._leases.setdefault(kept.vtpm, []).append(kept.lease)

    def listed_from(self, offset: int) -> ListReply:
        """Return a part of what is kept, from the `offset`th on.

        Raises:
            BadRequestError: a list begins at 0.

        """
        if offset < 0:
            raise BadRequestError(f"a list begins at 0, not {offset}")
        chunk = islice(self, offset, offset + _LIST_CHUNK)
        return ListReply(tuple(kept.describe() for kept in chunk), len(self))

    def end_strays(self, others: set[int]) -> None:
        """End what a lost spawner may have made without telling: nobody could stop it or find it again.

        `others` are processes that are no instances, and known.
        """
        known = {kept.pid for kept in self if kept.alive} | others
        for child in _children():
            if child not in known:
                note(f"process {child} was made but not announced, so it is ended")
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)

    def get(self, vtpm: UUID, lease: int) -> KeptInstance:
        """Return one.

        Raises:
            NoSuchInstanceError: it is not kept.

        """
        try:
            return self._instances[vtpm, lease]
        except KeyError:
            raise NoSuchInstanceError(vtpm, lease) from None

    def asleep(self, vtpm: UUID, lease: int) -> KeptInstance:
        """Return a hibernated one.

        Raises:
            NoSuchInstanceError: it is not kept. BadRequestError: it is not hibernated.

        """
        kept = self.get(vtpm, lease)
        if not kept.asleep:
            raise BadRequestError(f"vTPM {vtpm} with lease {lease} is not hibernated")
        return kept

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
        self._leases[vtpm].remove(lease)
        if not self._leases[vtpm]:
            del self._leases[vtpm]
        close_all(kept.all_descriptors)
        return kept.status


def _children() -> list[int]:
    """Return the children of this process (proc(5)); it has one thread."""
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return [int(word) for word in file.read().split()]
