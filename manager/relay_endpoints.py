"""Where the near side listens, by vTPM: sockets in a folder of its name, and ports of 127.0.0.1 that stay the same.

A vTPM gets the lowest free place when its name is first seen, and keeps it, whatever comes and goes beside it: port
BASE + place x STEP for TPM commands and the next one for control, as tpm2-tss and swtpm have them. The assignment is a
file; a name that is not used any more keeps its place until somebody takes it out of the file.
"""

import json
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from manager.durable import sync_directory
from manager.errors import ConfigurationError, UsageError
from manager.relay_vtpms import check_name
from manager.sockets import BACKLOG, LOOPBACK, Owner, listen_on_path

MAX_PLACES: Final = 4096
_LAST_PORT: Final = (1 << 16) - 1
_LOWEST_STEP: Final = 2  # two ports a vTPM
CONTROL, DATA = "swtpm.sock.ctrl", "swtpm.sock"


@dataclass(frozen=True, slots=True)
class Ports:
    """From which port on, in which steps."""

    base: int
    step: int = 10

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read BASE[:STEP]. Raises UsageError."""
        base, _, step = text.partition(":")
        try:
            made = cls(int(base), int(step or 10))
        except ValueError:
            made = cls(0, 0)
        if not 0 < made.base < _LAST_PORT or not _LOWEST_STEP <= made.step <= _LAST_PORT:
            raise UsageError(f"'{text[:40]}' is not BASE[:STEP]: a first port, and a step of at least {_LOWEST_STEP}")
        return made

    def of(self, place: int) -> int:
        """Return the data port of a place; the control port is the next one. Raises ConfigurationError."""
        port = self.base + place * self.step
        if port >= _LAST_PORT:
            raise ConfigurationError(f"there is no port {port} for place {place}: begin lower, or take smaller steps")
        return port


class Assignments:
    """Which place each name has, in a file."""

    def __init__(self, path: Path) -> None:
        """Read them.

        Raises:
            ConfigurationError: the file is not what `write` made; nothing is assigned anew over it.

        """
        self._path, self._unfinished = path, path.with_suffix(".new")
        self.places: dict[str, int] = {}
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{path} cannot be read: {error}. It says which vTPM has which port") from error
        if not isinstance(found, dict) or not all(
            check_name(name) and isinstance(place, int) and 0 <= place < MAX_PLACES for name, place in found.items()
        ):
            raise ConfigurationError(f"{path} does not say which vTPM has which port; put it right, or remove it")
        if len(set(found.values())) != len(found):
            raise ConfigurationError(f"{path} gives one place to two vTPMs; put it right, or remove it")
        self.places = found

    def add(self, names: Iterable[str]) -> list[str]:
        """Give places to names that have none, in the order of the alphabet; returns those, durable by then.

        A vTPM that is called as this file is gets none: its folder would be where the file is.

        Raises:
            ConfigurationError: the file cannot be written; nothing was assigned.

        """
        ours = (self._path.name, self._unfinished.name)
        new = sorted({name for name in names if name not in self.places and check_name(name) and name not in ours})
        used = set(self.places.values())
        free = (place for place in range(MAX_PLACES) if place not in used)
        added = dict(zip(new, free, strict=False))
        if added:
            self._write(self.places | added)
            self.places |= added
        return list(added)

    def _write(self, places: dict[str, int]) -> None:
        try:
            with self._unfinished.open("w", encoding="ascii") as file:
                json.dump(places, file, indent=1, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            self._unfinished.rename(self._path)
            sync_directory(self._path.parent)
        except OSError as error:
            raise ConfigurationError(f"{self._path} cannot be written: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one vTPM is reached."""

    name: str
    folder: Path
    port: int | None

    @property
    def control(self) -> Path:
        """The control socket: what QEMU is told."""
        return self.folder / CONTROL

    @property
    def data(self) -> Path:
        """The data socket."""
        return self.folder / DATA

    def describe(self) -> dict[str, str | int | None]:
        """Return what `vtpm-relay list` prints."""
        chardev = f"socket,id=vtpm0,path={str(self.control).replace(',', ',,')}"
        return {
            "name": self.name,
            "control": str(self.control),
            "data": str(self.data),
            "port": self.port,
            "control_port": None if self.port is None else self.port + 1,
            "tcti": f"swtpm:path={self.data}",
            "qemu": f"-chardev {chardev} -tpmdev emulator,id=tpm0,chardev=vtpm0 -device tpm-crb,tpmdev=tpm0",
        }

    def listen(self, owner: Owner, mode: int) -> list[tuple[socket.socket, bool]]:
        """Return new listening sockets, each with whether it is for control.

        Raises:
            OSError: one cannot be made; none is left.

        """
        made: list[tuple[socket.socket, bool]] = []
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.chown(self.folder, os.geteuid(), os.getegid(), follow_symlinks=False)
            self.folder.chmod(0o700)
            made.append((listen_on_path(self.control, owner, mode), True))
            made.append((listen_on_path(self.data, owner, mode), False))
            if self.port is not None:
                made.append((_listen_port(self.port), False))
                made.append((_listen_port(self.port + 1), True))
            os.chown(self.folder, owner.uid, owner.gid)
            self.folder.chmod(0o700 | (0o050 if mode & 0o070 else 0) | (0o005 if mode & 0o007 else 0))
        except OSError:
            for sock, _ in made:
                sock.close()
            raise
        return made


def _listen_port(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((LOOPBACK, port))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock
