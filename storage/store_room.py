"""Which sectors of the pool may be written: free ones, lowest first, and released ones that wait for a root."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of sectors."""

    first: int
    sectors: int

    def __contains__(self, location: int) -> bool:
        return 0 <= location - self.first < self.sectors


class Room:
    """Free, released and barred sectors of an open store, by location."""

    def __init__(self, free: Iterable[int]) -> None:
        self._free = sorted(free)  # a heap
        self._released: list[int] = []
        self._barred: tuple[Extent, ...] = ()
        self._aside: list[int] = []  # free, but barred

    def __len__(self) -> int:
        return len(self._free)

    def locations(self) -> list[int]:
        """List the sectors that may be written now, lowest first."""
        return sorted(self._free)

    def take(self) -> int:
        """Return the lowest free sector; it is not free any more."""
        return heapq.heappop(self._free)

    def release(self, locations: Iterable[int]) -> None:
        """Free sectors with the next `settle`."""
        self._released.extend(locations)

    def settle(self) -> None:
        """Free what was released: a root that does not lead there is durable."""
        self.add(self._released)
        self._released.clear()

    def add(self, locations: Iterable[int]) -> None:
        """Free sectors at once."""
        for location in locations:
            if self._barred and any(location in extent for extent in self._barred):
                self._aside.append(location)
            else:
                heapq.heappush(self._free, location)

    def bar(self, extents: Iterable[Extent]) -> None:
        """Give out no sector of these any more, until `unbar`."""
        free, self._free = self._free, []
        self._barred = tuple(extents)
        self.add(free)

    def unbar(self) -> None:
        """Give out every free sector again."""
        aside, self._aside, self._barred = self._aside, [], ()
        self.add(aside)

    def forget(self, extent: Extent) -> None:
        """Have the free sectors of a run no more: they are the log's, or outside the image now."""
        self._free = sorted(location for location in self._free if location not in extent)
        self._aside = [location for location in self._aside if location not in extent]
