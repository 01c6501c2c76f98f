"""The spawner: a warm process without keys, paths or network, from which instances are made. Started by the keeper.

One thread, one conversation: the keeper sends WANTED with the far end of a channel, the answer (`order.STARTED`) is
the process id of an instance-to-be that waits for its order on that channel, or 0 and why there is none. It sends no
descriptor: it could not while more than its few are on their way to others of its user (standby.UNTAKEN). In mode
`exec` a spawner waits for an order itself, so that each instance has an address layout of its own; the keeper has the
next one ready by then. It ends when the keeper does.
"""

import os
import signal
import socket
import sys
from dataclasses import replace
from functools import partial
from typing import Any, Final

from frontend_backend.descriptors import close_all, receive_message, send_message
from frontend_backend.errors import ChannelClosedError
from frontend_backend.messages_keeper import FEATURES, ConfinementReply, Feature, encode_keeper
from frontend_backend.release import RELEASE
from vtpm_instance import confine, landlock, namespaces, seccomp, syscalls
from vtpm_instance.confine import Confinement
from vtpm_instance.errors import InstanceError
from vtpm_instance.instance import heed_sigterm, run
from vtpm_instance.journal import note
from vtpm_instance.libtpms import the_tpm
from vtpm_instance.order import STARTED, WANTED_NOW
from vtpm_instance.spawn import PROCESS_NAME, awaited_order, become_instance, fork_instance
from vtpm_instance.warm import freeze_heap, warm_up

CHANNEL: Final = 3  # the descriptor of the keeper's end
_NULL: Final = 0  # standard input: the null device in spawner and instance
MODES: Final = ("fork", "exec")
_EXIT_OK, _EXIT_FAILURE, _EXIT_USAGE, _EXIT_BUG = 0, 1, 2, 255


def prepare(on_violation: seccomp.OnViolation, *, shared: bool = True) -> tuple[Confinement, dict[str, str | None]]:
    """Warm up (thoroughly if children will share the memory), then give up what no instance needs.

    Returns what is left to do in each instance, and for every feature None (it is active) or why it is not.

    Raises:
        InstanceError, OSError: no instance could be made here.

    """
    heed_sigterm()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    hints = warm_up(shared=shared)
    missing: dict[str, str | None] = dict.fromkeys(FEATURES)
    if os.geteuid() != 0:
        missing["user"] = "only root can give each instance a user of its own"
    the_tpm().write_messages_to(_NULL)
    the_tpm().seal_closures()
    confine.limit()
    missing |= namespaces.enter()
    confine.keep_spawner_capabilities()
    confine.gain_nothing()
    rules, missing["landlock"] = _landlock()
    programs, missing["seccomp"] = _seccomp(on_violation)
    confinement = confine.confinement(rules, programs, PROCESS_NAME, yields=_may_yield())
    return replace(confinement, hints=hints), missing


def _may_yield() -> bool:
    """Tell whether instances may be given less of the processors; where not, they have as much as everybody."""
    try:
        _try_out(confine.call_to_yield())
    except OSError as error:
        note(f"instances have as much of the processors as the manager: {error}")
        return False
    return True


def _landlock() -> tuple[int | None, str | None]:
    """Return a ruleset that works, or None and why there is none."""
    try:
        rules = landlock.ruleset()
        _try_out(landlock.call_to_enter(rules))
    except OSError as error:
        return None, str(error)
    return rules, None


def _seccomp(on_violation: seccomp.OnViolation) -> tuple[tuple[Any, Any] | None, str | None]:
    """Return filters that work (see `confine.confinement`) and None, or why they do not protect."""
    try:
        programs = seccomp.build(on_violation), seccomp.build(on_violation, takes_descriptors=True)
        for program in programs:
            _try_out(seccomp.call_to_load(program))
    except OSError as error:
        return None, str(error)
    if on_violation is seccomp.OnViolation.LOG:
        return programs, "it only logs (instance.seccomp is 'log')"
    return programs, None


def _try_out(step: tuple[int, ...]) -> None:
    """Make a system call in a child, so that what is refused is known before the first instance.

    Raises:
        OSError: the kernel refuses it.

    """
    child = os.fork()
    if child == 0:
        status = _EXIT_BUG
        try:
            syscalls.make((step,))
            status = _EXIT_OK
        except OSError as error:
            status = error.errno or _EXIT_BUG
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise OSError(status, f"refused when tried out: {os.strerror(abs(status))}")


def main(arguments: list[str]) -> int:
    """Serve the keeper at descriptor CHANNEL.

    `arguments`: mode, what a wrong system call does, the keeper's process id and release, a label.
    """
    mode, on_violation, parent = arguments[0], seccomp.OnViolation(arguments[1]), int(arguments[2])
    if arguments[3] != RELEASE:  # an order is not read as another release wrote it
        note(
            f"this spawner is of release {RELEASE}, its keeper of another: the installed code was replaced under it. "
            "'vtpm-manager upgrade' starts a keeper of this release"
        )
        return _EXIT_USAGE
    if mode not in MODES or not confine.die_with_parent(parent):
        return _EXIT_USAGE
    confinement, missing = prepare(on_violation, shared=mode == "fork")
    sock = socket.socket(fileno=CHANNEL)
    sock.set_inheritable(False)
    features = tuple(Feature(name, why is None, why or "") for name, why in missing.items())
    send_message(sock, encode_keeper(ConfinementReply(mode, on_violation.value, features)))
    freeze_heap()
    if mode == "exec":
        channel = sock.detach()
        become_instance(partial(awaited_order, channel), confinement, run, (channel,), os.getppid())
    try:
        while True:
            _serve_one(sock, confinement)
    except (ChannelClosedError, ConnectionError):
        return _EXIT_OK  # the keeper has ended, and with it the need for instances


def _serve_one(sock: socket.socket, confinement: Confinement) -> None:
    """Make an instance-to-be: it receives its order itself, see `awaited_order`."""
    how, descriptors = receive_message(sock, max_descriptors=1)
    (channel,) = descriptors
    if how == WANTED_NOW:
        confinement = replace(confinement, hints=())  # copying all at once is quicker only while nobody waits for it
    try:
        pid = fork_instance(partial(awaited_order, channel), confinement, run, (channel,))
    except (InstanceError, OSError) as error:
        send_message(sock, STARTED.pack(0) + str(error).encode())
    else:
        send_message(sock, STARTED.pack(pid))
    finally:
        close_all(descriptors)


def start() -> int:
    """Run the spawner as a process of its own; returns its exit status."""
    try:
        return main(sys.argv[1:])
    except (InstanceError, OSError) as error:
        note(f"the spawner cannot work: {error}")
        return _EXIT_FAILURE
