"""The command `vtpm-keeper`: arguments, socket, warm-up, then the keeper's loop."""

import argparse
import os
import signal
import socket
import stat
import sys
from collections.abc import Sequence
from typing import Final

from vtpm_instance.confine import leave_network
from vtpm_instance.errors import KeeperInUseError
from vtpm_instance.journal import note
from vtpm_instance.keeper_service import Keeper
from vtpm_instance.libtpms import the_tpm
from vtpm_instance.warm import warm_up

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
    parser.add_argument("--socket", required=True, metavar="PATH", help="where the manager connects (made, mode 0600)")
    parser.add_argument(
        "--ready-fd", type=int, metavar="N", help="descriptor that gets a line when the keeper is ready"
    )
    parser.add_argument(
        "--linger", type=float, default=600.0, metavar="SECONDS", help="end when unused for so long (default 600)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the keeper. Returns 0 after a stop, 1 when instances did not end in time, 8 when one runs there already."""
    arguments = _arguments(argv)
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
    if why := leave_network():
        note(f"instances keep the host's network namespace: {why}")
    keeper = Keeper(listener, wakeup, arguments.linger)
    warm_up(the_tpm())
    if arguments.ready_fd is not None:
        os.write(arguments.ready_fd, b"ready\n")
        os.close(arguments.ready_fd)
    try:
        return keeper.run()
    finally:
        keeper.close()
        os.unlink(arguments.socket)


if __name__ == "__main__":
    sys.exit(main())
