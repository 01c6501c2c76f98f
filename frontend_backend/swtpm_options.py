"""swtpm's command line, whole, as values. Pure: nothing is opened, looked up or checked against the system here.

Both commands that take swtpm's place parse with it: the one without a manager (vtpm_instance) and the managed one
(manager). Messages are swtpm's where swtpm has one, as scripts look for them.

Source: swtpm's swtpm.c, swtpm_chardev.c, common.c; reference/swtpm-libtpms-qemu.md 3.1.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from frontend_backend import swtpm_endpoints as endpoints
from frontend_backend import swtpm_parts as parts
from frontend_backend.swtpm_getopt import Options, getopt_long
from frontend_backend.swtpm_records import (
    Endpoint,
    Flags,
    KeySource,
    LogTarget,
    Manager,
    PcapTarget,
    PidTarget,
    ProfileSource,
    StatePlace,
)
from frontend_backend.swtpm_suboptions import OptionError

_NUMBER: Final = re.compile(r"\s*\+?(0[xX][0-9a-fA-F]+|[0-9]+)")
_PORTS: Final = 0x10000
_UINT: Final = 2**32
_STANDARD: Final = 3  # descriptors below are standard input, output and error


class Interface(StrEnum):
    """The first word of the command line."""

    SOCKET = "socket"
    CHARDEV = "chardev"


_EVERYWHERE: Final = {
    "daemon": "none",
    "help": "none",
    "fd": "needed",
    "runas": "needed",
    "chroot": "needed",
    "locality": "needed",
    "log": "needed",
    "key": "needed",
    "migration-key": "needed",
    "pid": "needed",
    "tpmstate": "needed",
    "ctrl": "needed",
    "flags": "needed",
    "tpm2": "none",
    "seccomp": "needed",
    "migration": "needed",
    "print-capabilities": "none",
    "print-states": "none",
    "print-profiles": "none",
    "print-info": "needed",
    "profile": "needed",
    "pcap": "needed",
    # not swtpm's: a vTPM of a manager in place of state files
    "manager": "maybe",
    "vtpm": "needed",
    "guest": "needed",
    "manager-ignore-tpmstate": "none",  # for libvirt, which always says --tpmstate
}
LONG: Final[Mapping[Interface, Mapping[str, str]]] = {
    Interface.SOCKET: {"port": "needed", "server": "needed", "terminate": "none", **_EVERYWHERE},
    Interface.CHARDEV: {"chardev": "needed", "vtpm-proxy": "none", **_EVERYWHERE},
}
_SHORT: Final = {"d": "daemon", "h": "help", "f": "fd", "r": "runas", "R": "chroot"}
SHORT: Final[Mapping[Interface, Mapping[str, str]]] = {
    Interface.SOCKET: {"p": "port", "t": "terminate", **_SHORT},
    Interface.CHARDEV: {"c": "chardev", **_SHORT},
}
# With a manager these are not for the caller to say: the manager has the state and its keys.
_NOT_MANAGED: Final = ("tpmstate", "key", "migration-key", "migration", "profile", "chroot", "print-states", "fd")
_IGNORE: Final = "manager-ignore-tpmstate"


@dataclass(frozen=True, slots=True)
class SwtpmOptions:
    """One command line. `server` is the data channel; `words` is what was parsed, for whoever runs it again."""

    interface: Interface
    words: tuple[str, ...]
    tpm2: bool = False
    state: StatePlace | None = None
    server: Endpoint | None = None
    control: Endpoint | None = None
    descriptor: int | None = None  # --fd: a connected socket or an open character device
    device: str | None = None
    vtpm_proxy: bool = False
    terminate: bool = False
    daemon: bool = False
    log: LogTarget = field(default_factory=LogTarget)
    key: KeySource | None = None
    migration_key: KeySource | None = None
    pid: PidTarget | None = None
    run_as: str | None = None
    chroot: str | None = None
    seccomp: str = "kill"
    flags: Flags = field(default_factory=Flags)
    reject_locality_4: bool = False
    allow_set_locality: bool = False
    incoming: bool = False
    release_lock_outgoing: bool = False
    profile: ProfileSource | None = None
    pcap: PcapTarget | None = None
    help: bool = False
    print_capabilities: bool = False
    print_states: bool = False
    print_profiles: bool = False
    print_info: int = 0
    manager: Manager | None = None


def parse(interface: Interface, words: Sequence[str], environment: Mapping[str, str]) -> SwtpmOptions:
    """Return what a command line says, `words` being what follows the interface.

    TPM_PATH and TPM_PORT of `environment` count where the command line names no state or port.

    Raises:
        OptionError: see there; the exit code is 1.

    """
    found, others = getopt_long(words, interface.value, LONG[interface], SHORT[interface])
    given = {name: value or "" for name, value in found}  # of an option that is there twice the last counts
    if "help" in given:
        return SwtpmOptions(interface, tuple(words), help=True)
    if others:
        raise OptionError(f"Unknown parameter '{others[0]}'")
    environment = dict(environment)
    descriptor = _descriptor(given.get("fd"))
    server = _server(found, environment)
    manager = _manager(given, found)
    options = SwtpmOptions(
        interface=interface,
        words=tuple(words),
        tpm2="tpm2" in given,
        descriptor=descriptor,
        device=given.get("chardev"),
        vtpm_proxy="vtpm-proxy" in given,
        terminate="terminate" in given or descriptor is not None,
        daemon="daemon" in given,
        run_as=given.get("runas"),
        chroot=given.get("chroot"),
        log=parts.log_target(given.get("log")),
        print_capabilities="print-capabilities" in given,
        control=endpoints.control(given.get("ctrl")),
        server=server,
        print_states="print-states" in given,
        print_profiles="print-profiles" in given,
        key=parts.key_source(given.get("key")),
        migration_key=parts.key_source(given.get("migration-key")),
        pid=parts.pid_target(given.get("pid")),
        **parts.localities(given.get("locality")),
        state=parts.state_place(given.get("tpmstate"), environment),
        seccomp=parts.seccomp_action(given.get("seccomp")),
        flags=_flags(given.get("flags"), proxy="vtpm-proxy" in given),
        **parts.migration(given.get("migration")),
        profile=parts.profile_source(given.get("profile")),
        pcap=parts.pcap_target(given.get("pcap")),
        print_info=_unsigned(given.get("print-info"), "Cannot parse info value '{}'."),
        manager=manager,
    )
    _check(options, given)
    return options


def _check(options: SwtpmOptions, given: Mapping[str, str]) -> None:
    if options.print_capabilities or options.print_profiles:
        return
    if options.print_states and "tpmstate" not in given:
        raise OptionError("Error: --tpmstate option is required for --print-states")
    if options.flags.startup == "deactivated" and options.tpm2:
        raise OptionError("Error: TPM 2 does not support startup deactivated")
    serves = not options.print_states and not options.print_info
    device = options.device is not None or options.descriptor is not None or options.vtpm_proxy
    if options.interface is Interface.CHARDEV and serves and not device:
        raise OptionError("Error: Missing character device or file descriptor")


def _manager(given: Mapping[str, str], found: Options) -> Manager | None:
    if "manager" not in given:
        stray = next((name for name in ("vtpm", "guest", _IGNORE) if name in given), None)
        if stray is not None:
            raise OptionError(f"Error: --{stray} goes with --manager only")
        return None
    ignored = {"tpmstate", "print-states"} if _IGNORE in given else set()
    refused = next((name for name, _ in found if name in _NOT_MANAGED and name not in ignored), None)
    if refused is not None:
        raise OptionError(
            f"Error: --{refused} does not go with --manager: the manager keeps the state, its key and its policy"
        )
    return Manager(given["manager"] or None, given.get("vtpm"), given.get("guest"), _IGNORE in given)


def _flags(text: str | None, *, proxy: bool) -> Flags:
    flags = parts.flags(text)
    if proxy and flags.startup is None:
        return Flags(need_init=False, startup="clear", auto_shutdown=flags.auto_shutdown)
    return flags


def _server(found: Options, environment: dict[str, str]) -> Endpoint | None:
    """Return the data channel that the last of --port and --server names; -p also says TPM_PORT, as swtpm has it."""
    text: str | None = None
    for name, value in found:
        if name == "port":
            port = _unsigned(value, "Cannot parse socket port number '{}'.")
            if port >= _PORTS:
                raise OptionError("Port is outside valid range.")
            environment["TPM_PORT"] = str(port)
            text = "type=tcp,disconnect"
        elif name == "server":
            text = value
    return endpoints.server(text, environment)


def _descriptor(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or int(text) >= _UINT:
        raise OptionError("Cannot parse socket file descriptor.")
    if int(text) < _STANDARD:
        raise OptionError("Error: Cannot accept file descriptors with values 0, 1, or 2")
    return int(text)


def _unsigned(text: str | None, message: str) -> int:
    """Return a number as strtoul reads it with base 0."""
    if text is None:
        return 0
    if not _NUMBER.fullmatch(text):
        raise OptionError(message.format(text))
    digits = text.strip().removeprefix("+")
    try:
        value = int(digits, 8 if digits.startswith("0") and digits[1:2].isdigit() else 0)
    except ValueError:
        raise OptionError(message.format(text)) from None
    if value >= _UINT:
        raise OptionError(message.format(text))
    return value
