"""What TPM programs need around them: a home of their own, a private message bus, a resource manager on it."""

import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from e2e_rig import Answer, Installation, wait_for

_BUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
    <allow own="*"/>
  </policy>
</busconfig>
"""
OUT_OF_OBJECTS = "0x902"  # TPM_RC_OBJECT_MEMORY: three transient objects are loaded
PCR_7 = "7:sha256=" + "7b" * 32


class Programs:
    """Runs programs that somebody else wrote, with nothing of this machine's users in their environment."""

    def __init__(self, base: Path, more: Mapping[str, str] | None = None) -> None:
        self.base = base
        self.home = base / "home"
        self.home.mkdir(exist_ok=True)
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(base),
            "LC_ALL": "C.UTF-8",
            **(more or {}),
        }

    def with_(self, **more: str) -> "Programs":
        """The same, with more in the environment."""
        return Programs(self.base, self.environment | more)

    def run(self, *words: str, check: bool = True, given: bytes | None = None, seconds: float = 60) -> Answer:
        done = subprocess.run(
            words, env=self.environment, input=given or b"", capture_output=True, cwd=self.home, timeout=seconds, check=False
        )
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        if check:
            assert done.returncode == 0, f"{words}: {done.returncode}\n{out}\n{err}"
        return Answer(subprocess.CompletedProcess(words, done.returncode, out, err))

    @contextmanager
    def running(self, *words: str) -> Iterator["Daemon"]:
        """A program in the background, ended afterwards; its output is in a file."""
        log = self.base / f"{Path(words[0]).name}-{time.monotonic_ns()}.log"
        with log.open("wb") as opened:
            process = subprocess.Popen(
                words, env=self.environment, cwd=self.home, stdin=subprocess.DEVNULL, stdout=opened, stderr=opened
            )
        daemon = Daemon(process, log)
        try:
            yield daemon
        finally:
            daemon.end()


class Daemon:
    """A program in the background."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self._log = process, log

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        if self.alive():
            self.process.kill()
            self.process.wait()


@contextmanager
def message_bus(base: Path) -> Iterator[Programs]:
    """A D-Bus daemon that stands for the system's; programs in the environment that leads to it."""
    path, configuration = base / "bus", base / "bus.conf"
    configuration.write_text(_BUS.format(path=path))
    programs = Programs(base, {"DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={path}"})
    with programs.running("dbus-daemon", f"--config-file={configuration}", "--nofork", "--nopidfile") as daemon:
        wait_for(lambda: path.exists() or not daemon.alive(), "the message bus")
        assert daemon.alive(), daemon.said
        yield programs


@contextmanager
def resource_manager(programs: Programs, tcti: str, name: str) -> Iterator[str]:
    """tpm2-abrmd on the bus before a vTPM; the TCTI of its clients."""
    bus_name = f"com.intel.tss2.{name}"
    root = ["--allow-root"] if os.geteuid() == 0 else []
    with programs.running("tpm2-abrmd", *root, "--dbus-name", bus_name, "--tcti", tcti) as daemon:
        clients = f"tabrmd:bus_name={bus_name}"
        tool = programs.with_(TPM2TOOLS_TCTI=clients)
        wait_for(
            lambda: not daemon.alive() or tool.run("tpm2_getrandom", "4", check=False).code == 0,
            f"tpm2-abrmd: {daemon.said}",
        )
        assert daemon.alive(), daemon.said
        yield clients


@contextmanager
def vtpms_for_clients(made: Installation, *names: str, tpm: str = "2.0") -> Iterator[dict[str, str]]:
    """Running vTPMs; the TCTI of each by its name."""
    for name in names:
        made.add(name, "--tpm", tpm)
    yield {name: str(made.attach(name, f"guest-of-{name}")["tcti"]) for name in names}
