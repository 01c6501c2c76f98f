"""Prepares the spawner so that what it forks is small and quick: everything is used before the first fork.

Python rewrites its byte code while it learns a path, and fills caches when it walks one first; done here, once, the
pages with the results are shared by all instances. The TPMs that run here are thrown away and terminated: a running
TPM must never be forked, its random numbers would repeat in each child (reference/performance.md 2c). Nothing here is a
secret of any vTPM.
"""

import gc
from functools import partial
from typing import Final

from vtpm_instance import footprint, rehearsal
from vtpm_instance.confine import Calls

# CPython 3.11 specialises byte code after 8 runs (PEP 659). Only TPM 2.0: the families share nearly all of the path,
# and each life of a TPM 1.2 makes an RSA key first, 0.1 to 0.4 s for 80 KiB of an instance of that family.
LIVES: Final = 10


def warm_up(*, shared: bool = True) -> Calls:
    """Let throw-away instances live, then freeze the heap; one is enough if no child will share it.

    That one loads whatever the libraries load on their first use, for which there is no file later. Returns the hints
    that spare a child which will share it page faults, see `footprint`.

    Raises:
        InstanceError, StorageError, OSError: a part does not work here; no instance would.

    """
    state = rehearsal.fresh()
    try:
        for _ in range(LIVES if shared else 1):
            state = rehearsal.live_once(state)
    finally:
        rehearsal.release(state)
    freeze_heap()
    return _hints() if shared else ()


def _hints() -> Calls:
    """Watch two lives, each in a child: a new TPM's, and one that wakes after it hibernated."""
    state = rehearsal.fresh()
    try:
        new = footprint.written_in(partial(rehearsal.live_once, state))
        state = rehearsal.live_once(state)
        woken = footprint.written_in(partial(rehearsal.live_once, state))
        return footprint.calls_to_copy(new & woken)
    finally:
        rehearsal.release(state)
        freeze_heap()


def freeze_heap() -> None:
    """Keep the garbage collector from touching, and so from unsharing, the pages children share."""
    gc.collect()
    gc.disable()
    gc.freeze()
