"""A relay under test: two network namespaces where they can be made, the installed command on both sides, and a client
that says on a control socket what QEMU's emulator back end says, byte for byte (reference/swtpm-libtpms-qemu.md 2)."""

import array
import os
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import vtpm_instance_rig as tpm
from e2e_rig import BIN, wait_for

READ_CLOCK = bytes.fromhex("80010000000a00000181")
NOT_STARTED = bytes.fromhex("80010000000a00000101")
FAILURE = bytes.fromhex("80010000000a00000101")


class Namespaces:
    """Two networks joined by a cable; without the right to make them both sides are on 127.0.0.1."""

    def __init__(self) -> None:
        self.holders: list[subprocess.Popen[bytes]] = []
        self.far: list[str] = []
        self.near: list[str] = []
        self.host = "127.0.0.1"
        try:
            self._make()
        except (OSError, subprocess.CalledProcessError):
            self.close()
            self.far, self.near, self.host = [], [], "127.0.0.1"

    def _make(self) -> None:
        for _ in range(2):
            holder = subprocess.Popen(["unshare", "--net", "sleep", "600"])
            self.holders.append(holder)
            wait_for(lambda pid=holder.pid: self._has_left(pid), "a network namespace", 5)
        far, near = (holder.pid for holder in self.holders)
        self.far, self.near = (["nsenter", "-t", str(pid), "-n", "--"] for pid in (far, near))
        run(*self.far, "ip", "link", "add", "vtfar", "type", "veth", "peer", "name", "vtnear", "netns", str(near))
        for prefix, device, address in ((self.far, "vtfar", "192.0.2.1"), (self.near, "vtnear", "192.0.2.2")):
            run(*prefix, "ip", "addr", "add", f"{address}/30", "dev", device)
            for each in (device, "lo"):
                run(*prefix, "ip", "link", "set", each, "up")
        self.host = "192.0.2.1"

    @staticmethod
    def _has_left(pid: int) -> bool:
        return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")

    def cut(self) -> None:
        """Pull the cable: nothing arrives, and nobody is told."""
        run(*self.near, "ip", "link", "set", "vtnear", "down")

    def mend(self) -> None:
        run(*self.near, "ip", "link", "set", "vtnear", "up")

    def close(self) -> None:
        for holder in self.holders:
            holder.kill()
            holder.wait()
        self.holders.clear()


class Loopback(Namespaces):
    """TLS without networks of its own: both sides on 127.0.0.1."""

    def _make(self) -> None:
        raise OSError("none are wanted")


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


class Relay:
    """Both sides. `places` are options of the far side: --socket of a manager, or --vtpm NAME=CONTROL,DATA."""

    def __init__(
        self,
        base: Path,
        places: list[str],
        *,
        spaces: Namespaces | None = None,
        vtpms: str = '["*"]',
        options: str = "",
    ) -> None:
        self.base, self.places, self.spaces = base, places, spaces
        self.near_options = options.split()
        self.directory = base / "near"
        self.far: subprocess.Popen[bytes] | None = None
        self.near: subprocess.Popen[bytes] | None = None
        self.clients = base / "clients.toml"
        self.hold = base / "hold.sock"
        self.address = f"tls:{spaces.host}:9443" if spaces else f"unix:{base}/relay.sock"
        for side in ("far-id", "near-id"):
            (base / side).mkdir()
            run(str(BIN / "vtpm-relay"), "key", str(base / side), "--name", side)
        self.allow(vtpms)

    def allow(self, vtpms: str, certificate: str = "near-id/relay.crt") -> None:
        who = f'certificate = "{certificate}"' if self.spaces else f"uid = {os.geteuid()}"
        self.clients.write_text(f'[[client]]\nname = "near"\n{who}\nvtpms = {vtpms}\n')

    def reread(self, vtpms: str) -> None:
        """Allow something else while the far side runs."""
        assert self.far is not None
        seen = self.log("far").count("the clients are those")
        self.allow(vtpms)
        self.far.send_signal(signal.SIGHUP)
        wait_for(lambda: self.log("far").count("the clients are those") > seen, "the clients' file read again")

    def start_far(self, *more: str) -> None:
        words = [
            "serve",
            "--listen",
            self.address,
            "--clients",
            str(self.clients),
            "--identity",
            str(self.base / "far-id"),
        ]
        words += ["--hold", str(self.hold), "--patience", "20", "--log-level", "debug", *self.places, *more]
        self.far = self._start("far", words, self.spaces.far if self.spaces else [])

    def start_near(self, identity: str = "near-id", *more: str) -> None:
        words = ["connect", "--to", self.address, "--directory", str(self.directory), "--log-level", "debug"]
        words += ["--identity", str(self.base / identity), "--far-certificate", str(self.base / "far-id/relay.crt")]
        words += [*self.near_options, *more]
        self.near = self._start("near", words, self.spaces.near if self.spaces else [])

    def _start(self, name: str, words: list[str], prefix: list[str]) -> "subprocess.Popen[bytes]":
        begun = self.log(name).count("ready")
        with (self.base / f"{name}.log").open("ab") as log:
            process = subprocess.Popen([*prefix, str(BIN / "vtpm-relay"), *words], stderr=log, stdin=subprocess.DEVNULL)

        def ready() -> bool:
            assert process.poll() is None, f"the {name} side ended:\n{self.log(name)[-3000:]}"
            return self.log(name).count("ready") > begun

        wait_for(ready, f"the {name} side")
        return process

    def log(self, name: str) -> str:
        path = self.base / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def stop_far(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.far is not None
        self.far.send_signal(number)
        code = self.far.wait(40)
        self.far = None
        return code

    def restart_far(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.stop_far(number)
        self.start_far()

    def control(self, name: str) -> Path:
        path = self.directory / name / "swtpm.sock.ctrl"
        wait_for(
            path.exists, f"the endpoint of {name}; near:\n{self.log('near')[-2000:]}\nfar:\n{self.log('far')[-2000:]}"
        )
        return path

    def data(self, name: str) -> Path:
        return self.control(name).with_name("swtpm.sock")

    def close(self) -> None:
        for process in (self.near, self.far):
            if process is not None:
                process.kill()
                process.wait()
        for entry in Path(
            "/proc"
        ).iterdir():  # the holder: it has our directory nowhere in its words, but listens in it
            if entry.name.isdigit():
                try:
                    ours = b"relay_holder" in (entry / "cmdline").read_bytes() and self._listens(entry)
                except OSError:
                    continue
                if ours:
                    os.kill(int(entry.name), signal.SIGKILL)

    def _listens(self, process: Path) -> bool:
        number = next(
            (
                line.split()[6]
                for line in Path("/proc/net/unix").read_text().splitlines()
                if line.endswith(str(self.hold))
            ),
            "",
        )
        return bool(number) and os.readlink(process / "fd/0") == f"socket:[{number}]"


@contextmanager
def relay(places: list[str], **options: object) -> Iterator[Relay]:
    with tempfile.TemporaryDirectory(prefix="vr") as base:
        made = Relay(Path(base), places, **options)  # type: ignore[arg-type]
        try:
            yield made
        finally:
            made.close()


class QemuClient:
    """What QEMU does with a control socket, up to a running guest's commands."""

    def __init__(self, control: Path, timeout: float = 60.0) -> None:
        self.control = socket.socket(socket.AF_UNIX)
        self.control.settimeout(timeout)
        self.control.connect(str(control))
        self.locality = 0xFF
        ours, theirs = socket.socketpair()
        self.data = ours
        self.data.settimeout(timeout)
        with theirs:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))]
            try:
                self.control.sendmsg([struct.pack(">I", 0x10)], rights)
                self.passed = struct.unpack(">I", self.read(self.control, 4))[0]
            except OSError:
                self.close()
                raise

    @staticmethod
    def read(sock: socket.socket, size: int) -> bytes:
        answer = b""
        while len(answer) < size:
            piece = sock.recv(size - len(answer))
            if not piece:
                raise ConnectionResetError("the relay went away")
            answer += piece
        return answer

    def command(self, number: int, payload: bytes = b"", size: int = 4) -> bytes:
        self.control.sendall(struct.pack(">I", number) + payload)
        return self.read(self.control, size)

    def result(self, number: int, payload: bytes = b"") -> int:
        return int.from_bytes(self.command(number, payload), "big")

    def power_on(self) -> None:
        """Device creation and machine start."""
        assert self.passed == 0
        assert self.raw(READ_CLOCK)[:2] == b"\x80\x01"
        assert struct.unpack(">II", self.command(0x01, size=8))[1] & 0x348F == 0x348F
        assert self.result(0x0E) == 0
        size = struct.unpack(">IIII", self.command(0x11, struct.pack(">I", 0), 16))[1]
        assert self.result(0x0E) == 0
        assert struct.unpack(">IIII", self.command(0x11, struct.pack(">I", size), 16))[0] == 0
        assert self.result(0x02, struct.pack(">I", 0)) == 0
        self.good(tpm.STARTUP_CLEAR)

    def raw(self, command: bytes) -> bytes:
        self.data.sendall(command)
        head = self.read(self.data, 10)
        return head + self.read(self.data, struct.unpack_from(">I", head, 2)[0] - 10)

    def transmit(self, command: bytes, locality: int = 0) -> bytes:
        if locality != self.locality:
            assert self.result(0x05, bytes([locality, 0, 0, 0])) == 0
            self.locality = locality
        return self.raw(command)

    def code(self, command: bytes, locality: int = 0) -> int:
        return int.from_bytes(self.transmit(command, locality)[6:10], "big")

    def good(self, command: bytes, locality: int = 0) -> bytes:
        for _ in range(5):
            answer = self.transmit(command, locality)
            if (code := int.from_bytes(answer[6:10], "big")) != 0x922:
                break
        assert code == 0, f"response code {code:#x}"
        return answer

    def close(self) -> None:
        self.control.close()
        self.data.close()


@contextmanager
def swtpm(base: Path, name: str = "plain", *, data: bool = False) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A plain swtpm 2.0; gives the far side's option for it."""
    state = base / name
    state.mkdir()
    control = state / "ctrl"
    words = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={control}"]
    if data:
        words += ["--server", f"type=unixio,path={state}/data", "--flags", "not-need-init,startup-clear"]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    try:
        wait_for(control.exists, "swtpm")
        yield f"--vtpm={name}={control}" + (f",{state}/data" if data else ""), process
    finally:
        process.kill()
        process.wait()


def pause(seconds: float) -> None:
    time.sleep(seconds)
