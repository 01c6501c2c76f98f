"""What TPM programs need around them: a home of their own, a private message bus, a resource manager on it."""

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from e2e_rig import Answer, wait_for

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
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
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
            words,
            env=self.environment,
            input=given or b"",
            capture_output=True,
            cwd=self.home,
            timeout=seconds,
            check=False,
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


def free_ports() -> int:
    """A port of the loopback interface that nobody uses, and neither the next one."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port
    raise AssertionError("no two free ports")


@contextmanager
def tcsd(base: Path, **device: str) -> Iterator[Programs]:
    """TrouSerS' daemon on a TPM 1.2, started by root, and programs that talk to it."""
    tss = pwd.getpwnam("tss")
    home = base / "tss"
    base.chmod(0o711)
    if not home.exists():
        home.mkdir()
        shutil.chown(home, tss.pw_uid, tss.pw_gid)
    port = free_ports()
    configuration = home / "tcsd.conf"
    configuration.write_text(f"port = {port}\nsystem_ps_file = {home}/system.data\ndisable_ipv6 = 1\n")
    os.chown(configuration, 0, tss.pw_gid)
    configuration.chmod(0o640)
    programs = Programs(base, {"TSS_TCSD_HOSTNAME": "localhost", "TSS_TCSD_PORT": str(port)})
    on = programs.with_(TCSD_USE_TCP_DEVICE="1", **device)
    with on.running("tcsd", "-e", "-f", "-c", str(configuration)) as daemon:
        wait_for(lambda: listens(port) or not daemon.alive(), "tcsd")
        assert daemon.alive(), daemon.said
        yield programs


def listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0
