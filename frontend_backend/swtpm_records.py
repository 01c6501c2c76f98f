"""What swtpm's options with sub-options say, as records. Declarations only.

Source: swtpm's common.c; reference/swtpm-libtpms-qemu.md 3.1.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypedDict

LOOPBACK: Final = "127.0.0.1"
SOCKET_MODE: Final = 0o770


class Kind(StrEnum):
    """What an endpoint is."""

    UNIX = "unixio"
    TCP = "tcp"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a channel is served. Exactly one of `path`, `port`, `descriptor`, `connected` is not None.

    `descriptor` is a listening socket, `connected` one that has its client already. `terminate` ends the process with
    the control connection; `disconnect` ends a data connection after each answer. `uid` and `gid`: numbers or names.
    """

    kind: Kind
    path: str | None = None
    port: int | None = None
    descriptor: int | None = None
    connected: int | None = None
    address: str = LOOPBACK
    interface: str | None = None
    mode: int = SOCKET_MODE
    uid: int | str | None = None
    gid: int | str | None = None
    terminate: bool = False
    disconnect: bool = False


@dataclass(frozen=True, slots=True)
class KeySource:
    """Where a key comes from: a file or descriptor with the key (`size` bytes of it), or with a password."""

    file: str | None
    descriptor: int | None
    password: bool
    size: int
    format: str = "hex"
    kdf: str = "pbkdf2"
    remove: bool = False


@dataclass(frozen=True, slots=True)
class StatePlace:
    """Where the state is. `mode` None: 0640 under the umask; `lock` None: directories are locked, files are not."""

    path: str
    is_directory: bool
    mode: int | None = None
    lock: bool | None = None
    backup: bool = False
    fsync: bool = True


@dataclass(frozen=True, slots=True)
class LogTarget:
    """Where messages go: standard error, `file` ("-" for nowhere) or `descriptor`."""

    file: str | None = None
    descriptor: int | None = None
    level: int = 1
    prefix: str | None = None
    truncate: bool = False


@dataclass(frozen=True, slots=True)
class PidTarget:
    """Where the process's number is written."""

    file: str | None
    descriptor: int | None


@dataclass(frozen=True, slots=True)
class Flags:
    """What is done before anybody connects. `startup` is clear, state, deactivated, none, or None: not said."""

    need_init: bool = True
    startup: str | None = None
    auto_shutdown: bool = True


@dataclass(frozen=True, slots=True)
class ProfileSource:
    """A libtpms profile: the JSON text itself, or where it is read from."""

    text: str | None
    file: str | None
    descriptor: int | None
    remove_disabled: str | None


@dataclass(frozen=True, slots=True)
class PcapTarget:
    """Where TPM commands and answers are recorded."""

    file: str | None
    descriptor: int | None
    mode: int
    truncate: bool
    checksums: bool


@dataclass(frozen=True, slots=True)
class Manager:
    """`--manager[=SOCKET]`, `--vtpm VTPM`, `--guest NAME`: a managed vTPM; None is left to the managed command.

    `ignore_tpmstate`: --tpmstate is there, as libvirt always says it, and means nothing.
    """

    socket: str | None
    vtpm: str | None
    guest: str | None
    ignore_tpmstate: bool = False


class Localities(TypedDict):
    """The fields of --locality."""

    reject_locality_4: bool
    allow_set_locality: bool


class Migration(TypedDict):
    """The fields of --migration."""

    incoming: bool
    release_lock_outgoing: bool
