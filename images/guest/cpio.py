"""The initramfs as the kernel wants it: a cpio archive in the format "newc", uncompressed.

Uncompressed is fastest under software emulation: loading 100 MB is a copy for the host, decompressing them is not.
Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Final

_MAGIC: Final = b"070701"
_TRAILER: Final = "TRAILER!!!"
_ALIGNMENT: Final = 4


def write_archive(tree: Path, target: BinaryIO) -> None:
    """Write everything below `tree`, owned by root, with its modes and times, links as links."""
    names = [Path(top) / name for top, folders, files in os.walk(tree) for name in (*folders, *files)]
    for number, path in enumerate(sorted(names), start=1):
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            _entry(target, number, str(path.relative_to(tree)), status, [os.readlink(path).encode()])
        elif stat.S_ISREG(status.st_mode):
            _entry(target, number, str(path.relative_to(tree)), status, [path.read_bytes()])
        else:
            _entry(target, number, str(path.relative_to(tree)), status, [])
    _entry(target, 0, _TRAILER, os.stat_result((0,) * 10), [])


def _entry(target: BinaryIO, inode: int, name: str, status: os.stat_result, content: Iterable[bytes]) -> None:
    body = b"".join(content)
    encoded = name.encode() + b"\0"
    fields = (inode, status.st_mode, 0, 0, 1, int(status.st_mtime), len(body), 0, 0, 0, 0, len(encoded), 0)
    head = _MAGIC + b"".join(b"%08x" % field for field in fields)
    target.write(_padded(head + encoded))
    target.write(_padded(body))


def _padded(part: bytes) -> bytes:
    return part + bytes(-len(part) % _ALIGNMENT)
