"""Builds what QEMU (and Xen) boot in tests: a kernel of Debian's and an initramfs, from packages of this machine.

    images/guest/build.py RECIPE [--directory build/guest]

prints a JSON document with the paths of `kernel` (bzImage), `elf` (the same for PVH) and `initrd`. An image that was
built from the same files is not built again: its name carries a hash over them. See docs/locality-driver.md.
"""

import argparse
import fcntl
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cpio import write_archive
from kernel import Kernel, fetch_kernel
from tree import ROOT, Tree

DIRECTORY: Final = ROOT / "build" / "guest"
DISK_MODULES: Final = ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"]
_HERE: Final = Path(__file__).resolve().parent


def _small(tree: Tree, kernel: Kernel) -> None:
    tree.busybox()
    tree.modules(kernel.modules(DISK_MODULES))
    tree.text("init", (_HERE / "init.sh").read_text(), 0o755)


def _manager(tree: Tree, kernel: Kernel) -> None:
    _small(tree, kernel)
    tree.python()
    tree.project()
    tree.program("/usr/bin/tpm2")
    tree.library("libtss2-tcti-swtpm.so.0*")
    tree.library("libtss2-tcti-device.so.0*")
    for path in kernel.modules(["tpm_vtpm_proxy", "vsock_loopback"]):
        shutil.copy2(path, tree.path / "modules")  # not in /modules/order: a script loads them


def _client(tree: Tree, _kernel: Kernel) -> None:
    tree.busybox()
    tree.program("/usr/bin/tpm2")
    tree.library("libtss2-tcti-device.so.0*")
    tree.compiled("counting", _HERE / "counting.c")
    tree.text("init", (_HERE / "agent.sh").read_text(), 0o755)


def _disks(tree: Tree, kernel: Kernel) -> None:
    _client(tree, kernel)
    for name in ("cryptsetup", "systemd-cryptenroll", "systemd-creds", "/lib/systemd/systemd-cryptsetup"):
        tree.program(name)
    for name in ("libtss2-esys.so.0", "libtss2-rc.so.0", "libtss2-mu.so.0", "libcryptsetup.so.12"):
        tree.library(f"{name}*")  # systemd loads them when it first needs a TPM or a disk
    tree.library("cryptsetup/libcryptsetup-token-systemd-tpm2.so")
    tree.modules(kernel.modules([*DISK_MODULES, "dm_crypt", "ecb", "xts", "algif_skcipher"]))


RECIPES: Final[dict[str, Callable[[Tree, Kernel], None]]] = {
    "small": _small,  # busybox only: boots in the time of its kernel
    "client": _client,  # busybox and tpm2-tools, led from outside over a serial port
    "disks": _disks,  # "client" with systemd's and cryptsetup's programs, and the modules of an encrypted disk
    "manager": _manager,  # "small" and this project, with tpm2-tools
}


def _fingerprint(recipe: str, kernel: Kernel) -> str:
    """Return a hash over everything an image is made of: our files, and the versions of what is installed."""
    digest = hashlib.sha256(f"{recipe} {kernel.directory.name}\n".encode())
    sources = [*_HERE.iterdir()]
    if recipe != "small":
        sources.append(Path("/var/lib/dpkg/status"))
    if recipe == "manager":
        packages = ("manager", "vtpm_instance", "frontend_backend", "storage")
        sources += [path for name in packages for path in (ROOT / name).rglob("*") if "__pycache__" not in path.parts]
        sources += [ROOT / "pyproject.toml", *_installed()]
    for path in sorted(path for path in sources if path.is_file()):
        digest.update(f"{path}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _installed() -> list[Path]:
    return sorted(Path(sys.prefix).glob("lib/python3.11/site-packages/*.dist-info/RECORD"))


def build(recipe: str, directory: Path) -> dict[str, str]:
    """Return the paths of an image, building it if need be. Older images of the recipe are removed."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in several processes may ask at once
        return _build(recipe, directory)


def _build(recipe: str, directory: Path) -> dict[str, str]:
    kernel = fetch_kernel(directory)
    initrd = directory / f"{recipe}-{_fingerprint(recipe, kernel)}.cpio"
    if not initrd.exists():
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            root = Path(scratch) / "root"
            tree = Tree(root)
            RECIPES[recipe](tree, kernel)
            unfinished = Path(scratch) / "cpio"
            with unfinished.open("wb") as target:
                write_archive(root, target)
            shutil.rmtree(root)
            for older in directory.glob(f"{recipe}-*.cpio"):
                older.unlink()
            unfinished.rename(initrd)
    return {"kernel": str(kernel.image), "elf": str(kernel.elf), "initrd": str(initrd)}


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Build a guest's kernel and initramfs.")
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="default: %(default)s")
    options = parser.parse_args()
    print(json.dumps(build(options.recipe, options.directory)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
