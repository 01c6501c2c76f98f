"""vtpm-relay: QEMU on one machine, vTPMs on another. `serve` beside the vTPMs, `connect` beside QEMU.

What lives here: options, and how the parts are put together. What it does: docs/relay.md.
"""

import argparse
import contextlib
import functools
import json
import logging
import os
import signal
import ssl
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import trio

from frontend_backend.command_line import parsed, place, whole
from frontend_backend.messages_admin import ExitCode
from manager.client import socket_path
from manager.errors import ConfigurationError, ManagerError, UsageError
from manager.notify import notify
from manager.relay_access import Access
from manager.relay_addresses import Address, Welcomer
from manager.relay_clients import Clients, endpoint_of
from manager.relay_endpoints import Assignments, Ports
from manager.relay_far import Far
from manager.relay_near import Dial, Near
from manager.relay_tls import (
    CERTIFICATE_FILE,
    KEY_FILE,
    context,
    encrypted,
    fingerprint,
    make_identity,
    read_certificate,
)
from manager.relay_vtpms import ManagedVtpms, NamedVtpms, Vtpms
from manager.sockets import Owner, parse_mode
from manager.task_errors import expected_error

_log = logging.getLogger("vtpm.relay")
PATIENCE: Final = 60.0  # seconds: a manager starts in that; a guest's driver waits two minutes
READY: Final = "ready"
_Started = trio.TaskStatus[None]


@whole
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parsed(_parser(), argv)
    try:
        return int(options.act(options))
    except ManagerError as error:
        print(f"vtpm-relay {options.verb}: {error}", file=sys.stderr)
        return int(error.code)
    except BaseExceptionGroup as group:
        first = expected_error(group, ManagerError)
        if first is None:
            raise
        print(f"vtpm-relay {options.verb}: {first}", file=sys.stderr)
        return int(getattr(first, "code", ExitCode.FAILURE))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vtpm-relay", description="Carry vTPMs from one machine to another.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    key = verbs.add_parser("key", help="make this machine's key and certificate; prints the fingerprint")
    key.add_argument("directory", type=place)
    key.add_argument("--name", default=os.uname().nodename, help="the certificate's name (default: the host's)")
    key.set_defaults(act=_key)

    serve = verbs.add_parser("serve", help="the side of the vTPMs")
    serve.add_argument("--listen", action="append", required=True, metavar="ADDRESS",
                       help="unix:PATH, tls:HOST:PORT or vsock:CID|any:PORT; may be given again")  # fmt: skip
    serve.add_argument("--clients", type=place, required=True, help="who may reach which vTPMs (TOML)")
    serve.add_argument("--socket", help="the manager's admin socket; our user needs the role of an auditor")
    serve.add_argument("--vtpm", action="append", default=[], metavar="NAME=CONTROL[,DATA]",
                       help="a vTPM by its sockets, without a manager; may be given again")  # fmt: skip
    serve.add_argument("--hold", type=place, metavar="SOCKET",
                       help="keep vTPMs on over a restart of this relay: a holder's socket, made here")  # fmt: skip
    _add_common(serve)
    serve.set_defaults(act=_serve)

    connect = verbs.add_parser("connect", help="the side of QEMU")
    connect.add_argument("--to", required=True, metavar="ADDRESS", help="unix:PATH, tls:HOST:PORT or vsock:CID:PORT")
    connect.add_argument("--far-certificate", type=place, help="the far side's certificate (PEM)")
    connect.add_argument("--owner", help="USER[:GROUP] that may use the sockets (default: ours)")
    connect.add_argument("--mode", default="0660", help="permissions of the sockets, octal")
    _add_places(connect)
    _add_common(connect)
    connect.set_defaults(act=_connect)

    shown = verbs.add_parser("list", help="show where the vTPMs are reached, as JSON")
    _add_places(shown)
    shown.set_defaults(act=_list)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--identity", type=place, metavar="DIRECTORY",
                        help=f"with {KEY_FILE} and {CERTIFICATE_FILE} of 'vtpm-relay key'")  # fmt: skip
    parser.add_argument("--patience", type=float, default=PATIENCE, metavar="SECONDS",
                        help="how long a request waits for a side that is away (default: %(default)g)")  # fmt: skip
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--directory", type=place, required=True, help="for the sockets, a folder a vTPM")
    parser.add_argument("--assignments", type=place,
                        help="which vTPM has which port (default: assignments.json in the directory)")  # fmt: skip
    parser.add_argument("--ports", metavar="BASE[:STEP]", help="ports of 127.0.0.1, too, from BASE on in steps (10)")


def _key(options: argparse.Namespace) -> int:
    print(make_identity(options.directory, options.name))
    return 0


def _list(options: argparse.Namespace) -> int:
    assignments, ports = _assignments(options), _ports(options)
    found = (endpoint_of(assignments, options.directory, ports, name) for name in sorted(assignments.places))
    print(json.dumps([endpoint.describe() for endpoint in found], indent=2))
    return 0


def _ports(options: argparse.Namespace) -> Ports | None:
    return None if options.ports is None else Ports.parse(options.ports)


def _assignments(options: argparse.Namespace) -> Assignments:
    return Assignments(options.assignments or options.directory / "assignments.json")


def _begin(options: argparse.Namespace) -> None:
    logging.basicConfig(level=options.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    if not 0 < options.patience < float("inf"):
        raise UsageError("--patience is a number of seconds above 0")


def _identity(options: argparse.Namespace, address: Address) -> tuple[Path, Path]:
    if options.identity is None:
        raise UsageError(f"{address.text} needs --identity DIRECTORY, made by 'vtpm-relay key DIRECTORY'")
    return options.identity / KEY_FILE, options.identity / CERTIFICATE_FILE


# the side of the vTPMs


def _serve(options: argparse.Namespace) -> int:
    _begin(options)
    addresses = [Address.parse(text) for text in options.listen]
    if options.vtpm and options.socket:
        raise UsageError("--vtpm and --socket exclude each other")
    vtpms: Vtpms = NamedVtpms.parse(options.vtpm) if options.vtpm else ManagedVtpms(socket_path(options.socket))
    access = Access.read(options.clients)
    remote = next((address for address in addresses if not address.is_local), None)
    tls = None
    if remote is not None:
        key, certificate = _identity(options, remote)
        tls = functools.partial(_server_context, key, certificate)
        tls(access)  # what is wrong with it is said now
    return trio.run(_run_far, options, addresses, vtpms, Welcomer(access, tls))


def _server_context(key: Path, certificate: Path, access: Access) -> ssl.SSLContext:
    return context(key, certificate, access.certificates, server=True)


async def _run_far(options: argparse.Namespace, addresses: list[Address], vtpms: Vtpms, welcomer: Welcomer) -> int:
    listeners = [(address, address.listen()) for address in addresses]
    far = Far(welcomer, vtpms, options.patience)
    if options.hold is not None:
        try:
            far.take_over(options.hold)
        except OSError as error:
            raise ConfigurationError(f"cannot keep connections at {options.hold}: {error}") from error
    async with trio.open_nursery() as nursery:
        await nursery.start(_until_told, far.leave, nursery)
        await nursery.start(_reread, options.clients, welcomer, far)
        _say_ready()
        await far.run(listeners)
        nursery.cancel_scope.cancel()
    for address in addresses:
        if address.is_local:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(str(address.place))
    return 0


async def _until_told(leave: Callable[[], object], nursery: trio.Nursery, task_status: _Started) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
        task_status.started()
        async for number in received:
            _log.info("%s: leaving", signal.Signals(number).name)
            notify("STOPPING=1")
            nursery.start_soon(leave)  # type: ignore[arg-type]


async def _reread(path: Path, welcomer: Welcomer, far: Far, task_status: _Started) -> None:
    """Read the clients' file again by SIGHUP: who is not in it any more is turned away, also in the middle."""
    with trio.open_signal_receiver(signal.SIGHUP) as received:
        task_status.started()
        async for _ in received:
            try:
                access = Access.read(path)
                if welcomer.tls is not None:
                    welcomer.tls(access)
            except ConfigurationError as error:
                _log.error("the clients stay what they were: %s", error)
            else:
                welcomer.access = access
                far.reconsider()
                _log.info("the clients are those that %s has now", path)


def _say_ready() -> None:
    _log.info(READY)
    notify("READY=1")


# the side of QEMU


def _connect(options: argparse.Namespace) -> int:
    _begin(options)
    address = Address.parse(options.to)
    dial = functools.partial(_dial, address, _client_context(options, address))
    owner, mode = Owner.parse(options.owner, os.geteuid()), parse_mode(options.mode)
    try:
        options.directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{options.directory} cannot be made: {error.strerror}") from error
    return trio.run(_run_near, options, dial, owner, mode)


def _client_context(options: argparse.Namespace, address: Address) -> tuple[ssl.SSLContext, str] | None:
    """Return how to speak TLS, and the far side's fingerprint; None on a Unix socket."""
    if address.is_local:
        return None
    if options.far_certificate is None:
        raise UsageError(f"{address.text} needs --far-certificate FILE: the far side's {CERTIFICATE_FILE}")
    key, certificate = _identity(options, address)
    pinned = read_certificate(options.far_certificate)
    return context(key, certificate, [pinned], server=False), fingerprint(pinned)


async def _dial(address: Address, tls: tuple[ssl.SSLContext, str] | None) -> trio.abc.Stream:
    stream = await address.connect()
    if tls is None:
        return stream
    try:
        return (await encrypted(stream, tls[0], [tls[1]], server=False))[0]
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise


async def _run_near(options: argparse.Namespace, dial: Dial, owner: Owner, mode: int) -> int:
    clients: list[Clients] = []

    def add(names: list[str]) -> None:
        clients[0].add(names)

    near = Near(dial, options.patience, add)
    clients.append(Clients(near, _assignments(options), options.directory, _ports(options), owner, mode))
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            nursery.start_soon(clients[0].run, _say_ready)
            nursery.start_soon(near.run)
            async for number in received:
                _log.info("%s: the guests' connections end", signal.Signals(number).name)
                await near.leave()
                nursery.cancel_scope.cancel()
    return 0


if __name__ == "__main__":
    sys.exit(main())
