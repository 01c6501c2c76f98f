# ruff: noqa: N818 - the names say what happened, as the design names them; the tree says that they are errors
"""Every error of the storage package, one tree. Messages are built here: what happened, what was kept, what to do.

Families: device (the disk's fault), image and store content (damage, foreign, newer), caller's faults.
"""

from collections.abc import Sequence
from uuid import UUID


class StorageError(Exception):
    """Base of everything this package raises on purpose."""


# --- secrets ---------------------------------------------------------------------------------------


class WrongSecretSize(StorageError):
    """Caller's fault: a secret of another length."""

    def __init__(self, kind: str, expected: int, got: int) -> None:
        super().__init__(f"a {kind} has {expected} bytes, got {got}")


class SecretWiped(StorageError):
    """Caller's fault: a secret was used after it had been overwritten."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"this {kind} has been wiped and holds nothing any more")


# --- device ----------------------------------------------------------------------------------------


class DeviceError(StorageError):
    """The disk's fault: an operation failed. `cause` is the OSError, also chained."""

    def __init__(self, operation: str, cause: OSError) -> None:
        super().__init__(f"could not {operation}: {cause.strerror or cause}")
        self.operation, self.cause = operation, cause


class StorageFull(DeviceError):
    """No room on the disk (ENOSPC, EDQUOT, EFBIG); nothing that was acknowledged is touched."""


# --- state images ----------------------------------------------------------------------------------


class ImageError(StorageError):
    """Base of what can be wrong with a state image."""


class ImageExists(ImageError):
    """Caller's fault: an image was to be made where bytes already are."""

    def __init__(self, offset: int) -> None:
        super().__init__(
            f"the place for a new state image is not empty (first byte in use at {offset}); nothing was changed. "
            "Give an empty file, or clear the device first if its content is not wanted"
        )


class NotAnImage(ImageError):
    """These bytes never were a state image, or a creation that did not end."""

    def __init__(self, found: str) -> None:
        super().__init__(f"not a state image: {found}; nothing was changed")


class ImageForeign(ImageError):
    """A state image, but of another vTPM or another store."""

    def __init__(self, what: str, expected: UUID, found: UUID) -> None:
        super().__init__(
            f"this state image belongs to {what} {found}, not {expected}; nothing was changed. "
            "Check which file or device was given"
        )
        self.expected, self.found = expected, found


class ImageTooNew(ImageError):
    """Written by a later version in a way that this one must not touch."""

    def __init__(self, where: str, needs: int, reads: int) -> None:
        super().__init__(
            f"{where} needs format version {needs}, this program reads up to {reads}; nothing was changed. "
            "Use a later version of the program"
        )
        self.needs, self.reads = needs, reads


class ImageDamaged(ImageError):
    """The bytes fail a checksum, an authentication or a bound."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"state image damaged: {where}: {problem}; nothing was changed. Keep the file for inspection")
        self.where, self.problem = where, problem


class NoMatchingSlot(ImageError):
    """No slot is the one that the record names: damaged, rolled back, or from another time."""

    def __init__(self, generation: int, claims: Sequence[str]) -> None:
        super().__init__(
            f"no slot of the state image matches the record of generation {generation} ({'; '.join(claims)}); "
            "nothing was changed. The image is older or newer than the record, or damaged: put back the right "
            "image, or quarantine the vTPM"
        )
        self.generation, self.claims = generation, tuple(claims)


class SlotMismatch(ImageError):
    """A slot has the record's digest but its header contradicts the record: a wrong record or a forgery."""

    def __init__(self, slot: int, field: str, expected: object, found: object) -> None:
        super().__init__(
            f"slot {slot} has the recorded digest but says {field} {found} where {expected} is expected; "
            "nothing was changed"
        )
        self.slot, self.field = slot, field


class KeyMismatch(ImageError):
    """The slot is the recorded one, but the key does not decrypt it."""

    def __init__(self, slot: int) -> None:
        super().__init__(
            f"slot {slot} has the recorded digest but does not open under the given key; nothing was changed"
        )
        self.slot = slot


class BlobsRefused(ImageError):
    """A set of state blobs that cannot be stored, or that no writer of ours could have stored."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"state blobs refused: {problem}; nothing was changed")


class StateTooLarge(ImageError):
    """More state than a slot may ever hold, or than it holds now without `ensure_room`."""

    def __init__(self, wanted: int, room: int) -> None:
        super().__init__(f"{wanted} bytes of state, but a slot has room for {room}; nothing was changed")
        self.wanted, self.room = wanted, room


class GenerationError(StorageError):
    """Caller's fault: a generation that does not go forward."""

    def __init__(self, subject: str, stored: int, offered: int) -> None:
        super().__init__(f"generation {offered} offered for {subject}, which is at {stored}; nothing was changed")
        self.stored, self.offered = stored, offered


class SlotsInUse(ImageError):
    """Caller's fault: a save before `load`, where slots already hold something."""

    def __init__(self, claims: Sequence[str]) -> None:
        super().__init__(
            f"this image holds state ({'; '.join(claims)}) and none was loaded; a save could overwrite it, so nothing "
            "was written. Load it, or call assume_fresh when the record says that the vTPM never ran"
        )


class NothingSaved(ImageError):
    """Caller's fault: `switch` without a save that succeeded."""

    def __init__(self) -> None:
        super().__init__("there is no saved slot to switch to; the live slot stays")


class ImageFailed(ImageError):
    """A flush failed earlier, so nothing is known about later writes through this object."""

    def __init__(self) -> None:
        super().__init__(
            "an earlier flush of this state image failed; the last acknowledged state is kept. Open the image again"
        )


# --- store -----------------------------------------------------------------------------------------


class StoreError(StorageError):
    """Base of what can be wrong with the store image or a call on it."""


class StoreExists(StoreError):
    """Caller's fault: a store was to be made where bytes already are."""

    def __init__(self, offset: int) -> None:
        super().__init__(
            f"the place for a new store is not empty (first byte in use at {offset}); nothing was changed. "
            "Give an empty file, or clear the device first if its content is not wanted"
        )


class NotAStore(StoreError):
    """These bytes never were a store, or a creation that did not end."""

    def __init__(self, found: str) -> None:
        super().__init__(f"not a store image: {found}; nothing was changed")


class StoreTooNew(StoreError):
    """Written by a later version in a way that this one must not touch."""

    def __init__(self, what: str, needs: int, reads: int) -> None:
        super().__init__(
            f"{what} of the store needs format version {needs}, this program reads up to {reads}; nothing was changed. "
            "Use a later version of the program"
        )
        self.needs, self.reads = needs, reads


class StoreDamaged(StoreError):
    """Bytes of the store fail a checksum, an authentication or a bound."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"store damaged: {where}: {problem}; nothing was changed. Keep the image and restore a backup")
        self.where, self.problem = where, problem


class WrongStoreKey(StoreError):
    """The header is sound, but the store was made with another key."""

    def __init__(self, store: UUID) -> None:
        super().__init__(f"the key given is not that of store {store}; nothing was changed")


class WrongGroupKey(StoreError):
    """The group record is sound, but the group has another key."""

    def __init__(self, group: UUID) -> None:
        super().__init__(f"the key given is not that of group {group}; nothing was changed")
        self.group = group


class StoreFailed(StoreError):
    """A write or flush failed earlier; after that nothing is known about what the disk holds."""

    def __init__(self, cause: str) -> None:
        super().__init__(
            f"the store stopped after a failed write ({cause}); everything acknowledged is kept. Open it again"
        )


class StoreClosed(StoreError):
    """Caller's fault: the store was closed."""

    def __init__(self) -> None:
        super().__init__("this store has been closed")


class BootAreaTooLarge(StoreError):
    """Caller's fault: more than a boot copy holds."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"{size} bytes for the boot area, which holds {limit}; nothing was changed")


class GroupClosed(StoreError):
    """The group's key has not been given, so its records can be neither read nor changed."""

    def __init__(self, groups: Sequence[UUID]) -> None:
        super().__init__(f"closed: group {', '.join(map(str, groups))}; nothing was changed. Unlock it first")
        self.groups = tuple(groups)


class NoSuchVtpm(StoreError):
    """Caller's fault: the store has no record of this UUID, in any group."""

    def __init__(self, vtpm: UUID, why: str = "") -> None:
        super().__init__(why or f"the store has no vTPM {vtpm}")
        self.vtpm = vtpm


class VtpmRemoved(NoSuchVtpm):
    """Caller's fault: the vTPM was removed; its tombstone is there. `removed`: seconds since 1970."""

    def __init__(self, vtpm: UUID, removed: int) -> None:
        super().__init__(vtpm, f"vTPM {vtpm} was removed; only its tombstone is there, nothing was changed")
        self.removed = removed


class NoSuchGroup(StoreError):
    """Caller's fault: the store has no group of this UUID."""

    def __init__(self, group: UUID) -> None:
        super().__init__(f"the store has no group {group}")
        self.group = group


class GroupNotEmpty(StoreError):
    """Caller's fault: a group with vTPMs was to be removed."""

    def __init__(self, group: UUID, vtpms: int) -> None:
        super().__init__(f"group {group} still has {vtpms} vTPMs; nothing was changed. Remove them first")
        self.group, self.vtpms = group, vtpms


class CommitRefused(StoreError):
    """Caller's fault: changes or values that make no sense; the whole commit is refused."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"commit refused: {problem}; nothing was changed")


class CommitTooLarge(StoreError):
    """More changes than one frame of the log holds; commit them in several steps."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(
            f"a commit of {size} bytes, but the log holds {limit} at a time; nothing was changed. Commit in steps"
        )


# --- catalogue -------------------------------------------------------------------------------------


class CatalogueError(StorageError):
    """Base of what can be wrong with the catalogue."""


class CatalogueDamaged(CatalogueError):
    """The file is no catalogue, or the database refuses it."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"the catalogue cannot be read: {problem}. Nothing was changed; it holds names and attachments, no keys"
        )


class CatalogueUnwritten(CatalogueError):
    """The disk takes no more, or may only be read: the transaction was taken back, what was done elsewhere was not."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"the catalogue could not be written: {problem}. It is as it was; what was done before this (a record "
            f"made, a vTPM stopped) stays done. Make room (or the disk writable), look with 'vtpm-show' and "
            f"'vtpm-verify --all', and ask again"
        )


class CatalogueTooNew(CatalogueError):
    """A newer version wrote it."""

    def __init__(self, version: int, ours: int) -> None:
        super().__init__(f"the catalogue has schema {version}, this version reads {ours}: use the newer manager")


class RowTampered(CatalogueError):
    """A row that decides who gets which vTPM was not written by the manager that holds the store key."""

    def __init__(self, table: str, row: str) -> None:
        super().__init__(
            f"the row of {row} in the catalogue's table '{table}' fails authentication: it was edited, or comes from "
            "another installation. Nothing was changed; put the right catalogue back"
        )
        self.table, self.row = table, row


class NameTaken(CatalogueError):
    """Caller's fault: a name or UUID that another row has."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is in the catalogue already")


class NoSuchRow(CatalogueError):
    """Caller's fault: no such row."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is not in the catalogue")


class CatalogueTooOld(CatalogueError):
    """An older version wrote it, and whoever opens it may not change it."""

    def __init__(self, version: int, ours: int) -> None:
        super().__init__(
            f"the catalogue has schema {version}, this version reads {ours}; nothing was changed. Starting the manager "
            "brings it up to date"
        )


class CatalogueForeign(CatalogueError):
    """It belongs to another store."""

    def __init__(self, theirs: UUID, ours: UUID) -> None:
        super().__init__(
            f"the catalogue belongs to store {theirs}, this is store {ours}; nothing was changed. Name the database "
            "that belongs to this store, or an empty one"
        )


class CatalogueUnreachable(CatalogueError):
    """The database server does not answer, or ended the connection."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(
            f"the catalogue's database {place} does not answer: {problem}. vTPMs that run go on; this was not done in "
            "the catalogue. Look at the server, then try again"
        )


class CatalogueBusy(CatalogueError):
    """Another process uses it."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"the catalogue is in use: {problem}; nothing was changed. End what uses it, or try again")


class BadCatalogueUrl(CatalogueError):
    """Caller's fault: no URL of a database that can hold a catalogue."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"the catalogue's URL cannot be used: {problem}")
