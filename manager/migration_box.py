"""Where the data about migration lies: two files, sealed under the store key, one of which the store's boot area names.

The boot area holds the digest of the file that counts, and is covered by the store's anchors: a file that somebody put
back is refused. A new file is written in the place of the other one, and counts with the commit that names it: a power
cut leaves the old or the new data.
"""

import hashlib
import hmac
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final
from uuid import UUID

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from manager.approvals import Approvals
from manager.durable import sync_directory
from manager.errors import ConflictError, IntegrityError
from manager.migration_state import MigrationState
from storage.secrets import StoreKey

Change = Callable[[MigrationState], MigrationState]
NAMES: Final = ("migration-0.sealed", "migration-1.sealed")
_MAGIC: Final = b"vTPMmig1"
_SALT_BYTES: Final = 32
_NONCE: Final = bytes(12)  # each derived key meets one message
_MAX_BYTES: Final = 64 * 1024 * 1024  # a departure has about 300 bytes: more than 200,000 of them


def seal(key: StoreKey, store: UUID, content: bytes) -> bytes:
    """Return `content` encrypted and authenticated as the migration data of this store."""
    salt = os.urandom(_SALT_BYTES)
    return _MAGIC + salt + AESGCM(_derived(key, salt)).encrypt(_NONCE, content, _MAGIC + store.bytes)


def unseal(key: StoreKey, store: UUID, sealed: bytes) -> bytes:
    """Undo `seal`. Raises IntegrityError."""
    start = len(_MAGIC) + _SALT_BYTES
    try:
        if not sealed.startswith(_MAGIC):
            raise InvalidTag
        salt = sealed[len(_MAGIC) : start]
        return AESGCM(_derived(key, salt)).decrypt(_NONCE, sealed[start:], _MAGIC + store.bytes)
    except InvalidTag as error:
        raise IntegrityError("the manager's data about migration is not what this manager wrote") from error


def _derived(key: StoreKey, salt: bytes) -> bytes:
    hkdf = HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=b"vtpm-manager migration v1")
    return hkdf.derive(key.reveal())


def read(state_dir: Path, key: StoreKey, store: UUID, digest: str) -> tuple[MigrationState, int]:
    """Return the data whose digest (hex, "" for none yet) the boot area has, and the index of its file in NAMES.

    Raises:
        IntegrityError: no file has it.

    """
    if not digest:
        return MigrationState(), 1
    for index, name in enumerate(NAMES):
        try:
            with open(state_dir / name, "rb") as file:
                sealed = file.read(_MAX_BYTES)
        except FileNotFoundError:
            continue
        if hmac.compare_digest(hashlib.sha256(sealed).hexdigest(), digest):
            return MigrationState.unpack(unseal(key, store, sealed)), index
    raise IntegrityError(
        f"the manager's data about migration ({' or '.join(NAMES)} in {state_dir}) is missing or is not the newest. "
        f"Nothing was changed: no vTPM can be claimed without it. Put the newest files back; if they are lost, "
        f"'vtpm-migrate-identity --anew' begins again without them"
    )


class MigrationBox:
    """The data about migration of a running manager; `state` is what counts."""

    def __init__(self, state_dir: Path, key: StoreKey, store: UUID, approvals: Approvals) -> None:
        """Read it. A manager whose data is missing runs all the same: every use raises `problem`."""
        self._state_dir, self._key, self._store, self._approvals = state_dir, StoreKey(key.view), store, approvals
        self._saving = trio.Lock()
        self._index = 1
        self.problem: IntegrityError | None = None
        self._state = MigrationState()
        boot = approvals.boot()
        try:
            self._state, self._index = read(state_dir, key, store, boot.migration)
        except IntegrityError as error:
            self.problem = error

    @property
    def state(self) -> MigrationState:
        """What counts. Raises IntegrityError: it is missing."""
        if self.problem is not None:
            raise self.problem
        return self._state

    @property
    def identity_counts(self) -> str:
        """The fingerprint of the identity that counts, empty for none: after a recovery none does."""
        return self._approvals.boot().identity

    def files(self) -> list[tuple[str, bytes]]:
        """Return name and content of the file that counts, for a backup; of what there is where none does."""
        wanted = NAMES if self.problem is not None else [NAMES[self._index]]
        paths = [self._state_dir / name for name in wanted]
        return [(path.name, path.read_bytes()) for path in paths if path.exists()]

    async def save(self, change: Change, identity: str | None = None) -> MigrationState:
        """Make `change(state)` what counts, durably; not yet anchored. `identity`: the fingerprint that counts now.

        Raises:
            IntegrityError: the data is missing. StorageError, OSError: the disk; what counts is unchanged, or known
            only after the next start.

        """
        async with self._saving:
            with trio.CancelScope(shield=True):
                counts = self.identity_counts if identity is None else identity
                state = await self._keep(change(self.state), counts)
        return state

    async def begin_anew(self) -> None:
        """Have no data and no identity, durably, in place of what is missing. Raises ConflictError: it is not."""
        async with self._saving:
            if self.problem is None:
                raise ConflictError("the manager's data about migration is not missing; nothing was changed")
            with trio.CancelScope(shield=True):
                await self._keep(MigrationState(), "")
            self.problem = None

    async def _keep(self, state: MigrationState, identity: str) -> MigrationState:
        sealed = seal(self._key, self._store, state.pack())
        index = 1 - self._index
        await trio.to_thread.run_sync(write, self._state_dir / NAMES[index], sealed)
        await self._approvals.keep_migration(hashlib.sha256(sealed).hexdigest(), identity)
        self._state, self._index = state, index
        return state

    def close(self) -> None:
        """Overwrite the key."""
        self._key.wipe()


def write(path: Path, content: bytes) -> None:
    """Write one of the files, durably; it counts once the boot area names it. Raises OSError."""
    known = path.exists()  # its name is durable since it was made
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fdatasync(file.fileno())
    if not known:
        sync_directory(path.parent)
