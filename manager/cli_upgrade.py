"""The commands `vtpm-manager upgrade` and `vtpm-manager preflight`."""

import argparse
import json
import sys
import time
from typing import Any, Final

from frontend_backend.messages_admin import ExitCode
from manager.cli import report
from manager.cli_output import print_answer
from manager.client import request, socket_path
from manager.config import Config, Layout
from manager.errors import BusyError, ManagerError, NotFoundError
from manager.verb_table import BY_NAME

_TAKE_OVER_SECONDS: Final = 120.0  # unsealing, opening and taking thousands of instances over
_LOOK_AGAIN: Final = 0.05


def run_preflight(layout: Layout, config: Config, running: str) -> int:
    """Say as JSON whether this code can take over from a running manager. Returns 0, or 4 when it cannot."""
    from manager.preflight import now, parse_running, preflight  # noqa: PLC0415 - loads the manager

    said = preflight(layout, config, parse_running(running) if running else now())
    print(json.dumps(said))
    return int(ExitCode.CONFLICT if said["problems"] else ExitCode.OK)


def run_upgrade(options: argparse.Namespace) -> int:
    """Have the manager hand over to the installed code, and wait until that serves. Returns the exit code."""
    verb, where = BY_NAME["upgrade"], socket_path(options.socket)
    try:
        (before,) = request(where, verb.name, {}, on_note=lambda text: print(text, file=sys.stderr))
        after = _wait(where, before)
        if after["upgrade_failed"]:
            raise ManagerError(
                f"{after['upgrade_failed']}. The code of before, release {after['release']}, serves again; running "
                f"vTPMs went on. Install a release that can be run, and try again"
            )
    except ManagerError as error:
        return report(error, options.form, "vtpm-manager upgrade")
    document = before | {"state": "upgraded", "pid": after["pid"], "release": after["release"]}
    return print_answer(verb, [document], options.form, paged=False)


def _wait(where: str, before: dict[str, Any]) -> dict[str, Any]:
    """Return the new manager's status.

    Raises:
        BusyError: it does not serve in time.

    """
    limit, problem = time.monotonic() + _TAKE_OVER_SECONDS, ""
    while time.monotonic() < limit:
        try:
            (status,) = request(where, "status", {})
        except (NotFoundError, BusyError) as error:
            problem = str(error)
        else:
            if status["run"] != before["run"]:
                return status
        time.sleep(_LOOK_AGAIN)
    raise BusyError(
        f"the old manager has stepped down, and the new one does not serve after {_TAKE_OVER_SECONDS:g} s ({problem}). "
        "Running vTPMs go on, their saves wait: look at the manager's log, and start it if it has ended"
    )
