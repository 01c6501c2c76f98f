"""What is measured: an installation of ours with its manager, and the real swtpm. All is torn down afterwards."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import vtpm_instance_commands as tpm
from e2e_rig import BIN, Installation, wait_for

from frontend_backend.front import RingFrontEnd
from manager import client
from manager.verb_table import BY_NAME

REPOSITORY = Path(__file__).resolve().parents[2]
INDEX = 0x1500016  # the NV index that the benchmarks use
CONTENT_BYTES = 64
_RC_RETRY = 0x922
_TRIES = 5


class TpmError(Exception):
    """A TPM refused a command of a benchmark: there is nothing to measure."""

    def __init__(self, code: int) -> None:
        super().__init__(f"a TPM answered {code:#x} to a benchmark's command")
        self.code = code


class Client:
    """A persistent connection to a TPM: the least a guest's driver can do for a command."""

    def __init__(self, exchange: Callable[[bytes], bytes], close: Callable[[], None]) -> None:
        self._exchange, self.close = exchange, close

    @classmethod
    def on_socket(cls, path: str, timeout: float | None = None) -> Self:
        """Connect to a data socket. A timeout in seconds costs a poll for each call; without one it waits for ever."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(timeout)
        sock.connect(path)
        send, receive = sock.sendall, sock.recv

        def exchange(packet: bytes) -> bytes:
            send(packet)
            return receive(4096)

        return cls(exchange, sock.close)

    @classmethod
    def on_ring(cls, path: str) -> Self:
        """Fetch a ring."""
        front = RingFrontEnd.connect(path)
        return cls(front.transact, front.close)

    def run(self, packet: bytes) -> bytes:
        """Send one command and return its answer; raises TpmError unless it says success."""
        answer = self._exchange(packet)
        if answer[6:10] != b"\0\0\0\0":
            raise TpmError(int.from_bytes(answer[6:10]))
        return answer

    def prepare(self) -> None:
        """Define the NV index and write it, and let the self tests of what is measured be over."""
        for packet in (tpm.nv_define(INDEX, CONTENT_BYTES), tpm.nv_write(INDEX, bytes(CONTENT_BYTES)), *READS.values()):
            self._insist(packet)

    def _insist(self, packet: bytes) -> None:
        for _ in range(_TRIES):
            try:
                self.run(packet)
            except TpmError as error:
                if error.code != _RC_RETRY:
                    raise
            else:
                return
        raise TpmError(_RC_RETRY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# The commands of design section 10 that store nothing, by the names it uses.
READS = {
    "GetRandom": tpm.get_random(32),
    "PCR_Read": tpm.pcr_read(0),
    "PCR_Extend": tpm.pcr_extend(16),
    "NV_Read": tpm.nv_read(INDEX, CONTENT_BYTES),
}


def writes() -> Iterator[bytes]:
    """Yield NV_Write commands without end, each with another content."""
    number = 0
    while True:
        number += 1
        yield tpm.nv_write(INDEX, number.to_bytes(8) * (CONTENT_BYTES // 8))


class Subject(Installation):
    """An installation whose state lies on the disk that is measured, and whose manager logs as in production."""

    def __init__(self, base: Path, disk: Path) -> None:
        super().__init__(base)
        self.disk = disk
        self.state = disk / "state"

    def start(self) -> None:
        """Start the manager and wait until it serves."""
        assert self.manager is None
        places = ("--state-dir", str(self.state), "--runtime-dir", str(self.runtime))
        with self.log.open("ab") as log:
            self.manager = subprocess.Popen([str(BIN / "vtpm-manager"), "run", *places], stderr=log)
        wait_for(self._ready, f"the manager; its log:\n{self.tail()}", 120.0)

    def ask(self, verb: str, **arguments: str | int | bool | None) -> list[dict[str, Any]]:
        """Ask the manager for a verb, without a command line between."""
        return client.request(str(self.runtime / "admin.sock"), verb, _with_defaults(verb, arguments))

    def make(self, name: str) -> None:
        """Add a vTPM."""
        self.ask("add", name=name)

    def run_for(self, name: str, frontend: str = "socket") -> dict[str, Any]:
        """Attach a vTPM to a guest of the same name."""
        return self.ask("attach", vtpm=name, guest=name, frontend=frontend)[0]

    def status(self) -> dict[str, Any]:
        """Return the document of `vtpm-manager status`."""
        return self.ask("status")[0]

    def processes(self) -> list[int]:
        """Return every process that names one of our directories: manager, keeper, instances, embedded TPM."""
        found = []
        mine = (str(self.base).encode(), str(self.disk).encode())
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with suppress(OSError):  # it has ended meanwhile
                    command = (entry / "cmdline").read_bytes()
                    if any(path in command for path in mine):
                        found.append(int(entry.name))
        return found

    def embedded_tpm(self) -> int:
        """Return the process id of the swtpm that stands in for the hardware TPM."""
        for pid in self.processes():
            if Path(f"/proc/{pid}/comm").read_text().strip() == "swtpm":
                return pid
        raise LookupError("the embedded TPM does not run")

    @staticmethod
    def spawner(keeper: int) -> int:
        """Return the process id of the keeper's spawner: its only child that neither is an instance nor will be one."""
        others = ("vtpm-instance", "vtpm-standby")
        return next(pid for pid, name in _children(keeper).items() if name not in others)

    @staticmethod
    def standing_by(keeper: int) -> list[int]:
        """Return the process ids of the keeper's instances-to-be."""
        return [pid for pid, name in _children(keeper).items() if name == "vtpm-standby"]

    def keeper(self, instance: int) -> int:
        """Return the process id of the keeper, whose child `instance` is."""
        return int(Path(f"/proc/{instance}/stat").read_text().rsplit(")", 1)[1].split()[1])


def _children(pid: int) -> dict[int, str]:
    """Return a process's children and their names (proc(5))."""
    words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(word): Path(f"/proc/{word}/comm").read_text().strip() for word in words}


def _with_defaults(verb: str, given: dict[str, str | int | bool | None]) -> dict[str, str | int | bool | None]:
    return {argument.name: argument.default for argument in BY_NAME[verb].arguments} | given


@contextmanager
def scratch() -> Iterator[Path]:
    """Make a directory on the repository's own file system: a disk, where /tmp may be memory."""
    device = REPOSITORY.stat().st_dev
    places = [Path(tempfile.gettempdir()), Path("/var/tmp"), REPOSITORY]
    place = next(place for place in places if place.is_dir() and place.stat().st_dev == device)
    directory = Path(tempfile.mkdtemp(prefix="vb", dir=place))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def running_subject() -> Iterator[Subject]:
    """Provision an installation on an embedded TPM and run it."""
    with scratch() as disk, tempfile.TemporaryDirectory(prefix="vb") as base:
        subject = Subject(Path(base), disk)
        try:
            subject.init()
            subject.start()
            yield subject
        finally:
            subject.tear_down()


class Swtpm:
    """One swtpm process, its state in `directory`; our end of its listening socket exists before it does."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.path = str(directory / "data.sock")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it. It can be connected to at once, and answers when it is ready: nobody has to look for its socket."""
        Path(self.path).unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.path)
            listener.listen(1)
            server = f"type=unixio,fd={listener.fileno()}"
            state = ("--tpmstate", f"dir={self.directory}", "--log", f"file={self.directory / 'log'}")
            self._process = subprocess.Popen(
                ["swtpm", "socket", "--tpm2", *state, "--server", server, "--flags", "not-need-init,startup-clear"],
                stderr=subprocess.DEVNULL,
                pass_fds=(listener.fileno(),),
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None, "it was not started"
        return self._process.pid

    def stop(self) -> None:
        """End it; its state stays."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait()
            self._process = None


@contextmanager
def running_swtpms(directory: Path, count: int = 1) -> Iterator[list[Swtpm]]:
    """Run `count` swtpm processes with states below `directory`."""
    peers: list[Swtpm] = []
    try:
        for number in range(count):
            peers.append(Swtpm(directory / f"swtpm-{number}"))
            peers[-1].start()
        yield peers
    finally:
        for peer in peers:
            peer.stop()
