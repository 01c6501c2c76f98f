"""What goes into a guest's root: programs with their libraries, Python, this project. All of it from this machine.

Debian's packages are installed here for the tests anyway, so a guest has the same versions as the tests around it.
"""

import compileall
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent.parent
PROJECT: Final = "vtpm-manager"
VENV: Final = Path("opt/vtpm-manager")
CODE: Final = ("manager", "vtpm_instance", "frontend_backend", "storage")
_PACKAGES: Final = "lib/python3.11/site-packages"
_LIBRARIES: Final = Path("/usr/lib/x86_64-linux-gnu")
_STDLIB: Final = Path("/usr/lib/python3.11")
# Of the standard library: what no guest needs, 30 of 55 MB.
_LEFT_OUT: Final = (
    "test",
    "idlelib",
    "tkinter",
    "turtledemo",
    "ensurepip",
    "lib2to3",
    "pydoc_data",
    "config-3.11-x86_64-linux-gnu",
)
_SCRIPT: Final = "#!/{venv}/bin/python\nimport sys\nfrom {module} import {call}\nsys.exit({call}())\n"


class Tree:
    """A root directory under construction."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in ("bin", "sbin", "lib", "lib64"):
            (path / "usr" / name).mkdir(parents=True)
            (path / name).symlink_to(f"usr/{name}")
        for name in ("dev", "proc", "sys", "run", "tmp", "etc", "root", "data", "modules"):
            (path / name).mkdir()
        (path / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")
        (path / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")

    def text(self, name: str, content: str, mode: int = 0o644) -> None:
        """Write a file."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(mode)

    def program(self, source: str) -> None:
        """Copy a program of this machine, and the libraries that it is linked with."""
        path = Path(shutil.which(source) or source).resolve()
        self._copy(path, self.path / "usr/bin" / Path(source).name)
        self._libraries_of(path)

    def compiled(self, name: str, source: Path) -> None:
        """Compile a C program, linked statically."""
        target = self.path / "usr/bin" / name
        subprocess.run(["gcc", "-static", "-O1", "-Wall", "-Werror", "-o", str(target), str(source)], check=True)

    def library(self, pattern: str) -> None:
        """Copy libraries that are loaded by name at run time, and what they are linked with."""
        found = sorted(_LIBRARIES.glob(pattern))
        if not found:
            raise SystemExit(f"{pattern} is not installed in {_LIBRARIES}")
        for path in found:
            self._copy(path.resolve(), self.path / path.relative_to("/"))
            self._libraries_of(path)

    def busybox(self) -> None:
        """Copy the static busybox; `init` installs its links."""
        self._copy(Path("/bin/busybox"), self.path / "usr/bin/busybox")
        (self.path / "usr/bin/sh").symlink_to("busybox")

    def modules(self, paths: list[Path]) -> None:
        """Copy the kernel's modules; /modules/order lists them as they must be loaded."""
        for path in paths:
            shutil.copy2(path, self.path / "modules")
        self.text("modules/order", "".join(f"{path.name}\n" for path in paths))

    def python(self) -> None:
        """Copy Python 3.11 and its standard library, compiled: a guest under emulation should not have to."""
        self.program("/usr/bin/python3.11")
        target = self.path / _STDLIB.relative_to("/")
        shutil.copytree(_STDLIB, target, symlinks=True, ignore=_unwanted)
        for extension in (target / "lib-dynload").glob("*.so"):
            self._libraries_of(extension)
        _compile(target)

    def project(self) -> None:
        """Install this project as the README does, with what it needs at run time, into /opt/vtpm-manager."""
        packages = self.requirements()
        self.checkout(packages, self.path / VENV / "bin")

    def requirements(self) -> Path:
        """Install what the project needs at run time; returns where its own packages belong."""
        venv = self.path / VENV
        packages = venv / _PACKAGES
        packages.mkdir(parents=True)
        (venv / "bin").mkdir()
        (venv / "bin/python").symlink_to("/usr/bin/python3.11")
        self.text(f"{VENV}/pyvenv.cfg", "home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.11.2\n")
        for name in sorted(_closure(_settings()["dependencies"])):
            self._distribution(name, packages)
        for entry in importlib.metadata.distribution(PROJECT).files or ():
            if entry.name == "METADATA":  # what tells the version; the files themselves are the checkout's
                self._copy(Path(str(entry.locate())), packages / entry)
        for pattern in ("libtpms.so.0", "libseccomp.so.2"):
            self.library(pattern)
        _compile(packages)
        return packages

    @staticmethod
    def checkout(packages: Path, commands: Path) -> None:
        """Copy this checkout's packages, compiled, and write its commands."""
        for name in CODE:
            shutil.copytree(ROOT / name, packages / name, ignore=shutil.ignore_patterns("__pycache__"))
            _compile(packages / name, packages)
        for script, target in _settings()["scripts"].items():
            module, _, call = target.partition(":")
            (commands / script).write_text(_SCRIPT.format(venv=VENV, module=module, call=call))
            (commands / script).chmod(0o755)

    def _distribution(self, name: str, packages: Path) -> None:
        found = importlib.metadata.distribution(name)
        for entry in found.files or ():
            source = Path(str(entry.locate()))
            if ".." not in entry.parts and "tests" not in entry.parts and source.is_file():
                self._copy(source, packages / entry)
                if source.suffix == ".so":
                    self._libraries_of(source)

    def _libraries_of(self, path: Path) -> None:
        shown = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=False).stdout
        for name in re.findall(r"(/\S+) \(0x", shown):
            target = (
                self.path / "usr" / Path(name).relative_to("/").relative_to("usr" if name.startswith("/usr") else "")
            )
            if not target.exists() and not name.startswith(str(Path(sys.prefix))):
                self._copy(Path(name).resolve(), target)

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _unwanted(folder: str, names: list[str]) -> set[str]:
    top = set(_LEFT_OUT) if Path(folder) == _STDLIB else set()
    return {name for name in names if name in top or name in {"__pycache__", "EXTERNALLY-MANAGED"}}


def _settings() -> dict[str, Any]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])


def _compile(tree: Path, base: Path | None = None) -> None:
    stripped = str(base or tree)
    if not compileall.compile_dir(tree, quiet=2, workers=0, stripdir=stripped, invalidation_mode=None):
        raise SystemExit(f"{tree} cannot be compiled")


def _closure(requirements: list[str]) -> set[str]:
    """Return the names of what must be installed for these requirements, extras left out."""
    wanted: set[str] = set()
    waiting = list(requirements)
    while waiting:
        line = waiting.pop()
        match = re.match(r"[A-Za-z0-9._-]+", line)
        if match is None or "extra ==" in line:
            continue
        name = match.group().lower().replace("_", "-")
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another version of Python, or another system
        if name not in wanted:
            wanted.add(name)
            waiting += found.requires or []
    return wanted
