"""Ends an instance that has outlived its keeper: nobody else has a pidfd of it any more."""

import logging
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

_log = logging.getLogger("vtpm.instance")
_START_TIME: Final = 19  # of the fields after the name in proc(5) stat: ticks since the machine was started


def start_of(pid: int) -> int | None:
    """Return when a process began, in clock ticks since boot (proc(5), stat); with its id that names it for good.

    None when it is gone.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[_START_TIME])


async def end(pid: int, start: int | None) -> None:
    """Kill the process that had this id and began at `start`, and wait for its end; another one is left alone."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if start is None or start_of(pid) != start:
            return
        _log.error("process %d has outlived its keeper; killing it", pid)
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)
