"""The keys below the hardware TPM (design section 5) and what is kept to get at them again."""

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Self
from uuid import UUID

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from manager.errors import IntegrityError
from manager.hwtpm_errors import TpmError
from manager.hwtpm_records import AnchorInfo, SealedBlob
from storage.secrets import Secret, StoreKey

_VERSION: Final = 1
_MAX_UNPACKED: Final = 64 * 1024  # bytes; what is packed has at most 6 KiB
ANCHOR_AUTH_SIZE: Final = 32


class PlatformSecret(Secret):
    """What the platform object seals: the store key, then the auth value of the anchor's index; 32 bytes each."""

    size = StoreKey.size + ANCHOR_AUTH_SIZE
    __slots__ = ()

    @property
    def store_key(self) -> StoreKey:
        """The store's root key."""
        return StoreKey(self.view[: StoreKey.size])

    @property
    def anchor_auth(self) -> bytes:
        """The auth value of the durable anchor's index, 32 bytes."""
        return bytes(self.view[StoreKey.size :])


def catalogue_key(store_key: StoreKey, store: UUID) -> bytes:
    """Return the key of the catalogue's row MACs, 32 bytes; derived, so that the catalogue never sees the store key."""
    hkdf = HKDF(algorithm=hashes.SHA256(), length=32, salt=store.bytes, info=b"vtpm-manager catalogue rows v1")
    return hkdf.derive(store_key.reveal())


def store_check(store_key: StoreKey, store: UUID) -> str:
    """Return what the configuration pins of a store, hex: public, and bound to its key and UUID.

    Without it somebody with the TPM's owner authorisation could seal a key of his own and put a whole store of his
    own in place of ours; vTPMs would then be other ones, silently.
    """
    hkdf = HKDF(algorithm=hashes.SHA256(), length=32, salt=store.bytes, info=b"vtpm-manager store check v1")
    return hkdf.derive(store_key.reveal()).hex()


@dataclass(frozen=True, slots=True)
class BootArea:
    """What stands in clear in the store image: enough for the right TPM, or the recovery key, to open it.

    None of it is secret. `platform` seals the PlatformSecret; `escrow` is the same secret for the recovery key
    (empty without one); `recovery` the recovery public keys (PEM, empty without). Authenticity comes from
    the TPM (a swapped object yields another key, which does not open the store).
    """

    platform: SealedBlob
    anchor: AnchorInfo
    escrow: bytes
    recovery: str

    def pack(self) -> bytes:
        """Return its bytes: about 1 to 3 KiB, by how many PCRs are bound and predicted."""
        return _pack(
            platform=self.platform.to_json(),
            anchor=self.anchor.to_json(),
            escrow=self.escrow.hex(),
            recovery=self.recovery,
        )

    @classmethod
    def unpack(cls, untrusted: bytes) -> Self:
        """Read what `pack` wrote.

        Raises:
            IntegrityError: it is something else.

        """
        with _reading(untrusted, "the store's boot area") as fields:
            return cls(
                platform=SealedBlob.from_json(fields["platform"]),
                anchor=AnchorInfo.from_json(fields["anchor"]),
                escrow=bytes.fromhex(fields["escrow"]),
                recovery=str(fields["recovery"]),
            )


@dataclass(frozen=True, slots=True)
class GroupSeal:
    """The manager's part of a group record: its sealed master key and the escrow of it."""

    name: str
    sealed: SealedBlob
    escrow: bytes

    def pack(self) -> bytes:
        """Return its bytes: about 1 to 3 KiB, by how many PCRs are bound and predicted."""
        return _pack(name=self.name, sealed=self.sealed.to_json(), escrow=self.escrow.hex())

    @classmethod
    def unpack(cls, untrusted: bytes) -> Self:
        """Read what `pack` wrote.

        Raises:
            IntegrityError: it is something else.

        """
        with _reading(untrusted, "a group record") as fields:
            return cls(
                name=str(fields["name"]),
                sealed=SealedBlob.from_json(fields["sealed"]),
                escrow=bytes.fromhex(fields["escrow"]),
            )


def _pack(**fields: Any) -> bytes:
    """Return `fields` as JSON, compressed: digests in hexadecimal take half their letters then."""
    return zlib.compress(json.dumps({"version": _VERSION} | fields, separators=(",", ":")).encode(), 9)


@contextmanager
def _reading(untrusted: bytes, what: str) -> Iterator[dict[str, Any]]:
    """Yield the fields of what `_pack` wrote; whatever is wrong with them, also inside, is an IntegrityError."""
    try:
        fields = json.loads(zlib.decompressobj().decompress(untrusted, _MAX_UNPACKED))
        if not isinstance(fields, dict) or fields.get("version") != _VERSION:
            raise IntegrityError(f"{what} has another version than {_VERSION}: use the manager that wrote it")
        yield fields
    except (KeyError, TypeError, ValueError, zlib.error, TpmError) as error:
        raise IntegrityError(f"{what} cannot be read: {error}. Nothing was changed") from error
