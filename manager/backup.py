"""A backup: one tar of store image, catalogue, configuration and state images, as they lie on the disk.

Format: the members below in any order, a later one of a name replacing an earlier one, then the manifest. The store and
the state images are encrypted and authenticated as they are; no key is in clear in any of them. Synchronous; who
calls it holds the locks.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from manager.errors import ManagerError
from manager.named_path import open_named
from storage.errors import StorageError
from storage.state_format import MAX_CHUNKS, image_bytes
from storage.state_image import StateImage
from storage.store_records import VtpmRecord

FORMAT: Final = "vtpm-backup/1"
MANIFEST: Final = "manifest.json"
STORE, CATALOGUE, CONFIG = "store.img", "catalogue.sqlite", "config.toml"
REQUIRED: Final = frozenset({STORE, CATALOGUE, CONFIG})
_PIECE: Final = 1024 * 1024
_LARGEST_IMAGE: Final = image_bytes(MAX_CHUNKS)  # what lies behind it on a device is not the image's


class BackupWriter:
    """Writes the members of a backup to a descriptor, which stays the caller's; `finish` makes it whole and durable."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._file = os.fdopen(os.dup(descriptor), "wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - see close
        self._members: dict[str, dict[str, Any]] = {}
        self._finished = False

    def close(self) -> None:
        """Free what is open; without `finish` the file is emptied, as a part of a backup is none."""
        with suppress(OSError):  # finished: nothing is left to be written; else what a full disk did not take
            self._file.close()
        if not self._finished:
            os.ftruncate(self._descriptor, 0)

    def add(self, name: str, content: bytes) -> None:
        """Add a member. Raises OSError."""
        self.add_pieces(name, len(content), [content])

    def add_file(self, name: str, descriptor: int, size: int) -> None:
        """Add the first `size` bytes of a file as a member.

        Raises:
            ManagerError: it is shorter. OSError: it cannot be read, or the backup not be written.

        """
        offsets = range(0, size, _PIECE)
        self.add_pieces(name, size, (os.pread(descriptor, min(_PIECE, size - offset), offset) for offset in offsets))

    def add_pieces(self, name: str, size: int, pieces: Iterable[bytes]) -> None:
        """Add a member that comes in pieces of `size` bytes together. Raises as `add_file`."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o600
        reader = _Hashed(pieces)
        try:
            self._tar.addfile(info, reader)
        except OSError as error:
            if error.errno is None:  # tarfile's own word for a file that ended too early
                raise ManagerError(f"{name} became shorter while it was read ({error}); no backup was made") from error
            raise
        self._members[name] = {"bytes": size, "sha256": reader.digest.hexdigest()}

    def drop(self, name: str) -> None:
        """Say that a member, if it is there, does not belong to the backup any more."""
        self._members.pop(name, None)

    def finish(self, about: dict[str, Any]) -> int:
        """Write the manifest, make all of it durable, return its size in bytes. Raises OSError."""
        manifest = {"format": FORMAT, **about, "members": self._members}
        content = json.dumps(manifest, indent=1).encode()
        info = tarfile.TarInfo(MANIFEST)
        info.size, info.mode = len(content), 0o600
        self._tar.addfile(info, io.BytesIO(content))
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._finished = True
        return self._file.tell()


class _Hashed(io.RawIOBase):
    """Pieces as a file to read from; hashes what passes."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        super().__init__()
        self.digest = hashlib.sha256()
        self._pieces, self._rest = iter(pieces), b""

    def read(self, size: int = -1) -> bytes:
        while not self._rest:
            piece = next(self._pieces, None)
            if not piece:
                return b""
            self._rest = piece
        given, self._rest = (self._rest, b"") if size < 0 else (self._rest[:size], self._rest[size:])
        self.digest.update(given)
        return given


def image_member(vtpm: UUID, named: bool) -> str:
    """Return the member of a state image: `named` ones lie where an administrator said, not in the state directory."""
    return f"{'named' if named else 'state'}/{vtpm}.img"


def copy_image(writer: BackupWriter, member: str, record: VtpmRecord, path: Path) -> bool:
    """Copy a state image, without its lock; tells whether the copy holds the state that `record` names.

    A save under way may tear the slot that is not live; the live one is not touched before its record is.

    Raises:
        FileNotFoundError: there is none. OSError: it cannot be read.

    """
    content = add_image(writer, member, path)
    scratch = os.memfd_create("vtpm-backup", os.MFD_CLOEXEC)
    try:
        with open(scratch, "wb", closefd=False) as file:
            file.write(content)
        with suppress(StorageError):  # damaged: it is kept as it is, and said to be
            return any(slot.digest == record.digest for slot in StateImage.open(scratch, record.uuid).describe())
        return False
    finally:
        os.close(scratch)


def add_image(writer: BackupWriter, member: str, path: Path) -> bytes:
    """Copy a state image as it is; returns its content. Raises as `copy_image`."""
    content = _read(path)
    writer.add(member, content)
    return content


def _read(path: Path) -> bytes:
    descriptor = open_named(path, os.O_RDONLY)
    with open(descriptor, "rb") as file:
        return file.read(_LARGEST_IMAGE)
