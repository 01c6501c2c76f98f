"""vtpm-xen: the back end of Xen guests' vTPM devices. `run` serves them, `check` says what this domain offers.

What lives here: options, signals, and how the parts are put together. What it does: docs/xen.md.
"""

import argparse
import fcntl
import functools
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import trio

from frontend_backend.command_line import parsed, place, whole
from frontend_backend.messages_admin import ExitCode
from frontend_backend.xen_back_trio import BackEnds
from frontend_backend.xen_device_trio import Kernel
from frontend_backend.xen_devices import DeviceEventChannels, DeviceGrants
from frontend_backend.xen_ledger import Ledgers
from frontend_backend.xs_trio import Xenstore, open_xenstore
from manager.cli_xen_ending import exit_code_of
from manager.config import SYSTEM_RUNTIME_DIR
from manager.errors import ConfigurationError, ConflictError
from manager.notify import notify
from manager.xen_backend import ManagerBinder
from manager.xen_backend_check import Finding, look_around
from manager.xen_backend_identity import identify
from manager.xen_backend_others import Others
from manager.xen_backend_witness import open_witness

_log = logging.getLogger("vtpm.xen")
READY: Final = "ready"
SOCKET_NAME: Final = "xen.sock"
LEDGERS: Final = "xen"
_DIRECTORY_MODE: Final = 0o711  # the manager's own, which others' sockets are in
_LOCK_NAME: Final = "lock"


@whole
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parsed(_parser(), argv)
    logging.basicConfig(level=options.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    return exit_code_of("vtpm-xen", lambda: int(options.act(options)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vtpm-xen", description="The back end of Xen guests' vTPM devices.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="serve the guests of this domain")
    run.set_defaults(act=_run)
    check = verbs.add_parser("check", help="say what this domain offers, and what is missing")
    check.add_argument("--json", action="store_true", help="print one JSON document")
    check.set_defaults(act=_check)
    for verb in (run, check):
        verb.add_argument("--runtime-dir", type=place, default=SYSTEM_RUNTIME_DIR, metavar="DIR",
                          help="the manager's; its socket xen.sock is there (default: %(default)s)")  # fmt: skip
        verb.add_argument("--xenstore", metavar="PATH",
                          help="a socket or device (default: xenstored's socket, else /dev/xen/xenbus)")  # fmt: skip
        verb.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    return parser


def _check(options: argparse.Namespace) -> int:
    findings = trio.run(look_around, options.runtime_dir / SOCKET_NAME, options.xenstore)
    if options.json:
        print(json.dumps({"schema": 1, "findings": [finding.describe() for finding in findings]}, indent=2))
    else:
        print(*findings, sep="\n")
    return int(_verdict(findings))


def _verdict(findings: Sequence[Finding]) -> ExitCode:
    wrong = [finding.code for finding in findings if finding.needed and not finding.ok]
    return wrong[0] if wrong else ExitCode.OK


def _run(options: argparse.Namespace) -> int:
    directory = options.runtime_dir / LEDGERS
    try:
        options.runtime_dir.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
        ledgers = Ledgers(directory)
        _lock(directory / _LOCK_NAME)
    except OSError as error:
        raise ConfigurationError(f"{directory} cannot be used: {error.strerror or error}") from error
    return trio.run(_serve, options, ledgers)


def _lock(path: Path) -> int:
    """Keep others like us away until we end: two back ends of one device would both map its page.

    Raises:
        ConflictError: another vtpm-xen runs here.

    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConflictError(f"another vtpm-xen serves this domain: it has {path}") from error
    return descriptor


async def _serve(options: argparse.Namespace, ledgers: Ledgers) -> int:
    async with open_xenstore(options.xenstore) as xs:
        _try_devices()
        witness = open_witness(options.runtime_dir / LEDGERS)
        who = functools.partial(identify, xs)
        binder = ManagerBinder(options.runtime_dir / SOCKET_NAME, who, witness, Others(xs))
        ends = BackEnds(xs, binder, Kernel(DeviceEventChannels.open, DeviceGrants.open), ledgers)
        async with trio.open_nursery() as nursery:
            await nursery.start(_until_told, ends, nursery.cancel_scope)
            await nursery.start(ends.run)
            await _say_ready(xs)
    return 0


def _try_devices() -> None:
    """Open what each guest will need: better now with its error than at the first guest."""
    DeviceEventChannels.open().close()
    DeviceGrants.open().close()


async def _say_ready(xs: Xenstore) -> None:
    _log.info("%s: serving backend/vtpm of domain %d through %s", READY, await xs.own_domain(), xs.name)
    notify("READY=1")


async def _until_told(ends: BackEnds, scope: trio.CancelScope, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
        task_status.started()
        async for number in received:
            _log.info("%s: leaving; guests keep their devices and wait for the next start", signal.Signals(number).name)
            notify("STOPPING=1")
            await ends.leave()
            scope.cancel()


if __name__ == "__main__":
    sys.exit(main())
