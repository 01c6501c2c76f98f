"""The guest's service as far as it goes without its devices: one file for old Pythons, what it says, the link.

With Linux' vTPM proxy and xen-tpmfront: tests/e2e/test_e2e_xen_guests.py and test_e2e_proxy.py.
"""

import ast
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from frontend_backend import guest_device
from frontend_backend.guest_device import GuestDeviceError, Ready, answer_here, link_to, notify, open_raw

SOURCE = Path(guest_device.__file__)
SET_LOCALITY, GET_RANDOM = 0x20001000, 0x17B


def packet(code: int, body: bytes = b"") -> bytes:
    return struct.pack(">HII", 0x8001, 10 + len(body), code) + body


def test_it_is_one_file_of_an_old_python_and_its_own_library() -> None:
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 7))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names | {"__future__"}
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(SOURCE), "--device", "/nowhere"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "vtpm-guest-device: there is no /nowhere; nothing was done\n"


def test_the_drivers_locality_is_answered_and_everything_else_is_the_vtpms() -> None:
    assert answer_here(packet(SET_LOCALITY, b"\0")) == packet(0)
    for other in (b"\1", b"\4", b"", b"\0\0"):
        assert answer_here(packet(SET_LOCALITY, other)) == packet(0x907)
    assert answer_here(packet(GET_RANDOM, b"\0\x20")) is None
    assert answer_here(b"\x80\x01") == packet(0x101)


def test_a_raw_device_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    with pytest.raises(GuestDeviceError, match="there is no") as caught:
        open_raw(str(tmp_path / "tpm0"))
    assert caught.value.code == 3
    with pytest.raises(GuestDeviceError, match="cannot be opened: Is a directory"):
        open_raw(str(tmp_path))


def test_the_link_is_made_in_one_step_and_never_over_anything_else(tmp_path: Path) -> None:
    link = tmp_path / "vtpmrm"
    link_to(str(link), "/dev/tpmrm1")
    link_to(str(link), "/dev/tpmrm2")
    assert os.readlink(link) == "/dev/tpmrm2"
    Ready(1, str(link), "/dev/tpm0").unlink()
    assert link.is_symlink(), "another device's link is left alone"
    Ready(2, str(link), "/dev/tpm0").unlink()
    assert not link.is_symlink()
    link.write_text("precious")
    with pytest.raises(GuestDeviceError, match="left alone"):
        link_to(str(link), "/dev/tpmrm1")
    assert link.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["vtpmrm"]


def test_systemd_is_told_where_it_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify("READY=1\nSTATUS=x")
        assert listener.recv(64) == b"READY=1\nSTATUS=x"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0vtpm-test-{os.getpid()}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@vtpm-test-{os.getpid()}")
        notify("STOPPING=1")
        assert listener.recv(64) == b"STOPPING=1"
