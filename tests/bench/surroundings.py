"""What a number depends on beside the code: machine, versions, disk, how busy everything was."""

import os
import platform
import shutil
import sqlite3
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from subjects import REPOSITORY

from vtpm_instance.libtpms import the_tpm

NOISE = (
    "How noise is dealt with: whatever is compared runs in the same minutes and takes turns call by call or block by "
    "block, the first place in each turn alternating; a ratio is the median of the ratios of single rounds, and the "
    "lowest and highest round stand beside it; a time is the median of the rounds' medians, so that a disturbed round "
    "does not move it; floors are compared by their least disturbed round. Percentiles are over all calls and do "
    "show the disturbances. There is no timed assertion anywhere: a missed target is printed as missed."
)
_GIB = 1 << 30


def load() -> str:
    """Return the load average over the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


def machine() -> tuple[str, ...]:
    """Return a line for each thing that the numbers depend on and that stays from run to run."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    return (
        f"machine: {_cpu()}, {os.cpu_count()} CPUs, {memory:.0f} GiB, Linux {platform.release()}",
        f"disk: {_file_system(REPOSITORY)}",
        f"versions: Python {platform.python_version()}, {_said('swtpm', '--version')}, libtpms "
        f"{'.'.join(map(str, the_tpm().version()))}, SQLite {sqlite3.sqlite_version}, "
        + ", ".join(f"{name} {metadata.version(name)}" for name in ("cffi", "cryptography", "lmdb", "trio")),
    )


def line(load_before: str, seconds: float) -> str:
    """Return the line on one benchmark's run."""
    return (
        f"{datetime.now(UTC).isoformat(timespec='minutes')}, {seconds:.0f} s, commit {_commit()}; load average "
        f"{load_before} before, {load()} after (the run itself makes about 1)"
    )


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    virtual = any("hypervisor" in line for line in lines if line.startswith("flags"))
    return (names[0] if names else platform.machine()) + (", virtual machine" if virtual else "")


def _commit() -> str:
    said = subprocess.run(
        ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=10"],
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip() or "unknown"


def _said(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return f"{command[0]} missing"
    text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    version = next((word for word in text.replace(",", " ").split() if word[:1].isdigit()), "unknown")
    return f"{command[0]} {version}"


def _file_system(path: Path) -> str:
    """Return type and options of the file system that holds `path` (proc(5), mountinfo)."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            kind, source, options = after.split()[:3]
            return f"{kind} on {source} ({options})"
    return "unknown"
