"""Debian's xenstored as a process, without Xen beneath it: for tests of everything that speaks to xenstore.

What lives here: the package (images/xen fetches it), the library that answers for the hypervisor, the process. What
must not: what is in the store.
"""

import fcntl
import functools
import importlib.util
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
SOURCE: Final = Path(__file__).with_name("xenstored_alone.c")
BUILD: Final = ROOT / "build" / "xen"  # as images/xen/build.py has it
START_SECONDS: Final = 20.0  # milliseconds, on an idle machine


@functools.cache
def xen_root() -> Path:
    """Return the directory with Debian's unpacked Xen packages, fetched once per checkout."""
    spec = importlib.util.spec_from_file_location("xen_packages", ROOT / "images" / "xen" / "packages.py")
    assert spec is not None
    assert spec.loader is not None
    packages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packages)
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # the lock of build.py
        fcntl.flock(lock, fcntl.LOCK_EX)
        return Path(packages.fetch_xen(BUILD).root)


class Xenstored:
    """One running xenstored; `socket` is where its clients come."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.socket = directory, directory / "socket"
        self.library = directory / "xenstored_alone.so"
        command = ["gcc", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(self.library), str(SOURCE)]
        subprocess.run(command, check=True)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it takes clients. A second start begins with an empty store."""
        root = xen_root()
        (program,) = root.glob("usr/lib/xen-*/bin/xenstored")
        environment = os.environ | {
            "LD_PRELOAD": str(self.library),
            "LD_LIBRARY_PATH": str(root / "usr/lib/x86_64-linux-gnu"),
            "XENSTORED_RUNDIR": str(self.directory),
            "XENSTORED_PATH": str(self.socket),
        }
        # ends with the test run, however that ends
        command = ["setpriv", "--pdeathsig", "KILL", str(program), "-N"]
        self._process = subprocess.Popen(command, env=environment)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, "xenstored ended at once"
            assert time.monotonic() < deadline, f"xenstored took no client within {START_SECONDS:g} s"
            time.sleep(0.005)

    def kill(self) -> None:
        """End it as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self.socket)) == 0


@contextmanager
def running_xenstored() -> Iterator[Xenstored]:
    """Run a xenstored of its own, with an empty store, for the time of the block."""
    with tempfile.TemporaryDirectory(prefix="xs") as directory:  # a socket's path must be short
        store = Xenstored(Path(directory))
        store.start()
        try:
            yield store
        finally:
            store.kill()
