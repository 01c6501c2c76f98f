"""What an instance is started with, or taken over with; and what is told of a process by proc(5)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from manager.errors import ManagerError
from manager.quotas import NO_QUOTA, VtpmQuota
from storage.errors import StorageError


@dataclass(frozen=True, slots=True)
class Launch:
    """What an instance is started with. `listeners` names the sockets handed to it."""

    vtpm: UUID
    lease: int
    family: str
    frontend: str
    owner_uid: int
    startup: str
    after_reset: str
    listeners: tuple[str, ...]
    epoch: int = 0
    hw_pcrs: int = 0  # as a bit map; bit 0 for PCR 0
    measure: str = ""  # as Running's
    measured: str = ""
    rest_after: float = 0.0
    quota: VtpmQuota = NO_QUOTA
    localities: int = 1
    maintenance: bool = False
    trace: bool = False
    terms: Mapping[str, Any] = field(default_factory=dict)  # of one that lives elsewhere: what else Load tells it
    wakes: bool = False  # of a hibernated vTPM, on the sockets that its keeper has


@dataclass(frozen=True, slots=True)
class Adoption:
    """What an instance is told that outlived its manager; `startup` when it has not loaded its state yet."""

    startup: str
    after_reset: str
    epoch: int
    rest_after: float
    hw_pcrs: int = 0
    measure: str = ""
    measured: str = ""


class Once:
    """Calls something at most once, keeping what it raises."""

    def __init__(self, what: Callable[[], None]) -> None:
        self._what: Callable[[], None] | None = what
        self.error: Exception | None = None

    def call(self) -> None:
        """Call it, unless that was done before."""
        what, self._what = self._what, None
        if what is None:
            return
        try:
            what()
        except (ManagerError, StorageError, OSError) as error:
            self.error = error


def uid_of(pid: int) -> int | None:
    """Return the real user id of a process (proc(5)), None when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("Uid:")), None)
