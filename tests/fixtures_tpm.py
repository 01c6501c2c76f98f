"""Real swtpm processes for tests, in a directory of their own on Unix sockets; and a relay that records their bus."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from manager.hwtpm_setting import TctiSetting

READY_SECONDS = 10.0
FLAGS = "not-need-init,startup-clear"
CMD_GET_CAPABILITY = (1).to_bytes(4, "big")  # swtpm_ioctls(3), as the answer's size
CAPABILITY_BYTES = 8
CMD_INIT, CMD_SET_LOCALITY = 2, 5  # swtpm_ioctls(3)
STARTUP_CLEAR = bytes.fromhex("8001 0000000c 00000144 0000")


@dataclass
class SwtpmProcess:
    """One swtpm and its state directory. `start` and `stop` make a platform reset; the state stays."""

    directory: Path
    flags: str = FLAGS
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def socket(self) -> str:
        return str(self.directory / "tpm")

    @property
    def setting(self) -> TctiSetting:
        return TctiSetting.parse(f"swtpm:path={self.socket}")

    @property
    def tcti(self) -> str:
        """For TPM2TOOLS_TCTI."""
        return self.setting.text

    def start(self) -> None:
        assert self.process is None
        for name in (self.socket, self.socket + ".ctrl"):
            Path(name).unlink(missing_ok=True)
        command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.directory}"]
        command += ["--server", f"type=unixio,path={self.socket}", "--ctrl", f"type=unixio,path={self.socket}.ctrl"]
        command += ["--flags", self.flags, "--log", f"file={self.directory}/log,level=1"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + READY_SECONDS
        while not self._answers():
            assert self.process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < deadline, "swtpm did not start"
            time.sleep(0.005)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(READY_SECONDS)
            try:
                client.connect(self.socket + ".ctrl")
                client.sendall(CMD_GET_CAPABILITY)  # it binds this socket before the other: only an answer says both
                return len(client.recv(CAPABILITY_BYTES)) == CAPABILITY_BYTES
            except OSError:
                return False

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
            self.process.wait(10)
            self.process = None

    def kill(self) -> None:
        """Power cut."""
        self.stop(signal.SIGKILL)

    def tool(self, *command: str) -> str:
        """Run a tpm2-tools command against it, as another user of this TPM would; standard output."""
        environment = os.environ | {"TPM2TOOLS_TCTI": self.tcti, "TSS2_LOG": "all+NONE"}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=30).stdout


@contextmanager
def running_swtpm(directory: Path | None = None, flags: str = FLAGS) -> Iterator[SwtpmProcess]:
    """A started swtpm; its state in `directory`, or in a short temporary one (socket paths: 107 bytes)."""
    own = directory is None
    where = Path(tempfile.mkdtemp(prefix="tpm")) if directory is None else directory
    swtpm = SwtpmProcess(where, flags)
    try:
        swtpm.start()
        yield swtpm
    finally:
        swtpm.kill()
        if own:
            shutil.rmtree(where)


class BusRelay:
    """A second socket pair in front of a swtpm: records every command and response, and may alter responses."""

    def __init__(self, swtpm: SwtpmProcess) -> None:
        self.path = swtpm.socket + ".bus"
        self.setting = TctiSetting.parse(f"swtpm:path={self.path}")
        self.commands: list[bytes] = []
        self.responses: list[bytes] = []
        self.alter: dict[int, bytes] = {}  # command code -> response to give instead of the next one
        self.flip: set[int] = set()  # command codes whose next response gets a bit flipped
        self.before: dict[int, list[bytes]] = {}  # command code -> commands of somebody else, one before each
        self.cut_at: int | None = None  # so many commands pass; the next one is the last, and gets no answer
        self.cut_executes = False  # whether the TPM still carries that one out
        self.reset_at: int | None = None  # so many commands pass; before the next one the TPM is reset, as by hardware
        self.was_cut = self.was_reset = False
        self._far_control: socket.socket | None = None
        self._control_lock = threading.Lock()  # held while the data side uses the control channel
        self._stop_reader, self._stop_writer = socket.socketpair()
        self._target = swtpm.socket
        self._threads = [self._serve("", record=True), self._serve(".ctrl", record=False)]

    def clear(self) -> None:
        self.commands.clear()
        self.responses.clear()

    def saw(self, secret: bytes) -> bool:
        return any(secret in packet for packet in (*self.commands, *self.responses))

    def close(self) -> None:
        self._stop_writer.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self._stop_reader.close()

    def _serve(self, suffix: str, *, record: bool) -> threading.Thread:
        listener = socket.socket(socket.AF_UNIX)
        Path(self.path + suffix).unlink(missing_ok=True)
        listener.bind(self.path + suffix)
        listener.listen()
        thread = threading.Thread(target=self._relay, args=(listener, suffix, record))
        thread.start()
        return thread

    def _readable(self, *sockets: socket.socket) -> list[socket.socket]:
        import select

        return select.select([*sockets, self._stop_reader], [], [])[0]

    @staticmethod
    def _readable_now(source: socket.socket) -> list[socket.socket]:
        import select

        return select.select([source], [], [], 0)[0]

    def _relay(self, listener: socket.socket, suffix: str, record: bool) -> None:
        with listener:
            while self._stop_reader not in self._readable(listener):
                near, _ = listener.accept()
                with near, socket.socket(socket.AF_UNIX) as far:
                    far.connect(self._target + suffix)
                    if not record:
                        self._far_control = far
                    self._pump(near, far, record)

    def _pump(self, near: socket.socket, far: socket.socket, record: bool) -> None:
        code = 0
        while True:
            ready = self._readable(near, far)
            if self._stop_reader in ready:
                return
            for source, sink in ((near, far), (far, near)):
                if source not in ready:
                    continue
                with nullcontext() if record else self._control_lock:
                    if not record and source not in self._readable_now(source):
                        continue
                    try:
                        packet = source.recv(8192)
                    except ConnectionResetError:
                        return
                if not packet:
                    return
                if record and source is near:
                    code = int.from_bytes(packet[6:10])
                    self.commands.append(packet)
                    self._inject(far, self.before.get(code, []))
                    self._maybe_reset(far)
                    if self._is_the_last(far, packet):
                        return
                elif record:
                    packet = self._altered(code, packet)
                    self.responses.append(packet)
                sink.sendall(packet)

    def _inject(self, far: socket.socket, foreign: list[bytes]) -> None:
        if foreign:
            far.sendall(foreign.pop())
            assert int.from_bytes(far.recv(8192)[6:10]) == 0

    def _is_the_last(self, far: socket.socket, packet: bytes) -> bool:
        """A machine whose power goes: this command is carried out or not, and nobody hears of it."""
        if self.cut_at is None:
            return False
        self.cut_at -= 1
        if self.cut_at >= 0:
            return False
        self.cut_at, self.was_cut = None, True
        if self.cut_executes:
            far.sendall(packet)
            far.recv(8192)
        return True

    def _maybe_reset(self, far: socket.socket) -> None:
        """TPM reset and TPM2_Startup(CLEAR) by the firmware, unnoticed by whoever uses the TPM."""
        if self.reset_at is None:
            return
        self.reset_at -= 1
        if self.reset_at >= 0:
            return
        self.reset_at, self.was_reset = None, True
        assert self._far_control is not None
        with self._control_lock:
            for order in (CMD_INIT.to_bytes(4) + bytes(4), CMD_SET_LOCALITY.to_bytes(4) + b"\0"):
                self._far_control.sendall(order)
                assert self._far_control.recv(4) == bytes(4)
            far.sendall(STARTUP_CLEAR)  # which no other locality than 0 and 3 may send
            assert int.from_bytes(far.recv(8192)[6:10]) in (0, 0x100)  # swtpm may have done it
            self._far_control.sendall(CMD_SET_LOCALITY.to_bytes(4) + b"\2")
            assert self._far_control.recv(4) == bytes(4)

    def _altered(self, code: int, packet: bytes) -> bytes:
        if code in self.alter:
            return self.alter.pop(code)
        if code in self.flip:
            self.flip.remove(code)
            return packet[:20] + bytes([packet[20] ^ 1]) + packet[21:]
        return packet


def extend_command(pcr: int, digest: bytes = b"\x5a" * 32) -> bytes:
    """Raw TPM2_PCR_Extend of the SHA-256 bank by a password session. Source: Part 3, 22.2."""
    body = pcr.to_bytes(4) + bytes.fromhex("00000009 40000009 0000 00 0000") + bytes.fromhex("00000001 000b") + digest
    return bytes.fromhex("8002") + (10 + len(body)).to_bytes(4) + (0x182).to_bytes(4) + body


@contextmanager
def recorded_bus(swtpm: SwtpmProcess) -> Iterator[BusRelay]:
    """A relay in front of `swtpm`; open the TPM through its `setting`."""
    relay = BusRelay(swtpm)
    try:
        yield relay
    finally:
        relay.close()
