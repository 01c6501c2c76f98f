"""Instances that turn evil: the real spawner's preparation and fork, with another `run`. Run as a program.

This process plays the keeper. Arguments: a directory, and "filtered" or "unfiltered". Prints one JSON object: attempt
to outcome, which is "refused: ...", "killed" or "done".
"""

import ctypes
import json
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

sys.path.insert(0, str(Path(__file__).parent))

from evil_attempts import ATTEMPTS, Attempt, Targets

from frontend_backend.descriptors import receive_message, send_message
from frontend_backend.tpmhdr import TpmFamily
from vtpm_instance import confine, seccomp, spawner
from vtpm_instance.control import FrontEnd
from vtpm_instance.libtpms import the_tpm
from vtpm_instance.order import InstanceOrder
from vtpm_instance.spawn import fork_instance

UIDS = 1_879_048_192
GOOD = "a clean end"


def order(uid: int, channel: int) -> InstanceOrder:
    return InstanceOrder(
        UUID(int=1), 1, TpmFamily.TPM_2_0, FrontEnd.SOCKET, 0, 0, channel, channel, channel, {}, uid, uid
    )


def neighbour_runs(_order: InstanceOrder) -> int:
    signal.pause()
    return 0


def evil(attempt: Attempt, targets: Targets, tell: int) -> Any:
    def run(_order: InstanceOrder) -> int:
        try:
            attempt(targets)
        except Exception as error:  # noqa: BLE001 - whatever refuses it
            os.write(tell, f"refused: {type(error).__name__} {getattr(error, 'errno', '')}".encode())
        else:
            os.write(tell, b"done")
        return 0

    return run


def spawn_all(channel: socket.socket, directory: Path, *, filtered: bool, port: int) -> None:
    """The spawner: prepare as the product does, then fork one instance an attempt."""
    assert confine.die_with_parent(os.getppid())
    unix = directory / "s"
    closure = _closure_address()
    confinement, missing = spawner.prepare(seccomp.OnViolation.KILL)
    assert not any(missing.values()), missing
    outside = replace(confinement, filter=())
    inside = confinement if filtered else outside
    told, tell = os.pipe2(os.O_CLOEXEC)
    neighbour = fork_instance(lambda: order(UIDS + 1, tell), outside, neighbour_runs, (tell,))
    targets = Targets(neighbour, os.getppid(), "/etc/passwd", str(unix), b"\0evil-target", port, closure, tell)
    for group in ATTEMPTS.values():
        for name, attempt in group.items():
            pid = fork_instance(lambda: order(UIDS, tell), inside, evil(attempt, targets, tell), (tell,))
            pidfd = os.pidfd_open(pid)  # nobody waits for it before it is told of it
            send_message(channel, json.dumps([name, pid]).encode(), [pidfd, told])
            os.close(pidfd)
            channel.recv(1)
    send_message(channel, json.dumps([GOOD, neighbour]).encode(), [told, told])


def _closure_address() -> int:
    from vtpm_instance._libtpms import ffi

    return int(ffi.cast("uintptr_t", the_tpm()._closures["tpm_io_init"]))


def main(directory: Path, *, filtered: bool) -> dict[str, str]:
    with (
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket() as tcp,
    ):
        unix.bind(str(directory / "s"))
        (directory / "s").chmod(0o777)
        abstract.bind(b"\0evil-target")
        tcp.bind(("127.0.0.1", 0))
        for listener in (unix, abstract, tcp):
            listener.listen(64)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        child = os.fork()
        if child == 0:
            try:
                spawn_all(theirs, directory, filtered=filtered, port=tcp.getsockname()[1])
            finally:
                os._exit(0)
        theirs.close()
        return collect(ours)


def collect(channel: socket.socket) -> dict[str, str]:
    outcomes: dict[str, str] = {}
    while True:
        data, (pidfd, told) = receive_message(channel, max_descriptors=2)
        name, pid = json.loads(data)
        os.set_blocking(told, False)
        if name == GOOD:
            outcomes["the neighbour lives"] = "yes" if os.waitpid(pid, os.WNOHANG) == (0, 0) else "no"
            os.kill(pid, signal.SIGKILL)
            return outcomes
        _, status = os.waitpid(pid, 0)
        try:
            said = os.read(told, 500).decode()
        except BlockingIOError:
            said = ""
        code = os.waitstatus_to_exitcode(status)
        killed = {-signal.SIGSYS: "killed", -signal.SIGSEGV: "refused: SIGSEGV", 0: "done"}.get(
            code, f"ended with {code}"
        )
        outcomes[name] = said or killed
        os.close(pidfd)
        os.close(told)
        channel.send(b"\0")


if __name__ == "__main__":
    ctypes.CDLL(None)
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), filtered=sys.argv[2] == "filtered")))
