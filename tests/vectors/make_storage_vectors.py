"""How the golden images of the storage formats were made. Run it only to add one: existing files are kept.
Those of version 1 were written by the code of that time; a reader of version 1 refuses what this one writes.

    python tests/vectors/make_storage_vectors.py

Each NAME.img.gz is an image, NAME.json beside it says what must be found in it: `expect` is "ok" or the name of
the error, `because` why. The keys are of these images only.
"""

import gzip
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from storage_disks import MemoryDisk  # noqa: E402 - the path comes first

from storage import store_format as fmt  # noqa: E402
from storage.secrets import GroupKey, StateKey, StoreKey  # noqa: E402
from storage.state_image import Emulator, Family, Saved, StateImage  # noqa: E402
from storage.store import (  # noqa: E402
    BuryVtpm,
    ForgetVtpm,
    GroupRecord,
    PutGroup,
    PutVtpm,
    RecordFlags,
    RemoveVtpm,
    Store,
    VtpmRecord,
)

STORE = UUID("0b7d28be-47df-4702-8aa6-4d1b061ced90")
VTPM = UUID("35f495c4-1f44-4f55-9c2a-90e8adb11e8f")
GROUPS = [UUID("a9fe7c7f-cd00-4b95-8f44-f55c35f495c4"), UUID("c2a90e8a-db11-4e8f-b1a0-61ced90b7d28")]
SECTOR = fmt.SECTOR

Vector = tuple[bytes, dict[str, Any]]


def seed(label: str) -> bytes:
    return hashlib.sha256(f"golden image, {label}".encode()).digest()


KEY = StoreKey(seed("store key"))


def uuid_of(number: int) -> UUID:
    return UUID(bytes=seed(f"vTPM {number}")[:16], version=4)


def group_key(group: UUID) -> GroupKey:
    return GroupKey(seed(f"group {group}"))


# --- state images ----------------------------------------------------------------------------------


def state_blobs(label: str) -> dict[str, bytes]:
    return {"permall": seed(label) * 40, "volatilestate": seed(label + " volatile") * 9}


def state(family: Family) -> Vector:
    disk = MemoryDisk()
    image = StateImage.create(disk, VTPM, STORE, family)
    image.save(state_blobs("old"), 1, Emulator("libtpms", "0.9.2"))
    image.switch()
    saved = image.save(state_blobs("new"), 2, Emulator("libtpms", "0.9.2"))
    return bytes(disk.content), state_description(saved, family)


def state_description(saved: Saved, family: Family) -> dict[str, Any]:
    return {
        "format": "state",
        "expect": "ok",
        "because": "two slots are written, the record names the one of generation 2",
        "vtpm": str(VTPM),
        "store": str(STORE),
        "family": str(family),
        "key": saved.key.reveal().hex(),
        "digest": saved.digest.hex(),
        "generation": saved.generation,
        "emulator": "libtpms 0.9.2",
        "blobs": {name: data.hex() for name, data in state_blobs("new").items()},
    }


def state_newer() -> Vector:
    content, description = state(Family.TPM20)
    header = bytearray(content[:480])
    header[8:12] = b"\0\2\0\2"
    changed = bytes(header) + hashlib.sha256(header).digest() + content[512:]
    return changed, description | {"expect": "ImageTooNew", "because": "version 2, minimum version 2"}


def state_truncated() -> Vector:
    content, description = state(Family.TPM20)
    return content[:20000], description | {"expect": "ImageDamaged", "because": "cut at byte 20000, inside slot 0"}


def state_flipped() -> Vector:
    content, description = state(Family.TPM20)
    changed = bytearray(content)
    changed[4096 + 16384 + 500] ^= 0x10
    because = "one bit of the live slot (1) is wrong; the other slot is whole but of generation 1"
    return bytes(changed), description | {"expect": "NoMatchingSlot", "because": because}


# --- stores ----------------------------------------------------------------------------------------


def describe_store(store: Store, because: str) -> dict[str, Any]:
    groups = store.groups()
    return {
        "format": "store",
        "expect": "ok",
        "because": because,
        "store": str(store.uuid),
        "key": KEY.reveal().hex(),
        "boot_area": store.boot_area.hex(),
        "digest": store.digest().hex(),
        "sequence": store.sequence,
        "anchored": store.anchored.hex(),
        "volatile": store.volatile_expected.hex(),
        "damage": 0,
        "groups": [
            {
                "uuid": str(uuid),
                "flags": record.flags,
                "blob": record.blob.hex(),
                "key": group_key(uuid).reveal().hex(),
            }
            for uuid, record in groups.items()
        ],
        "vtpms": [
            {
                "uuid": str(record.uuid),
                "group": str(record.group),
                "key": record.key.reveal().hex(),
                "digest": record.digest.hex(),
                "generation": record.generation,
                "flags": int(record.flags),
            }
            for record in sorted(store.vtpms(), key=lambda record: record.uuid)
        ],
    }


def put(number: int, generation: int) -> PutVtpm:
    group = GROUPS[number % 2]
    key = StateKey(seed(f"state key {number} {generation}"))
    digest = seed(f"state digest {number} {generation}")
    return PutVtpm(VtpmRecord(uuid_of(number), group, key, digest, generation, RecordFlags(generation % 16)))


def filled(disk: MemoryDisk) -> Store:
    store = Store.create(disk, STORE, KEY, b"first boot area", 64 * SECTOR)
    store.commit([PutGroup(GroupRecord(group, 5, seed(str(group)) * 3), group_key(group)) for group in GROUPS])
    store.commit([put(number, 1) for number in range(60)])
    store.checkpoint()
    store.write_boot_area(b"second boot area")
    store.note_anchored(seed("anchored"))
    store.note_volatile(seed("volatile"))
    store.commit([put(number, 2) for number in range(30)])
    store.commit([RemoveVtpm(uuid_of(7)), put(8, 3)])
    store.commit([put(9, 4)])
    return store


def store_whole() -> Vector:
    disk = MemoryDisk()
    store = filled(disk)
    return bytes(disk.content), describe_store(store, "leaves, and a log with four frames")


def store_carried() -> Vector:
    disk = MemoryDisk()
    whole = filled(disk)
    expected = describe_store(whole, "the log was emptied while group 1 was closed: its parts are carried")
    store = Store.open(disk, KEY)
    store.unlock_group(GROUPS[0], group_key(GROUPS[0]))
    store.checkpoint()
    return bytes(disk.content), expected | {"digest": store.digest().hex(), "sequence": store.sequence}


def store_torn() -> Vector:
    disk = MemoryDisk()
    store = filled(disk)
    expected = describe_store(store, "a frame after these records was torn by a power cut and is dropped")
    before = bytes(disk.content)
    store.commit([put(number, 9) for number in range(40)])
    changed = [i for i, (a, b) in enumerate(zip(before, bytes(disk.content), strict=True)) if a != b]
    cut = (changed[-1] + changed[0]) // 2 // fmt.UNIT * fmt.UNIT
    return bytes(disk.content[:cut]) + before[cut:], expected


def store_flipped(what: str) -> Vector:
    disk = MemoryDisk()
    state_ = filled(disk)._state
    expected = describe_store(Store.open(disk, KEY), "")
    if what == "log":
        offset = state_.log.first * SECTOR + state_.root.body.log_unit * fmt.UNIT + 200
        error, because = "StoreDamaged", "one bit of a frame that is not the last is wrong"
    else:
        offset = state_.tree.maps[0].location * SECTOR + 100
        error, because = "StoreDamaged", "one bit of the map is wrong"
    disk.content[offset] ^= 4
    return bytes(disk.content), expected | {"expect": error, "because": because}


def store_newer() -> Vector:
    content, description = store_whole()
    header = bytearray(content[:480])
    header[8:12] = b"\0\3\0\3"
    changed = bytes(header) + hashlib.sha256(header).digest() + content[512:]
    return changed, description | {"expect": "StoreTooNew", "because": "version 3, minimum version 3"}


def store_tombstones() -> Vector:
    """One tombstone in a leaf, one in the log, one that was taken away again."""
    disk = MemoryDisk()
    store = filled(disk)
    store.commit([BuryVtpm(uuid_of(10), 1_700_000_000), BuryVtpm(uuid_of(11), 1_700_000_001)])
    store.checkpoint()
    store.commit([BuryVtpm(uuid_of(12), 1_700_000_002), ForgetVtpm(uuid_of(11))])
    expected = describe_store(store, "vTPMs 10 (in a leaf) and 12 (in the log) have tombstones, 11 has none any more")
    tombstones = [
        {
            "uuid": str(left.uuid),
            "group": str(left.group),
            "removed": left.removed,
            "generation": left.generation,
            "flags": int(left.flags),
        }
        for left in sorted(store.tombstones(), key=lambda left: left.uuid)
    ]
    return bytes(disk.content), expected | {"tombstones": tombstones}


def store_truncated() -> Vector:
    content, description = store_whole()
    cut = description | {"expect": "StoreDamaged", "because": "the last two of 64 sectors are missing"}
    return content[: 62 * SECTOR], cut


VECTORS: dict[str, Callable[[], Vector]] = {
    "storage-state-v1-tpm20": lambda: state(Family.TPM20),
    "storage-state-v1-tpm12": lambda: state(Family.TPM12),
    "storage-state-v2-newer": state_newer,
    "storage-state-v1-truncated": state_truncated,
    "storage-state-v1-flipped": state_flipped,
    "storage-store-v1": store_whole,
    "storage-store-v1-carried": store_carried,
    "storage-store-v1-torn": store_torn,
    "storage-store-v1-flipped-log": lambda: store_flipped("log"),
    "storage-store-v1-flipped-map": lambda: store_flipped("map"),
    "storage-store-v2-tombstones": store_tombstones,
    "storage-store-v3-newer": store_newer,
    "storage-store-v1-truncated": store_truncated,
}


def main() -> None:
    for name, make in VECTORS.items():
        image, text = HERE / f"{name}.img.gz", HERE / f"{name}.json"
        if image.exists():
            continue
        content, description = make()
        image.write_bytes(gzip.compress(content, 9, mtime=0))
        text.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
