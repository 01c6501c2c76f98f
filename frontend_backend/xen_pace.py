"""How often a guest is attended to: a bucket of tokens that says how long to wait. Time is an argument.

And how much is said about it in the log, which is everybody's.
"""

import logging
import time
from dataclasses import dataclass
from typing import Final

LINES_AT_ONCE: Final = 40.0
"""Lines about one device without a pause: some of its guest's reboots and reconnections, whatever its guest does."""
LINES_A_SECOND: Final = 1 / 60
"""And so many afterwards. What is kept back is counted in the next line."""


@dataclass(slots=True)
class Pace:
    """`burst` at once, then `rate` a second."""

    rate: float
    burst: float
    _owed: float = 0.0  # tokens used and not yet earned back
    _at: float = 0.0  # seconds, when that was so

    def spend(self, now: float) -> float:
        """Take one token; returns the seconds to wait before going on, 0 within the burst.

        `now`: seconds of any clock that never goes back.
        """
        self._earn(now)
        self._owed += 1
        return max(0.0, self._owed - self.burst) / self.rate

    def spend_if_any(self, now: float) -> bool:
        """Take one token if there is one; returns whether there was."""
        self._earn(now)
        if self._owed + 1 > self.burst:
            return False
        self._owed += 1
        return True

    def _earn(self, now: float) -> None:
        self._owed = max(0.0, self._owed - max(0.0, now - self._at) * self.rate)
        self._at = now


class Voice:
    """What is said about one device: a guest can cause any of it as often as it likes."""

    def __init__(self, log: logging.Logger, who: object) -> None:
        """Say it in `log`, with `who` before it."""
        self._log, self._who = log, who
        self._pace = Pace(LINES_A_SECOND, LINES_AT_ONCE)
        self._kept_back = 0

    def say(self, level: int, text: str) -> None:
        """Say it, or count it."""
        if not self._log.isEnabledFor(level):
            return
        if not self._pace.spend_if_any(time.monotonic()):
            self._kept_back += 1
            return
        kept_back, self._kept_back = self._kept_back, 0
        more = f" ({kept_back} lines about it were kept back before)" if kept_back else ""
        self._log.log(level, "%s: %s%s", self._who, text, more)
