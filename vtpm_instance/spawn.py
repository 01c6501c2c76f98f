"""Makes one instance out of the warm spawner: by a fork, or by becoming it.

It is made ahead of need, shut in as far as it can be, and waits for its order: what that takes is not waited for when
a vTPM is attached or woken. It lives for one order at most.

A forked instance is the keeper's child, not the spawner's (CLONE_PARENT): the keeper alone reaps it and reads its exit
status, the spawner can die without it, and the parent-death signal means the keeper. The spawner must be
single-threaded and must have no running TPM. The child never returns into the spawner's code: it ends with
`os._exit`, so that nothing of the spawner's is flushed, closed or run twice.
Source: clone(2).
"""

import os
import signal
import socket
import traceback
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

from frontend_backend.descriptors import receive_message
from frontend_backend.errors import ChannelClosedError
from vtpm_instance import confine
from vtpm_instance.confine import Confinement
from vtpm_instance.errors import LibtpmsMisuseError
from vtpm_instance.front_ends import RULES
from vtpm_instance.journal import note
from vtpm_instance.libtpms import the_tpm
from vtpm_instance.order import InstanceOrder
from vtpm_instance.syscalls import call, number_of

PROCESS_NAME: Final = "vtpm-instance"  # 13 of at most 15 characters (PR_SET_NAME)
EXIT_UNUSED: Final = 0  # its keeper needs it no more, or has ended
EXIT_BUG: Final = 70  # an exception nobody expected (EX_SOFTWARE of sysexits.h)
_MAX_DESCRIPTORS: Final = 9  # page, doorbell, image, three listeners, connections: see handover.MAX_HANDED
_CLONE: Final = number_of("clone")
_CLONE_PARENT: Final = 0x00008000  # linux/sched.h

Run = Callable[[InstanceOrder], int]


def awaited_order(channel: int) -> InstanceOrder:
    """Wait for the order on a socket, which is closed then; its descriptors come with it.

    It is received in the process that it is for: the lock on the state image belongs to the open file, and must end
    with the instance.

    Raises:
        ChannelClosedError: there will be none.

    """
    with socket.socket(fileno=channel) as sock:
        data, descriptors = receive_message(sock, max_descriptors=_MAX_DESCRIPTORS)
    return InstanceOrder.unpack(data, descriptors)


def fork_instance(
    make_order: Callable[[], InstanceOrder], confinement: Confinement, run: Run, keep: Sequence[int]
) -> int:
    """Start an instance that does `run(make_order())`; returns its process id. It is a child of this process's parent.

    The order is made in the child, shut in already, which has the descriptors `keep` for it.

    Raises:
        LibtpmsMisuseError: a TPM runs in this process.
        OSError: no more processes or descriptors.

    """
    if the_tpm().running is not None:
        raise LibtpmsMisuseError("a process with a running TPM must not be forked")
    parent = os.getppid()
    pid = call("clone", _CLONE, _CLONE_PARENT | signal.SIGCHLD, 0)
    if pid == 0:
        become_instance(make_order, confinement, run, keep, parent)
    return pid


def become_instance(
    make_order: Callable[[], InstanceOrder], confinement: Confinement, run: Run, keep: Sequence[int], parent: int
) -> NoReturn:
    """Be an instance of `parent`'s until the end of this process."""
    status = EXIT_BUG
    try:
        order = _order(make_order) if confine.shut_in(confinement, keep, parent) else None
        status = EXIT_UNUSED if order is None else _obey(order, confinement, run, parent)
    except BaseException:  # noqa: BLE001 - the process ends here whatever it was; it must not unwind into the spawner
        note(f"a bug ended this instance: {traceback.format_exc()}")
    finally:
        os._exit(status)


def _order(make_order: Callable[[], InstanceOrder]) -> InstanceOrder | None:
    try:
        return make_order()
    except (ChannelClosedError, ConnectionError):
        return None


def _obey(order: InstanceOrder, confinement: Confinement, run: Run, parent: int) -> int:
    taking = RULES[order.front_end].takes_descriptors
    if confine.lock_down(confinement, order.uid, order.gid, order.descriptors, parent, takes_descriptors=taking):
        return run(order)
    return EXIT_UNUSED
