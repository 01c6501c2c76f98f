import json
import os
import zlib
from dataclasses import replace
from typing import Any

import pytest

from manager.errors import ConflictError, IntegrityError
from manager.hwtpm_records import AnchorInfo, SealedBlob
from manager.keys import BootArea, GroupSeal
from manager.policy import SealPolicy
from storage.store_format import MAX_BOOT_BYTES, MAX_GROUP_BLOB

SEALED = SealedBlob(b"public", b"private", SealPolicy.build(reference=b"group"))
GROUP = GroupSeal("tenant", SEALED, b"escrow")
BOOT = BootArea(SEALED, AnchorInfo(0x01800001, bytes(34)), b"escrow", "-----BEGIN")
APPROVALS = (os.urandom(650).hex(), os.urandom(650).hex())
FULL_GROUP = replace(
    GROUP, pcrs="sha256:0,7", recovery="PEM r", saa="PEM a", approvals=APPROVALS, slot=3, ak={"public": "00ff"}, quota=5
)
FULL_BOOT = replace(BOOT, saa="PEM a", approvals=APPROVALS, slot=0, hierarchies=b"\x00sealed")


def packed(**fields: Any) -> bytes:
    return zlib.compress(json.dumps(fields).encode(), 9)


def fields_of(record: bytes) -> dict[str, Any]:
    fields = json.loads(zlib.decompress(record))
    assert isinstance(fields, dict)
    return fields


def test_a_group_record_of_version_1_still_opens() -> None:
    written = packed(version=1, name="tenant", sealed=SEALED.to_json(), escrow=b"escrow".hex())
    assert GroupSeal.unpack(written) == GROUP


def test_a_boot_area_of_version_1_still_opens() -> None:
    written = packed(
        version=1,
        platform=SEALED.to_json(),
        anchor=BOOT.anchor.to_json(),
        escrow=b"escrow".hex(),
        recovery="-----BEGIN",
    )
    assert BootArea.unpack(written) == BOOT


def test_a_record_that_says_nothing_new_is_written_as_version_1_was() -> None:
    assert fields_of(GROUP.pack()).keys() == {"version", "name", "sealed", "escrow"}
    assert fields_of(BOOT.pack()).keys() == {"version", "platform", "anchor", "escrow", "recovery"}
    assert fields_of(GROUP.pack())["version"] == fields_of(BOOT.pack())["version"] == 1


def test_a_record_with_more_is_refused_by_managers_that_would_lose_it() -> None:
    assert fields_of(FULL_GROUP.pack())["version"] == fields_of(FULL_BOOT.pack())["version"] == 2


@pytest.mark.parametrize("slot", [0, 63, None])
def test_records_with_every_field_say_what_was_put_into_them(slot: int | None) -> None:
    group, boot = replace(FULL_GROUP, slot=slot), replace(FULL_BOOT, slot=slot)
    assert GroupSeal.unpack(group.pack()) == group
    assert BootArea.unpack(boot.pack()) == boot


@pytest.mark.parametrize(
    "wrong",
    [
        {"slot": -1},
        {"slot": True},
        {"slot": "1"},
        {"quota": -1},
        {"approvals": "00"},
        {"approvals": ["zz"]},
        {"ak": []},
    ],
)
def test_a_later_field_that_is_not_what_it_should_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError, match="cannot be read"):
        GroupSeal.unpack(packed(**(fields_of(FULL_GROUP.pack()) | wrong)))


def test_what_does_not_fit_the_store_is_refused_before_it_is_written() -> None:
    many = tuple(os.urandom(650).hex() for _ in range(7))
    with pytest.raises(ConflictError, match=f"room for {MAX_GROUP_BLOB}"):
        replace(GROUP, approvals=many).pack()
    with pytest.raises(ConflictError, match=f"room for {MAX_BOOT_BYTES}"):
        replace(BOOT, approvals=many).pack()
    assert len(FULL_GROUP.pack()) < MAX_GROUP_BLOB
