"""How many vTPMs can run here: descriptors are counted before they are spent.

A running vTPM costs the manager one descriptor (its ring's doorbell) and its keeper up to five (page, doorbell, pidfd,
two listening sockets); there are as many keepers as that takes (manager.keepers). Whoever runs into the limit at
accept(2) or recvmsg(2) can neither serve nor say why; so the last ones are never given away.
"""

import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from manager.errors import BusyError

# descriptors: 64 administrators with 4 files each, 64 starts with image, ring and sockets at once, and our own
_MANAGERS_OWN: Final = 768
_KEEPERS_OWN: Final = 64
_MAPPINGS_OWN: Final = 2000  # of memory in the manager: libraries, arenas, threads; a ring's page is one
_MANAGERS_SHARE: Final = 1
_KEEPERS_SHARE: Final = 5
KEEPERS_MOST: Final = 64  # 1,000,000 descriptors at 20,000 each: far beyond what one manager serves
_DEFAULT_MAPPINGS: Final = 65_530  # the kernel's vm.max_map_count, for a /proc without sys (systemd's ProcSubset=pid)


def raise_descriptor_limit() -> int:
    """Raise this process's soft limit of descriptors to its hard limit, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def descriptor_limit_of(pid: int) -> int | None:
    """Return the soft limit of descriptors of a process (proc(5), limits), None where it cannot be read."""
    try:
        lines = Path(f"/proc/{pid}/limits").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line.split()[3] for line in lines if line.startswith("Max open files")), "")
    return int(found) if found.isdigit() else None


def room_of_keeper(descriptors_most: int, per_keeper: int = 0) -> int:
    """Return how many vTPMs a keeper may have that may have so many descriptors; `per_keeper` 0: no limit of ours."""
    fit = max(0, (descriptors_most - _KEEPERS_OWN) // _KEEPERS_SHARE)
    return min(fit, per_keeper) if per_keeper else fit


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many vTPMs fit, and why not more. 0 in the configuration means: as many as fit.

    `keeper_limit` is the descriptors that a keeper started by this manager may have.
    """

    configured: int
    manager_limit: int
    keeper_limit: int
    mappings: int
    per_keeper: int = 0

    @classmethod
    def found(cls, configured: int, manager_limit: int, per_keeper: int = 0) -> "Capacity":
        """Find out what this machine allows; keepers inherit the manager's limit."""
        try:
            mappings = int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))
        except FileNotFoundError:
            mappings = _DEFAULT_MAPPINGS
        return cls(configured, manager_limit, manager_limit, mappings, per_keeper)

    @property
    def by_descriptors(self) -> int:
        """Running vTPMs that the descriptors of manager and keepers, and the manager's mappings, suffice for."""
        ours = (self.manager_limit - _MANAGERS_OWN) // _MANAGERS_SHARE
        theirs = KEEPERS_MOST * room_of_keeper(self.keeper_limit, self.per_keeper)
        return max(0, min(ours, theirs, self.mappings - _MAPPINGS_OWN))

    @property
    def most(self) -> int:
        """VTPMs that may run at once."""
        return min(self.configured, self.by_descriptors) if self.configured else self.by_descriptors

    def check(self, running: int) -> None:
        """Check that one more may be started.

        Raises:
            BusyError: there is no room.

        """
        if running < self.most:
            return
        if self.configured and running >= self.configured:
            raise BusyError(
                f"{running} vTPMs run, as many as quota.running allows; nothing was started. Detach one first, or "
                f"raise quota.running in the configuration and restart the manager"
            )
        raise BusyError(
            f"{running} vTPMs run, and there are no file descriptors for another (the manager may have "
            f"{self.manager_limit}, and so may each keeper); nothing was started. Detach one first, or raise "
            f"LimitNOFILE of the manager's unit"
        )


def descriptors_in_use() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd")) - 1  # without the one that lists them
