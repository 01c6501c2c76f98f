"""Hostile control and data channels: altered requests in pieces, descriptors that nobody asked for, peers that go away.

    ./dev fuzz control [--seconds N] [--seed S]

Two victims, both real processes: `vtpm-swtpm`, of which everybody may ask everything, and an instance under a keeper
that is attached as `qemu`. After each storm a new peer is answered, the TPM comes up, what was stored is there, and no
descriptor was left open. `vtpm-swtpm` may end where it was told to, with exit code 0.
"""

import argparse
import array
import os
import random
import select
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from control_recorder import REQUESTS
from emulator_backend import EmulatorBackend, end_all
from fuzz_frontend_backend import mutated
from swtpm_rig import OURS, Running, running
from vtpm_instance_commands import STARTUP_CLEAR, get_random, nv_content, nv_define, nv_read, nv_write, pcr_extend, rc
from vtpm_instance_manager import until
from vtpm_instance_rig import Bench, connect, receive_exactly, running_keeper, transact

INDEX, KEPT = 0x01500001, b"kept"
STORMS = 20  # between two looks at a victim
PACKETS = (get_random(), pcr_extend(16), struct.pack(">IBI", 8, 1, 12) + get_random(), STARTUP_CLEAR)


class QemuVictim:
    """An instance attached as `qemu`."""

    def __init__(self, stack: ExitStack) -> None:
        self.bench = Bench(stack.enter_context(running_keeper()), "2.0", "qemu")
        stack.callback(self.bench.close)
        self.bench.spawn("none")
        self.data_path, self.control_path = self.bench.data_path, self.bench.control_path
        self.check(first=True)

    @property
    def pid(self) -> int:
        """The process."""
        return self.bench.pid

    def check(self, *, first: bool = False) -> None:
        """See that the next QEMU finds what was stored."""
        qemu = EmulatorBackend(self.control_path)
        assert qemu.reset() == 0, self.bench.keeper.log.read_text()
        assert qemu.set_locality(0) == 0
        assert rc(qemu.run(STARTUP_CLEAR)) == 0
        if first:
            assert rc(qemu.run(nv_define(INDEX, len(KEPT)))) == 0
            assert rc(qemu.run(nv_write(INDEX, KEPT))) == 0
        assert nv_content(qemu.run(nv_read(INDEX, len(KEPT)))) == KEPT
        qemu.die()


class SwtpmVictim:
    """The command in swtpm's place."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack, self.starts = stack, 0
        self._state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-")))
        self._start()

    def _start(self) -> None:
        self._one: Running = self.stack.enter_context(running(OURS, "--tpm2", "--tpmstate", f"dir={self._state}"))
        self.starts += 1
        self.data_path, self.control_path = self._one.data, self._one.ctrl

    @property
    def pid(self) -> int:
        """The process; a new one where the last was told to end."""
        if self._one.process.poll() is not None:
            assert self._one.process.stderr is not None
            assert self._one.process.returncode == 0, self._one.process.stderr.read().decode()
            self._start()
        return self._one.process.pid

    def check(self) -> None:
        """See that it answers, and comes up; where it was just told to end, that the next one does."""
        try:
            self._check()
        except (OSError, EOFError):
            self._one.process.wait(10)
            self._check()

    def _check(self) -> None:
        assert self.pid
        with connect(self.control_path) as control:
            for request in ("0000000e", "00000002 00000001", "00000005 00"):
                control.sendall(bytes.fromhex(request))
                assert receive_exactly(control, 4) == bytes(4), request
        with connect(self.data_path) as data:
            assert rc(transact(data, STARTUP_CLEAR)) in {0, 0x100}
            assert rc(transact(data, get_random())) == 0


Victim = QemuVictim | SwtpmVictim


def storm(victim: Victim, chance: random.Random) -> None:
    """Say something hostile on some connections, and go."""
    assert victim.pid
    requests = list(REQUESTS.values())
    with ExitStack() as stack:
        for _ in range(chance.randrange(1, 5)):
            control = chance.random() < 0.75
            try:
                sock = stack.enter_context(_reach(victim.control_path if control else victim.data_path))
                said = b"".join(
                    each if chance.random() < 0.3 else mutated(each, chance.choice(requests), chance)
                    for each in chance.choices(requests if control else PACKETS, k=chance.randrange(1, 6))
                )
                _say(sock, said[:20_000], chance)
            except (BrokenPipeError, ConnectionError, FileNotFoundError):
                continue  # it was told to end, or has let us go: both are checked afterwards


def _reach(path: Path) -> socket.socket:
    """Connect, waiting while the line of those who wait is full."""
    reached: list[socket.socket] = []

    def reach() -> bool:
        with suppress(BlockingIOError):
            reached.append(connect(path))
        return bool(reached)

    until(reach, f"a place in the line of {path.name}")
    return reached[0]


def _say(sock: socket.socket, said: bytes, chance: random.Random) -> None:
    while said:
        size = chance.choice((1, 3, 4, 8, 100, len(said)))
        if chance.random() < 0.2:
            _pass(sock, said[:size], chance)
        else:
            sock.sendall(said[:size])
        said = said[size:]
        if chance.random() < 0.5 and select.select([sock], [], [], 0.002)[0]:
            sock.recv(65536)


def _pass(sock: socket.socket, said: bytes, chance: random.Random) -> None:
    """Send with descriptors that make no sense, or the end of a socket pair whose other end goes at once."""
    mine, theirs = socket.socketpair()
    read, write = os.pipe()
    passed = chance.choices([mine.fileno(), theirs.fileno(), read, write], k=chance.randrange(1, 4))
    with mine, theirs, os.fdopen(read), os.fdopen(write):
        sock.sendmsg([said], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", passed))])


def descriptors(pid: int) -> int:
    """How many a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def fuzz(victims: list[Victim], seed: int, seconds: float, said: Callable[[str], object]) -> int:
    """Storm until the time is up; returns how often."""
    before = [(victim.pid, descriptors(victim.pid)) for victim in victims]
    started, count = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        index = count // STORMS % len(victims)
        victim = victims[index]
        try:
            storm(victim, random.Random(seed + count))
            if count % STORMS == STORMS - 1:
                victim.check()
                if victim.pid != before[index][0]:
                    before[index] = victim.pid, descriptors(victim.pid)
                most = before[index][1]
                until(lambda pid=victim.pid, most=most: descriptors(pid) <= most + 1, "the descriptors")  # type: ignore[misc]
        except BaseException:
            if isinstance(victim, QemuVictim):
                said(victim.bench.keeper.log.read_text())
            said(f"fuzz control: {type(victim).__name__} within {STORMS} storms before seed {seed + count}\n")
            raise
        count += 1
    return count


def main() -> int:
    """Run until the time is up."""
    parser = argparse.ArgumentParser(description="Fuzz both channels.")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    with ExitStack() as stack:
        victims: list[Victim] = [QemuVictim(stack), SwtpmVictim(stack)]
        count = fuzz(victims, options.seed, options.seconds, sys.stdout.write)
        with suppress(OSError):
            end_all()
    sys.stdout.write(f"fuzz control: {count} storms from seed {options.seed}: both victims answer as before\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
