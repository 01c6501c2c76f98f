"""Which vTPMs the far side has, and where they listen: asked of the manager, or named on the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from manager.client import RemoteError, request
from manager.errors import ManagerError, UsageError
from manager.relay_asking import NotTakenError, Places
from manager.relay_frames import Opening

_FRONT_ENDS: Final = ("qemu", "socket")  # those with a control socket
_AT_ONCE: Final = 4  # questions to the manager


Argument = str | int | bool | tuple[str, ...] | None


class Vtpms(Protocol):
    """The vTPMs of the far side."""

    async def find(self, name: str) -> Places:
        """Return where a vTPM listens. Raises NotTakenError where it does not just now."""

    async def names(self) -> list[str]:
        """Return the names of those that can be reached, in order. Raises ManagerError."""


class ManagedVtpms:
    """Those that a manager has attached."""

    def __init__(self, admin_socket: str) -> None:
        """Ask the manager at `admin_socket`; our user needs the role of an auditor."""
        self._path = admin_socket
        self._limit = trio.CapacityLimiter(_AT_ONCE)

    async def find(self, name: str) -> Places:
        """Return where a vTPM listens."""
        try:
            (shown,) = await self._ask("show", {"vtpm": name})
        except (ManagerError, RemoteError) as error:
            raise NotTakenError(str(error)) from None
        if not _has_sockets(shown):
            raise NotTakenError(f"vTPM {name} is not attached with --frontend qemu or socket, on Unix sockets")
        tcti = shown.get("tcti")
        data = Path(tcti.removeprefix("swtpm:path=")) if tcti else None
        return Places(Path(str(shown["control"])), data)

    async def _ask(self, verb: str, arguments: dict[str, Argument]) -> list[dict[str, Any]]:
        def ask() -> list[dict[str, Any]]:
            return request(self._path, verb, arguments)

        return await trio.to_thread.run_sync(ask, limiter=self._limit, abandon_on_cancel=True)

    async def names(self) -> list[str]:
        """Return the names of those that can be reached."""
        rows = await self._ask("list", {})
        return [str(row["name"]) for row in rows if _has_sockets(row)]


def _has_sockets(shown: dict[str, Any]) -> bool:
    return shown.get("frontend") in _FRONT_ENDS and str(shown.get("control")).startswith("/")


class NamedVtpms:
    """Those that the command line names: swtpm's, for example."""

    def __init__(self, places: Mapping[str, Places]) -> None:
        """Know these."""
        self._places = dict(places)

    @classmethod
    def parse(cls, texts: list[str]) -> "NamedVtpms":
        """Read NAME=CONTROL[,DATA]. Raises UsageError."""
        places: dict[str, Places] = {}
        for text in texts:
            name, _, rest = text.partition("=")
            control, _, data = rest.partition(",")
            if not control or not check_name(name) or name in places:
                raise UsageError(f"'{text[:120]}' is not NAME=CONTROL-SOCKET[,DATA-SOCKET], or names one twice")
            places[name] = Places(Path(control), Path(data) if data else None)
        return cls(places)

    async def find(self, name: str) -> Places:
        """Return where a vTPM listens."""
        await trio.lowlevel.checkpoint()
        try:
            return self._places[name]
        except KeyError:
            raise NotTakenError(f"there is no vTPM {name}") from None

    async def names(self) -> list[str]:
        """Return all names."""
        await trio.lowlevel.checkpoint()
        return sorted(self._places)


def check_name(name: str) -> bool:
    """Tell whether a vTPM can have this name (as manager.registry has it), so that it can be a file's, too."""
    good = name.isascii() and all(c.isalnum() or c in "._-" for c in name)
    return good and 0 < len(name) <= Opening.MAX_NAME and not name.startswith(".")
