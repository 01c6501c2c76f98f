"""`vtpm-manager restore`: unpacks a whole backup into an empty state directory. Opens no TPM and judges no age.

Whether the hardware TPM takes the restored store for the newest is the rollback rule's business, at `run`.
"""

import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from manager import restoring
from manager.backup import FORMAT, MANIFEST, REQUIRED, STORE
from manager.durable import sync_directory
from manager.errors import ConflictError, IntegrityError, ManagerError, NotFoundError, refused_by_system
from manager.restore_catalogue import catalogue_in_place

_log = logging.getLogger("vtpm.restore")
_MAX_MANIFEST: Final = 256 * 1024 * 1024  # 1,000,000 members have about 130 bytes each
_PIECE: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Restored:
    """What was restored; `named` leads from a vTPM's UUID to where its state image, now in named/, has to be put."""

    store: str
    sequence: int
    vtpms: int
    state_images: int
    named: dict[str, str]


def restore(source: Path, state_dir: Path, catalogue: str | None = None) -> Restored:
    """Unpack the backup `source` into `state_dir`, which must be empty or not there; all of it, or nothing.

    What a restore that was cut short left there is taken away first: it can be repeated. `catalogue`: see
    `catalogue_in_place`.

    Raises:
        NotFoundError, DeniedError: no such file, or it may not be read. ConflictError: directory or database are not
        empty. IntegrityError: no backup, a part of one, or bytes that are not those that were written. ManagerError:
        the operating system refused.

    """
    if restoring.is_unfinished(state_dir):
        _log.warning("a restore into %s was cut short; what it left is taken away", state_dir)
        restoring.take_away(state_dir)
    if os.path.lexists(state_dir) and (not state_dir.is_dir() or any(state_dir.iterdir())):
        raise ConflictError(f"{state_dir} is not empty; nothing was changed. Restore into a new directory")
    try:
        file = open(source, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        refused = refused_by_system(error)
        raise type(refused)(f"{refused}; nothing was changed") from error
    try:
        with file, _all_or_nothing(state_dir):
            manifest = _unpack(file, state_dir)
            with catalogue_in_place(state_dir, catalogue):
                restoring.finish(state_dir)
    except FileNotFoundError as error:
        raise NotFoundError(f"{error.filename}: {error.strerror}; nothing was changed") from error
    except OSError as error:
        if os.path.lexists(state_dir / STORE):
            raise ManagerError(f"all is in {state_dir}, but whether it would survive a power cut: {error}") from error
        raise ManagerError(f"not restored: {error}; {state_dir} was left empty") from error
    images = sum(1 for name in manifest["members"] if name.endswith(".img") and name not in REQUIRED)
    return Restored(manifest["store"], manifest["sequence"], manifest["vtpms"], images, manifest["named"])


@contextmanager
def _all_or_nothing(state_dir: Path) -> Iterator[None]:
    """Make the directory; on any error take away what was put into it."""
    made = not state_dir.exists()
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        restoring.begin(state_dir)
        yield
    except BaseException:
        if restoring.is_unfinished(state_dir):  # else all of it is in place, only not yet known to be durable
            restoring.take_away(state_dir)
            if made:
                state_dir.rmdir()
        raise


def _unpack(file: IO[bytes], state_dir: Path) -> dict[str, Any]:
    """Write every member and compare it with the manifest, which is the last; returns the manifest."""
    found: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                if member.name == MANIFEST and member.isreg() and member.size <= _MAX_MANIFEST:
                    manifest = _manifest(_content(tar, member).read())
                    break
                if not member.isreg() or not restoring.MEMBER.fullmatch(member.name):
                    raise IntegrityError(f"no backup: '{member.name[:80]}' is in it; nothing was changed")
                found[member.name] = _write(_content(tar, member), _place(state_dir, member.name))
            else:
                raise IntegrityError("a part of a backup only: its manifest is missing; nothing was changed")
    except (tarfile.TarError, EOFError) as error:
        raise IntegrityError(f"no backup, or a part of one only: {error}; nothing was changed") from error
    members = manifest["members"]
    for name in sorted(REQUIRED.union(members)):
        if name not in members or found.get(name) != members[name]:
            raise IntegrityError(f"the backup's {name} is missing, or not what was backed up; nothing was changed")
    for name in found.keys() - members.keys():  # of vTPMs that were removed while the backup was made
        _place(state_dir, name).unlink()
    for folder in {_place(state_dir, name).parent for name in members}:
        sync_directory(folder)
    return manifest


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member)
    assert content is not None, "a regular file has content"
    return content


def _manifest(untrusted: bytes) -> dict[str, Any]:
    wanted = {"store": str, "sequence": int, "vtpms": int, "named": dict, "members": dict}
    try:
        manifest = json.loads(untrusted)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"the backup's manifest cannot be read: {error}; nothing was changed") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise IntegrityError(
            f"the backup is not of the form {FORMAT}; nothing was changed. Use the manager that wrote it"
        )
    if any(type(manifest.get(name)) is not kind for name, kind in wanted.items()):
        raise IntegrityError("the backup's manifest does not say what it must; nothing was changed")
    return manifest


def _place(state_dir: Path, name: str) -> Path:
    return state_dir / (restoring.UNFINISHED if name == STORE else name)


def _write(content: IO[bytes], path: Path) -> dict[str, Any]:
    """Write a member durably; returns what the manifest must say of it."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    digest, size = hashlib.sha256(), 0
    with open(descriptor, "wb") as file:
        while piece := content.read(_PIECE):
            digest.update(piece)
            size += file.write(piece)
        file.flush()
        os.fsync(descriptor)
    return {"bytes": size, "sha256": digest.hexdigest()}
