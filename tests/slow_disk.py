"""A disk whose flushes are slower than they are, for real processes: builds slow_flush.c and says how slow.

What lives here: the shim's build, its shared page, an installation that runs on it. What must not: measuring.
"""

import mmap
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

from e2e_rig import BIN, Installation, wait_for

SOURCE: Final = Path(__file__).with_name("slow_flush.c")
_PAGE: Final = struct.Struct("=II")  # microseconds added to each flush, flushes of all processes so far
_VARIABLE: Final = "VTPM_SLOW_FLUSH"


class SlowDisk:
    """The library and its page, both in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.library, self._file = directory / "slow_flush.so", directory / "slow_flush.page"
        subprocess.run(
            ["gcc", "-O2", "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(self.library), str(SOURCE), "-ldl"],
            check=True,
        )
        self._file.write_bytes(bytes(mmap.PAGESIZE))
        with self._file.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), mmap.PAGESIZE)

    @property
    def environment(self) -> dict[str, str]:
        """What a program is started with to have the slow disk, with everything it forks."""
        return os.environ | {"LD_PRELOAD": str(self.library), _VARIABLE: str(self._file)}

    @property
    def milliseconds(self) -> float:
        """How much longer each flush takes than the disk needs; may be set while programs run."""
        return self._word(0) / 1000

    @milliseconds.setter
    def milliseconds(self, value: float) -> None:
        self._page[:4] = struct.pack("=I", round(value * 1000))

    @property
    def flushes(self) -> int:
        """How many flushes there were so far, of all programs together; wraps at 2^32."""
        return self._word(1)

    def _word(self, index: int) -> int:
        return int(_PAGE.unpack_from(self._page)[index])

    def is_under(self, pid: int) -> bool:
        """Tell whether a process has the library in it."""
        return str(self.library) in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._page.close()


def run_on(disk: SlowDisk, installation: Installation) -> None:
    """Start the manager of a provisioned installation on the slow disk, and with it keeper and instances."""
    assert installation.manager is None
    places = ("--state-dir", str(installation.state), "--runtime-dir", str(installation.runtime))
    with installation.log.open("ab") as log:
        installation.manager = subprocess.Popen(
            [str(BIN / "vtpm-manager"), "run", *places], env=disk.environment, stderr=log
        )
    wait_for(installation._ready, f"the manager; its log:\n{installation.tail()}", 120.0)


@contextmanager
def slow_disk() -> Iterator[SlowDisk]:
    """Build it in a directory of its own, as quick as the disk is until told otherwise."""
    directory = Path(tempfile.mkdtemp(prefix="vs"))
    try:
        with SlowDisk(directory) as made:
            yield made
    finally:
        shutil.rmtree(directory, ignore_errors=True)
