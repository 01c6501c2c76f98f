"""Removal of a folder that another user could write to.

He may have left anything there: folders a thousand deep, links to elsewhere, and he may still write in one that he has
open. So nothing here recurses or follows a link, and what is to be emptied becomes ours first.
"""

import errno
import os
from pathlib import Path
from typing import Final

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PRIVATE: Final = 0o700
_MOST: Final = 1_000_000  # names that are looked at, some ten seconds: he could add levels as fast as we take them


def remove_tree(path: Path) -> None:
    """Remove a folder and all that is in it, if it is there. The folder above it must be ours alone.

    Raises:
        OSError: it was not removed; what is left is ours, and nobody else can reach it.

    """
    try:
        top = _ours(str(path), None)
    except FileNotFoundError:
        return
    try:
        _empty(top)
    finally:
        os.close(top)
    path.rmdir()


def _empty(top: int) -> None:
    """Take everything away below `top`; the folders of a folder move up, so there are never more than two levels.

    They get names that their owner cannot have guessed.
    """
    seen = 0
    while names := os.listdir(top):
        for name in names:
            if _is_unlinked(name, top):
                continue
            folder = _ours(name, top)
            try:
                for inner in os.listdir(folder):
                    seen += 1
                    if not _is_unlinked(inner, folder):
                        os.close(_ours(inner, folder))  # it must be writable to move: its ".." changes
                        os.rename(inner, f"{seen}-{os.urandom(8).hex()}", src_dir_fd=folder, dst_dir_fd=top)
            finally:
                os.close(folder)
            os.rmdir(name, dir_fd=top)
        seen += len(names)
        if seen > _MOST:
            raise OSError(errno.E2BIG, "more is in it than anybody should have put there")


def _is_unlinked(name: str, above: int) -> bool:
    try:
        os.unlink(name, dir_fd=above)
    except IsADirectoryError:
        return False
    return True


def _ours(name: str, above: int | None) -> int:
    """Open a folder that nobody but us can add to from now on; the one above it is ours already."""
    os.chown(name, os.geteuid(), os.getegid(), dir_fd=above, follow_symlinks=False)
    os.chmod(name, _PRIVATE, dir_fd=above)
    return os.open(name, _FOLDER, dir_fd=above)
