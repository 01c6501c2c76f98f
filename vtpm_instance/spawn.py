"""Forks one instance from the warm keeper.

The keeper must be single-threaded and must have no running TPM. The child never returns into the keeper's code: it
ends with `os._exit`, so that nothing of the keeper's is flushed, closed or run twice.
"""

import os
import signal
import traceback
from typing import Final

from vtpm_instance import confine, instance
from vtpm_instance.errors import LibtpmsMisuseError
from vtpm_instance.instance import InstanceOrder
from vtpm_instance.journal import note
from vtpm_instance.libtpms import the_tpm

PROCESS_NAME: Final = "vtpm-instance"  # 13 of at most 15 characters (PR_SET_NAME)
_NULL: Final = 0  # standard input: the null device after `detach_from_parent`


def spawn(order: InstanceOrder, uid: int, gid: int) -> tuple[int, int]:
    """Start an instance as user `uid` and group `gid` (0: the keeper's); returns (pid, pidfd).

    The caller closes its copies of the instance's descriptors at once: the lock on the state image belongs to the
    open file they share and must end with the instance.

    Raises:
        LibtpmsMisuseError: a TPM runs in this process.
        OSError: no more processes or descriptors.

    """
    if the_tpm().running is not None:
        raise LibtpmsMisuseError("a process with a running TPM must not be forked")
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _child(order, uid, gid, parent)
    try:
        return pid, os.pidfd_open(pid)
    except OSError:
        # Unwatched it could neither be stopped nor be found by the next manager.
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _child(order: InstanceOrder, uid: int, gid: int, parent: int) -> None:
    status = instance.EXIT_BUG
    try:
        confine.close_all_but(order.descriptors)
        confine.detach_from_parent()
        the_tpm().write_messages_to(_NULL)
        confine.become(uid, gid)
        if confine.lock_down(PROCESS_NAME, parent):
            status = instance.run(order)
    except BaseException:  # noqa: BLE001 - the process ends here whatever it was; it must not unwind into the keeper
        note(f"a bug ended this instance: {traceback.format_exc()}")
    finally:
        os._exit(status)
