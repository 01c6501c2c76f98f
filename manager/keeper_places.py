"""Which keeper has which instance, and how many each has. No I/O: what keepers did is told by `manager.keepers`."""

from collections import Counter, OrderedDict
from typing import Final

from manager.keeper_client import Keeper

_STRAYS_MOST: Final = 1000  # starts that failed without a word on whether there is an instance; the oldest are dropped

Name = tuple[bytes, int]  # vTPM and lease


class Places:
    """Where instances are. One that is being made counts, and can be found, from before its keeper is asked."""

    def __init__(self) -> None:
        """Know of none yet."""
        self._homes: dict[Name, Keeper] = {}
        self._strays: OrderedDict[Name, Keeper] = OrderedDict()
        self._kept: Counter[Keeper] = Counter()
        self._starting: Counter[Keeper] = Counter()
        self._most: dict[Keeper, int] = {}  # of those that said they are full

    def home_of(self, name: Name) -> Keeper | None:
        """Return the keeper that has an instance, or may have it; None: nobody was ever asked for it."""
        return self._homes.get(name) or self._strays.get(name)

    def has(self, name: Name) -> bool:
        """Tell whether a keeper surely has it."""
        return name in self._homes

    def load_of(self, keeper: Keeper) -> int:
        """Return how many instances a keeper has or is making; ended ones that are not forgotten yet included."""
        return self._kept[keeper] + self._starting[keeper]

    def cap_of(self, keeper: Keeper, room: int) -> int:
        """Return how many a keeper with this much room takes: fewer where it said that it is full."""
        return min(room, self._most.get(keeper, room))

    def reserve(self, keeper: Keeper) -> None:
        """Count one that is about to be made; `unreserve` follows whatever becomes of it."""
        self._starting[keeper] += 1

    def unreserve(self, keeper: Keeper) -> None:
        """Count it no longer."""
        self._starting[keeper] -= 1

    def begin(self, name: Name, keeper: Keeper) -> None:
        """Take note that a keeper is asked to make this one: until `settle` or `give_up` it may have done so."""
        self._strays[name] = keeper
        while len(self._strays) > _STRAYS_MOST:
            self._strays.popitem(last=False)

    def give_up(self, name: Name) -> None:
        """Take note that it was not made."""
        self._strays.pop(name, None)

    def settle(self, name: Name, keeper: Keeper) -> None:
        """Take note that a keeper has it."""
        self._strays.pop(name, None)
        if name not in self._homes:
            self._homes[name] = keeper
            self._kept[keeper] += 1

    def leave(self, name: Name) -> None:
        """Take note that it is forgotten: its keeper has room again."""
        self._strays.pop(name, None)
        keeper = self._homes.pop(name, None)
        if keeper is not None:
            self._kept[keeper] -= 1
            self._most.pop(keeper, None)

    def is_full(self, keeper: Keeper) -> bool:
        """Take note that a keeper takes no more until one leaves; returns False when it has none at all."""
        self._most[keeper] = self._kept[keeper]
        return self._kept[keeper] > 0

    def is_empty_again(self, keeper: Keeper) -> None:
        """Take note that another process came in a keeper's place: what the first had is gone."""
        for name in [name for name, home in self._homes.items() if home is keeper]:
            del self._homes[name]
        self._kept[keeper] = 0
        self._most.pop(keeper, None)
