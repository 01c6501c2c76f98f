"""What the manager knows of a device of the vTPM proxy, and what it says where the host has none."""

import os
from pathlib import Path

import pytest

from manager import proxy_device
from manager.errors import ManagerError
from manager.proxy_device import ProxyDevice, ProxyMissingError, new_device


@pytest.mark.skipif(proxy_device.CONTROL.exists(), reason="this host has the vTPM proxy: see test_e2e_proxy")
def test_a_host_without_the_proxy_is_told_the_modules_name() -> None:
    with pytest.raises(ProxyMissingError, match="modprobe tpm_vtpm_proxy"):
        new_device("2.0")


def test_a_device_is_known_to_the_next_manager(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    assert ProxyDevice.read(path) is None
    device = ProxyDevice(3, 253, 3, "2.0")
    device.write(path)
    assert ProxyDevice.read(path) == device
    assert [str(each) for each in device.paths] == ["/dev/tpm3", "/dev/tpmrm3"]
    assert [str(each) for each in ProxyDevice(0, 10, 224, "1.2").paths] == ["/dev/tpm0"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"number": "x", "major": 1, "minor": 1, "family": "2.0"}'])
def test_a_damaged_note_names_itself(tmp_path: Path, text: str) -> None:
    path = tmp_path / "device.json"
    path.write_text(text)
    with pytest.raises(ManagerError, match=r"device\.json"):
        ProxyDevice.read(path)


def test_an_open_descriptor_is_not_given_up_and_a_hung_up_one_is(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    assert not proxy_device.given_up(reader)
    os.close(writer)
    assert proxy_device.given_up(reader)
    os.close(reader)
