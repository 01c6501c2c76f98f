"""Commands killed at each of their system calls that change files, by strace's fault injection (strace(1), inject)."""

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_rig import BIN

# What changes files. Not openat: an interpreter makes thousands, and what it creates shows before the next of these.
CHANGES = "write,pwrite64,pwritev,fsync,fdatasync,ftruncate,rename,renameat,renameat2,unlink,unlinkat,mkdir,rmdir,link"
_CALL = re.compile(r"(\w+)\((?:([12])[,)])?")
_QUIET = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}  # else a changed module is compiled, with writes of its own


def needs_strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    tried = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip("strace is not allowed to trace here")


def changes_of(*words: str, calls: str = CHANGES) -> list[tuple[str, int]]:
    """Run a command to its end; returns its changing calls in order, each with its number among those of its name."""
    trace = Path(os.devnull)
    descriptor = os.memfd_create("strace")
    try:
        trace = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
        done = _strace(["-o", str(trace), "-e", f"trace={calls}"], words)
        assert done.returncode == 0, done.stderr
        lines = trace.read_text(errors="replace").splitlines()
    finally:
        os.close(descriptor)
    counted: Counter[str] = Counter()
    found = []
    for line in lines:
        if call := _CALL.match(line):
            counted[call[1]] += 1
            if call[2] is None:  # what it prints changes nothing
                found.append((call[1], counted[call[1]]))
    return found


def killed_at_each_change(
    *words: str, before: Callable[[], None], calls: str = CHANGES, step: int = 1
) -> Iterator[tuple[str, int]]:
    """Run the command again and again, after `before`, killed with SIGKILL at another changing call each time.

    The call itself is not carried out any more. Yields which call it was.
    """
    before()
    for name, number in changes_of(*words, calls=calls)[::step]:
        before()
        done = _strace(
            ["-o", os.devnull, "-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={number}"], words
        )
        assert done.returncode in (-9, 137), f"{name} {number}: exit {done.returncode}: {done.stderr}"
        yield name, number


def _strace(options: list[str], words: tuple[str, ...]) -> "subprocess.CompletedProcess[str]":
    program = BIN / words[0]
    command = ["strace", "-qq", *options, str(program if program.exists() else words[0]), *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=_QUIET)


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below a directory, without sockets."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
