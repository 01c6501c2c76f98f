"""What QEMU finds behind its TPM's control socket in tests: swtpm, the control of the rig, or a vTPM of ours."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from e2e_rig import Installation, alive, wait_for
from guest_rig import Image
from qemu_rig import Qemu, connected

# `./dev test` runs ours, `./dev e2e qemu` both: what swtpm does not pass under the same QEMU is a fault of the rig.
SUBJECTS = tuple(os.environ.get("VTPM_QEMU_SUBJECTS", "ours").split(","))


class Behind(Protocol):
    """One TPM's place, whatever QEMU is in front of it."""

    ours: bool

    def arguments(self) -> list[str]:
        """Return QEMU's arguments for the TPM's back end, once it can be connected to."""

    def close(self) -> None:
        """End what runs."""


class Swtpm:
    """Plain swtpm, started anew for each QEMU as libvirt does."""

    ours = False

    def __init__(self, directory: Path, family: str = "2.0") -> None:
        self.state, self.control = directory / "swtpm", directory / "swtpm.ctrl"
        self.state.mkdir()
        self.family = ["--tpm2"] if family == "2.0" else []
        self.process: subprocess.Popen[bytes] | None = None

    def arguments(self) -> list[str]:
        self.close()
        self.control.unlink(missing_ok=True)
        command = ["swtpm", "socket", *self.family, "--tpmstate", f"dir={self.state}"]
        command += ["--ctrl", f"type=unixio,path={self.control}"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        while not self.control.is_socket():
            assert self.process.poll() is None, "swtpm ended"
            time.sleep(0.005)
        return back_end(self.control)

    def close(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)
            self.process = None


class Ours:
    """A vTPM of an installation, attached to one guest: the same words for each QEMU."""

    ours = True

    def __init__(self, made: Installation, name: str, family: str = "2.0", *, add: bool = True) -> None:
        self.made, self.name = made, name
        if add:
            made.add(name, "--tpm", family)
        self.attached = made.attach(name, f"guest-{name}", "--frontend", "qemu")

    @property
    def control(self) -> Path:
        """Where QEMU connects, as the arguments say that vtpm-attach gave."""
        words = shlex.split(self.attached["qemu"])
        chardev = words[words.index("-chardev") + 1]
        (path,) = (option.removeprefix("path=") for option in chardev.split(",") if option.startswith("path="))
        return Path(path)

    def arguments(self) -> list[str]:
        connected(self.control).close()
        words = shlex.split(self.attached["qemu"])
        assert [words[0], words[2], words[4]] == ["-chardev", "-tpmdev", "-device"]
        return words[:4]  # the device is the test's

    def hibernate(self) -> None:
        """The guest's kernel may ask for random numbers at any time: the verb says then that it is busy, exit 8."""

        def done() -> bool:
            answer = self.made.command("vtpm-hibernate", self.name, check=False)
            assert answer.code in {0, 8}, answer.err
            return answer.code == 0

        pid = self.made.show(self.name)["pid"]
        wait_for(done, "hibernation")
        wait_for(lambda: not alive(pid), "the instance's end")

    def close(self) -> None:
        """The installation ends with its fixture."""


def back_end(control: Path) -> list[str]:
    return ["-chardev", f"socket,id=chrtpm,path={control}", "-tpmdev", "emulator,id=tpm0,chardev=chrtpm"]


@contextmanager
def place() -> Iterator[Path]:
    """A directory with a short name, for sockets."""
    made = Path(tempfile.mkdtemp(prefix="vm", dir=os.environ.get("TMPDIR")))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


class Bench:
    """QEMUs, one after another or two at a time, that all end with the test."""

    def __init__(self, directory: Path, image: Image) -> None:
        self.directory, self.image = directory, image
        self.made: list[Qemu] = []

    def qemu(self, tpm: Behind | Sequence[str], name: str = "first", **options: object) -> Qemu:
        """Start a QEMU with this TPM; QEMUs with one name share their directory (OVMF's variables)."""
        directory = self.directory / name
        directory.mkdir(exist_ok=True)
        arguments = tpm.arguments() if hasattr(tpm, "arguments") else tpm
        made = Qemu(directory, self.image, arguments, **options)  # type: ignore[arg-type]
        self.made.append(made)
        return made

    def disk(self) -> Path:
        """Make a small disk that keeps snapshots: QEMU puts the machine's state into it."""
        path = self.directory / "disk"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "16M"], check=True)
        return path

    def close(self) -> None:
        for made in self.made:
            made.kill()
            if said := made.log():  # pytest shows it where a test failed
                sys.stderr.write(f"QEMU in {made.directory.name}:\n{said}")
