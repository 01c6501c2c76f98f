"""QEMU with a Linux guest that is led command by command, and what is put in its TPM's place: swtpm, or ours."""

import select
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guest_rig import KERNEL, Image
from qmp import Monitor

OVMF = Path("/usr/share/OVMF")
# The cache of translated code is kept so small that it is emptied now and then. What QEMU translated before a reset
# stays in it otherwise, and each write of the new boot to one of those pages is slow: OVMF took 90 s instead of 13.
ACCELERATOR = "tcg,tb-size=32"
MEMORY_MIB = 256
START_SECONDS = 30.0
BOOT_SECONDS = 300.0  # 5 (SeaBIOS) or 15 (OVMF) on a quiet machine
COMMAND_SECONDS = 120.0
_MIGRATION_ENDED = {"completed", "failed", "cancelled"}


class Ticks:
    """What the guest's `counting` says, each value with the host's time of its arrival (seconds, monotonic)."""

    def __init__(self, sock: socket.socket) -> None:
        self._pieces: list[tuple[float, bytes]] = []
        self._begun = b""
        self._socket = sock
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while piece := self._socket.recv(65536):
            self._pieces.append((time.monotonic(), piece))

    def follow(self, source: "Ticks") -> None:
        """Go on with the line that the guest had begun to say at the QEMU that it came from: moves tear them."""
        self._begun = source._parsed()[1]

    def _parsed(self) -> tuple[list[tuple[float, int]], bytes]:
        seen, rest = list[tuple[float, int]](), self._begun
        for moment, piece in list(self._pieces):
            *lines, rest = (rest + piece).split(b"\n")
            seen += [(moment, int(line)) for line in lines]
        return seen, rest

    @property
    def seen(self) -> list[tuple[float, int]]:
        """All of it, so far."""
        return self._parsed()[0]

    @property
    def count(self) -> int:
        """How many, also before `follow`."""
        return sum(piece.count(b"\n") for _, piece in list(self._pieces))

    def close(self) -> None:
        """Wait for what a QEMU that has ended still said."""
        self._thread.join(START_SECONDS)
        self._socket.close()


def connected(path: Path, process: "subprocess.Popen[bytes] | None" = None) -> socket.socket:
    """Connect as soon as somebody listens; `process` is who will, unless it ends."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(path))
        except OSError:
            sock.close()
            assert time.monotonic() < deadline, f"nobody listens at {path}"
            assert process is None or process.poll() is None, "QEMU ended"
            time.sleep(0.005)
        else:
            return sock


class GuestError(AssertionError):
    """A command in the guest ended with another code than 0."""


class Agent:
    """The guest's shell: images/guest/agent.sh."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._rest = b""
        self._number = 0

    def ready(self, seconds: float = BOOT_SECONDS) -> float:
        """Wait until the guest has booted; returns its uptime then, in seconds."""
        return float(self._answer("ready", seconds)[1])

    def run(self, command: str, seconds: float = COMMAND_SECONDS) -> tuple[int, str]:
        """Run a command of the shell; returns its exit code and what it printed."""
        assert "\n" not in command
        self._number += 1
        self._socket.sendall(f"{self._number} {command}\n".encode())
        code, said = self._answer(str(self._number), seconds)
        return code, said.decode(errors="replace")

    def good(self, command: str, seconds: float = COMMAND_SECONDS) -> str:
        """Run a command that must succeed; returns what it printed, without blanks around."""
        code, said = self.run(command, seconds)
        if code != 0:
            raise GuestError(f"{command}\n{said}-> {code}")
        return said.strip()

    def _answer(self, number: str, seconds: float) -> tuple[int, bytes]:
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            self._receive(deadline)
        head, self._rest = self._rest.split(b"\n", 1)
        said, code, count = head.decode().split()
        # OVMF writes to every serial port, but ends before Linux begins
        assert said == number or (number == "ready" and said.endswith("ready")), (
            f"{head!r} where the answer to {number} was expected"
        )
        while len(self._rest) < int(count):
            self._receive(deadline)
        output, self._rest = self._rest[: int(count)], self._rest[int(count) :]
        return int(code), output

    def _receive(self, deadline: float) -> None:
        ready, _, _ = select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"the guest says nothing more; last {self._rest!r}")
        piece = self._socket.recv(65536)
        if not piece:
            raise ConnectionResetError("QEMU has gone")
        self._rest += piece

    def close(self) -> None:
        self._socket.close()


class Qemu:
    """One QEMU process. It waits before the first instruction until `boot`, or for a migration."""

    def __init__(
        self,
        directory: Path,
        image: Image,
        tpm: Sequence[str],
        *,
        device: str = "tpm-tis",
        firmware: str = "seabios",
        incoming: str = "",
        disk: Path | None = None,
    ) -> None:
        """tpm: QEMU's arguments for the TPM's back end; disk: a qcow2 that keeps snapshots."""
        self.directory = directory
        self.console = directory / "console"
        command = [
            "qemu-system-x86_64",
            "-accel",
            ACCELERATOR,
            "-machine",
            "q35",
            "-cpu",
            "qemu64,+rdrand",
            "-smp",
            "1",
        ]
        command += ["-m", str(MEMORY_MIB), "-nodefaults", "-display", "none", "-serial", f"file:{self.console}"]
        command += ["-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", " ".join(KERNEL)]
        for name, use in (("agent", "isa-serial"), ("ticks", "isa-debugcon,iobase=0xe9"), ("qmp", "")):
            (directory / name).unlink(missing_ok=True)
            command += ["-chardev", f"socket,id={name},path={directory}/{name},server=on,wait=off"]
            command += ["-device", f"{use},chardev={name}"] if use else ["-mon", f"chardev={name},mode=control"]
        back_end = tpm[tpm.index("-tpmdev") + 1]
        (number,) = (option for option in back_end.split(",") if option.startswith("id="))
        command += [*tpm, "-device", f"{device},tpmdev={number.removeprefix('id=')}"]
        if firmware == "ovmf":
            command += self._ovmf()
        if disk is not None:
            command += ["-drive", f"if=none,id=disk,file={disk},format=qcow2", "-device", "virtio-blk,drive=disk"]
        command += ["-incoming", incoming] if incoming else ["-S"]
        with (directory / "qemu.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._connections: list[Monitor | Agent | Ticks] = []
        try:
            self.monitor = Monitor(connected(directory / "qmp", self.process))
            self._connections.append(self.monitor)
            self.guest = Agent(connected(directory / "agent", self.process))
            self._connections.append(self.guest)
            self.ticks = Ticks(connected(directory / "ticks", self.process))
            self._connections.append(self.ticks)
        except OSError as error:  # it may listen for a moment before it finds out that it has no TPM
            self.kill()
            raise AssertionError(f"QEMU ended:\n{self.log()}") from error
        except BaseException:
            self.kill()
            raise

    def _ovmf(self) -> list[str]:
        variables = self.directory / "variables"
        if not variables.exists():
            shutil.copyfile(OVMF / "OVMF_VARS_4M.fd", variables)
        code = f"if=pflash,format=raw,readonly=on,file={OVMF}/OVMF_CODE_4M.fd"
        return ["-drive", code, "-drive", f"if=pflash,format=raw,file={variables}"]

    def boot(self) -> float:
        """Let it start; returns the guest's uptime when it is ready, in seconds."""
        self.monitor.execute("cont")
        return self.guest.ready()

    def reboot(self) -> float:
        """Let the guest reset its machine, and wait until it is up again."""
        self.guest._socket.sendall(b"0 sync; reboot -f\n")
        return self.guest.ready()

    def log(self) -> str:
        return (self.directory / "qemu.log").read_text(errors="replace")[-3000:]

    def power_off(self) -> None:
        """Let the guest switch its machine off, and wait until QEMU has ended."""
        self.guest._socket.sendall(b"0 poweroff -f\n")
        self._ended(COMMAND_SECONDS)

    def quit(self) -> None:
        """End QEMU as its monitor does it."""
        self.monitor.execute("quit")
        self._ended(START_SECONDS)

    def migrate(self, uri: str) -> dict[str, Any]:
        """Send the machine away; returns what query-migrate says once it is there. QEMU stays, without a machine."""
        self.monitor.execute("migrate", uri=uri)
        deadline = time.monotonic() + COMMAND_SECONDS
        while (shown := dict(self.monitor.execute("query-migrate")))["status"] not in _MIGRATION_ENDED:
            assert time.monotonic() < deadline, shown
            time.sleep(0.02)
        assert shown["status"] == "completed", f"{shown}\n{self.log()}"
        return shown

    def arrived(self) -> None:
        """Wait until what comes in is complete: the machine runs then, or stands still as it was sent."""
        deadline = time.monotonic() + COMMAND_SECONDS
        while self.monitor.execute("query-status")["status"] in {"inmigrate", "postmigrate"}:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def _ended(self, seconds: float) -> None:
        code = self.process.wait(seconds)
        self._close()
        assert code == 0, f"QEMU ended with {code}:\n{self.log()}"

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()
        self._close()

    def _close(self) -> None:
        for connection in self._connections:
            connection.close()
