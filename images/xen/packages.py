"""Xen as Debian 12 packs it: downloaded with apt, unpacked, never installed on this machine.

Installing these packages would make the machine boot into Xen and start its daemons.
"""

import gzip
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

VERSION: Final = "4.17"
PACKAGES: Final = (
    f"xen-hypervisor-{VERSION}-amd64",
    f"xen-utils-{VERSION}",
    "xen-utils-common",
    "xenstore-utils",
    f"libxenmisc{VERSION}",
    "libxengnttab1",
    "libxenevtchn1",
    "libxenstore4",
    "libxenforeignmemory1",
    "libxencall1",
    "libxentoollog1",
    "libxendevicemodel1",
    "libxentoolcore1",
    "libxenhypfs1",
    "libyajl2",
)


class Xen:
    """The unpacked packages: `hypervisor` is what QEMU's multiboot loader takes, `root` what would be installed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hypervisor = directory / "xen.elf"
        self.root = directory / "root"


def fetch_xen(build: Path) -> Xen:
    """Return Xen, downloaded (5 MB) and unpacked if that has not been done before."""
    present = sorted(build.glob("xen-[0-9]*"))
    if present:
        return Xen(present[-1])
    with tempfile.TemporaryDirectory(dir=build) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        packages = _download(Path(scratch))
        for package in packages:
            subprocess.run(["dpkg-deb", "-x", str(package), str(made / "root")], check=True)
        packed = made / "root/boot" / f"xen-{VERSION}-amd64.gz"
        (made / "xen.elf").write_bytes(gzip.decompress(packed.read_bytes()))
        shutil.rmtree(made / "root/boot")
        (hypervisor,) = (path for path in packages if path.name.startswith("xen-hypervisor"))
        version = hypervisor.name.split("_")[1]
        made.rename(build / f"xen-{version}")
    return Xen(build / f"xen-{version}")


def _download(scratch: Path) -> list[Path]:
    """Fetch the packages with apt; as root once more with newer lists, for Debian drops replaced versions."""
    for last in (False, True):
        done = subprocess.run(
            ["apt-get", "download", "-qq", *PACKAGES], cwd=scratch, capture_output=True, text=True, check=False
        )
        packages = sorted(scratch.glob("*.deb"))
        if len(packages) == len(PACKAGES):
            return packages
        if last or os.geteuid() != 0:
            raise SystemExit(f"apt-get download failed (apt-get update, as root, may help): {done.stderr}")
        subprocess.run(["apt-get", "update", "-qq"], check=False, capture_output=True)
    raise AssertionError
