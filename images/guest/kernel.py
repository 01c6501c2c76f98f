"""Debian's kernel for guests: downloaded with apt, unpacked, never installed on this machine.

The package of `linux-image-amd64`'s dependency is fetched once and kept below the build directory.
"""

import lzma
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

META_PACKAGE: Final = "linux-image-amd64"
_XZ_MAGIC: Final = b"\xfd7zXZ\0"
# Most of the 460 MB of modules are for hardware that no emulated machine has.
_LEFT_OUT: Final = (
    "sound",
    "drivers/gpu",
    "drivers/media",
    "drivers/net/wireless",
    "drivers/net/ethernet",
    "drivers/infiniband",
    "drivers/scsi",
    "drivers/iio",
    "drivers/staging",
    "drivers/usb",
)
_DEPENDS: Final = re.compile(rb"\0depends=([^\0]*)\0")


class Kernel:
    """An unpacked kernel package: `image` boots under a BIOS, `elf` under PVH (microvm, Xen)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.image = directory / "vmlinuz"
        self.elf = directory / "vmlinux"

    def modules(self, names: list[str]) -> list[Path]:
        """Return these modules' files (given without .ko), each after those that it depends on."""
        found = {path.stem.replace("-", "_"): path for path in (self.directory / "modules").rglob("*.ko")}
        ordered: list[Path] = []

        def add(name: str) -> None:
            path = found[name.replace("-", "_")]
            if path in ordered:
                return
            match = _DEPENDS.search(path.read_bytes())
            for needed in match.group(1).decode().split(",") if match else ():
                if needed:
                    add(needed)
            ordered.append(path)

        for name in names:
            add(name)
        return ordered


def package_name() -> str:
    """Return the package of the newest kernel that apt knows, as linux-image-6.1.0-56-amd64."""
    shown = subprocess.run(["apt-cache", "depends", META_PACKAGE], capture_output=True, text=True, check=False).stdout
    names = re.findall(r"Depends: (linux-image-\S+)", shown)
    if not names:
        raise SystemExit(f"apt knows no {META_PACKAGE}: run `apt-get update` as root")
    return str(names[0])


def fetch_kernel(build: Path) -> Kernel:
    """Return the kernel, downloaded (70 MB) and unpacked if that has not been done before."""
    present = sorted(build.glob("linux-image-*"))
    if present:
        return Kernel(present[-1])
    with tempfile.TemporaryDirectory(dir=build) as scratch:
        name, package = _download(Path(scratch))
        subprocess.run(["dpkg-deb", "-x", str(package), scratch], check=True)
        made = Path(scratch) / name
        made.mkdir()
        (image,) = Path(scratch, "boot").glob("vmlinuz-*")
        image.rename(made / "vmlinuz")
        (kernel,) = Path(scratch, "lib/modules").iterdir()
        (kernel / "kernel").rename(made / "modules")
        for name_of_many in _LEFT_OUT:
            shutil.rmtree(made / "modules" / name_of_many)
        _unpack(made)
        made.rename(build / name)
    return Kernel(build / name)


def _download(scratch: Path) -> tuple[str, Path]:
    """Fetch the package with apt; as root once more with newer lists, for Debian drops replaced versions."""
    for last in (False, True):
        name = package_name()
        done = subprocess.run(
            ["apt-get", "download", "-qq", name], cwd=scratch, capture_output=True, text=True, check=False
        )
        if packages := list(scratch.glob("*.deb")):
            return name, packages[0]
        if last or os.geteuid() != 0:
            raise SystemExit(f"apt-get download {name} failed (apt-get update, as root, may help): {done.stderr}")
        subprocess.run(["apt-get", "update", "-qq"], check=False, capture_output=True)
    raise AssertionError


def _unpack(directory: Path) -> None:
    """Cut the ELF image out of the bzImage: it boots where there is no BIOS, and spares the guest its decompression."""
    packed = (directory / "vmlinuz").read_bytes()
    start = packed.index(_XZ_MAGIC)
    (directory / "vmlinux").write_bytes(lzma.LZMADecompressor().decompress(packed[start:]))
