"""Upgrade in place: the installed code is asked whether it can take over, and then takes this process's place.

The new code runs in the same process (execve): systemd's main process and whoever watches the pid see no change, locks
are given back before, and keepers stay this process's children. Instances and keepers go on, as after SIGHUP.
"""

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

import trio

from frontend_backend.release import RELEASE
from manager import preflight
from manager.errors import BusyError, ConflictError

_log = logging.getLogger("vtpm.upgrade")
_PREFLIGHT_SECONDS: Final = 60.0  # it imports what a manager imports: a second, on a busy machine more
_WORDS_MOST: Final = 600  # characters of what the installed code says that are passed on


@dataclass(frozen=True, slots=True)
class Command:
    """How this manager was started: the command, and what follows its verb `run`."""

    program: tuple[str, ...]
    options: tuple[str, ...]
    failed: str | None = None  # why the installed code could not be run when it was to take over

    @classmethod
    def of_this_process(cls) -> Self:
        """Return it; to be called before anything changes the directory."""
        script, rest = Path(sys.argv[0]).absolute(), sys.argv[1:]
        if os.access(script, os.X_OK) and script.is_file():
            return cls((str(script),), tuple(rest[1:]))  # its first line says which Python, and may have changed
        before = sys.orig_argv[1 : len(sys.orig_argv) - len(rest)]
        return cls((sys.executable, *before), tuple(rest[1:]))

    def with_verb(self, verb: str, *more: str) -> list[str]:
        """Return the words of another run of the installed code, on the same installation."""
        return [*self.program, verb, *self.options, *more]


async def ask_installed(command: Command) -> str:
    """Ask the installed code whether it can take over; returns its release.

    Raises:
        ConflictError: it cannot. BusyError: it does not say. Nothing was changed.

    """
    words = command.with_verb("preflight", "--running", json.dumps(preflight.now()))
    try:
        with trio.fail_after(_PREFLIGHT_SECONDS):
            done = await trio.run_process(words, capture_stdout=True, capture_stderr=True, check=False)
    except trio.TooSlowError:
        raise BusyError(
            f"the installed code did not say within {_PREFLIGHT_SECONDS:g} s whether it can take over; nothing was "
            f"changed, this manager goes on"
        ) from None
    except OSError as error:
        raise _refused(f"{command.program[0]} cannot be started: {error.strerror or error}") from error
    return _verdict(done)


def _verdict(done: "subprocess.CompletedProcess[bytes]") -> str:
    try:
        said = json.loads(done.stdout)
        release, problems = str(said["release"]), list(map(str, said["problems"]))
    except (ValueError, KeyError, TypeError):
        words = done.stderr.decode("utf-8", "replace").strip()[-_WORDS_MOST:]
        raise _refused(f"it ended with exit code {done.returncode}: {words}") from None
    if problems:
        raise _refused(f"of release {release}, {'; '.join(problems)[:_WORDS_MOST]}")
    return release


def _refused(why: str) -> ConflictError:
    return ConflictError(
        f"the installed code cannot take over: {why}. Nothing was changed, this manager goes on. Install a release "
        f"that can, or stop everything first ('vtpm-manager stop')"
    )


def become(command: Command) -> Command:
    """Run the installed code in this process, as it was started; returns only if it cannot be, with the reason."""
    words = command.with_verb("run")
    _log.info("handing over to %s", " ".join(words))
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execv(words[0], words)  # noqa: S606 - no shell is wanted
    except OSError as error:
        why = f"{words[0]} cannot be run: {error.strerror or error}"
        _log.error("%s; the code of before, release %s, goes on", why, RELEASE)
        return replace(command, failed=why)
