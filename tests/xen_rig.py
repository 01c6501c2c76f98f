"""Xen under QEMU's software emulation: dom0 and domains led command by command, with a hardware TPM that is swtpm.

    python tests/xen_rig.py [--keep DIRECTORY] [SCRIPT]     lines of a script (or of standard input), run one by one:

    xl list                          a command of dom0's shell
    @guest web vtpm=backend=0,uuid=… memory=160    creates a domain of images/xen's guest
    @domain manager memory=192 disk=/dev/vdd iomem=fed42,1 extra=…   creates a domain that runs this project
    web: tpm2 getrandom 8            a command of a domain's shell
    @power-off, @power-cut, @boot    the host

Each machine is started by `XenHost.boot`; one at a time on a machine of two CPUs (tests of several helpers: flock).
"""

import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from xen_consoles import BOOT_SECONDS, COMMAND_SECONDS, KERNEL_WORDS, Domain, domain_config, guest_config
from xen_link import Link, Step, Transcript, XenError

__all__ = ["Domain", "Step", "Transcript", "XenError", "XenHost", "domain_config", "guest_config", "xen_host"]

ROOT = Path(__file__).resolve().parent.parent
BUILDER = ROOT / "images" / "xen" / "build.py"
BUILD_SECONDS = 600.0  # the first time 75 MB are downloaded
_ENDS_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")  # a test that is killed leaves no machine behind
SILENT_SECONDS = 30.0  # Xen has said something after 1
DATA_BYTES = 256 << 20
# The model that the emulator's own flaws leave alone: with `max` dom0 dies, and PVH guests need SVM and nested paging.
# rdrand: kernels have randomness at once, not after a second or two.
CPU = "qemu64,+svm,+npt,+rdrand"
# Without its defences against Spectre and the like, which cost an emulated hypervisor much of its time.
XEN = "console=com1 com1=115200,8n1 loglvl=info dom0_max_vcpus=1 spec-ctrl=no xpti=no pv-l1tf=no"
DOM0_MEMORY = "768M"


def built() -> dict[str, str]:
    """The images, built if need be."""
    done = subprocess.run(
        [sys.executable, str(BUILDER)], capture_output=True, text=True, check=False, timeout=BUILD_SECONDS
    )
    assert done.returncode == 0, f"images/xen/build.py:\n{done.stderr[-3000:]}"
    return dict(json.loads(done.stdout))


class XenHost:
    """One machine: its data disks and its TPM stay; `boot` is power on."""

    def __init__(
        self,
        directory: Path,
        *,
        disks: int = 0,
        memory: int = 2048,
        processors: int = 1,
        dom0_memory: str = DOM0_MEMORY,
        kernel: Sequence[str] = (),
        content: Path | None = None,
        content_disk: int = 0,
        progress: TextIO | None = None,
    ) -> None:
        """disks: further data disks (vdd, vde, ...), for domains; kernel: more words for dom0's command line.

        processors: dom0 has one of them. Two were no quicker where this machine's are not both free: they wait for each
        other most of the time then.

        content: a directory whose content the disk `content_disk` begins with; 0 is what dom0 finds below /data.
        """
        self.directory, self._memory, self._dom0_memory, self._kernel = directory, memory, dom0_memory, kernel
        self.processors, self._progress = processors, progress
        self._images = built()
        self.data = [directory / f"data{number}" for number in range(disks + 1)]
        for disk in self.data:
            if not disk.exists():
                with disk.open("wb") as file:
                    file.truncate(DATA_BYTES)
                filled = ["-d", str(content)] if content is not None and disk == self.data[content_disk] else []
                command = ["/sbin/mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,root_owner=0:0", *filled]
                subprocess.run([*command, str(disk)], check=True)
        (directory / "tpm").mkdir(exist_ok=True)
        self.console = directory / "console"
        self.transcript = Transcript()
        self.process: subprocess.Popen[bytes] | None = None
        self._tpm: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None
        self._began = time.monotonic()

    # --- what is shown ---

    def clock(self) -> float:
        return time.monotonic() - self._began

    def note(self, text: str) -> None:
        if self._progress is not None:
            self._progress.write(f"[{self.clock():6.1f}] {text}\n")
            self._progress.flush()

    def record(self, where: str, command: str, output: str, code: int, began: float) -> None:
        step = Step(where, command, output, code, began, self.clock())
        self.transcript.steps.append(step)
        if self._progress is not None:
            self._progress.write(f"{step}\n")
            self._progress.flush()

    # --- power ---

    def boot(self) -> float:
        """Switch on and wait for dom0; its uptime then, in seconds. Once more if QEMU stays silent, which is rare."""
        assert self.process is None
        for silent in (True, False):
            self._power_on()
            try:
                return self._booted()
            except TimeoutError:
                said = self._said()
                self.power_cut()
                if said.strip() or not silent:
                    raise XenError(f"dom0 did not come up:\n{said[-4000:]}") from None
                self.note("QEMU said nothing: once more")
        raise AssertionError

    def _said(self) -> str:
        return self.console.read_text(errors="replace").replace("\r", "") if self.console.exists() else ""

    def _booted(self) -> float:
        deadline = time.monotonic() + BOOT_SECONDS
        while True:
            try:
                uptime = float(self.link.ready(1.0))
            except queue.Empty:
                waited = BOOT_SECONDS - (deadline - time.monotonic())
                if waited > BOOT_SECONDS or (waited > SILENT_SECONDS and not self._said().strip()):
                    raise TimeoutError from None
            else:
                self.note(f"dom0: up after {uptime:.1f} s")
                return uptime

    def _power_on(self) -> None:
        for name in ("ctrl", "agent", "console"):
            (self.directory / name).unlink(missing_ok=True)
        tpm = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.directory}/tpm", "--flags", "startup-clear"]
        tpm += ["--ctrl", f"type=unixio,path={self.directory}/ctrl"]
        self._tpm = subprocess.Popen([*_ENDS_WITH_US, *tpm], stdin=subprocess.DEVNULL)
        self._wait((self.directory / "ctrl").is_socket, "swtpm")
        self._began = time.monotonic()
        with (self.directory / "qemu.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*_ENDS_WITH_US, *self._command()], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._wait((self.directory / "agent").is_socket, "QEMU")
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.directory / "agent"))
        self._link = Link(sock)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not start"
            assert self.process is None or self.process.poll() is None, (self.directory / "qemu.log").read_text()
            time.sleep(0.005)

    def _command(self) -> list[str]:
        made = self._images
        line = " ".join([KERNEL_WORDS, "role=dom0 initcall_blacklist=init_tis", *self._kernel]).replace(
            ",", ",,"
        )  # a single comma begins the next module
        memory = f"dom0_mem={self._dom0_memory},max:{self._dom0_memory}"
        qemu = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", CPU]
        qemu += ["-smp", str(self.processors)]
        qemu += ["-m", str(self._memory), "-nodefaults", "-no-reboot", "-display", "none", "-monitor", "none"]
        qemu += ["-serial", f"file:{self.console}", "-kernel", made["xen"]]
        qemu += ["-append", f"{XEN} {memory}"]
        qemu += ["-initrd", f"{made['kernel']} {line},{made['boot']}"]
        for disk in (made["system"], made["project"]):
            qemu += ["-drive", f"file={disk},format=raw,if=virtio,readonly=on"]
        for data in self.data:
            qemu += ["-drive", f"file={data},format=raw,if=virtio,cache=unsafe"]
        qemu += ["-chardev", f"socket,id=c0,path={self.directory}/ctrl", "-tpmdev", "emulator,id=t0,chardev=c0"]
        qemu += ["-device", "tpm-tis,tpmdev=t0", "-device", "virtio-serial-pci"]
        qemu += ["-chardev", f"socket,id=agent,path={self.directory}/agent,server=on,wait=off"]
        return [*qemu, "-device", "virtserialport,chardev=agent,name=agent"]

    @property
    def link(self) -> Link:
        assert self._link is not None, "the host is switched off"
        return self._link

    def power_off(self) -> None:
        """Let dom0 write back its disks and end."""
        with suppress(TimeoutError):  # the answer may be lost
            self.link.ask(20, run="umount -l /data; sync; poweroff -f", seconds=20)
        assert self.process is not None
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.power_cut()

    def power_cut(self) -> None:
        """End QEMU as a power cut would. What dom0 has not written is lost; the TPM keeps what it keeps."""
        for process in (self.process, self._tpm):
            if process is not None:
                process.send_signal(signal.SIGKILL if process is self.process else signal.SIGTERM)
                process.wait()
        self.process = self._tpm = None
        if self._link is not None:
            self._link.close()
            self._link = None

    # --- dom0 ---

    def start(self, command: str, seconds: float = COMMAND_SECONDS) -> "HostPending":
        """Send a command to dom0's shell without waiting for its end."""
        return HostPending(self, self.link.post(run=command, seconds=seconds), command, seconds, self.clock())

    def run(self, command: str, seconds: float = COMMAND_SECONDS) -> tuple[int, str]:
        """Run a command of dom0's shell; returns its exit code (-9: it took too long) and what it printed."""
        return self.start(command, seconds).wait()

    def good(self, command: str, seconds: float = COMMAND_SECONDS) -> str:
        """Run a command that must succeed; returns what it printed, without blanks around."""
        code, said = self.run(command, seconds)
        if code != 0:
            raise XenError(f"dom0$ {command}\n{said}-> {code}\n{self._said()[-1500:]}")
        return said.strip()

    def write(self, path: str, content: str) -> None:
        """Write a file in dom0."""
        self.good(f"cat >{path} <<'END-OF-FILE'\n{content}\nEND-OF-FILE")

    # --- domains ---

    def create(self, name: str, config: str, *, seconds: float = COMMAND_SECONDS) -> Domain:
        """Write a configuration (`guest_config`, `domain_config`), create the domain, open its console."""
        self.write(f"/tmp/{name}.cfg", config)
        self.good(f"xl create -q /tmp/{name}.cfg", seconds)
        return self.opened(name)

    def opened(self, name: str) -> Domain:
        """The console of a domain that runs."""
        script = f"id=$(xl domid {name}) && for _ in 1 2 3 4 5 6 7 8 9; do "
        script += "tty=$(xenstore-read /local/domain/$id/console/tty) && [ $tty ] && echo $id $tty && exit; sleep 0.1; "
        number, console = self.good(script + "done; exit 1").split()
        return Domain(self, name, int(number), console)


@dataclass
class HostPending:
    """A command of dom0 that has been sent."""

    host: XenHost
    number: int
    command: str
    seconds: float
    began: float

    def wait(self) -> tuple[int, str]:
        """Its exit code (-9: it took too long) and what it printed."""
        answer = self.host.link.take(self.number, self.seconds + 30)
        self.host.record("dom0", self.command, answer["out"], answer["code"], self.began)
        return answer["code"], answer["out"]


@contextmanager
def xen_host(prepare: Callable[[Path], Path] | None = None, **options: Any) -> Iterator[XenHost]:
    """A booted host with a new disk and a new TPM, in a directory that goes with it.

    prepare: given that directory, returns what /data begins with; may use its `tpm`, the state of the host's TPM.
    """
    directory = Path(tempfile.mkdtemp(prefix="xen", dir=os.environ.get("TMPDIR")))
    (directory / "tpm").mkdir()
    made = XenHost(directory, content=prepare(directory) if prepare else None, **options)
    try:
        made.boot()
        yield made
    finally:
        made.power_cut()
        shutil.rmtree(directory)


if __name__ == "__main__":
    from xen_script import main

    sys.exit(main())
