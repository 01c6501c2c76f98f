"""A token bucket: how often somebody may ask. Time is an argument."""

from dataclasses import dataclass


@dataclass(slots=True)
class TokenBucket:
    """`burst` at once, then `rate` a second. `take` is told the time in seconds of any clock that never goes back."""

    rate: float
    burst: float
    _left: float = -1.0
    _at: float = 0.0

    def take(self, now: float) -> bool:
        """Take a token; returns False where there is none, which changes nothing."""
        left = self.burst if self._left < 0 else min(self.burst, self._left + (now - self._at) * self.rate)
        if left < 1:
            return False
        self._left, self._at = left - 1, now
        return True
