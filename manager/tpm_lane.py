"""The one lane to the hardware TPM for asynchronous code: calls run one after another in a worker thread."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

import trio

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


@dataclass(frozen=True, slots=True)
class LaneStatistics:
    """`waiting`: calls queued or running now. `served`: calls that ended, of which `failed` raised."""

    waiting: int
    served: int
    failed: int


class TpmLane:
    """Queue of one for blocking calls, normally methods of HardwareTpm."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(1)
        self._waiting = 0
        self._served = 0
        self._failed = 0

    async def run(self, call: Callable[[*_Ts], _T], *args: *_Ts) -> _T:
        """Run `call(*args)` when it is its turn, and return or raise what it does.

        Cancellation takes effect while the call waits for its turn. Once it runs it runs to its end, because the
        thread owns the TPM; the deadline inside HardwareTpm bounds that time. Batch a whole sequence in one call.
        """
        self._waiting += 1
        try:
            result = await trio.to_thread.run_sync(self._counted, call, args, limiter=self._limiter)
        finally:
            self._waiting -= 1
        return result

    def _counted(self, call: Callable[[*_Ts], _T], args: tuple[*_Ts]) -> _T:
        """Run in the worker thread; the limiter lets one in at a time, so the counters need no lock."""
        try:
            return call(*args)
        except BaseException:
            self._failed += 1
            raise
        finally:
            self._served += 1

    def statistics(self) -> LaneStatistics:
        """Counters at this moment."""
        return LaneStatistics(self._waiting, self._served, self._failed)
