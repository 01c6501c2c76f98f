"""Machines for tests: QEMU without KVM, a guest of images/guest, a TPM that is swtpm behind TIS or CRB registers."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILDER = ROOT / "images" / "guest" / "build.py"
DISK_BYTES = 48 * 1024 * 1024
# Without its defences against Spectre and the like, which cost an emulated kernel a tenth of its time.
# The words after that: what an emulated processor would spend seconds on at each boot (tests of cryptography, clearing
# pages twice, a walk over all page tables), and waiting for randomness.
KERNEL = ("console=ttyS0", "quiet", "panic=-1", "mitigations=off", "cryptomgr.notests", "init_on_alloc=0", "rodata=off")
KERNEL += ("random.trust_cpu=on",)
BUILD_SECONDS = 300.0  # the first time 70 MB are downloaded
BOOT_SECONDS = 400.0  # 10 to 40 on a quiet machine
SILENT_SECONDS = 90.0  # the kernel has said something after 5 on a quiet machine
POLL_SECONDS = 0.02
_STEP = re.compile(r"^\$ (.*)$")
_CODE = re.compile(r"^-> (\d+) at [0-9.]+ s$")


@dataclass
class Image:
    """What images/guest/build.py made."""

    kernel: Path
    initrd: Path


def built_image(recipe: str) -> Image:
    done = subprocess.run(
        [sys.executable, str(BUILDER), recipe], capture_output=True, text=True, check=False, timeout=BUILD_SECONDS
    )
    assert done.returncode == 0, f"images/guest/build.py {recipe}:\n{done.stderr[-3000:]}"
    made = json.loads(done.stdout)
    return Image(Path(made["kernel"]), Path(made["initrd"]))


@dataclass
class Step:
    """A command in the guest's transcript: a line `$ command`, what it printed, a line `-> code`."""

    command: str
    output: str
    code: int


@dataclass
class Transcript:
    """What one run of a machine printed."""

    text: str
    seconds: float
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        command, lines = "", []
        for line in self.text.splitlines():
            if match := _STEP.match(line):
                command, lines = match.group(1), []
            elif (match := _CODE.match(line)) and command:
                self.steps.append(Step(command, "\n".join(lines), int(match.group(1))))
                command = ""
            else:
                lines.append(line)

    def step(self, beginning: str) -> Step:
        """The only step with this command, or whose command begins so; the test fails if there is none."""
        found = [step for step in self.steps if step.command == beginning]
        found = found or [step for step in self.steps if step.command.startswith(beginning)]
        assert len(found) == 1, f"{len(found)} steps begin with {beginning!r} in:\n{self.text[-6000:]}"
        return found[0]

    def good(self, beginning: str) -> str:
        """The output of the only step like this, which must have ended with 0."""
        step = self.step(beginning)
        assert step.code == 0, f"$ {step.command}\n{step.output}\n-> {step.code}"
        return step.output

    @property
    def finished(self) -> bool:
        return "@@DONE 0" in self.text


class Machine:
    """One machine: its disk, and its TPM with what it keeps. `boot` is power on, run, power off."""

    def __init__(self, directory: Path, image: Image, files: dict[str, str]) -> None:
        """files: name -> content, on the disk; `guest.sh` is what the guest runs."""
        self.directory = directory
        self.image = image
        self.disk = directory / "disk.img"
        content = directory / "content"
        content.mkdir()
        for name, text in files.items():
            (content / name).write_text(text)
        with self.disk.open("wb") as disk:
            disk.truncate(DISK_BYTES)
        subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", "-d", str(content), str(self.disk)], check=True)
        (directory / "tpm").mkdir()

    def boot(
        self, kernel: Sequence[str] = (), *, device: str = "tpm-tis", firmware: str = "", seconds: float = BOOT_SECONDS
    ) -> Transcript:
        """Run the guest until it switches itself off; once more if QEMU stayed silent, which it does now and then.

        kernel: words for its command line. firmware: version that the machine's SMBIOS tables tell: measured by SeaBIOS
        into PCR 1.
        """
        for silent in (True, False):
            transcript = self._boot(kernel, device, firmware, seconds)
            if transcript.text.strip() or not silent:
                break
        return transcript

    def _boot(self, kernel: Sequence[str], device: str, firmware: str, seconds: float) -> Transcript:
        control = self.directory / "ctrl"
        control.unlink(missing_ok=True)
        tpm = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.directory}/tpm"]
        tpm += ["--ctrl", f"type=unixio,path={control}", "--flags", "startup-clear"]
        swtpm = subprocess.Popen(tpm, stdin=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 10
            while not control.is_socket():
                assert time.monotonic() < deadline, "swtpm did not start"
                time.sleep(0.005)
            return self._run([*KERNEL, *kernel], device, firmware, seconds)
        finally:
            swtpm.terminate()  # it ends with QEMU; this is for a QEMU that never came up
            swtpm.wait(10)

    def _run(self, kernel: Sequence[str], device: str, firmware: str, seconds: float) -> Transcript:
        qemu = [
            "qemu-system-x86_64",
            "-accel",
            "tcg",
            "-machine",
            "q35",
            "-cpu",
            "qemu64,+rdrand",
            "-smp",
            "2",
            "-m",
            "1024",
        ]
        qemu += ["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio", "-monitor", "none"]
        qemu += ["-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd), "-append", " ".join(kernel)]
        qemu += ["-drive", f"file={self.disk},format=raw,if=virtio,cache=unsafe"]
        qemu += ["-chardev", f"socket,id=c0,path={self.directory}/ctrl", "-tpmdev", "emulator,id=t0,chardev=c0"]
        qemu += ["-device", f"{device},tpmdev=t0"]
        if firmware:
            qemu += ["-smbios", f"type=0,vendor=test,version={firmware}"]
        begun = time.monotonic()
        with (self.directory / "console").open("w+b") as console:
            process = subprocess.Popen(qemu, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
            try:
                while process.poll() is None:
                    silent = os.fstat(console.fileno()).st_size == 0
                    if time.monotonic() > begun + (min(SILENT_SECONDS, seconds) if silent else seconds):
                        break
                    time.sleep(POLL_SECONDS)
            finally:
                process.kill()
                process.wait()
            console.seek(0)
            text = console.read().decode(errors="replace").replace("\r", "")
        return Transcript(text, time.monotonic() - begun)


@contextmanager
def machine(recipe: str, files: dict[str, str]) -> Iterator[Machine]:
    """A machine with a new disk and a new TPM, in a directory that goes with it."""
    image = built_image(recipe)
    directory = Path(tempfile.mkdtemp(prefix="vm", dir=os.environ.get("TMPDIR")))
    try:
        yield Machine(directory, image, files)
    finally:
        shutil.rmtree(directory)
