"""An installation under test, driven only as a user would: the installed commands, tpm2-tools, raw bytes on sockets."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import vtpm_instance_rig as tpm

BIN = Path(sys.executable).parent
DEADLINE = 30.0


@cache
def may_enter(uid: int) -> bool:
    """Tell whether a user can run the Python of this clone: below /root, say, only root can."""
    try:
        return subprocess.run([sys.executable, "-c", ""], user=uid, check=False).returncode == 0
    except PermissionError:
        return False


def wait_for(condition: Any, what: str, seconds: float = DEADLINE) -> Any:
    limit = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < limit, f"waited {seconds} s for {what}"
        time.sleep(0.01)
    return result


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


class Answer:
    """What a command did."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Installation:
    """A state directory, a runtime directory, and the manager that serves them."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.state, self.runtime, self.log = base / "state", base / "run", base / "manager.log"
        self.manager: subprocess.Popen[bytes] | None = None
        self.recovery = base / "recovery.pem"

    # --- the manager's own command ---

    def vtpm_manager(self, verb: str, *options: str, check: bool = True) -> Answer:
        places = ("--state-dir", str(self.state), "--runtime-dir", str(self.runtime))
        return self.command("vtpm-manager", verb, *places, *options, check=check)

    def init(self, *options: str, tcti: str = "embedded", check: bool = True) -> Answer:
        if not self.recovery.exists() and "--no-recovery" not in options:
            self.command("vtpm-recovery-key", "new", str(self.recovery))
        if "--no-recovery" not in options:
            options = ("--recovery", f"{self.recovery}.pub", *options)
        return self.vtpm_manager("init", "--tcti", tcti, *options, check=check)

    def configure(self, key: str, value: object) -> None:
        """Set a number, word or truth value that the configuration has."""
        file = self.state / "config.toml"
        lines = file.read_text().splitlines()
        assert sum(line.startswith(f"{key} = ") for line in lines) == 1, f"not one key {key}"
        changed = [f"{key} = {json.dumps(value)}" if line.startswith(f"{key} = ") else line for line in lines]
        file.write_text("\n".join(changed) + "\n")

    def spawn(self) -> None:
        """Start a manager without waiting for it."""
        assert self.manager is None
        places = ("--state-dir", str(self.state), "--runtime-dir", str(self.runtime), "--log-level", "debug")
        with self.log.open("ab") as log:
            self.manager = subprocess.Popen([str(BIN / "vtpm-manager"), "run", *places], stderr=log)

    def start(self) -> None:
        self.spawn()
        wait_for(self._ready, f"the manager; its log:\n{self.log.read_text()[-3000:]}")

    def _ready(self) -> bool:
        assert self.manager is not None
        assert self.manager.poll() is None, f"the manager ended:\n{self.log.read_text()[-3000:]}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as admin:
            try:
                admin.connect(str(self.runtime / "admin.sock"))
            except OSError:
                return False
        return True

    def try_start(self) -> int:
        """Start a manager that is expected not to; return its exit code."""
        places = ("--state-dir", str(self.state), "--runtime-dir", str(self.runtime))
        done = subprocess.run([str(BIN / "vtpm-manager"), "run", *places], capture_output=True, timeout=60, check=False)
        self.refusal = done.stderr.decode()
        return done.returncode

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.manager is not None
        self.manager.send_signal(number)
        code = self.manager.wait(60)
        self.manager = None
        return code

    def restart(self) -> None:
        assert self.stop() == 0, self.log.read_text()[-3000:]
        self.start()

    def kill(self) -> None:
        """SIGKILL to the manager alone."""
        self.stop(signal.SIGKILL)

    # --- verbs ---

    def command(self, *words: str, check: bool = True, **more: Any) -> Answer:
        environment = os.environ | {"VTPM_MANAGER_SOCKET": str(self.runtime / "admin.sock")} | more.pop("env", {})
        done = subprocess.run(
            [str(BIN / words[0]) if (BIN / words[0]).exists() else words[0], *words[1:]],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **more,
        )
        if check:
            assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.tail()}"
        return Answer(done)

    def tail(self) -> str:
        return self.log.read_text()[-2500:] if self.log.exists() else ""

    def add(self, name: str, *options: str) -> str:
        return self.command("vtpm-add", "--name", name, *options).out.strip()

    def attach(self, name: str, guest: str = "guest", *options: str) -> dict[str, Any]:
        return dict(self.command("vtpm-attach", name, guest, *options, "--json").json)

    def show(self, name: str) -> dict[str, Any]:
        return dict(self.command("vtpm-show", name, "--json").json)

    def tool(self, tcti: str, *words: str, check: bool = True, cwd: Path | None = None) -> Answer:
        """Run a tpm2-tools command as the guest would."""
        environment = {"TPM2TOOLS_TCTI": tcti, "TSS2_LOG": "all+NONE"}
        return self.command(*words, check=check, env=environment, cwd=cwd or self.base)

    def images(self) -> list[Path]:
        return sorted(self.state.rglob("*.img"))

    def processes(self) -> list[int]:
        """Every process that belongs to this installation."""
        mine = str(self.base).encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with suppress(OSError):
                    if mine in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
        return found

    def tear_down(self) -> None:
        if self.manager is not None:
            self.manager.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.manager.wait(30)
            if self.manager.poll() is None:
                self.manager.kill()
                self.manager.wait()
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def installation(kind: type[Installation] = Installation) -> Iterator[Installation]:
    """A fresh installation in a directory with a short name (Unix sockets), torn down afterwards."""
    base = Path(tempfile.mkdtemp(prefix="vt"))
    made = kind(base)
    try:
        yield made
    finally:
        made.tear_down()
        shutil.rmtree(base, ignore_errors=True)


class Guest:
    """A guest that speaks raw TPM commands on a data socket, as a TPM driver does; it connects anew after a crash."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.sock: socket.socket | None = None

    def transmit(self, command: bytes, timeout: float = 30.0) -> bytes:
        """One command, its whole answer. Raises OSError (EOFError) when the instance goes away meanwhile."""
        if self.sock is None:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(timeout)
            try:
                self.sock.connect(self.endpoint)
            except OSError:
                self.close()
                raise
        try:
            self.sock.sendall(command)
            answer = b""
            while len(answer) < 10 or len(answer) < int.from_bytes(answer[2:6], "big"):
                piece = self.sock.recv(4096)
                if not piece:
                    raise ConnectionResetError("the instance went away")
                answer += piece
        except OSError:
            self.close()
            raise
        return answer

    def code(self, command: bytes) -> int:
        return int.from_bytes(self.transmit(command)[6:10], "big")

    def good(self, command: bytes) -> bytes:
        """A command that must succeed (TPM_RC_RETRY is repeated, as drivers do)."""
        for _ in range(5):
            answer = self.transmit(command)
            if (code := int.from_bytes(answer[6:10], "big")) != 0x922:
                break
        assert code == 0, f"response code {code:#x}"
        return answer

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    # the commands the tests use
    def define(self, index: int, size: int) -> None:
        self.good(tpm.nv_define(index, size))

    def write(self, index: int, content: bytes) -> None:
        self.good(tpm.nv_write(index, content))

    def read(self, index: int, size: int) -> bytes:
        return tpm.nv_content(self.good(tpm.nv_read(index, size)))

    def extend(self, pcr: int, digest: bytes) -> None:
        self.good(tpm.pcr_extend(pcr, digest))

    def pcr(self, index: int) -> bytes:
        return self.good(tpm.pcr_read(index))[-32:]
