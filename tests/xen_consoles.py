"""Domains that are led over their consoles: images/xen/agent.sh; and the configurations to create them from."""

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from xen_link import Link, XenError

BOOT_SECONDS = 120.0  # 4 on a quiet machine
COMMAND_SECONDS = 120.0
# What an emulated processor would spend seconds on at each boot: self-tests of cryptography, clearing pages twice, a
# walk over all page tables, guards against flaws of processors that this one does not have; waiting for randomness.
KERNEL_WORDS = (
    "console=hvc0 quiet panic=-1 mitigations=off cryptomgr.notests init_on_alloc=0 rodata=off random.trust_cpu=on"
)


class Host(Protocol):
    """What a domain needs of its host: tests/xen_rig.py."""

    @property
    def link(self) -> Link: ...

    def note(self, text: str) -> None: ...

    def record(self, where: str, command: str, output: str, code: int, began: float) -> None: ...

    def clock(self) -> float: ...


class Domain:
    """A running domain whose shell is led over its console: images/xen/agent.sh."""

    def __init__(self, host: Host, name: str, number: int, console: str) -> None:
        self.host, self.name, self.number, self.console = host, name, number, console
        self.said = ""  # everything, also what came between answers
        self._seen = 0
        self._count = 0
        self._gone = False
        self._change = threading.Condition()
        host.link.listen(console, self._listen)
        answer = host.link.ask(COMMAND_SECONDS, open=console)
        assert answer["code"] == 0, f"{name}: {answer['out']}"

    def _listen(self, piece: str | None) -> None:
        with self._change:
            if piece is None:
                self._gone = True
            else:
                self.said += piece.replace("\r", "")
            self._change.notify_all()

    def _until(self, mark: str, seconds: float) -> str:
        """What comes before a line that begins with `mark`, and that line's rest is next to be read."""
        deadline = time.monotonic() + seconds
        with self._change:
            while True:
                at = self.said.find(f"\n{mark}", self._seen)
                end = self.said.find("\n", at + 1) if at >= 0 else -1
                if end >= 0:
                    before, self._seen = self.said[self._seen : at], at + 1 + len(mark)
                    return before
                left = deadline - time.monotonic()
                if self._gone or left <= 0:
                    why = "has gone" if self._gone else f"did not say {mark!r} in {seconds} s"
                    raise XenError(f"domain {self.name} {why}; last:\n{self.said[-3000:]}")
                self._change.wait(left)

    def _line(self) -> str:
        end = self.said.index("\n", self._seen)
        line, self._seen = self.said[self._seen : end], end
        return line.strip()

    def ready(self, seconds: float = BOOT_SECONDS) -> float:
        """Wait until it has booted; its own uptime then, in seconds."""
        self._until("@@READY ", seconds)
        uptime = float(self._line())
        self.host.note(f"{self.name}: up after {uptime:.1f} s")
        return uptime

    def start(self, command: str) -> "Pending":
        """Send a command without waiting for its end."""
        assert "\n" not in command
        self._count += 1
        self.host.link.send(console=self.console, **{"in": f"{self._count} {command}\n"})
        return Pending(self, self._count, command, self.host.clock())

    def run(self, command: str, seconds: float = COMMAND_SECONDS) -> tuple[int, str]:
        """Run a command of the shell; returns its exit code and what it printed."""
        return self.start(command).wait(seconds)

    def good(self, command: str, seconds: float = COMMAND_SECONDS) -> str:
        """Run a command that must succeed; returns what it printed, without blanks around."""
        code, said = self.run(command, seconds)
        if code != 0:
            raise XenError(f"{self.name}$ {command}\n{said}-> {code}")
        return said.strip()


@dataclass
class Pending:
    """A command of a domain that has been sent."""

    domain: Domain
    number: int
    command: str
    began: float

    def wait(self, seconds: float = COMMAND_SECONDS) -> tuple[int, str]:
        domain = self.domain
        domain._until(f"@@BEGIN {self.number}", seconds)
        said = domain._until(f"@@END {self.number} ", seconds).removeprefix("\n")
        code = int(domain._line())
        domain.host.record(domain.name, self.command, said, code, self.began)
        return code, said


def _config(
    name: str, memory: int, extra: str, initrd: str, vtpm: Sequence[str], lines: Sequence[str], processors: int = 1
) -> str:
    words = f"{KERNEL_WORDS} {extra}".strip()
    found = [f'name="{name}"', 'type="pv"', f"memory={memory}", f"vcpus={processors}", 'kernel="/guest/vmlinux"']
    found += [f'ramdisk="/guest/{initrd}"', f'extra="{words}"', 'on_crash="destroy"', 'on_reboot="destroy"']
    if vtpm:
        found.append(f"vtpm={json.dumps(list(vtpm))}")
    return "\n".join([*found, *lines])


def guest_config(
    name: str, *, vtpm: Sequence[str] = (), memory: int = 160, extra: str = "", lines: Sequence[str] = ()
) -> str:
    """A guest with Linux's unmodified front end. vtpm: as "backend=0,uuid=..."; lines: more of xl.cfg(5)."""
    return _config(name, memory, extra, "guest.cpio", vtpm, lines)


def domain_config(
    name: str,
    *,
    memory: int = 192,
    processors: int = 1,
    disks: Sequence[str] = (),
    iomem: str = "",
    vtpm: Sequence[str] = (),
    extra: str = "",
    lines: Sequence[str] = (),
) -> str:
    """A domain that runs this project. disks: of dom0 (/dev/vdd), the first becomes /data; iomem: as "fed42,1"."""
    all_disks = ["phy:/dev/vda,xvda,r", "phy:/dev/vdb,xvdb,r"]
    all_disks += [f"phy:{disk},xvd{letter},w" for disk, letter in zip(disks, "cdef", strict=False)]
    more = [f"disk={json.dumps(all_disks)}", *([f'iomem=["{iomem}"]'] if iomem else []), *lines]
    return _config(name, memory, f"role=domain {extra}", "boot.cpio", vtpm, more, processors)
