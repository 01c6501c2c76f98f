"""The configuration: TOML in, frozen dataclasses out. The only reader of configuration files.

An unknown key is an error: a misspelt safeguard must not be silently absent.
"""

import dataclasses
import json
import math
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from manager.config_ranges import out_of_range
from manager.errors import ConfigurationError, DeniedError

SYSTEM_CONFIG: Final = Path("/etc/vtpm-manager/config.toml")
SYSTEM_STATE_DIR: Final = Path("/var/lib/vtpm-manager")
SYSTEM_RUNTIME_DIR: Final = Path("/run/vtpm-manager")
CONFIG_NAME: Final = "config.toml"

# sun_path has 108 bytes with its NUL (unix(7)); what we append to the runtime directory must fit behind it
_LONGEST_TAIL: Final = len("/vtpm/00000000-0000-0000-0000-000000000000/swtpm.sock.ctrl")
_MOST_INTEGER: Final = 2**63 - 1
MAX_RUNTIME_DIR: Final = 107 - _LONGEST_TAIL


@dataclass(frozen=True, slots=True)
class TpmConfig:
    """The hardware TPM: how to reach it, at which locality, which PCRs the keys are bound to."""

    tcti: str = "embedded"
    locality: int = 2
    pcrs: str = "sha256:0,2,7"
    srk_name: str = ""  # hex; pinned here at init, so that a salted session is salted to the right key
    store_check: str = ""  # hex; pinned here at init, so that no other store is taken for ours
    busy_seconds: float = 30.0  # how long a busy TPM is waited for


@dataclass(frozen=True, slots=True)
class AnchorConfig:
    """Rollback protection between key events: durable anchor every `interval_seconds`, or at each group commit."""

    strict: bool = False
    interval_seconds: float = 3600.0  # flash wear: docs/threat-model.md


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """The store image: the size below which `compact` does not cut it, and how long removed vTPMs are remembered."""

    size: int = 2 * 1024 * 1024  # what `init --store-size` said
    tombstone_days: float = 30.0


@dataclass(frozen=True, slots=True)
class InstanceConfig:
    """Instances: their user ids (base + a number per vTPM; base 0 keeps the manager's) and deadlines in seconds."""

    uid_base: int = 1_879_048_192  # above systemd's container ranges (uids-gids.md), below 2^31
    commit_timeout: float = 90.0  # xen-tpmfront and tpm_tis give up after 120 s
    start_timeout: float = 20.0
    stop_timeout: float = 60.0
    restarts: int = 5  # crashes within restart_seconds before an attached vTPM is left down
    restart_seconds: float = 60.0
    spawn: str = "fork"  # "exec": each instance has an address layout of its own
    seccomp: str = "kill"  # what a system call does that an instance must not make: "kill", "errno", "log"
    per_keeper: int = 0  # vTPMs that one keeper has at most, and that end with it; 0: as its descriptors allow
    hibernate_after: float = 600.0  # seconds without a command; 0: never
    require: tuple[str, ...] = ()  # what must shut instances in (messages_keeper.FEATURES), or nothing starts


@dataclass(frozen=True, slots=True)
class QuotaConfig:
    """What may be used up, beside what the machine has; 0 is no limit of ours."""

    vtpms_per_group: int = 0
    running: int = 0  # vTPMs that run at once
    commands_per_second: int = 0  # of a vTPM whose attachment says nothing else; these three are kept with it
    saves_per_second: int = 0
    nv_bytes: int = 0


@dataclass(frozen=True, slots=True)
class AdminConfig:
    """Who may do what on the admin socket, beside root and the manager's own user (administrators)."""

    socket_mode: str = "0660"
    socket_group: str = ""
    operator_uids: tuple[int, ...] = ()
    auditor_uids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AttestationConfig:
    """Quotes: which PCRs of the hardware TPM stand in them."""

    pcrs: str = "sha256:0-7"


@dataclass(frozen=True, slots=True)
class MigrationConfig:
    """Where other managers reach this one: unix:/PATH, tcp:PORT (loopback), tcp:HOST:PORT; empty: nowhere."""

    listen: str = ""


@dataclass(frozen=True, slots=True)
class CatalogueConfig:
    """Names, labels, attachments and events: in which database, and how long events are kept."""

    url: str = field(default="", repr=False)  # it may have a password; empty: the file in the state directory
    events_kept: int = 100_000
    events_days: int = 400


@dataclass(frozen=True, slots=True)
class Config:
    """Everything a configuration file may say."""

    tpm: TpmConfig = field(default_factory=TpmConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    instance: InstanceConfig = field(default_factory=InstanceConfig)
    admin: AdminConfig = field(default_factory=AdminConfig)
    catalogue: CatalogueConfig = field(default_factory=CatalogueConfig)
    quota: QuotaConfig = field(default_factory=QuotaConfig)
    attestation: AttestationConfig = field(default_factory=AttestationConfig)
    migration: MigrationConfig = field(default_factory=MigrationConfig)

    @classmethod
    def load(cls, path: Path) -> "Config":
        """Read a file.

        Raises:
            ConfigurationError: unreadable, not TOML, or with a key or value that is not known.

        """
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except PermissionError as error:
            raise DeniedError(
                f"cannot read {path}: {error.strerror}. Nothing was done: only the manager's own user and root may"
            ) from error
        except OSError as error:
            raise ConfigurationError(
                f"cannot read {path}: {error.strerror}; run 'vtpm-manager init' first, or name the right --state-dir"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"{path} is not TOML: {error}") from error
        return cls.from_tree(tree, str(path))

    @classmethod
    def from_tree(cls, tree: dict[str, Any], where: str) -> "Config":
        """Check a parsed tree; raises ConfigurationError."""
        sections: dict[str, type] = typing.get_type_hints(cls)
        values = {}
        for name, content in tree.items():
            if name not in sections or not isinstance(content, dict):
                raise ConfigurationError(f"{where}: unknown section [{name}]; known: {', '.join(sections)}")
            values[name] = _section(sections[name], name, content, f"{where}: [{name}]")
        return cls(**values)

    def to_toml(self) -> str:
        """Return the text of a file that loads to this configuration."""
        lines = ["# vtpm-manager; every key is described in docs/configuration.md"]
        for section in dataclasses.fields(self):
            lines += ["", f"[{section.name}]"]
            content = getattr(self, section.name)
            lines += [f"{key.name} = {_toml_value(getattr(content, key.name))}" for key in dataclasses.fields(content)]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies; see docs/architecture.md."""

    state_dir: Path
    runtime_dir: Path

    @property
    def config(self) -> Path:
        """The configuration that `init` wrote."""
        return self.state_dir / CONFIG_NAME

    @property
    def store(self) -> Path:
        """The store image; may be a link to a block device."""
        return self.state_dir / "store.img"

    @property
    def catalogue(self) -> Path:
        """The catalogue's database."""
        return self.state_dir / "catalogue.sqlite"  # unless the configuration names a database: catalogue_place

    @property
    def embedded_tpm(self) -> Path:
        """The embedded hardware TPM's own directory."""
        return self.state_dir / "embedded-tpm"

    @property
    def state_images(self) -> Path:
        """The directory of state images that no --state-image named."""
        return self.state_dir / "state"

    @property
    def xen_socket(self) -> Path:
        """Where vtpm-xen asks which domain may have which vTPM."""
        return self.runtime_dir / "xen.sock"

    @property
    def admin_socket(self) -> Path:
        """The administrators' socket."""
        return self.runtime_dir / "admin.sock"

    @property
    def keeper_socket(self) -> Path:
        """Where the keeper listens for the manager."""
        return self.runtime_dir / "keeper.sock"

    @property
    def sockets(self) -> Path:
        """The directory with one folder of sockets per attached vTPM."""
        return self.runtime_dir / "vtpm"

    def check(self) -> None:
        """Refuse a runtime directory whose sockets could not be named.

        Raises:
            ConfigurationError: its path is too long.

        """
        length = len(str(self.runtime_dir).encode())
        if length > MAX_RUNTIME_DIR:
            raise ConfigurationError(
                f"the runtime directory {self.runtime_dir} has {length} bytes; a Unix socket's path has at most 107, "
                f"so it may have {MAX_RUNTIME_DIR}: choose a shorter --runtime-dir"
            )


def _section(kind: type, name: str, content: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    for key, value in content.items():
        if key not in hints:
            raise ConfigurationError(f"{where}: unknown key '{key}'; known: {', '.join(hints)}")
        content[key] = _value(value, hints[key], f"{where} {key}")
        if problem := out_of_range(name, key, content[key]):
            raise ConfigurationError(f"{where} {key}: {problem}")
    return kind(**content)


def _value(value: Any, wanted: Any, where: str) -> Any:
    if type(value) is int and abs(value) > _MOST_INTEGER:
        raise ConfigurationError(f"{where}: a number that long cannot be: TOML's have 64 bits")
    if wanted is float and type(value) is int:
        return float(value)
    if typing.get_origin(wanted) is tuple:
        kind = typing.get_args(wanted)[0]
        if isinstance(value, list) and all(type(item) is kind for item in value):
            return tuple(value)
        raise ConfigurationError(f"{where}: {value!r} where a list of {'numbers' if kind is int else 'words'} is due")
    if type(value) is not wanted:
        raise ConfigurationError(f"{where}: {value!r} where {wanted.__name__} is due")
    return value


def _toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return json.dumps(list(value))
    if value == math.inf:
        return "inf"
    return json.dumps(value)  # strings, numbers and truth values are written alike in JSON and TOML
