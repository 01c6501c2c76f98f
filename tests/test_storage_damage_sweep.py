"""One byte in thirteen of everything that means anything; `./dev bench crash --damage` takes all of them."""

import pytest
from damage_sweep import DamageError, Sweep, whole_image
from storage_histories import SECTOR

from storage import store_format as fmt
from storage import store_tree

STRIDE = 13


@pytest.fixture(scope="module")
def image() -> bytes:
    return whole_image()


@pytest.mark.parametrize(
    "part", ["header", "boot area", "map", "group records", "roots", "leaves", "carried parts", "log"]
)
def test_a_changed_byte_is_found_and_where_it_is(image: bytes, part: str) -> None:
    sweep = Sweep(image, STRIDE, first=5)
    sweep.parts()[part]()
    assert sum(sweep.judged.values()) > 20


def test_the_sweep_has_all_kinds_of_sectors(image: bytes) -> None:
    sweep = Sweep(image)
    assert set(sweep.parts()) >= {
        "header",
        "boot area",
        "map",
        "group records",
        "roots",
        "leaves",
        "carried parts",
        "log",
    }
    assert {sector.kind for sector in sweep.sectors} == {fmt.Kind.GROUP, fmt.Kind.LEAF, fmt.Kind.CARRY}
    assert sum(len(vtpms) for vtpms in sweep.held.values()) == len(sweep.rows) == 200
    assert len(sweep.frames) == 3
    assert any(image[fmt.BOOT_SECTORS[0] * SECTOR :][:SECTOR])
    assert any(image[fmt.ROOT_SECTORS[1 - sweep.slot] * SECTOR :][:SECTOR])


def test_a_store_that_does_not_look_is_found_out(image: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the tests."""
    monkeypatch.setattr(store_tree.Tree, "check", lambda _: iter(()))
    with pytest.raises(DamageError):
        Sweep(image, STRIDE).parts()["leaves"]()
