"""Which plots there are in docs/."""

from collections.abc import Callable, Mapping
from typing import Final

import plots
import plots_instance

# file in docs/ -> what draws it from its section's data; `form` is a file type that matplotlib knows
DRAW: Final[Mapping[str, Callable[..., bytes]]] = {
    "store-size.svg": plots.store_sizes,
    "round-trips.svg": plots_instance.round_trips,
    "instance-memory.svg": plots_instance.stacked,
    "attach.svg": plots_instance.stacked,
}
