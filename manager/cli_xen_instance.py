"""vtpm-xen-instance: the program of a Xen domain that runs one vTPM, for a guest, from a manager in another domain.

What lives here: options, signals, and how the parts are put together. What it does: docs/xen.md, arrangement (c).
"""

import argparse
import fcntl
import functools
import logging
import os
import signal
import sys
import tomllib
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import trio

from frontend_backend.command_line import parsed, place, whole
from frontend_backend.messages_admin import ExitCode
from frontend_backend.xen_back_trio import BackEnds
from frontend_backend.xen_device_trio import Kernel
from frontend_backend.xen_devices import DeviceEventChannels, DeviceGrantOffers, DeviceGrants
from frontend_backend.xen_front_node_trio import device_path
from frontend_backend.xen_front_trio import XenFront
from frontend_backend.xen_kernel import EventChannels, GrantOffers
from frontend_backend.xen_ledger import Ledgers
from frontend_backend.xs_trio import Xenstore, open_xenstore
from manager import confinement
from manager.cli_xen_ending import exit_code_of
from manager.config import InstanceConfig
from manager.errors import ConfigurationError, ConflictError
from manager.notify import notify
from manager.xen_backend_identity import identify
from manager.xen_backend_others import Others
from manager.xen_instance_guest import ANY, GuestBinder
from manager.xen_instance_life import Life, LifeSettings
from manager.xen_instance_uplink import Uplink

_log = logging.getLogger("vtpm.xen.instance")
SYSTEM_CONFIG: Final = Path("/etc/vtpm-xen-instance.toml")
RUNTIME_DIR: Final = Path("/run/vtpm-xen-instance")
READY: Final = "ready"
NOBODY: Final = 65_534  # a user that owns nothing here
_LONGEST_RUNTIME: Final = 107 - len("/keeper.sock")  # bytes of a socket's path (unix(7))
_MOST_UID: Final = 2**31 - 1
_LEVELS: Final = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line and the configuration file say; `image` is all that has no default."""

    image: Path
    guest: str = ANY
    uuid: UUID | None = None
    device: int | None = None
    uid: int = NOBODY
    runtime_dir: Path = RUNTIME_DIR
    xenstore: str | None = None
    log_level: str = "info"


@dataclass(frozen=True, slots=True)
class Interfaces:
    """How to open this kernel's Xen devices, and xenstore; the tests' simulation brings its own."""

    open_xenstore: Callable[[str | None], AbstractAsyncContextManager[Xenstore]] = open_xenstore
    open_channels: Callable[[], EventChannels] = DeviceEventChannels.open
    open_offers: Callable[[], GrantOffers] = DeviceGrantOffers.open
    kernel: Kernel = field(default_factory=lambda: Kernel(DeviceEventChannels.open, DeviceGrants.open))


@whole
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""

    def work() -> int:
        settings = read_settings(argv)
        logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
        trio.run(_run, settings)
        return int(ExitCode.OK)

    return exit_code_of("vtpm-xen-instance", work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vtpm-xen-instance",
        description="Runs one vTPM in this Xen domain, for a guest, from a manager in another domain.",
    )
    add = parser.add_argument
    add("--config", type=place, metavar="FILE", help=f"TOML with the same words (default: {SYSTEM_CONFIG}, if there)")
    add("--image", metavar="PATH", help="the vTPM's state image: a file or block device; needed")
    add(
        "--guest",
        metavar="DOMAIN",
        help="the guest's name or number; 'any' (default): whichever the toolstack connects",
    )
    add("--uuid", metavar="UUID", help="the vTPM that this domain is for (default: the one the manager hands out)")
    add("--device", type=int, metavar="N", help="this domain's vtpm device (default: the one that has a back end)")
    add("--uid", type=int, metavar="UID", help="the user that the vTPM runs as (default 65534; 0: this program's own)")
    add("--runtime-dir", metavar="DIR", help=f"where its sockets are (default {RUNTIME_DIR})")
    add("--xenstore", metavar="PATH", help="a socket or device (default: xenstored's socket, else /dev/xen/xenbus)")
    add("--log-level", choices=_LEVELS, help="(default info)")
    return parser


def read_settings(argv: Sequence[str] | None) -> Settings:
    """Return what the command line says, and the configuration file where that says nothing.

    Raises:
        ConfigurationError: a word is not known, or means nothing.

    """
    options = {key: value for key, value in vars(parsed(_parser(), argv)).items() if value is not None}
    path = options.pop("config", None)
    words = _read_file(path or SYSTEM_CONFIG, needed=path is not None) | options
    known = Settings.__dataclass_fields__
    if unknown := sorted(set(words) - set(known)):
        raise ConfigurationError(f"unknown word {unknown[0]!r}; known: {', '.join(known)}")
    if "image" not in words:
        raise ConfigurationError("--image PATH is needed: where the vTPM's state is, or is to be")
    try:
        return _settings(words)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"the settings mean nothing: {error}") from error


def _read_file(path: Path, *, needed: bool) -> dict[str, Any]:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if not needed:
            return {}
        raise ConfigurationError(f"{path} is not there") from error
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    return {key.replace("-", "_"): value for key, value in tree.items()}


def _settings(words: dict[str, Any]) -> Settings:
    made = Settings(
        image=Path(words["image"]).absolute(),
        guest=str(words.get("guest", ANY)),
        uuid=UUID(words["uuid"]) if "uuid" in words else None,
        device=_number(words, "device", 0, 0xFFFF) if "device" in words else None,
        uid=_number(words, "uid", NOBODY, _MOST_UID),
        runtime_dir=Path(words.get("runtime_dir", RUNTIME_DIR)).absolute(),
        xenstore=words.get("xenstore"),
        log_level=str(words.get("log_level", "info")),
    )
    if not words["image"]:
        raise ValueError("image is a path, and it is empty")
    if not made.guest.strip():
        raise ValueError(f"guest {made.guest!r} names no domain: write its number, its name, or {ANY}")
    if made.log_level not in _LEVELS:
        raise ValueError(f"log_level is one of {', '.join(_LEVELS)}")
    if len(os.fsencode(made.runtime_dir)) > _LONGEST_RUNTIME:
        raise ValueError(f"runtime_dir is longer than {_LONGEST_RUNTIME} bytes: its sockets could not be reached")
    return made


def _number(words: dict[str, Any], name: str, default: int, most: int) -> int:
    value = words.get(name, default)
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name} is a number from 0 to {most}")
    return value


async def _run(settings: Settings) -> None:
    stop = trio.Event()

    async def until_told(task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            task_status.started()
            async for number in received:
                _log.info("%s: stopping the vTPM cleanly", signal.Signals(number).name)
                stop.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(until_told)
        await serve(settings, stop)
        nursery.cancel_scope.cancel()


async def serve(settings: Settings, stop: trio.Event, interfaces: Interfaces | None = None) -> None:
    """Be the domain's program until `stop` is set and the vTPM has stopped.

    Raises:
        ManagerError, XenError: see `Life.run`, `confinement.connect`; what is acknowledged is durable.

    """
    xen = interfaces or Interfaces()
    with ExitStack() as opened:
        opened.callback(os.close, _claim(settings.runtime_dir))
        ledgers = Ledgers(settings.runtime_dir / "xen")
        channels = xen.open_channels()
        opened.callback(channels.close)
        offers = xen.open_offers()
        opened.callback(offers.close)
        async with xen.open_xenstore(settings.xenstore) as xs:
            path = device_path(await xs.own_domain(), settings.device or 0)
            front = XenFront(xs, channels, offers, path, follows=settings.device is None)
            await _serve(settings, stop, xs, front, lambda binder: BackEnds(xs, binder, xen.kernel, ledgers))


async def _serve(
    settings: Settings, stop: trio.Event, xs: Xenstore, front: XenFront, back_end: Callable[[GuestBinder], BackEnds]
) -> None:
    config = InstanceConfig()
    keeper, found = await confinement.connect(settings.runtime_dir / "keeper.sock", config)
    for feature in () if found is None else found.features:
        if not feature.active:
            _log.warning("the vTPM is not shut in by %s: %s", feature.name, feature.why)
    life = Life(
        LifeSettings(settings.image, settings.runtime_dir, settings.uuid, settings.uid), Uplink(front), keeper, config
    )
    front.on_wish, front.on_change, life.on_ready = life.on_wish, life.on_wish, _say_ready
    who = functools.partial(identify, xs)
    binder = GuestBinder(life, settings.guest, settings.runtime_dir, who, Others(xs))
    back_ends = back_end(binder)

    async def until_stopped() -> None:
        await stop.wait()
        notify("STOPPING=1")
        await back_ends.leave()
        await life.stop()

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(front.run)
            await nursery.start(back_ends.run)
            nursery.start_soon(until_stopped)
            await life.run()
            nursery.cancel_scope.cancel()
    finally:
        if life.alive:  # we fail, it need not: the keeper keeps it for the next one of us
            keeper.close()
        else:
            with trio.CancelScope(shield=True):
                await confinement.end(keeper)


def _say_ready() -> None:
    _log.info("%s: the vTPM answers", READY)
    notify("READY=1")


def _claim(directory: Path) -> int:
    """Make the runtime directory, ours alone, and keep others like us away until the descriptor is closed.

    Raises:
        ConflictError: another one runs here. ConfigurationError: the directory cannot be used.

    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigurationError(f"{directory} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConflictError(f"another vtpm-xen-instance runs here: it has {directory}/lock") from error
    return descriptor


if __name__ == "__main__":
    sys.exit(main())
