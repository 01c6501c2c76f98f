"""What an installation holds of the system: processes, descriptors, sockets, locks, files; to find what is left."""

import os
import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, Self

from e2e_rig import Installation, wait_for

from storage.catalogue_database import SQLITE_CONNECTIONS_MOST

_SETTLE_SECONDS: Final = 20.0  # descriptors of the last dead are closed a moment after them
_PASSING: Final = ("-wal", "-shm", "-journal")  # SQLite's
_CATALOGUE: Final = (".sqlite", *_PASSING)
# What there may be more of with every vTPM, and in the manager with every keeper (docs/architecture.md)
_OF_A_VTPM: Final = {
    "keeper": Counter({"/memfd:vtpm-ring (deleted)": 1, "pidfd": 1, "socket:": 3}),
    "manager": Counter({"socket:": 1}),
}
_OF_A_KEEPER: Final = Counter({"socket:": 2})


def _stat(pid: int) -> tuple[str, int]:
    """Return state and parent of a process (proc(5)); raises OSError when it is gone."""
    state, parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:2]
    return state, int(parent)


def _role(pid: int) -> str:
    """Return what a process of an installation is; raises OSError when it is gone."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    if b"vtpm_instance.keeper" in words:
        return "keeper"
    if words and words[0].endswith(b"swtpm"):
        return "tpm"
    if any(word.endswith(b"/vtpm-manager") for word in words):
        return "manager"
    if any(b"vtpm_instance.spawner" in word for word in words):
        if Path(f"/proc/{pid}/comm").read_text().strip() == "vtpm-standby":
            return "standby"
        confined = re.search(r"^Seccomp:\t2$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return "instance" if confined else "spawner"
    return b" ".join(words).decode(errors="replace")


def roles(made: Installation) -> list[tuple[str, int]]:
    """Return the installation's processes with what each is."""
    found = []
    for pid in made.processes():
        with suppress(OSError):
            if _stat(pid)[0] not in "ZX":
                found.append((_role(pid), pid))
    return found


def descriptors(pid: int) -> Counter[str]:
    """Return what a process has open, by kind, and how often; empty when it is gone."""
    kinds: Counter[str] = Counter()
    with suppress(OSError):
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{entry}")
                kinds["pidfd" if "pidfd" in target else re.sub(r"[0-9a-f-]{36}|\[?\d+\]?", "", target)] += 1
    return kinds


def _own(there: list[tuple[str, int]]) -> set[tuple[str, tuple[tuple[str, int], ...]]]:
    """Return what processes have open beside what vTPMs and keepers take, and beside the catalogue.

    Processes of a role that have the same are one entry: it does not depend on how many keepers share the vTPMs.
    """
    parents: Counter[int] = Counter()
    for role, pid in there:
        if role == "instance":
            with suppress(OSError):
                parents[_stat(pid)[1]] += 1
    keepers = sum(role == "keeper" for role, _ in there)
    found = set()
    for role, pid in there:
        if role != "tpm":
            held = descriptors(pid)
            for kind, each in _OF_A_VTPM.get(role, Counter()).items():
                held[kind] -= each * (parents[pid] if role == "keeper" else parents.total())
            if role == "manager":
                held.subtract({kind: each * keepers for kind, each in _OF_A_KEEPER.items()})
            rest = {kind: count for kind, count in held.items() if count and not kind.endswith(_CATALOGUE)}
            found.add((role, tuple(sorted(rest.items()))))
    return found


def _connections(there: list[tuple[str, int]]) -> int:
    """Return how often the catalogue's file or one of SQLite's beside it is open in one process, at most."""
    counts = (descriptors(pid) for role, pid in there if role != "tpm")
    return max((count for kinds in counts for kind, count in kinds.items() if kind.endswith(_CATALOGUE)), default=0)


@dataclass
class Inventory:
    """What is there at one moment."""

    processes: Counter[str]
    zombies: int
    descriptors: set[tuple[str, tuple[tuple[str, int], ...]]]
    connections: int
    sockets: Counter[str]
    locks: Counter[str]
    files: set[str]

    @classmethod
    def of(cls, made: Installation) -> Self:
        """Look at an installation."""
        there = roles(made)
        files = {str(path.relative_to(made.state)) for path in made.state.rglob("*") if path.is_file()}
        return cls(
            Counter(role for role, _ in there),
            _zombies({pid for _, pid in there}),
            _own(there),
            _connections(there),
            listening(made),
            locks(made),
            {name for name in files if not name.endswith(_PASSING)},
        )

    @classmethod
    def at_rest(cls, made: Installation) -> Self:
        """Look when in each keeper the next instance stands by, which is made a moment after the last one's order."""

        def all_stand_by() -> bool:
            there = Counter(role for role, _ in roles(made))
            return there["standby"] == there["keeper"] > 0

        wait_for(all_stand_by, "an instance to stand by in each keeper")
        return cls.of(made)

    @staticmethod
    def servants(made: Installation) -> dict[str, int]:
        """Return the process ids of those of which there is one."""
        return {role: pid for role, pid in roles(made) if role != "instance"}

    def differences(self, now: "Inventory") -> list[str]:
        """Return in words what is not as it was.

        Of connections to the catalogue there may be as many as its pool has: two threads that read at once take two,
        and SQLite keeps the descriptor of one that was closed for the next.
        """
        found = [
            f"{field.name}: was {getattr(self, field.name)}, is {getattr(now, field.name)}"
            for field in fields(self)
            if field.name != "connections" and getattr(self, field.name) != getattr(now, field.name)
        ]
        if now.connections > SQLITE_CONNECTIONS_MOST:
            found.append(f"connections: {now.connections} to the catalogue, whose pool has {SQLITE_CONNECTIONS_MOST}")
        return found

    def compare(self, look: Callable[[], "Inventory"]) -> None:
        """Make sure that everything is as it was, after a moment to settle."""
        limit = time.monotonic() + _SETTLE_SECONDS
        while (differences := self.differences(look())) and time.monotonic() < limit:
            time.sleep(0.1)
        assert not differences, "\n".join(differences)

    @staticmethod
    def nothing_left(made: Installation) -> None:
        """Make sure that a stopped installation holds nothing."""
        assert not listening(made)
        assert not locks(made)
        assert not roles(made)


def _zombies(parents: set[int]) -> int:
    count = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, parent = _stat(int(entry.name))
                count += state == "Z" and parent in parents
    return count


def listening(made: Installation) -> Counter[str]:
    """Return the Unix sockets that listen below the runtime directory (proc(5): flag __SO_ACCEPTCON)."""
    found: Counter[str] = Counter()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if len(words) > 7 and words[7].startswith(str(made.base)) and int(words[3], 16) & 0x10000:
            found[words[7]] += 1
    return found


def locks(made: Installation) -> Counter[str]:
    """Return the files below the state directory that somebody has locked, with how often."""
    names = {path.stat().st_ino: str(path.relative_to(made.state)) for path in made.state.rglob("*") if path.is_file()}
    found: Counter[str] = Counter()
    for line in Path("/proc/locks").read_text().splitlines():
        inode = int(line.split()[-3].rsplit(":", 1)[1])
        if inode in names and not names[inode].endswith((*_PASSING, ".sqlite")):
            found[names[inode]] += 1
    return found
