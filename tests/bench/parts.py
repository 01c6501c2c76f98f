"""Where the CPUs go: how much of it in which process, and in which part of it, from perf's samples of all CPUs.

A sample is counted by its innermost frame when that is in a program or library, and by what the kernel was asked for
otherwise. With the clock as its source, what runs with interrupts off is counted where they come on again.
"""

import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from document import Table
from load_clients import load
from subjects import Subject

_RATE: Final = 499  # samples a second of each CPU; odd, so as not to keep step with the timer
_SECONDS: Final = 5.0
_BEGIN: Final = 2.0  # seconds
_KERNEL: Final = "([kernel.kallsyms])"
_CALL: Final = "__x64_sys_"
IDLE: Final = "nothing"
OTHERS: Final = "everything else"
_LIBRARIES: Final = {
    "libtpms": ("libtpms.so",),
    "encryption and digests": ("libcrypto.so", "_rust.abi3.so", "_hashlib."),
}
_INTERPRETER: Final = "interpreter and other libraries"
# The first that has one of its names anywhere in the kernel's part of the stack.
_KERNEL_PARTS: Final[Mapping[str, Collection[str]]] = {
    "kernel: scheduler": {"schedule", "__schedule", "try_to_wake_up", "asm_sysvec_reschedule_ipi"},
    "kernel: interrupts": {"asm_common_interrupt", "asm_sysvec_apic_timer_interrupt"},
    "kernel: writing and flushing": {
        *(_CALL + name for name in ("pwrite64", "pwritev2", "fdatasync", "fsync")),
        *("wb_workfn", "blk_mq_run_work_fn", "blk_mq_requeue_work"),
    },
    "kernel: sockets, pipes, waiting": {
        *(_CALL + name for name in ("sendto", "recvfrom", "sendmsg", "recvmsg", "read", "write")),
        *(_CALL + name for name in ("poll", "ppoll", "epoll_wait", "epoll_pwait", "epoll_ctl", "select", "futex")),
    },
    "kernel: memory": {"asm_exc_page_fault", *(_CALL + name for name in ("brk", "mmap", "munmap", "madvise"))},
}
_KERNEL_REST: Final = "kernel: other work"
PARTS: Final = (*_LIBRARIES, _INTERPRETER, *_KERNEL_PARTS, _KERNEL_REST, IDLE)

Shares = Mapping[tuple[str, str], float]  # of all samples, by (process, part)


def part_of(frames: Sequence[str]) -> str:
    """Return the part that a stack counts for; a frame is "symbol (file)", the innermost comes first."""
    if not frames[0].endswith(_KERNEL):
        return next((part for part, names in _LIBRARIES.items() if any(n in frames[0] for n in names)), _INTERPRETER)
    symbols = {frame.partition(" ")[0].partition(".")[0] for frame in frames if frame.endswith(_KERNEL)}
    return next((part for part, names in _KERNEL_PARTS.items() if not symbols.isdisjoint(names)), _KERNEL_REST)


def shares_of(script: str, processes: Mapping[str, Collection[int]]) -> Shares:
    """Return the shares of what `perf script` wrote: for each sample the process id, its stack, an empty line."""
    names = {pid: name for name, pids in processes.items() for pid in pids}
    counts: Counter[tuple[str, str]] = Counter()
    for sample in script.split("\n\n"):
        head, *stack = sample.strip("\n").splitlines() or [""]
        frames = [line.split(None, 1)[1] for line in stack if len(line.split(None, 1)) == 2]
        if head.strip().isdecimal() and frames:
            pid = int(head)
            counts[names.get(pid, OTHERS), part_of(frames) if pid else IDLE] += 1
    return {key: count / counts.total() for key, count in counts.items()}


def cpu_table(shares: Shares, saves_a_second: float, processes: Sequence[str]) -> Table:
    """Return the table of the parts by processes, in microseconds for each save."""
    whole = (os.cpu_count() or 1) * 1e6 / max(1.0, saves_a_second)
    table = Table(
        ("", *processes, OTHERS),
        note=f"Where the CPUs go (perf), all save, this disk: microseconds for each save, of the {whole:.0f} that "
        f"there are at {saves_a_second:,.0f} a second. *{OTHERS.capitalize()}* is clients, the kernel's threads and "
        "whoever else was on the machine. libtpms takes its digests from the library that our SHA-256 comes from: "
        "both are in one line:",
    )
    for part in PARTS:
        used = [shares.get((process, part), 0.0) * whole for process in (*processes, OTHERS)]
        table.add(part, *(f"{value:.0f}" for value in used))
    return table


def where_the_cpus_go(
    subject: Subject, endpoints: Sequence[str], clients: int, processes: Mapping[str, Collection[int]]
) -> list[Table]:
    """Sample all CPUs while all save; no table where perf is not installed or may not look."""
    if shutil.which("perf") is None:
        return []
    # what is sampled lies within the load, however long its clients take to begin
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load, endpoints, _SECONDS + 2 * _BEGIN, clients, warm_up=_BEGIN)
        time.sleep(2 * _BEGIN)
        before, started = subject.status()["commits"], time.monotonic()
        script = _script(subject.disk / "perf.data")
        rate = (subject.status()["commits"] - before) / (time.monotonic() - started)
        loading.result()
    return [cpu_table(shares_of(script, processes), rate, tuple(processes))] if script else []


def _script(output: Path) -> str:
    """Return the samples of all CPUs in the next seconds as `perf script` writes them, nothing where perf may not."""
    command = ["perf", "record", "--all-cpus", "-g", "--freq", str(_RATE), "--output", str(output), "--"]
    nowhere = subprocess.DEVNULL
    if subprocess.run([*command, "sleep", str(_SECONDS)], stdout=nowhere, stderr=nowhere, check=False).returncode:
        return ""
    read = ["perf", "script", "--input", str(output), "--no-inline", "--fields", "pid,ip,sym,dso"]
    return subprocess.run(read, capture_output=True, text=True, check=False).stdout
