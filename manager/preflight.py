"""Can this code take over from a manager that runs? Asked of the newly installed code before the old one steps down.

What lives here: what the running code writes and speaks (`now`), and what this code makes of that (`problems`). Reads
the configuration and what stands in clear in the store; opens and changes nothing, and needs no TPM.
"""

import json
import os
from typing import Final

from frontend_backend import messages_instance, messages_keeper
from frontend_backend.release import RELEASE
from manager.config import Config, Layout
from manager.config_check import refuse_unusable
from manager.confinement import keeper_options
from manager.errors import UsageError
from manager.opening import read_boot_area
from storage import state_format, store_format
from storage.catalogue_schema import SCHEMA

# kept on disk: newer code reads what older code wrote, not the other way round
_FORMATS: Final = {
    "store": (store_format.FORMAT_VERSION, "the store's format"),
    "state": (state_format.FORMAT_VERSION, "the state images' format"),
    "catalogue": (SCHEMA, "the catalogue's schema"),
}
# spoken with keepers and instances that go on: both sides must be of one version
_PROTOCOLS: Final = {
    "keeper": (messages_keeper.VERSION, "the keepers' protocol"),
    "ring": (messages_instance.VERSION, "the instances' protocol"),
}


def now() -> dict[str, int]:
    """Return what this code writes and speaks, by name."""
    return {name: version for name, (version, _) in (_FORMATS | _PROTOCOLS).items()}


def parse_running(text: str) -> dict[str, int]:
    """Return what `now` said in a running manager.

    Raises:
        UsageError: it is not that.

    """
    try:
        running = json.loads(text)
    except ValueError:
        running = None
    if not isinstance(running, dict) or not all(type(version) is int for version in running.values()):
        raise UsageError("--running is what the running manager says of itself: an object of numbers, in JSON")
    return running


def problems(running: dict[str, int]) -> list[str]:
    """Return why this code cannot take over from code that writes and speaks `running`; empty: it can."""
    found = [f"it does not know what '{name[:40]}' is" for name in sorted(running.keys() - now().keys())]
    for name, (ours, what) in _FORMATS.items():
        if running.get(name, 0) > ours:
            found.append(f"{what} is version {running[name]}, and it reads up to {ours}")
    for name, (ours, what) in _PROTOCOLS.items():
        if running.get(name, 0) != ours:
            found.append(f"{what} is version {running.get(name, 0)}, and it speaks {ours}")
    return found


def preflight(layout: Layout, config: Config, running: dict[str, int]) -> dict[str, object]:
    """Return this code's release and what keeps it from taking over.

    Raises:
        ConfigurationError: it cannot use the configuration. IntegrityError, OSError: it cannot read the store.

    """
    import manager.daemon  # noqa: F401, PLC0415 - everything that the new manager imports must be there

    layout.check()
    refuse_unusable(layout, config)
    keeper_options(config.instance)
    descriptor = os.open(layout.store, os.O_RDONLY | os.O_CLOEXEC)
    try:
        read_boot_area(descriptor)
    finally:
        os.close(descriptor)
    return {"release": RELEASE, "problems": problems(running)}
