import gzip
import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from storage_disks import MemoryDisk

from storage import errors
from storage.secrets import GroupKey, StateKey, StoreKey
from storage.state_image import StateImage
from storage.store import PutVtpm, Store

VECTORS = Path(__file__).parent / "vectors"
NAMES = sorted(path.stem for path in VECTORS.glob("storage-*.json"))


def read(name: str) -> tuple[MemoryDisk, dict[str, Any]]:
    image = gzip.decompress((VECTORS / f"{name}.img.gz").read_bytes())
    return MemoryDisk(image), json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))


def open_state(disk: MemoryDisk, expected: dict[str, Any]) -> dict[str, Any]:
    image = StateImage.open(disk, UUID(expected["vtpm"]), expect_store=UUID(expected["store"]))
    key = StateKey(bytes.fromhex(expected["key"]))
    blobs = image.load(key, bytes.fromhex(expected["digest"]), expected["generation"])
    live = image.describe()[image.live_slot or 0]
    return {
        "family": str(image.family),
        "emulator": str(live.emulator),
        "blobs": {name: data.hex() for name, data in blobs.items()},
    }


def open_store(disk: MemoryDisk, expected: dict[str, Any]) -> dict[str, Any]:
    assert Store.read_boot_area(disk)[0] == UUID(expected["store"])
    store = Store.open(disk, StoreKey(bytes.fromhex(expected["key"])))
    for group in expected["groups"]:
        store.unlock_group(UUID(group["uuid"]), GroupKey(bytes.fromhex(group["key"])))
    return {
        "store": str(store.uuid),
        "boot_area": store.boot_area.hex(),
        "digest": store.digest().hex(),
        "sequence": store.sequence,
        "anchored": store.anchored.hex(),
        "volatile": store.volatile_expected.hex(),
        "damage": len(store.damage),
        **({"tombstones": open_tombstones(store)} if "tombstones" in expected else {}),
        "groups": [
            {"uuid": str(uuid), "flags": record.flags, "blob": record.blob.hex()}
            for uuid, record in store.groups().items()
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


def open_tombstones(store: Store) -> list[dict[str, Any]]:
    return [
        {
            "uuid": str(left.uuid),
            "group": str(left.group),
            "removed": left.removed,
            "generation": left.generation,
            "flags": int(left.flags),
        }
        for left in sorted(store.tombstones(), key=lambda left: left.uuid)
    ]


def without_keys(expected: dict[str, Any]) -> dict[str, Any]:
    groups = [{name: value for name, value in group.items() if name != "key"} for group in expected["groups"]]
    return expected | {"groups": groups}


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_image_is_read_or_refused_as_it_always_was_and_not_changed(name: str) -> None:
    disk, expected = read(name)
    before = bytes(disk.content)
    use = {"state": open_state, "store": open_store}[expected["format"]]
    if expected["expect"] == "ok":
        wanted = without_keys(expected) if expected["format"] == "store" else expected
        found = use(disk, expected)
        assert found == {field: wanted[field] for field in found}
    else:
        with pytest.raises(getattr(errors, expected["expect"])):
            use(disk, expected)
    assert bytes(disk.content) == before


def test_the_newer_images_are_refused_with_both_versions_named() -> None:
    for name, use, error, words in (
        ("storage-state-v2-newer", open_state, errors.ImageTooNew, "version 2, this program reads up to 1"),
        ("storage-store-v3-newer", open_store, errors.StoreTooNew, "version 3, this program reads up to 2"),
    ):
        disk, expected = read(name)
        with pytest.raises(error, match=f"needs format {words}"):
            use(disk, expected)


def test_a_golden_store_and_image_can_be_gone_on_with() -> None:
    disk, expected = read("storage-store-v1-carried")
    store = Store.open(disk, StoreKey(bytes.fromhex(expected["key"])))
    for group in expected["groups"]:
        store.unlock_group(UUID(group["uuid"]), GroupKey(bytes.fromhex(group["key"])))
    store.commit([PutVtpm(record) for record in list(store.vtpms())])
    store.checkpoint()
    disk, expected = read("storage-state-v1-tpm20")
    image = StateImage.open(disk, UUID(expected["vtpm"]))
    image.load(StateKey(bytes.fromhex(expected["key"])), bytes.fromhex(expected["digest"]), expected["generation"])
    saved = image.save({"permall": b"next"}, 3)
    assert image.load(saved.key, saved.digest, 3) == {"permall": b"next"}


def test_every_golden_image_says_what_it_is_for_and_is_small() -> None:
    assert len(NAMES) >= 12
    for name in NAMES:
        _, expected = read(name)
        assert expected["because"]
        assert (VECTORS / f"{name}.img.gz").stat().st_size < 64 * 1024
