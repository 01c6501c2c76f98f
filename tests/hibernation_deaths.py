"""A vTPM that goes to sleep and wakes while one of its processes is killed at a chosen system call (strace, inject).

The guest extends one PCR again and again. What it reads must hold every extend that was acknowledged: a volatile state
that was used twice, or lost without a failure, would show an older value.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import vtpm_instance_rig as tpm
from e2e_rig import Guest, Installation, wait_for

from manager.client import request
from manager.errors import ManagerError

PCR = 4
DIGEST = b"\x44" * 32
FAILURE = 0x101
_TRACER_ENDS = 5  # seconds


class Extender:
    """A guest that extends its PCR; `values` are those the PCR may have now."""

    def __init__(self, made: Installation, name: str, endpoint: str) -> None:
        self.made, self.name = made, name
        self.guest = Guest(endpoint)
        self.values = {bytes(32)}
        self.resets = 0

    def extend(self) -> bool:
        """Extend once; returns whether that was acknowledged."""
        try:
            code = self.guest.code(tpm.pcr_extend(PCR, DIGEST))
        except OSError:
            self.values |= {_extended(value) for value in self.values}  # done or not: nobody said
            return False
        if code:
            assert code == FAILURE, hex(code)
            return False
        self.values = {_extended(value) for value in self.values}
        return True

    def check(self) -> None:
        """Read the PCR: it is what was acknowledged, or the vTPM answers failure until its platform is reset."""
        answer = wait_for(self._read, f"an answer; the log:\n{self.made.tail()}")
        if tpm.rc(answer) == FAILURE:
            self.made.command("vtpm-reset-platform", self.name)
            self.values, self.resets = {bytes(32)}, self.resets + 1
            answer = wait_for(self._read, "an answer after the reset")
        assert tpm.rc(answer) == 0
        assert answer[-32:] in self.values, f"an acknowledged extend is missing; the log:\n{self.made.tail()}"
        self.values = {answer[-32:]}

    def _read(self) -> bytes | None:
        try:
            return self.guest.transmit(tpm.pcr_read(PCR))
        except OSError:
            return None


def _extended(value: bytes) -> bytes:
    return sha256(value + DIGEST).digest()


def ask(made: Installation, verb: str, name: str) -> bool:
    """Ask for a verb, whether or not somebody is there to do it."""
    try:
        request(str(made.runtime / "admin.sock"), verb, {"vtpm": name})
    except (ManagerError, OSError, EOFError):
        return False
    return True


@contextmanager
def killed_at(pid: int, call: str, number: int) -> Iterator[None]:
    """Kill a process at its `number`th system call of this name from now on; the call itself is not made any more.

    Which process: `pid`, or one that it forks, each with a count of its own.
    """
    options = ["-f", "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}"]
    tracer = subprocess.Popen(["strace", "-qq", "-o", os.devnull, *options, "-p", str(pid)], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: _is_traced(pid) or tracer.poll() is not None, "strace to attach")
        yield
    finally:
        with suppress(ProcessLookupError):
            tracer.send_signal(signal.SIGTERM)
        try:
            tracer.wait(_TRACER_ENDS)
        except subprocess.TimeoutExpired:  # it waits for threads of a process whose first thread it has killed
            tracer.kill()
            tracer.wait()


def _is_traced(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    return "TracerPid:\t0" not in text


@dataclass(frozen=True)
class Death:
    """Who dies, and at which system call of what it does when the vTPM goes to sleep and wakes."""

    who: str  # "instance" that goes to sleep, "waking" the next one, "manager", "keeper", "spawner"
    call: str
    number: int

    def __str__(self) -> str:
        return f"{self.who}-{self.call}-{self.number}"


def _deaths(who: str, **calls: int) -> list[Death]:
    return [Death(who, call, number) for call, most in calls.items() for number in range(1, most + 1)]


DEATHS = [
    *_deaths("instance", pwrite64=1, fdatasync=1, sendto=3, sendmsg=1, exit_group=1),
    *_deaths("waking", sendto=4, pread64=3, recvfrom=2, getrandom=2, flock=1),
    *_deaths("manager", sendto=4, sendmsg=5, recvmsg=6, fdatasync=4, flock=1),
    *_deaths("keeper", sendmsg=5, recvmsg=6, epoll_ctl=6, close=6),
    *_deaths("spawner", recvmsg=1, clone=1, sendmsg=1, close=2),
]


def pid_of(made: Installation, name: str, who: str) -> int:
    """Return the process to trace for a death."""
    if who == "instance":
        return int(made.show(name)["pid"])
    assert made.manager is not None
    if who == "manager":
        return made.manager.pid
    keeper = int(made.vtpm_manager("status", "--json").json["keeper_pid"])
    if who == "keeper":
        return keeper
    if who == "waking":  # it stands by already
        wait_for(lambda: _children(keeper, "vtpm-standby") != [], "an instance to stand by")
        return _children(keeper, "vtpm-standby")[0]
    return next(pid for pid in _children(keeper) if "vtpm_instance.spawner" in _words(pid))


def _children(keeper: int, name: str | None = None) -> list[int]:
    """Return a keeper's children of this name, or those that are neither instances nor stand by."""
    children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
    names = {int(pid): Path(f"/proc/{pid}/comm").read_text().strip() for pid in children}
    others = ("vtpm-instance", "vtpm-standby")
    return [pid for pid, its in names.items() if (its == name if name else its not in others)]


def _words(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode()


def die(extender: Extender, death: Death) -> None:
    """Let the vTPM sleep and wake once while somebody dies over it, then see that everything is right."""
    made, name = extender.made, extender.name
    assert extender.extend()
    with killed_at(pid_of(made, name, death.who), death.call, death.number):
        ask(made, "hibernate", name)
        waking = threading.Thread(target=extender.extend)
        waking.start()
        waking.join(3.0)
        if waking.is_alive():  # it waits for a manager
            _revive(made)
            waking.join(30.0)
    assert not waking.is_alive(), f"nobody answers; the log:\n{made.tail()}"
    _revive(made)
    extender.check()
    assert extender.extend()
    wait_for(lambda: ask(made, "hibernate", name), f"it to sleep\n{made.tail()}")
    extender.check()


def _revive(made: Installation) -> None:
    """Start another manager where the last one was killed."""
    if made.manager is not None and made.manager.poll() is not None:
        made.manager = None
    if made.manager is None:
        made.start()
