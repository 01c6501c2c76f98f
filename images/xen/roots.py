"""What goes into the images: initramfs and root disk of dom0 and of our domains, the checkout, a guest's root."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kernel import Kernel
from packages import VERSION, Xen
from tree import CODE, VENV, Tree

_HERE: Final = Path(__file__).resolve().parent
_ROOT_MODULES: Final = ("crc32c_generic", "ext4")
# xen_gntdev maps a guest's page, xen_gntalloc offers one of ours, xen_evtchn rings: what our programs use.
_XEN_MODULES: Final = ("xen_evtchn", "xen_gntdev", "xen_gntalloc")
# In the order in which they are loaded; all of it costs a fork each.
MODULES: Final = {
    "dom0": (
        "virtio_pci",
        "virtio_blk",
        *_ROOT_MODULES,
        "virtio_console",
        *_XEN_MODULES,
        "xen_privcmd",
        "xenfs",
        "xen_blkback",
        "loop",
    ),
    "domain": ("xen_blkfront", *_ROOT_MODULES, *_XEN_MODULES, "tpm_vtpm_proxy"),
}
_GUEST_MODULES: Final = ("xen_tpmfront", "tpm_vtpm_proxy")
_XEN_PROGRAMS: Final = ("xl", "xenstored", "xenconsoled", "xenconsole", "xen-init-dom0", "libxl-save-helper")
PROJECT: Final = Path("opt/project")


@dataclass
class Contents:
    """What the root disk is made of."""

    kernel: Path
    xen: Xen
    boot: Path
    guest: Path


def _busybox(tree: Tree) -> None:
    """With its links, which a read-only root cannot make when it boots; what is there already stays."""
    tree.busybox()
    listed = subprocess.run(["/bin/busybox", "--list"], capture_output=True, text=True, check=True).stdout
    for name in listed.split():
        link = tree.path / "usr/bin" / name
        if not link.exists() and not link.is_symlink():
            link.symlink_to("busybox")


def _modules(tree: Tree, kernel: Kernel, name: str, modules: tuple[str, ...]) -> None:
    paths = kernel.modules(list(modules))
    for path in paths:
        shutil.copy2(path, tree.path / "modules")
    tree.text(f"modules/{name}", "".join(f"{path.name}\n" for path in paths))


def boot(root: Path, kernel: Kernel) -> None:
    """Fill the initramfs of dom0 and of our domains: it loads modules and goes over to the root disk."""
    tree = Tree(root)
    tree.busybox()
    for role, modules in MODULES.items():
        _modules(tree, kernel, role, modules)
    tree.text("init", (_HERE / "boot.sh").read_text(), 0o755)


def guest(root: Path, kernel: Kernel) -> None:
    """Fill a guest: busybox, tpm2-tools, a program that sends bytes to a TPM, Linux's own front end."""
    tree = Tree(root)
    tree.program("/usr/bin/tpm2")
    tree.library("libtss2-tcti-device.so.0*")
    tree.compiled("raw", _HERE / "raw.c")
    tree.compiled("timed", _HERE / "timed.c")
    _modules(tree, kernel, "guest", _GUEST_MODULES)
    tree.text("agent.sh", (_HERE / "agent.sh").read_text())
    tree.text("init", (_HERE / "guest.sh").read_text(), 0o755)
    _busybox(tree)


def system(root: Path, contents: Contents) -> None:
    """Fill the root disk of dom0 and of our domains. The checkout is on a disk of its own, which changes more often."""
    tree = Tree(root)
    for name in ("sbin", "var", "opt/project", "proc", "guest"):
        (root / name).mkdir(parents=True, exist_ok=True)
    tree.python()
    packages = tree.requirements()
    _link_checkout(root, packages)
    for program in ("/usr/bin/tpm2", "/usr/bin/swtpm"):  # swtpm: for tests/bench/bench_xen.py
        tree.program(program)
    for library in ("libtss2-tcti-swtpm.so.0*", "libtss2-tcti-device.so.0*"):
        tree.library(library)
    _xen_tools(tree, contents.xen)
    for script in ("agent.sh", "dom0.sh", "domain.sh", "dom0_agent.py"):
        tree.text(f"usr/sbin/{script}", (_HERE / script).read_text(), 0o755)
    tree.text("etc/xen/scripts/block", (_HERE / "block.sh").read_text(), 0o755)
    _busybox(tree)
    shutil.copy2(contents.kernel, root / "guest/vmlinux")
    shutil.copy2(contents.guest, root / "guest/guest.cpio")
    shutil.copy2(contents.boot, root / "guest/boot.cpio")


def _link_checkout(root: Path, packages: Path) -> None:
    """Let what belongs to the checkout be links to its disk."""
    shutil.rmtree(root / VENV / "bin")
    (root / VENV / "bin").symlink_to("/" / PROJECT / "bin")
    for name in CODE:
        (packages / name).symlink_to("/" / PROJECT / name)


def _xen_tools(tree: Tree, xen: Xen) -> None:
    programs = Path(f"usr/lib/xen-{VERSION}/bin")
    (tree.path / programs).mkdir(parents=True)
    for name in _XEN_PROGRAMS:
        shutil.copy2(xen.root / programs / name, tree.path / programs)
    for path in (xen.root / "usr/bin").glob("xenstore*"):
        shutil.copy2(path, tree.path / "usr/bin", follow_symlinks=False)
    libraries = Path("usr/lib/x86_64-linux-gnu")
    for path in (xen.root / libraries).glob("*.so*"):
        shutil.copy2(path, tree.path / libraries, follow_symlinks=False)
    for name in ("liblzma.so.5", "libuuid.so.1", "libz.so.1", "libzstd.so.1"):  # what those are linked with
        tree.library(name)
    tree.text("etc/xen/xl.conf", "autoballoon=0\n")


def project(root: Path) -> None:
    """Fill the disk of the checkout: its packages, compiled, and its commands beside Python."""
    (root / "bin").mkdir(parents=True)
    (root / "bin/python").symlink_to("/usr/bin/python3.11")
    Tree.checkout(root, root / "bin")
