"""The command `vtpm-keeper`: arguments, socket, spawner, then the keeper's loop."""

import argparse
import contextlib
import json
import os
import signal
import socket
import stat
import sys
from collections.abc import Sequence
from typing import Final

from vtpm_instance.errors import KeeperInUseError, SpawnerLostError
from vtpm_instance.journal import note
from vtpm_instance.keeper_service import Keeper
from vtpm_instance.spawner_link import Spawner, SpawnSettings

EXIT_FAILURE: Final = 1  # instances did not end in time, or the spawner does not work here
EXIT_BUSY: Final = 8  # another keeper serves this path (design section 9)
_BACKLOG: Final = 8
_SOCKET_MASK: Final = 0o177  # a socket with mode 0600


def open_listener(path: str) -> socket.socket:
    """Bind the keeper's socket, mode 0600; one that a dead keeper left is replaced.

    Raises:
        KeeperInUseError: a keeper answers there.
        OSError: the path cannot be used.

    """
    if _is_served(path):
        raise KeeperInUseError(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mask = os.umask(_SOCKET_MASK)
    try:
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


def _file_of(path: str) -> tuple[int, int] | None:
    """Return device and inode of a file, None where there is none."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _take_away(path: str, ours: tuple[int, int] | None) -> None:
    """Remove the keeper's socket, unless it is gone, or another keeper's by now: that one could not be found again.

    To be called while it still listens: whoever cannot connect removes the socket and starts another keeper there.
    """
    if ours is not None and _file_of(path) == ours:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _is_served(path: str) -> bool:
    """Tell whether somebody listens at `path`; removes a socket nobody listens on."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            if stat.S_ISSOCK(mode):
                os.unlink(path)
            return False
    return True


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vtpm-keeper", description="Keeps vTPM instances running across restarts of vtpm-manager."
    )
    parser.add_argument("--socket", metavar="PATH", help="where the manager connects (made, mode 0600)")
    parser.add_argument("--check", action="store_true", help="print as JSON what shuts instances in here, and end")
    parser.add_argument(
        "--ready-fd", type=int, metavar="N", help="descriptor that gets a line when the keeper is ready"
    )
    parser.add_argument(
        "--linger", type=float, default=600.0, metavar="SECONDS", help="end when unused for so long (default 600)"
    )
    parser.add_argument(
        "--spawn", choices=("fork", "exec"), default="fork", help="how instances are made (default fork)"
    )
    parser.add_argument(
        "--seccomp",
        choices=("kill", "errno", "log"),
        default="kill",
        help="what a system call does that an instance must not make (default kill)",
    )
    arguments = parser.parse_args(argv)
    if not arguments.socket and not arguments.check:
        parser.error("--socket PATH is needed, or --check")
    return arguments


def _check(settings: SpawnSettings) -> int:
    """Start a spawner, print what shuts its instances in, end it."""
    spawner = Spawner(settings, lambda _old, _new: None)
    try:
        found = spawner.wait_ready()
    except SpawnerLostError as error:
        note(str(error))
        return EXIT_FAILURE
    finally:
        spawner.close()
    features = [{"name": each.name, "active": each.active, "why": each.why} for each in found.features]
    print(json.dumps({"mode": found.mode, "on_violation": found.on_violation, "features": features}))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the keeper. Returns 0 after a stop, 8 when one runs there already, 1 when it cannot work."""
    arguments = _arguments(argv)
    settings = SpawnSettings(arguments.spawn, arguments.seccomp, arguments.socket or "")
    if arguments.check:
        return _check(settings)
    # Before anything else runs: a signal must not be lost between here and the loop.
    wakeup, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        listener = open_listener(arguments.socket)
    except KeeperInUseError as error:
        note(str(error))
        return EXIT_BUSY
    except OSError as error:
        note(f"the socket {arguments.socket} cannot be made: {error.strerror or error}")
        return EXIT_FAILURE
    ours = _file_of(arguments.socket)
    keeper = Keeper(listener, wakeup, arguments.linger, settings)
    try:
        keeper.prepare()
        if arguments.ready_fd is not None:
            os.write(arguments.ready_fd, b"ready\n")
            os.close(arguments.ready_fd)
        return keeper.run()
    except SpawnerLostError as error:
        note(str(error))
        return EXIT_FAILURE
    finally:
        _take_away(arguments.socket, ours)
        keeper.close()


if __name__ == "__main__":
    sys.exit(main())
