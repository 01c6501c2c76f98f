"""Which of a Xen device's requests was handed on: a mark that outlives the process that made it.

A guest's page shows SUBMIT as long as its command is not answered. A back end that was killed leaves it so, and its
successor cannot tell from the page whether the instance had the command already. It asks this ledger: one small file
a device in a directory that the boot empties, mapped, so that the mark costs one store and survives SIGKILL. It need
not survive the machine: guests do not.
"""

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Self

_MODE: Final = 0o600
_DIRECTORY_MODE: Final = 0o700
_BYTES: Final = mmap.PAGESIZE
MAGIC: Final = b"vtpmxen1"


@dataclass(frozen=True, slots=True)
class Connection:
    """Which page of which device a mark is about: Xen's numbers, as the front end published them."""

    domain: int
    device: int
    ring_ref: int
    event_channel: int

    CODEC: ClassVar[struct.Struct] = struct.Struct("<8sIIII")
    MARK: ClassVar[int] = 24  # offset of the mark's byte

    def pack(self) -> bytes:
        """Return what stands in the file before the mark."""
        return self.CODEC.pack(MAGIC, self.domain, self.device, self.ring_ref, self.event_channel)


assert Connection.CODEC.size == Connection.MARK, "the mark is the byte behind the connection"


class Ledger:
    """The mark of one connection. `found`: a back end before us handed on what the page may still show."""

    def __init__(self, path: Path, mapping: mmap.mmap, *, found: bool) -> None:
        """Take `mapping` over; use `Ledgers.open`."""
        self._path, self._mapping, self.found = path, mapping, found

    def take(self) -> None:
        """Note that the request on the page is handed on from now."""
        self._mapping[Connection.MARK] = 1

    def settle(self) -> None:
        """Note that it is answered, or given back."""
        self._mapping[Connection.MARK] = 0

    def close(self) -> None:
        """Leave the mark for whoever comes after us. May be repeated."""
        self._mapping.close()

    def discard(self) -> None:
        """Close and remove the file: the page is gone, and what was on it with it."""
        self.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Ledgers:
    """The ledgers of all devices of this domain, in a directory of ours alone."""

    def __init__(self, directory: Path) -> None:
        """Use `directory`, which is made.

        Raises:
            OSError: it cannot be made.

        """
        directory.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
        self._directory = directory

    def open(self, connection: Connection) -> Ledger:
        """Return the ledger of a connection; a mark that is about another page of the same device does not count.

        Raises:
            OSError: no room, or no rights. Whoever asked must not serve the device: he could not keep count.

        """
        path = self._directory / f"{connection.domain}-{connection.device}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, _MODE)
        try:
            os.posix_fallocate(descriptor, 0, _BYTES)  # a mapped page without a block behind it would be SIGBUS
            mapping = mmap.mmap(descriptor, _BYTES)
        finally:
            os.close(descriptor)
        here = connection.pack()
        found = mapping[: Connection.MARK] == here and mapping[Connection.MARK] != 0
        if not found:
            mapping[Connection.MARK] = 0
            mapping[: Connection.MARK] = here
        return Ledger(path, mapping, found=found)

    def known(self) -> list[tuple[int, int]]:
        """Return the (domain, device) of each file; who has no device any more has no use for its file."""
        found = []
        for entry in self._directory.iterdir():
            domain, _, device = entry.name.partition("-")
            if domain.isdecimal() and device.isdecimal():
                found.append((int(domain), int(device)))
        return sorted(found)

    def forget(self, domain: int, device: int) -> None:
        """Remove a device's file, if there is one."""
        (self._directory / f"{domain}-{device}").unlink(missing_ok=True)
