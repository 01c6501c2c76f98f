"""The keys below the hardware TPM (design section 5) and what is kept to get at them again."""

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Self
from uuid import UUID

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from manager.errors import ConflictError, IntegrityError
from manager.hwtpm_errors import TpmError
from manager.hwtpm_records import AnchorInfo, SealedBlob
from storage.secrets import Secret, StoreKey
from storage.store_format import MAX_BOOT_BYTES, MAX_GROUP_BLOB

_VERSION: Final = 1
_VERSION_WITH_MORE: Final = 2  # a record with fields that managers of version 1 would lose when they seal it anew
_VERSION_WITH_MIGRATION: Final = 3  # managers of version 2 would start a vTPM that left for another manager
_MAX_UNPACKED: Final = 64 * 1024  # bytes; what is packed has at most 6 KiB
ANCHOR_AUTH_SIZE: Final = 32
HIERARCHY_AUTH_SIZE: Final = 32


class PlatformSecret(Secret):
    """What the platform object seals: the store key, then the auth value of the anchor's index; 32 bytes each."""

    size = StoreKey.size + ANCHOR_AUTH_SIZE
    __slots__ = ()

    def __new__(cls, content: bytes | bytearray | memoryview) -> Self:
        """Take either size for what it is."""
        size = 2 * HIERARCHY_AUTH_SIZE + PlatformSecret.size
        return super().__new__(PlatformSecretWithAuths if len(content) == size else cls)  # type: ignore[return-value] # a child

    @property
    def store_key(self) -> StoreKey:
        """The store's root key."""
        return StoreKey(self.view[: StoreKey.size])

    @property
    def anchor_auth(self) -> bytes:
        """The auth value of the durable anchor's index, 32 bytes."""
        return bytes(self.view[StoreKey.size : StoreKey.size + ANCHOR_AUTH_SIZE])

    @property
    def owner_auth(self) -> bytes:
        """The password of the TPM's owner hierarchy, empty for none."""
        return b""

    @property
    def endorsement_auth(self) -> bytes:
        """The password of the TPM's endorsement hierarchy, empty for none."""
        return b""

    def with_auths(self, owner: bytes, endorsement: bytes) -> "PlatformSecret":
        """Return a secret with these passwords, at most 32 bytes each; zeros at their end do not count."""
        both = b"".join(auth.ljust(HIERARCHY_AUTH_SIZE, b"\0") for auth in (owner, endorsement))
        return PlatformSecretWithAuths(self.reveal()[: PlatformSecret.size] + both)


class PlatformSecretWithAuths(PlatformSecret):
    """Behind the two, the passwords of the TPM's owner and endorsement hierarchies: all that one object can seal."""

    size = PlatformSecret.size + 2 * HIERARCHY_AUTH_SIZE
    __slots__ = ()

    @property
    def owner_auth(self) -> bytes:
        """See PlatformSecret."""
        return bytes(self.view[PlatformSecret.size :][:HIERARCHY_AUTH_SIZE]).rstrip(b"\0")

    @property
    def endorsement_auth(self) -> bytes:
        """See PlatformSecret."""
        return bytes(self.view[PlatformSecret.size + HIERARCHY_AUTH_SIZE :]).rstrip(b"\0")


assert PlatformSecretWithAuths.size == 128, "MAX_SYM_DATA, TPM 2.0 Part 2, 11.1.13: what one sealed object can carry"


def catalogue_key(store_key: StoreKey, store: UUID) -> bytes:
    """Return the key of the catalogue's row MACs, 32 bytes; derived, so that the catalogue never sees the store key."""
    hkdf = HKDF(algorithm=hashes.SHA256(), length=32, salt=store.bytes, info=b"vtpm-manager catalogue rows v1")
    return hkdf.derive(store_key.reveal())


def state_blob_key(store_key: StoreKey, store: UUID) -> bytes:
    """Return the key that keys of exported state blobs are wrapped under, 32 bytes; derived from the store key."""
    hkdf = HKDF(algorithm=hashes.SHA256(), length=32, salt=store.bytes, info=b"vtpm-manager state blobs v1")
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

    Later fields, absent in older records: `saa` is the approver's public key (PEM), `approvals` its approvals that are
    installed (hex), `slot` the installation's place in the revocation index, `revocation` that index, `least` the
    lowest sequence that is not revoked, `hierarchies` the escrow of the hardware TPM's hierarchy passwords, `migration`
    the digest (SHA-256, hex) of what the manager keeps about migration, `identity` the fingerprint of its certificate
    for other managers.
    """

    platform: SealedBlob
    anchor: AnchorInfo
    escrow: bytes
    recovery: str
    saa: str = ""
    approvals: tuple[str, ...] = ()
    slot: int | None = None
    hierarchies: bytes = b""
    revocation: AnchorInfo | None = None
    least: int = 0
    migration: str = ""
    identity: str = ""

    def __post_init__(self) -> None:
        """Have the sealed object carry the approvals that may open it."""
        object.__setattr__(self, "platform", _with_approvals(self.platform, self.approvals))

    def pack(self) -> bytes:
        """Return its bytes: about 1 to 3 KiB, by how many PCRs are bound and predicted.

        Raises:
            ConflictError: they are more than the store has room for.

        """
        later = _later(
            saa=self.saa,
            approvals=list(self.approvals),
            slot=self.slot,
            hierarchies=self.hierarchies.hex(),
            revocation=None if self.revocation is None else self.revocation.to_json(),
            least=self.least or None,
            migration=self.migration,
            identity=self.identity,
        )
        packed = _pack(
            later,
            platform=self.platform.to_json(),
            anchor=self.anchor.to_json(),
            escrow=self.escrow.hex(),
            recovery=self.recovery,
        )
        return _fitting(packed, MAX_BOOT_BYTES, "the store's boot area")

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
                saa=str(fields.get("saa", "")),
                approvals=_hexadecimals(fields.get("approvals", [])),
                slot=_number(fields.get("slot")),
                hierarchies=bytes.fromhex(fields.get("hierarchies", "")),
                revocation=AnchorInfo.from_json(fields["revocation"]) if "revocation" in fields else None,
                least=_number(fields.get("least")) or 0,
                migration=bytes.fromhex(fields.get("migration", "")).hex(),
                identity=bytes.fromhex(fields.get("identity", "")).hex(),
            )


@dataclass(frozen=True, slots=True)
class GroupSeal:
    """The manager's part of a group record: its sealed master key and the escrow of it.

    Later fields, absent in older records: `pcrs` is the selection that it was made with ("": the installation's),
    `recovery` the group's own recovery public keys (PEM, "": the installation's), `saa` its approver's public key (PEM,
    "": none), `approvals` the approvals that are installed (hex), `slot` its place in the revocation index, `least` the
    lowest sequence that is not revoked, `ak` its attestation key, `quota` how many vTPMs it may have (None: as many as
    the configuration allows), `exportable` whether the state of its vTPMs may leave in another form than ours.
    """

    name: str
    sealed: SealedBlob
    escrow: bytes
    pcrs: str = ""
    recovery: str = ""
    saa: str = ""
    approvals: tuple[str, ...] = ()
    slot: int | None = None
    ak: dict[str, Any] | None = None
    quota: int | None = None
    least: int = 0
    exportable: bool = False

    def __post_init__(self) -> None:
        """Have the sealed object carry the approvals that may open it."""
        object.__setattr__(self, "sealed", _with_approvals(self.sealed, self.approvals))

    def pack(self) -> bytes:
        """Return its bytes: about 1 to 3 KiB, by how many PCRs are bound, predicted and approved.

        Raises:
            ConflictError: they are more than the store has room for.

        """
        later = _later(
            pcrs=self.pcrs,
            recovery=self.recovery,
            saa=self.saa,
            approvals=list(self.approvals),
            slot=self.slot,
            ak=self.ak,
            least=self.least or None,
            quota=self.quota,
            exportable=self.exportable or None,
        )
        packed = _pack(later, name=self.name, sealed=self.sealed.to_json(), escrow=self.escrow.hex())
        return _fitting(packed, MAX_GROUP_BLOB, f"the record of group {self.name}")

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
                pcrs=str(fields.get("pcrs", "")),
                recovery=str(fields.get("recovery", "")),
                saa=str(fields.get("saa", "")),
                approvals=_hexadecimals(fields.get("approvals", [])),
                slot=_number(fields.get("slot")),
                ak=_object(fields.get("ak")),
                least=_number(fields.get("least")) or 0,
                quota=_number(fields.get("quota")),
                exportable=fields.get("exportable") is True,
            )


def _with_approvals(sealed: SealedBlob, approvals: tuple[str, ...]) -> SealedBlob:
    return replace(sealed, approvals=tuple(map(bytes.fromhex, approvals)))


def _later(**fields: Any) -> dict[str, Any]:
    """Return those of the later fields that say something: a record without any is as version 1 wrote it."""
    return {name: value for name, value in fields.items() if value is not None and value not in ("", [])}


def _hexadecimals(untrusted: Any) -> tuple[str, ...]:
    if not isinstance(untrusted, list):
        raise TypeError("approvals are no list")
    return tuple(bytes.fromhex(item).hex() for item in untrusted)


def _number(untrusted: Any) -> int | None:
    if untrusted is None or (type(untrusted) is int and untrusted >= 0):
        return untrusted
    raise ValueError("its slot or quota is no number")


def _object(untrusted: Any) -> dict[str, Any] | None:
    if untrusted is None or isinstance(untrusted, dict):
        return untrusted
    raise TypeError("its attestation key is no object")


def _fitting(packed: bytes, most: int, what: str) -> bytes:
    if len(packed) > most:
        raise ConflictError(
            f"{what} would need {len(packed)} bytes, and the store has room for {most}: nothing was changed. Fewer "
            f"approvals, predicted PCR values or bound PCRs take less"
        )
    return packed


def _pack(later: dict[str, Any], **fields: Any) -> bytes:
    """Return `fields` as JSON, compressed: digests in hexadecimal take half their letters then."""
    version = {"version": _VERSION_WITH_MORE if later else _VERSION}
    if "migration" in later:
        version = {"version": _VERSION_WITH_MIGRATION}
    return zlib.compress(json.dumps(version | fields | later, separators=(",", ":")).encode(), 9)


@contextmanager
def _reading(untrusted: bytes, what: str) -> Iterator[dict[str, Any]]:
    """Yield the fields of what `_pack` wrote; whatever is wrong with them, also inside, is an IntegrityError."""
    try:
        fields = json.loads(zlib.decompressobj().decompress(untrusted, _MAX_UNPACKED))
        known = range(_VERSION, _VERSION_WITH_MIGRATION + 1)
        if not isinstance(fields, dict) or fields.get("version") not in known:
            raise IntegrityError(
                f"{what} has another version than {known.start} to {known.stop - 1}: use the manager that wrote it"
            )
        yield fields
    except (KeyError, TypeError, ValueError, zlib.error, TpmError) as error:
        raise IntegrityError(f"{what} cannot be read: {error}. Nothing was changed") from error
