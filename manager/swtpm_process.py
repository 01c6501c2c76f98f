"""The process of the command in swtpm's place, as its command line says: user, log, pid file, daemon."""

import logging
import os
import pwd
import sys
from contextlib import suppress
from pathlib import Path

from frontend_backend.messages_admin import ExitCode
from frontend_backend.swtpm_records import LogTarget, PidTarget
from manager.errors import ManagerError, UsageError
from manager.notify import notify

_log = logging.getLogger("vtpm.swtpm")


class Ready:
    """Tells whoever started a daemon that it is ready; without --daemon nobody waits.

    Until then `complain` reaches whoever started it, even if standard error is the log by now: libvirt shows it.
    """

    def __init__(self, *, daemon: bool) -> None:
        """Become a daemon if that is wanted: the first process waits and ends with the daemon's word."""
        self._pipe: int | None = None
        self._complaints: int | None = os.dup(sys.stderr.fileno())
        if not daemon:
            return
        reading, writing = os.pipe2(os.O_CLOEXEC)
        if os.fork():
            os.close(writing)
            os._exit(int(ExitCode.OK) if os.read(reading, 1) else int(ExitCode.FAILURE))
        os.close(reading)
        os.setsid()
        self._pipe = writing

    def say(self) -> None:
        """Say it, to systemd too where it waits (NOTIFY_SOCKET), and let go of the terminal."""
        try:
            notify("READY=1")
        except OSError as error:
            _log.warning("systemd was not told that this is ready: %s", error)
        if self._complaints is not None:
            os.close(self._complaints)
            self._complaints = None
        if self._pipe is None:
            return
        with suppress(OSError):
            os.write(self._pipe, b"\n")
            os.close(self._pipe)
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for descriptor in (0, 1):
            os.dup2(nothing, descriptor)

    def complain(self, text: str) -> None:
        """Say what went wrong to the log, and to whoever started this."""
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
        if self._complaints is not None and not os.path.sameopenfile(self._complaints, sys.stderr.fileno()):
            with suppress(OSError):
                os.write(self._complaints, f"{text}\n".encode())


def write_pid(target: PidTarget | None) -> None:
    """Write this process's number where it is wanted. Raises ManagerError."""
    if target is None:
        return
    try:
        if target.descriptor is not None:
            os.write(target.descriptor, f"{os.getpid()}\n".encode())
            os.close(target.descriptor)
        elif target.file is not None:
            Path(target.file).write_text(f"{os.getpid()}\n", encoding="ascii")
    except OSError as error:
        raise ManagerError(f"cannot write the pid file: {error.strerror or error}") from error


def remove_pid(target: PidTarget | None) -> None:
    """Remove the pid file, unless it is another process's: this one may have ended before it wrote its own."""
    if target is not None and target.file is not None:
        path = Path(target.file)
        with suppress(OSError):
            if path.read_bytes() == f"{os.getpid()}\n".encode():
                path.unlink()


def log_to(target: LogTarget) -> None:
    """Have standard error go where the log is wanted. Raises ManagerError."""
    if target.file is None and target.descriptor is None:
        return
    try:
        if target.descriptor is not None:
            os.dup2(target.descriptor, sys.stderr.fileno())
            return
        name = os.devnull if target.file == "-" else str(target.file)
        how = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_TRUNC if target.truncate else os.O_APPEND)
        opened = os.open(name, how, 0o640)
        os.dup2(opened, sys.stderr.fileno())
        os.close(opened)
    except OSError as error:
        raise ManagerError(f"cannot log to {target.file or target.descriptor}: {error.strerror or error}") from error


def become(user: str | None) -> None:
    """Run as another user from now on. Raises UsageError: there is none, ManagerError: we may not."""
    if user is None:
        return
    try:
        entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except KeyError:
        raise UsageError(f"there is no user '{user[:80]}'") from None
    if entry.pw_uid == os.geteuid():
        return
    try:
        os.initgroups(entry.pw_name, entry.pw_gid)
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    except OSError as error:
        raise ManagerError(f"cannot become user {user}: {error.strerror or error}") from error
