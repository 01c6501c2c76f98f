"""How often an instance may crash, and how long after each crash it is started again."""

import time
from dataclasses import dataclass, field
from typing import Final

from manager.config import InstanceConfig

_SECOND_DELAY: Final = 0.25  # seconds; the first crash is forgiven at once: a guest waits
_LONGEST_DELAY: Final = 30.0  # seconds; longer than that nobody waits for an attachment to come back


@dataclass(slots=True)
class CrashBudget:
    """What one attachment may still crash. Times are in seconds."""

    allowed: int
    period: float
    _crashes: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, config: InstanceConfig) -> "CrashBudget":
        """Return a full budget."""
        return cls(config.restarts, config.restart_seconds)

    def spend(self, now: float | None = None) -> float | None:
        """Count one crash; return how long to wait before the next start, None when there is to be none.

        Each crash within `period` doubles the wait; one that is longer ago is forgotten.
        """
        moment = time.monotonic() if now is None else now
        self._crashes = [crash for crash in self._crashes if moment - crash < self.period] + [moment]
        count = len(self._crashes)
        if count > self.allowed:
            return None
        return 0.0 if count == 1 else min(_SECOND_DELAY * 2 ** (count - 2), _LONGEST_DELAY)
