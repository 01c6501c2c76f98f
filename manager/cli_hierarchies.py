"""`init`'s options for hierarchy passwords, and `vtpm-manager show-hierarchy-auth`. What they do: hierarchies."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

from frontend_backend.messages_admin import ExitCode
from manager.config import Config, Layout
from manager.verb_table import SCHEMA_VERSION

_NAMES = ("owner", "endorsement", "lockout")
MakeVerb = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def add_init_options(init: argparse.ArgumentParser) -> None:
    """Add what `init` takes."""
    init.add_argument(
        "--set-hierarchy-auth",
        action="store_true",
        help="set the hardware TPM's owner, endorsement and lockout passwords; kept in the escrow",
    )
    for name in _NAMES:
        init.add_argument(
            f"--{name}-auth-file", metavar="FILE", help=f"the {name} hierarchy's password, where it has one"
        )


def given_auths(options: argparse.Namespace) -> dict[str, bytes]:
    """Return the passwords that files were named for, by hierarchy. Raises UsageError."""
    from manager.hierarchies import read_auth  # noqa: PLC0415 - --help should not load the TPM's libraries

    named = {name: getattr(options, f"{name}_auth_file") for name in _NAMES}
    return {name: read_auth(path) for name, path in named.items() if path}


def add_verb(verb: MakeVerb, layout: Callable[[argparse.Namespace], Layout], config: Callable[..., Config]) -> None:
    """Add `show-hierarchy-auth` to the parser that `verb` adds to."""

    def call(options: argparse.Namespace) -> int:
        return _show(options, layout(options), lambda: config(options, layout(options)))

    made = verb("show-hierarchy-auth", call, "tell the hardware TPM's hierarchy passwords from the escrow")
    made.add_argument("--key", required=True, metavar="FILE", help="the recovery key")
    made.add_argument("--passphrase-file", metavar="FILE", help="passphrase of the recovery key")
    made.add_argument(
        "--complete", action="store_true", help="set those of ours that the TPM has not: an init was cut at its end"
    )
    made.add_argument("--json", dest="form", action="store_const", const="json", help="one JSON document")


def _show(options: argparse.Namespace, layout: Layout, config: Callable[[], Config]) -> int:
    from manager import hierarchies  # noqa: PLC0415 - as above
    from manager.opening import read_boot_area  # noqa: PLC0415
    from manager.recovery import complete_hierarchies  # noqa: PLC0415
    from manager.recovery_key import RecoveryPrivate, read_passphrase  # noqa: PLC0415

    passphrase = read_passphrase(options.passphrase_file) if options.passphrase_file else None
    key = RecoveryPrivate.load(options.key, passphrase)
    descriptor = os.open(_store_of(layout), os.O_RDONLY | os.O_CLOEXEC)
    try:
        store, boot = read_boot_area(descriptor)
    finally:
        os.close(descriptor)
    kept, completed = complete_hierarchies(layout, config(), key) if options.complete else (boot.hierarchies, [])
    auths, made = hierarchies.open_escrow(kept, key, store), hierarchies.made_of(kept)
    if options.form == "json":
        document = {"schema": SCHEMA_VERSION, "store": str(store), "completed": completed}
        print(json.dumps(document | {f"{name}_auth": auth.hex() for name, auth in auths.items()}, indent=2))
    else:
        for name, auth in auths.items():
            whose = "made by init" if name in made else "given to init"
            print(f"{name + ':':13}hex:{auth.hex()}  ({whose})")
        for done in completed:
            print(f"set the {done} password")
    return int(ExitCode.OK)


def _store_of(layout: Layout) -> Path:
    """Return the store, or the one that an interrupted init left. Raises NotFoundError."""
    from manager.errors import NotFoundError  # noqa: PLC0415 - as above
    from manager.store_place import unfinished_store  # noqa: PLC0415

    for path in (layout.store, unfinished_store(layout)):
        if path.exists():
            return path
    raise NotFoundError(f"there is no store at {layout.store}: name the right --state-dir")
