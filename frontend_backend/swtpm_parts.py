"""What swtpm's options with sub-options mean, but for the two channels: one function for each. Pure.

Source: swtpm's common.c; reference/swtpm-libtpms-qemu.md 3.1.
"""

from collections.abc import Mapping
from typing import Final

from frontend_backend.swtpm_records import (
    Flags,
    KeySource,
    Localities,
    LogTarget,
    Migration,
    PcapTarget,
    PidTarget,
    ProfileSource,
    StatePlace,
)
from frontend_backend.swtpm_suboptions import Kinds, OptionError, sub_options, text_of, whole, yes

_KEY_SIZES: Final = {"aes-cbc": 16, "aes-128-cbc": 16, "aes-256-cbc": 32}  # bytes
_LOG: Final[Kinds] = {"file": "str", "fd": "int", "level": "uint", "prefix": "str", "truncate": "bool"}
_KEY: Final[Kinds] = {
    **dict.fromkeys(("file", "mode", "format", "pwdfile", "kdf"), "str"),
    **dict.fromkeys(("fd", "pwdfd"), "int"),
    "remove": "bool",
}
_PID: Final[Kinds] = {"file": "str", "fd": "int"}
_STATE: Final[Kinds] = {
    **dict.fromkeys(("dir", "backend-uri"), "str"),
    **dict.fromkeys(("lock", "backup", "fsync"), "bool"),
    "mode": "mode",
}
_STARTUPS: Final = ("clear", "state", "deactivated", "none")  # the first that is there counts, in this order
_LOCALITY: Final[Kinds] = dict.fromkeys(("reject-locality-4", "allow-set-locality"), "bool")
_FLAGS: Final[Kinds] = dict.fromkeys(
    ("not-need-init", *(f"startup-{kind}" for kind in _STARTUPS), "disable-auto-shutdown"), "bool"
)
_MIGRATION: Final[Kinds] = dict.fromkeys(("incoming", "release-lock-outgoing"), "bool")
_PROFILE: Final[Kinds] = {**dict.fromkeys(("name", "profile", "file", "remove-disabled"), "str"), "fd": "int"}
_PCAP: Final[Kinds] = {"file": "str", "mode": "mode", "fd": "int", "truncate": "bool", "checksums": "bool"}


def log_target(text: str | None) -> LogTarget:
    """Return --log; with a file or descriptor level 0 is 1, as swtpm has it."""
    if text is None:
        return LogTarget()
    values = sub_options(text, _LOG, "logging")
    level = whole(values, "level") or 1
    return LogTarget(
        text_of(values, "file"), whole(values, "fd"), level, text_of(values, "prefix"), yes(values, "truncate")
    )


def key_source(text: str | None) -> KeySource | None:
    """Return --key or --migration-key."""
    if text is None:
        return None
    values = sub_options(text, _KEY, "key")
    file, descriptor = text_of(values, "file"), whole(values, "fd")
    password_file, password_descriptor = text_of(values, "pwdfile"), whole(values, "pwdfd")
    if file is None and descriptor is None and password_file is None and password_descriptor is None:
        raise OptionError("Either file=, fd=, pwdfile=, or pwdfd= is required for key option")
    key_format, mode, kdf = values.get("format", "hex"), values.get("mode", "aes-128-cbc"), values.get("kdf", "pbkdf2")
    if key_format not in ("hex", "binary"):
        raise OptionError(f"Unknown key format '{key_format}'.")
    if mode not in _KEY_SIZES:
        raise OptionError(f"Unknown encryption mode '{mode}'.")
    is_password = file is None and descriptor is None
    if is_password and kdf not in ("pbkdf2", "sha512"):
        raise OptionError(f"Unknown kdf '{kdf}'.")
    return KeySource(
        file=password_file if is_password else file,
        descriptor=password_descriptor if is_password else descriptor,
        password=is_password,
        size=_KEY_SIZES[str(mode)],
        format=str(key_format),
        kdf=str(kdf),
        remove=yes(values, "remove"),
    )


def pid_target(text: str | None) -> PidTarget | None:
    """Return --pid."""
    if text is None:
        return None
    values = sub_options(text, _PID, "pid")
    target = PidTarget(text_of(values, "file"), whole(values, "fd"))
    if target.file is None and target.descriptor is None:
        raise OptionError("The file or fd parameter is required for the pid option.")
    return target


def state_place(text: str | None, environment: Mapping[str, str]) -> StatePlace | None:
    """Return --tpmstate, or TPM_PATH of the environment, or None."""
    if text is None:
        path = environment.get("TPM_PATH")
        return StatePlace(path, is_directory=True) if path else None
    values = sub_options(text, _STATE, "tpmstate")
    directory, uri = text_of(values, "dir"), text_of(values, "backend-uri")
    is_directory = True
    if directory is not None:
        path = directory
    elif uri is None:
        raise OptionError("The dir or backend-uri parameters is required for the tpmstate option.")
    elif uri.startswith("dir://"):
        path = uri.removeprefix("dir://")
    elif uri.startswith("file://"):
        path, is_directory = uri.removeprefix("file://"), False
    else:
        raise OptionError(f"SWTPM_NVRAM_Init: Unsupported backend '{uri}'.")
    lock = values.get("lock")
    return StatePlace(
        path=path,
        is_directory=is_directory,
        mode=whole(values, "mode"),
        lock=None if lock is None else lock is True,
        backup=yes(values, "backup"),
        fsync=values.get("fsync", True) is True,
    )


def localities(text: str | None) -> Localities:
    """Return --locality."""
    values = {} if text is None else sub_options(text, _LOCALITY, "locality")
    return Localities(
        reject_locality_4=yes(values, "reject-locality-4"), allow_set_locality=yes(values, "allow-set-locality")
    )


def flags(text: str | None) -> Flags:
    """Return --flags."""
    values = {} if text is None else sub_options(text, _FLAGS, "flags")
    startup = next((kind for kind in _STARTUPS if yes(values, f"startup-{kind}")), None)
    started = startup is not None and startup != "none"
    return Flags(
        need_init=not yes(values, "not-need-init") and not started,
        startup=startup,
        auto_shutdown=not yes(values, "disable-auto-shutdown"),
    )


def seccomp_action(text: str | None) -> str:
    """Return --seccomp: none, log or kill."""
    action = "kill" if text is None else sub_options(text, {"action": "str"}, "seccomp").get("action", "kill")
    if action not in ("none", "log", "kill"):
        raise OptionError(f"Unsupported seccomp log action {action}")
    return str(action)


def migration(text: str | None) -> Migration:
    """Return --migration."""
    values = {} if text is None else sub_options(text, _MIGRATION, "migration")
    return Migration(incoming=yes(values, "incoming"), release_lock_outgoing=yes(values, "release-lock-outgoing"))


def profile_source(text: str | None) -> ProfileSource | None:
    """Return --profile."""
    if text is None:
        return None
    values = sub_options(text, _PROFILE, "profile")
    named = [name for name in ("name", "profile", "file", "fd") if name in values]
    if len(named) > 1:
        raise OptionError("Only one profile option parameter of 'profile', 'name', 'fd', or 'file' may be provided")
    if not named:
        raise OptionError("No profile option parameter given to get a profile")
    remove = text_of(values, "remove-disabled")
    if remove not in (None, "check", "fips-host"):
        raise OptionError(f"Invalid option parameter '{remove}' for 'remove-disabled'")
    name, own = text_of(values, "name"), text_of(values, "profile")
    content = own.strip() if own is not None else None if name is None else f'{{"Name":"{name}"}}'
    return ProfileSource(content, text_of(values, "file"), whole(values, "fd"), remove)


def pcap_target(text: str | None) -> PcapTarget | None:
    """Return --pcap."""
    if text is None:
        return None
    values = sub_options(text, _PCAP, "pcap")
    target = PcapTarget(
        text_of(values, "file"),
        whole(values, "fd"),
        0o640 if (mode := whole(values, "mode")) is None else mode,
        yes(values, "truncate"),
        yes(values, "checksums"),
    )
    if target.file is None and target.descriptor is None:
        raise OptionError("Could not open pcap file for writing: neither file nor fd was given")
    return target
