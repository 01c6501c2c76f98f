"""Store and state images on block devices, as an operator with logical volumes has them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from block_devices import loop_device
from e2e_rig import Installation

from storage.store import Store

MIB = 1 << 20


@pytest.fixture
def store_device(tmp_path: Path) -> Iterator[Path]:
    with loop_device(tmp_path / "backing-store", 4 * MIB) as device:
        yield device


@pytest.fixture
def named_device(tmp_path: Path) -> Iterator[Path]:
    """A device under a stable name that is a link, like /dev/mapper/vg-guest."""
    with loop_device(tmp_path / "backing-state", MIB) as device:
        name = tmp_path / "vg-guest"
        name.symlink_to(device)
        yield name


def secret_of(bare: Installation, tcti: str) -> str:
    return bare.tool(tcti, "tpm2_nvread", "0x1500001").out


def keep_secret(bare: Installation, tcti: str, secret: str) -> None:
    bare.tool(tcti, "tpm2_nvdefine", "0x1500001", "-s", str(len(secret)))
    (bare.base / "secret").write_text(secret)
    bare.tool(tcti, "tpm2_nvwrite", "0x1500001", "-i", str(bare.base / "secret"))


def test_store_and_state_on_devices_survive_restart_reset_and_removal(
    bare: Installation, store_device: Path, named_device: Path
) -> None:
    bare.init("--store", str(store_device))
    assert (bare.state / "store.img").readlink() == store_device
    bare.start()
    bare.add("web", "--state-image", str(named_device))
    shown = bare.show("web")
    assert shown["state_image"] == str(named_device), "the stable name is kept, not what it leads to today"
    keep_secret(bare, bare.attach("web")["tcti"], "on a device")
    bare.restart()
    assert secret_of(bare, bare.show("web")["tcti"]) == "on a device"
    taken = bare.command("vtpm-add", "--name", "second", "--state-image", str(named_device), check=False)
    assert taken.code == 4, taken.err
    bare.command("vtpm-detach", "web")
    assert bare.command("vtpm-verify", "--all").code == 0
    bare.command("vtpm-reset", "web", "--yes")
    fresh = bare.attach("web")["tcti"]
    assert bare.tool(fresh, "tpm2_nvread", "0x1500001", check=False).code != 0
    keep_secret(bare, fresh, "once more")
    bare.command("vtpm-detach", "web")
    bare.command("vtpm-remove", "web", "--yes")
    bare.add("next", "--state-image", str(named_device))
    keep_secret(bare, bare.attach("next")["tcti"], "another's")
    assert bare.stop() == 0


def test_a_store_on_a_device_grows_into_it(bare: Installation, store_device: Path) -> None:
    bare.init("--store", str(store_device), "--store-size", str(MIB))
    bare.start()
    bare.command("vtpm-add", "--count", "16000", "--name", "vm-{}")
    full = bare.command("vtpm-add", "--count", "40000", "--name", "more-{}", check=False)
    assert full.code == 1
    assert "no room" in full.err or "has only" in full.err, full.err
    bare.restart()
    assert bare.command("vtpm-show", "vm-16000", "--json").json["state"] == "added"
    assert bare.command("vtpm-verify", "--all").code == 0
    assert bare.stop() == 0


def test_init_refuses_a_device_that_holds_something_and_leaves_it(bare: Installation, store_device: Path) -> None:
    store_device.write_bytes(b"a file system, maybe")
    answer = bare.init("--store", str(store_device), check=False)
    assert answer.code == 4, answer.err
    assert "holds something" in answer.err
    assert store_device.read_bytes()[:20] == b"a file system, maybe"
    assert not (bare.state / "store.img").exists()


def test_an_interrupted_init_on_a_device_is_taken_away_by_the_next(bare: Installation, store_device: Path) -> None:
    """Its link and half a store are there, as after a power cut before the last rename."""
    bare.init("--store", str(store_device))
    (bare.state / "store.img").rename(bare.state / "store.new")
    descriptor = os.open(store_device, os.O_RDONLY)
    (bare.state / "store.begun").write_text(str(Store.read_boot_area(descriptor)[0]))
    os.close(descriptor)
    bare.init("--store", str(store_device))
    bare.start()
    assert bare.stop() == 0


def test_a_store_in_a_named_file(bare: Installation, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere" / "vtpm.store"
    place.parent.mkdir()
    bare.init("--store", str(place))
    assert place.stat().st_size == 2 * MIB
    assert bare.init("--store", str(place), check=False).code == 4
    bare.start()
    bare.add("web")
    bare.restart()
    assert bare.show("web")["state"] == "added"
    assert bare.stop() == 0


@pytest.mark.parametrize("content", [b"x", b"\0" * 5000 + b"y"])
def test_a_state_image_that_holds_something_is_refused_when_it_is_named(
    bare: Installation, tmp_path: Path, content: bytes
) -> None:
    bare.init()
    bare.start()
    thesis = tmp_path / "thesis"
    thesis.write_bytes(content)
    answer = bare.command("vtpm-add", "--name", "web", "--state-image", str(thesis), check=False)
    assert answer.code == 4
    assert "holds something already" in answer.err
    assert thesis.read_bytes() == content
    assert os.path.exists("/proc/version")
    assert bare.command("vtpm-add", "--state-image", "/proc/version", check=False).code != 0
    assert bare.stop() == 0


def test_a_place_for_a_state_image_with_a_file_system_far_behind_its_beginning_is_refused(vtpms: Installation) -> None:
    """Where btrfs has its mark, the first 64 KiB are zero."""
    place = vtpms.base / "volume"
    content = bytes(64 * 1024) + b"_BHRfS_M" + bytes(4096)
    place.write_bytes(content)
    refused = vtpms.command("vtpm-add", "--name", "web", "--state-image", str(place), check=False)
    assert refused.code == 4, refused.err
    assert place.read_bytes() == content
    assert vtpms.command("vtpm-show", "web", check=False).code == 3
