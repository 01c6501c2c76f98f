"""What a run was asked to do."""

import sys
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Options:
    """How much to measure. `quick` proves that the tool works; its numbers mean nothing."""

    instances: int = 50
    quick: bool = False
    active: int = 1000  # instances that save at once
    attached: int = 5000  # vTPMs, most of them hibernated

    def rounds(self, wanted: int) -> int:
        """Return how many rounds to take."""
        return 2 if self.quick else wanted

    def each(self, wanted: int) -> int:
        """Return how many calls a round has."""
        return max(4, wanted // 20) if self.quick else wanted


def progress(text: str) -> None:
    """Tell the person who waits."""
    print(f"bench: {text}", file=sys.stderr, flush=True)
