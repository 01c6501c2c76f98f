"""A restore that has not ended: how it is known, and how what it left is taken away.

Until everything else is in place and durable, the store has another name. It gets that name first of all, so while it
is there and the store is not, whatever else lies in the state directory was put there by a restore.
"""

import os
import re
from pathlib import Path
from typing import Final

from manager.durable import sync_directory
from manager.errors import ConflictError

_STORE: Final = "store.img"  # as in manager.config.Layout and in a backup
UNFINISHED: Final = f"{_STORE}.restoring"
FOLDERS: Final = ("state", "named")
_UUID: Final = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_FILES: Final = r"config\.toml|catalogue\.sqlite|store\.img|migration-[01]\.sealed"
MEMBER: Final = re.compile(rf"{_FILES}|(?:{'|'.join(FOLDERS)})/{_UUID}\.img")

_CONFIG_BEING_WRITTEN: Final = "config.new"


def is_unfinished(state_dir: Path) -> bool:
    """Tell whether a restore into this directory was cut short."""
    return os.path.lexists(state_dir / UNFINISHED) and not os.path.lexists(state_dir / _STORE)


def begin(state_dir: Path) -> None:
    """Say durably that a restore has begun, in a directory that is there and empty. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    os.close(os.open(state_dir / UNFINISHED, flags, 0o600))
    sync_directory(state_dir)
    sync_directory(state_dir.parent)


def finish(state_dir: Path) -> None:
    """Put the store in place, durably, when everything else is. Raises OSError."""
    sync_directory(state_dir)
    (state_dir / UNFINISHED).rename(state_dir / _STORE)
    sync_directory(state_dir)


def take_away(state_dir: Path) -> None:
    """Remove what a restore puts into its directory, and nothing else; what says that it began goes last.

    Raises OSError, also where something else is in one of its folders.
    """
    for name in FOLDERS:
        folder = state_dir / name
        if folder.is_dir():
            for entry in folder.iterdir():
                if MEMBER.fullmatch(f"{name}/{entry.name}"):
                    entry.unlink()
            folder.rmdir()
    for entry in state_dir.iterdir():
        if MEMBER.fullmatch(entry.name) or entry.name == _CONFIG_BEING_WRITTEN:
            entry.unlink()
    sync_directory(state_dir)
    (state_dir / UNFINISHED).unlink(missing_ok=True)
    sync_directory(state_dir)


def refuse_unfinished(state_dir: Path) -> None:
    """Refuse to use a state directory into which a restore was cut short.

    Raises:
        ConflictError: it is one; says what to do.

    """
    if is_unfinished(state_dir):
        raise ConflictError(
            f"a restore into {state_dir} was cut short, so not all of the backup is there. Nothing was changed. Run "
            f"'vtpm-manager restore' again with the same --state-dir: it begins anew"
        )
