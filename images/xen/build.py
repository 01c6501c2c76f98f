"""Builds what QEMU boots to run Xen in tests: Debian's hypervisor and kernel, root disks with this project, a guest.

    images/xen/build.py [--directory build/xen]

prints a JSON document with the paths of `xen`, `kernel`, `boot` (the initramfs of dom0 and of domains of ours),
`system` (their root disk: Python, Xen's tools, what the project needs) and `project` (a disk with this checkout). The
guests' initramfs and kernel lie on the root disk, below /guest. What was built from the same files is not built again:
names carry hashes. See docs/xen.md.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

_HERE: Final = Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE.parent / "guest"))

from cpio import write_archive
from elf import without_zeros
from kernel import Kernel, fetch_kernel
from packages import Xen, fetch_xen
from roots import Contents, boot, guest, project, system
from tree import CODE, ROOT

DIRECTORY: Final = ROOT / "build" / "xen"
KERNELS: Final = ROOT / "build" / "guest"
MIB: Final = 1 << 20
_IN_USE_SECONDS: Final = 600  # whoever was told of an image a moment ago has yet to start QEMU with it


def _hash(parts: Iterable[str], files: Iterable[Path]) -> str:
    digest = hashlib.sha256("\n".join(parts).encode())
    for path in sorted(path for path in files if path.is_file()):
        digest.update(f"{path}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _ours() -> list[Path]:
    return [*_HERE.iterdir(), *(_HERE.parent / "guest").iterdir()]


def _installed() -> list[Path]:
    return [Path("/var/lib/dpkg/status"), *Path(sys.prefix).glob("lib/python3.11/site-packages/*.dist-info/RECORD")]


def _code() -> list[Path]:
    found = [path for name in CODE for path in (ROOT / name).rglob("*") if "__pycache__" not in path.parts]
    return [*found, ROOT / "pyproject.toml"]


def _archive(root: Path, target: Path) -> None:
    with target.open("wb") as file:
        write_archive(root, file)


def _elf(kernel: Kernel, target: Path) -> None:
    target.write_bytes(without_zeros(kernel.elf.read_bytes()))


def _disk(root: Path, target: Path) -> None:
    """Make an ext4 file system of what lies below `root`, with a tenth to spare: it is never written to."""
    used = sum(path.lstat().st_blocks * 512 for path in root.rglob("*"))
    with target.open("wb") as file:
        file.truncate(-(-(used * 11 // 10) // MIB) * MIB + 4 * MIB)
    options = "root_owner=0:0,lazy_itable_init=1"
    command = ["/sbin/mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-m", "0", "-E", options, "-d", str(root)]
    subprocess.run([*command, str(target)], check=True)


def _kept(
    directory: Path, name: str, fingerprint: str, fill: Callable[[Path], None], pack: Callable[[Path, Path], None]
) -> Path:
    """Return the file NAME-FINGERPRINT, made now if it is not there; of this name, what nobody needs is removed."""
    made = directory / f"{name}-{fingerprint}"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            root, unfinished = Path(scratch) / "root", Path(scratch) / "packed"
            fill(root)
            pack(root, unfinished)
            unfinished.rename(made)
        for older in directory.glob(f"{name}-*"):
            if older.stat().st_mtime < time.time() - _IN_USE_SECONDS:
                older.unlink()
    os.utime(made)
    return made


def build(directory: Path) -> dict[str, str]:
    """Return the paths of the images, building what must be built."""
    directory.mkdir(parents=True, exist_ok=True)
    KERNELS.mkdir(parents=True, exist_ok=True)
    with (KERNELS / "lock").open("w") as kernels, (directory / "lock").open("w") as lock:
        fcntl.flock(kernels, fcntl.LOCK_EX)  # images/guest fetches the same kernel
        kernel = fetch_kernel(KERNELS)
        fcntl.flock(kernels, fcntl.LOCK_UN)
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in several processes may ask at once
        return _build(directory, kernel, fetch_xen(directory))


def _build(directory: Path, kernel: Kernel, xen: Xen) -> dict[str, str]:
    versions = (kernel.directory.name, xen.directory.name)
    booted = _kept(directory, "boot", _hash(versions, _ours()), lambda root: boot(root, kernel), _archive)
    tools = _hash(versions, [*_ours(), *_installed()])
    guests = _kept(directory, "guest", tools, lambda root: guest(root, kernel), _archive)
    trimmed = _kept(directory, "kernel", _hash(versions, _ours()), Path.mkdir, lambda _, target: _elf(kernel, target))
    contents = Contents(trimmed, xen, booted, guests)
    rooted = _kept(directory, "system", tools, lambda root: system(root, contents), _disk)
    code = _kept(directory, "project", _hash((), [*_ours(), *_code()]), project, _disk)
    return {
        "xen": str(xen.hypervisor),
        "kernel": str(trimmed),
        "boot": str(booted),
        "system": str(rooted),
        "project": str(code),
    }


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Build what QEMU boots to run Xen in tests.")
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="default: %(default)s")
    options = parser.parse_args()
    if shutil.which("apt-get") is None:
        raise SystemExit("the images are made of Debian's packages: apt-get is needed")
    print(json.dumps(build(options.directory)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
