"""The commands' part of `vtpm-import` and `vtpm-export`: swtpm's files are read and written with their user's rights.

The state travels to and from the manager in memory that has no name (memfd), never in a message or a file. The source
of an import stays locked until the manager has answered; the lock of an export's directory is held while it is written.
"""

import argparse
import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any, Final

from manager.errors import ConflictError, DeniedError, IntegrityError, ManagerError, NotFoundError, UsageError
from storage import swtpm_blob
from storage.errors import StorageError
from storage.state_format import Blobs, pack_blobs, unpack_blobs
from storage.swtpm_crypto import MODES, Kdf, KeyFormat, SwtpmKey, key_of_file, key_of_password
from storage.swtpm_directory import LOCK_FILE
from storage.swtpm_errors import SwtpmDiskError, SwtpmKeyUnusable, SwtpmLocked
from storage.swtpm_files import PERMANENT, SwtpmFiles, Where, open_files

Answer = Generator[dict[str, Any]]
MAGIC: Final = bytes.fromhex(
    "ab364723"
)  # in a TPM 2.0's permanent state, after two bytes of version (libtpms, NVMarshal)
_TPM12_BEGINS: Final = bytes.fromhex("0001")  # TPM_TAG_NVSTATE_V1 (libtpms, TPM_PermanentAll_Store)
SAVED: Final = "savestate"
_STATE_FILES: Final = ("tpm2-00.", "tpm-00.")
_KEY_BYTES: Final = 64 * 1024
_FAMILIES: Final = {True: "2.0", False: "1.2"}


@contextmanager
def prepared(
    verb: str, options: argparse.Namespace, arguments: dict[str, Any], descriptors: list[int]
) -> Iterator[Callable[[Answer], Answer]]:
    """Prepare a request, and yield what is to be done with its answer.

    Raises:
        NotFoundError: no such state. ConflictError: it is in use, or something is in the way. IntegrityError: it does
        not open. UsageError: the key.

    """
    content = os.memfd_create("vtpm-state", os.MFD_CLOEXEC)
    descriptors.append(content)
    key = _key(options)
    try:
        if verb == "import":
            with _source(options, key, arguments, content):
                yield lambda answer: answer
        else:
            with _target(options.to_swtpm, key, content) as written:
                yield written
    except SwtpmLocked as error:
        raise ConflictError(str(error)) from error
    except SwtpmDiskError as error:
        kind = DeniedError if isinstance(error.cause, PermissionError) else ManagerError
        raise kind(str(error)) from error
    except StorageError as error:
        raise IntegrityError(str(error)) from error


def _key(options: argparse.Namespace) -> SwtpmKey | None:
    if options.key is not None and options.pwdfile is not None:
        raise UsageError("a state has one key: give --key or --pwdfile")
    path = options.key or options.pwdfile
    if path is None:
        return None
    with open(path, "rb") as file:
        content = file.read(_KEY_BYTES)
    try:
        if options.pwdfile is not None:
            return key_of_password(content, Kdf(options.kdf), MODES[options.key_mode])
        return key_of_file(content, KeyFormat(options.key_format), MODES[options.key_mode])
    except SwtpmKeyUnusable as error:
        raise UsageError(f"{path}: {error}; nothing was done") from error


@contextmanager
def _source(
    options: argparse.Namespace, key: SwtpmKey | None, arguments: dict[str, Any], content: int
) -> Iterator[None]:
    """Read the state under its lock, which is held for the while, and put it into `content`."""
    files = _find(options.from_swtpm, options.tpm)
    try:
        _lock(files)
        image = files.load(PERMANENT)
        if image is None:
            raise NotFoundError(
                f"{options.from_swtpm} holds no state of a TPM of swtpm's; nothing was made. Only a backup of one "
                "(….permall.bak) may be there: start swtpm with 'backup' once, it puts it back"
            )
        blobs = {PERMANENT: swtpm_blob.unpack_stored(image, key)}
        family = _family(files, blobs[PERMANENT])
        if options.tpm not in (None, family):
            raise IntegrityError(f"{options.from_swtpm} holds a TPM {family}, not a {options.tpm}; nothing was made")
        saved = files.load(SAVED) if family == "1.2" else None
        if saved is not None:
            blobs[SAVED] = swtpm_blob.unpack_stored(saved, key)
        if files.load("volatilestate") is not None:
            _warn("its stored volatile state is not adopted: this vTPM starts as after a power cut")
        if not files.where.is_directory:
            _warn("swtpm locks a file only where it is told to: be sure that none runs on this one")
        arguments["tpm"] = family
        os.pwrite(content, pack_blobs(Blobs(blobs)), 0)
        yield
    finally:
        files.close()


def _lock(files: SwtpmFiles) -> None:
    """Lock the source; a lock file that is made here belongs to whom the directory does, or its swtpm could not start.

    Raises:
        SwtpmStateError: it is in use, or cannot be locked.

    """
    path = files.where.path
    lock = os.path.join(path, LOCK_FILE)
    made = files.where.is_directory and not os.path.lexists(lock)
    files.lock()
    if made and os.geteuid() == 0:
        owner = os.stat(path)
        os.chown(lock, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _family(files: SwtpmFiles, permanent: bytes) -> str:
    """Return the family of a permanent state. Raises IntegrityError: it is not of its file's, or of none."""
    is_tpm2 = permanent[2:6] == MAGIC
    as_named = files.where.tpm2 == is_tpm2 if files.where.is_directory else is_tpm2 or permanent[:2] == _TPM12_BEGINS
    if not as_named:
        raise IntegrityError(
            f"the permanent state in {files.where.path} does not begin as one of a TPM "
            f"{_FAMILIES[files.where.tpm2] if files.where.is_directory else '2.0 or 1.2'} does; nothing was made; "
            "restore a good copy"
        )
    return _FAMILIES[is_tpm2]


def _find(path: str, family: str | None) -> SwtpmFiles:
    """Open the state at `path`; in a directory with TPMs of both families the caller has to say which."""
    if not os.path.exists(path):  # a file backend would be made
        raise NotFoundError(f"{path} is not there; nothing was made")
    if not os.path.isdir(path):
        return open_files(Where(path, is_directory=False, tpm2=True, lock=True))
    found = {name for tpm2, name in _FAMILIES.items() if _has_state(path, tpm2=tpm2)}
    if len(found) > 1 and family is None:
        raise UsageError(f"{path} holds a TPM 2.0 and a TPM 1.2: say which with --tpm; nothing was made")
    return open_files(Where(path, is_directory=True, tpm2=(family or min(found, default="2.0")) == "2.0"))


def _has_state(path: str, *, tpm2: bool) -> bool:
    files = open_files(Where(path, is_directory=True, tpm2=tpm2))
    try:
        return PERMANENT in files.sizes()
    finally:
        files.close()


@contextmanager
def _target(path: str, key: SwtpmKey | None, content: int) -> Iterator[Callable[[Answer], Answer]]:
    """Lock an empty place before anything is asked for; what comes back is written there, then the answer is told."""
    os.makedirs(path, mode=0o700, exist_ok=True)
    places = {tpm2: open_files(Where(path, is_directory=True, tpm2=tpm2)) for tpm2 in _FAMILIES}
    try:
        places[True].lock()  # one lock file for both families
        if any(name.startswith(_STATE_FILES) for name in os.listdir(path)):  # a backup of another TPM, too
            raise ConflictError(f"{path} holds a TPM's state already; it was left as it is, nothing was exported")

        def written(answer: Answer) -> Answer:
            with closing(answer):
                documents = list(answer)
            blobs = unpack_blobs(os.pread(content, os.fstat(content).st_size, 0))
            try:
                for name in blobs:
                    image = swtpm_blob.pack_stored(blobs[name], key)
                    places[blobs[PERMANENT][2:6] == MAGIC].store(name, image)
            except StorageError as error:
                raise ManagerError(
                    f"the state was handed out and not written: {error}. The vTPM is as it was"
                ) from error
            if key is None:
                _warn(f"{path} holds the state in clear: who reads it has all of this TPM's secrets (--key, --pwdfile)")
            yield from documents

        yield written
    finally:
        for files in places.values():
            files.close()


def _warn(text: str) -> None:
    sys.stderr.write(f"{text}\n")
