"""A TPM behind swtpm's command line: swtpm itself or vtpm-swtpm, on Unix sockets in a short directory of its own."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import vtpm_instance_rig as rig
from vtpm_instance_commands import command12, nv_content, nv_define, nv_read, nv_write, rc

READY_SECONDS = 20.0
SWTPM = ("swtpm",)
OURS = (str(Path(sys.executable).with_name("vtpm-swtpm")),)
INDEX = 0x1500020
STARTED = "not-need-init,startup-clear"
_GET_CAPABILITY = (1).to_bytes(4)
# TPM_KEY_PARMS: RSA, OAEP, no signatures, 2048 bits, 2 primes, default exponent
_KEY_PARAMETERS = bytes.fromhex("00000001 0003 0001 0000000c 00000800 00000002 00000000")


@dataclass
class Running:
    """One process and its sockets."""

    process: subprocess.Popen[bytes]
    directory: Path

    @property
    def data(self) -> Path:
        return self.directory / "s"

    @property
    def ctrl(self) -> Path:
        return self.directory / "s.ctrl"

    def tpm(self, *packets: bytes) -> list[bytes]:
        """Answers to TPM commands on a connection of their own."""
        with rig.connect(self.data) as sock:
            return [rig.transact(sock, packet) for packet in packets]

    def control(self, request: bytes, count: int = 4096, *, seconds: float = 20.0) -> bytes:
        """The answer to one control request, as one segment brings it."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(seconds)
            sock.connect(str(self.ctrl))
            sock.sendall(request)
            return sock.recv(count)

    def ioctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["swtpm_ioctl", "--unix", str(self.ctrl), *words], capture_output=True, text=True, timeout=30, check=False
        )

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(READY_SECONDS)


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("TPM_")}


@contextmanager
def running(
    command: Sequence[str], *options: str, flags: str | None = STARTED, serves_data: bool = True
) -> Iterator[Running]:
    """`command` socket with `options`, answering on its control channel; ended at the end however it went."""
    directory = Path(tempfile.mkdtemp(prefix="sw"))
    words = [*command, "socket"]
    if serves_data:
        words += ["--server", f"type=unixio,path={directory}/s"]
    words += ["--ctrl", f"type=unixio,path={directory}/s.ctrl", *options]
    if flags is not None:
        words += ["--flags", flags]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())
    one = Running(process, directory)
    try:
        await_ready(one)
        yield one
    finally:
        process.kill()
        process.communicate()
        shutil.rmtree(directory)


def await_ready(one: Running) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            if len(one.control(_GET_CAPABILITY)) == 8:
                return
        except OSError:
            if one.process.poll() is not None:
                assert one.process.stderr is not None
                raise AssertionError(f"ended with {one.process.returncode}: {one.process.stderr.read()!r}") from None
            assert time.monotonic() < deadline, "it did not answer"
            time.sleep(0.005)


def refused(command: Sequence[str], *options: str) -> tuple[int, str]:
    """Exit code and standard error of a command that ends by itself."""
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=READY_SECONDS, env=environment(), check=False
    )
    return done.returncode, done.stderr


def put_secret(one: Running, secret: bytes) -> None:
    """Have a TPM 2.0 keep a secret in NV."""
    answers = one.tpm(nv_define(INDEX, len(secret)), nv_write(INDEX, secret))
    assert [rc(answer) for answer in answers] == [0, 0]


def get_secret(one: Running, size: int) -> bytes:
    return nv_content(one.tpm(nv_read(INDEX, size))[0])


def make_endorsement_key(one: Running) -> bytes:
    """Have a TPM 1.2 make its endorsement key; the public part, the same as `endorsement_key` then tells."""
    answer = one.tpm(command12(0x78, bytes(20) + _KEY_PARAMETERS))[0]
    assert rc(answer) == 0
    return answer[10:-20]


def endorsement_key(one: Running) -> bytes:
    answer = one.tpm(command12(0x7C, bytes(20)))[0]
    assert rc(answer) == 0, answer.hex()
    return answer[10:-20]
