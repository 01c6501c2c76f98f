"""The swtpm command as a process: daemon, user, root directory, log, pid file, system call filter, readiness.

Source: swtpm's daemonize.c, pidfile.c, logging.c, utils.c (do_chroot, change_process_owner), sd-notify.c.
"""

import os
import signal
import socket
import stat
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from frontend_backend.swtpm_records import LogTarget, PidTarget
from frontend_backend.swtpm_suboptions import OptionError
from vtpm_instance import journal, syscalls
from vtpm_instance.seccomp import OnViolation, build, call_to_load

PREFIX: Final = "swtpm: "  # of messages on standard error; scripts look for what follows it
_STANDARD_ERROR: Final = 2
_READY: Final = b"R"


class Daemon:
    """The parent waits until the child is ready, and ends with 0 then, or as the child ended."""

    def __init__(self) -> None:
        """Fork; returns in the child only. Nothing that a fork does not inherit (locks, threads) may be there yet."""
        waiting, self._ready = os.pipe2(os.O_CLOEXEC)
        child = os.fork()
        if child:
            os.close(self._ready)
            started = os.read(waiting, 1)
            os._exit(0 if started else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256 or 1)
        os.close(waiting)
        os.setsid()

    def detach(self, *, keep_standard_error: bool) -> None:
        """Let the terminal and the directory go."""
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for descriptor in (0, 1) if keep_standard_error else (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(null)

    def ready(self) -> None:
        """Let the parent end."""
        os.write(self._ready, _READY)
        os.close(self._ready)


def change_root(path: str) -> None:
    """Make a directory the root of the file system. Raises OptionError."""
    try:
        os.chroot(path)
        os.chdir("/")
    except OSError as error:
        raise OptionError(f"chroot failed: {path}: {error.strerror}") from error


class User:
    """A user to become, with its groups, looked up while its name can be: before the root directory changes."""

    def __init__(self, who: str) -> None:
        """Look up `who`, a name or number. Raises OptionError."""
        import pwd  # noqa: PLC0415 - only where it is asked for

        try:
            found = pwd.getpwuid(int(who)) if who.isascii() and who.isdigit() else pwd.getpwnam(who)
        except (KeyError, OverflowError):
            raise OptionError(f"Error: User '{who}' does not exist.") from None
        self._who, self._uid, self._gid = who, found.pw_uid, found.pw_gid
        self._groups = os.getgrouplist(found.pw_name, found.pw_gid)

    def become(self) -> None:
        """Become it, for good. Raises OptionError."""
        try:
            os.setgroups(self._groups)
            os.setgid(self._gid)
            os.setuid(self._uid)
        except OSError as error:
            raise OptionError(f"Error: setting the user to '{self._who}' failed: {error.strerror}") from error


def open_log(target: LogTarget) -> bool:
    """Have standard error, ours and libtpms', go where --log says; tells whether it goes anywhere else than before.

    Raises:
        OptionError: it cannot.

    """
    descriptor = _log_descriptor(target)
    if descriptor is not None:
        os.dup2(descriptor, _STANDARD_ERROR)
        if descriptor > _STANDARD_ERROR:
            os.close(descriptor)
        journal.begin_with("")
    if target.prefix is not None:
        journal.begin_with(target.prefix)
    return descriptor is not None


def _log_descriptor(target: LogTarget) -> int | None:
    try:
        if target.file == "-":
            return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        if target.file is not None:
            how = os.O_TRUNC if target.truncate else os.O_APPEND
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | how
            return os.open(target.file, flags, stat.S_IRUSR | stat.S_IWUSR)
        if target.descriptor is not None:
            return _checked_log(target.descriptor)
    except OSError as error:
        raise OptionError(f"Could not open logfile for writing: {error.strerror}") from error
    return None


def _checked_log(descriptor: int) -> int:
    import fcntl  # noqa: PLC0415 - only for a log that is handed over

    try:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    except OSError as error:
        raise OptionError(f"Could not access logfile using fd {descriptor}: {error.strerror}") from error
    if not flags & (os.O_RDWR | os.O_WRONLY):
        raise OptionError(f"Could not access logfile using fd {descriptor}: it is not open for writing")
    return descriptor


FileIdentity = tuple[int, int]  # device and inode


def identity_of(status: os.stat_result) -> FileIdentity:
    """Return what tells a file from the one that takes its path later."""
    return status.st_dev, status.st_ino


def remove_own(path: str, identity: FileIdentity) -> None:
    """Take a path away unless another process has put something of its own there; where we may not it stays."""
    with suppress(OSError):
        if identity_of(os.lstat(path)) == identity:
            os.unlink(path)


class PidFile:
    """Where the process's number is."""

    def __init__(self, target: PidTarget) -> None:
        """Check what --pid names; nothing is written yet. Raises OptionError."""
        self._path, self._descriptor = target.file, target.descriptor
        self._identity: FileIdentity | None = None
        if self._path is None and self._descriptor is not None:
            try:
                if stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                    return
            except OSError as error:
                raise OptionError(f"Bad filedescriptor {self._descriptor} for pid file") from error
            raise OptionError(f"Bad filedescriptor {self._descriptor} for pid file")

    def write(self) -> None:
        """Write this process's number. Raises OptionError."""
        content = str(os.getpid()).encode()
        try:
            if self._path is not None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
                mode = stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IROTH
                descriptor = os.open(self._path, flags, mode)
            else:
                assert self._descriptor is not None, "a pid file has a path or a descriptor"
                descriptor, self._descriptor = self._descriptor, None
            try:
                os.write(descriptor, content)
                self._identity = identity_of(os.fstat(descriptor))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise OptionError(f"Could not open pidfile {self._path} : {error.strerror}") from error

    def remove(self) -> None:
        """Take a named one away; where we may not any more (--chroot, --runas) it stays."""
        if self._path is not None and self._identity is not None:
            remove_own(self._path, self._identity)


def wakeup_pipe() -> int:
    """Return a descriptor that becomes readable with SIGTERM or SIGINT; SIGPIPE is no reason to end."""
    wakeup, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    signal.set_wakeup_fd(wake)
    return wakeup


def filter_program(action: str) -> Any | None:
    """Return the system call filter for --seccomp, None for `none`. Raises OptionError."""
    if action == "none":
        return None
    try:
        return build(OnViolation(action), takes_descriptors=True, keeps_files=True)
    except OSError as error:
        raise OptionError(
            f"no system call filter can be made here: {error}; --seccomp action=none goes without"
        ) from error


def enter_filter(program: Any | None) -> None:
    """Put this process under the filter, for good. Raises OSError."""
    if program is not None:
        syscalls.prctl(_PR_SET_NO_NEW_PRIVS, 1)
        syscalls.make((call_to_load(program),))


_PR_SET_NO_NEW_PRIVS: Final = 38  # linux/prctl.h


class Systemd:
    """What wants to know when the TPM can be used (NOTIFY_SOCKET), if anything does."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Make what `ready` needs: under the system call filter it could not be made."""
        path = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if path[:1] in ("/", "@") else None

    def ready(self) -> None:
        """Say it."""
        if self._sock is None:
            return
        with self._sock:
            try:
                self._sock.sendto(b"READY=1", self._address)
            except OSError as error:
                journal.note(f"systemd was not told that the TPM is ready: {error.strerror or error}")
