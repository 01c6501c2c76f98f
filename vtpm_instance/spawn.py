"""Makes one instance out of the warm spawner: by a fork, or by becoming it.

A forked instance is the keeper's child, not the spawner's (CLONE_PARENT): the keeper alone reaps it and reads its exit
status, the spawner can die without it, and the parent-death signal means the keeper. The spawner must be
single-threaded and must have no running TPM. The child never returns into the spawner's code: it ends with
`os._exit`, so that nothing of the spawner's is flushed, closed or run twice.
Source: clone(2).
"""

import os
import signal
import traceback
from collections.abc import Callable
from typing import Final, NoReturn

from vtpm_instance import confine
from vtpm_instance._libtpms import ffi
from vtpm_instance.confine import Confinement
from vtpm_instance.errors import LibtpmsMisuseError
from vtpm_instance.front_ends import RULES
from vtpm_instance.journal import note
from vtpm_instance.libtpms import the_tpm
from vtpm_instance.order import InstanceOrder
from vtpm_instance.syscalls import address_of, call, number_of

PROCESS_NAME: Final = "vtpm-instance"  # 13 of at most 15 characters (PR_SET_NAME)
EXIT_BUG: Final = 70  # an exception nobody expected (EX_SOFTWARE of sysexits.h)
_CLONE: Final = number_of("clone")
_CLONE_PIDFD: Final = 0x00001000  # linux/sched.h
_CLONE_PARENT: Final = 0x00008000

Run = Callable[[InstanceOrder], int]


def fork_instance(make_order: Callable[[], InstanceOrder], confinement: Confinement, run: Run) -> tuple[int, int]:
    """Start an instance that does `run(make_order())`; returns (pid, pidfd). It is a child of this process's parent.

    The order is made in the child, because every page that the spawner writes to is one that its children stop sharing.
    The caller closes its copies of the instance's descriptors at once: the lock on the state image belongs to the
    open file they share and must end with the instance.

    Raises:
        LibtpmsMisuseError: a TPM runs in this process.
        OSError: no more processes or descriptors.

    """
    if the_tpm().running is not None:
        raise LibtpmsMisuseError("a process with a running TPM must not be forked")
    parent = os.getppid()
    pidfd = ffi.new("int *")
    pid = call("clone", _CLONE, _CLONE_PARENT | _CLONE_PIDFD | signal.SIGCHLD, 0, address_of(pidfd))
    if pid == 0:
        become_instance(make_order, confinement, run, parent)
    return pid, pidfd[0]


def become_instance(
    make_order: Callable[[], InstanceOrder], confinement: Confinement, run: Run, parent: int
) -> NoReturn:
    """Be an instance of `parent`'s until the end of this process."""
    status = EXIT_BUG
    try:
        order = make_order()
        taking = RULES[order.front_end].takes_descriptors
        if confine.lock_down(confinement, order.uid, order.gid, order.descriptors, parent, takes_descriptors=taking):
            status = run(order)
    except BaseException:  # noqa: BLE001 - the process ends here whatever it was; it must not unwind into the spawner
        note(f"a bug ended this instance: {traceback.format_exc()}")
    finally:
        os._exit(status)
