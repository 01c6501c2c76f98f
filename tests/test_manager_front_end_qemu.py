"""Attachments with front end qemu: what is printed, switched off until QEMU comes, and what becomes of them after."""

import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID
from xml.etree import ElementTree as ET

import pytest
import vtpm_instance_commands as tpm
from e2e_rig import Guest, Installation, alive, installation, wait_for
from qemu_client import NOT_RUNNING, qemu, say

from manager.attachment_words import default_startup, next_startup
from manager.connection_help import libvirt_xml, qemu_arguments
from manager.foreign_folder import remove_tree
from storage.catalogue_rows import AttachmentRow
from storage.store_records import RecordFlags

INDEX, CONTENT = 0x01500001, b"what counts"
DIGEST = b"\x17" * 32
pytestmark = [pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def host() -> Iterator[Installation]:
    with installation() as made:
        made.base.chmod(0o711)
        made.init()
        made.start()
        yield made


def attached(host: Installation, name: str, *options: str) -> str:
    """Make a vTPM for QEMU; returns the path of its control socket."""
    host.add(name)
    return str(host.attach(name, "guest", "--frontend", "qemu", *options)["endpoint"])


def is_off(host: Installation, name: str) -> bool:
    guest = Guest(host.show(name)["tcti"].removeprefix("swtpm:path="))
    answer = guest.transmit(tpm.get_random(8))
    guest.close()
    return answer == NOT_RUNNING


# what is printed


def test_what_is_printed_can_be_copied(host: Installation) -> None:
    control = attached(host, "printed")
    shown = host.show("printed")
    assert shown["endpoint"] == shown["control"] == control
    assert (shown["startup"], shown["mode"]) == ("none", "0600")
    assert f"path={control}" in shlex.split(shown["qemu"])[1]
    source = ET.fromstring(shown["libvirt_xml"]).find("./backend[@type='external']/source")
    assert source is not None
    assert source.attrib == {"type": "unix", "mode": "connect", "path": control}
    lines = host.command("vtpm-show", "printed").out.splitlines()
    for field in ("qemu", "libvirt_xml"):
        (line,) = [line for line in lines if line.startswith(f"{field} ")]
        assert line.split(maxsplit=1)[1] == shown[field], "one line, as it is"
    host.command("vtpm-detach", "printed")
    assert (host.show("printed")["qemu"], host.show("printed")["libvirt_xml"]) == (None, None)


def test_qemu_takes_what_is_printed(host: Installation) -> None:
    """QEMU itself connects, finds a TPM 2.0 and resets it before it begins to wait for its monitor."""
    attached(host, "taken")
    words = ["qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-nodefaults", "-display", "none", "-S"]
    words += ["-monitor", "stdio", *shlex.split(host.show("taken")["qemu"])]
    done = subprocess.run(words, input="info tpm\nquit\n", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "model=tpm-crb" in done.stdout
    wait_for(lambda: is_off(host, "taken"), "it to be switched off with its QEMU")


def test_paths_are_quoted_for_qemu_the_shell_and_xml() -> None:
    path = "/run/it's <a>, b&c/x"
    words = shlex.split(qemu_arguments(path, UUID(int=5 << 96), "2.0"))
    assert words[1] == f"socket,id=vtpm-00000005-ctrl,path={path.replace(',', ',,')}"
    assert words[4:] == ["-device", "tpm-crb,tpmdev=vtpm-00000005"]
    source = ET.fromstring(libvirt_xml(path, "1.2")).find("backend/source")
    assert source is not None
    assert source.attrib["path"] == path
    assert "tpm-tis" in libvirt_xml(path, "1.2"), "QEMU has no tpm-crb for TPM 1.2"


# what becomes of it


def test_it_is_switched_off_until_qemu_comes_and_after_it_has_gone(host: Installation) -> None:
    control = attached(host, "switched")
    assert is_off(host, "switched")
    with qemu(control) as machine:
        assert tpm.rc(say(machine.data, tpm.pcr_extend(10, DIGEST))) == 0
        machine.reset()
        assert say(machine.data, tpm.pcr_read(10))[-32:] == bytes(32), "PCRs of before the reset"
        assert tpm.rc(say(machine.data, tpm.nv_define(INDEX, len(CONTENT)))) == 0
        assert tpm.rc(say(machine.data, tpm.nv_write(INDEX, CONTENT))) == 0
    wait_for(lambda: is_off(host, "switched"), "it to be switched off: QEMU was killed, say")
    with qemu(control) as machine:
        assert tpm.nv_content(say(machine.data, tpm.nv_read(INDEX, len(CONTENT)))) == CONTENT


@pytest.mark.parametrize("restart", ["clean", "crash"])
def test_a_restart_of_everything_leaves_it_switched_off(host: Installation, restart: str) -> None:
    control = attached(host, f"restarted-{restart}")
    with qemu(control) as machine:
        assert tpm.rc(say(machine.data, tpm.pcr_extend(10, DIGEST))) == 0
        assert tpm.rc(say(machine.data, tpm.nv_define(INDEX, len(CONTENT)))) == 0
        if restart == "clean":
            host.restart()
        else:
            before = host.show(f"restarted-{restart}")["pid"]
            os.kill(before, signal.SIGKILL)
            wait_for(lambda: host.show(f"restarted-{restart}")["pid"] not in (None, before), "the next instance")
            wait_for(lambda: host.show(f"restarted-{restart}")["state"] == "running", "it to be ready")
    assert is_off(host, f"restarted-{restart}"), "what the guest before had in its PCRs is gone"
    with qemu(control) as machine:
        assert say(machine.data, tpm.pcr_read(10))[-32:] == bytes(32)
        assert tpm.rc(say(machine.data, tpm.nv_write(INDEX, CONTENT))) == 0


def test_a_running_guest_notices_nothing_of_a_manager_that_dies(host: Installation) -> None:
    control = attached(host, "outlives")
    with qemu(control) as machine:
        assert tpm.rc(say(machine.data, tpm.pcr_extend(10, DIGEST))) == 0
        before = say(machine.data, tpm.pcr_read(10))[-32:]
        pid = host.show("outlives")["pid"]
        host.kill()
        assert len(say(machine.data, tpm.get_random(8))) == 20
        host.start()
        wait_for(lambda: host.show("outlives")["state"] == "running", "it to be taken over")
        assert host.show("outlives")["pid"] == pid
        assert alive(pid)
        assert tpm.rc(say(machine.data, tpm.nv_define(INDEX, len(CONTENT)))) == 0
        assert say(machine.data, tpm.pcr_read(10))[-32:] == before


def test_a_running_guest_notices_nothing_of_hibernation(host: Installation) -> None:
    control = attached(host, "sleeps")
    with qemu(control) as machine:
        assert tpm.rc(say(machine.data, tpm.pcr_extend(10, DIGEST))) == 0
        before = say(machine.data, tpm.pcr_read(10))[-32:]
        host.command("vtpm-hibernate", "sleeps")
        assert host.show("sleeps")["state"] == "hibernated"
        assert say(machine.data, tpm.pcr_read(10))[-32:] == before
        host.command("vtpm-hibernate", "sleeps")
        host.kill()  # and the next manager finds it asleep
        host.start()
        assert say(machine.data, tpm.pcr_read(10))[-32:] == before
        machine.reset()
        assert say(machine.data, tpm.pcr_read(10))[-32:] == bytes(32)
    wait_for(lambda: is_off(host, "sleeps"), "it to be switched off with its QEMU")


def test_only_the_owner_connects_to_its_qemu(host: Installation) -> None:
    if os.geteuid():
        pytest.skip("needs root, to become others")
    control = attached(host, "owned", "--owner", "64055:64055")
    for uid, refused in ((64055, False), (64056, True), (65534, True)):
        os.seteuid(uid)
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                assert (sock.connect_ex(control) != 0) is refused
        finally:
            os.seteuid(0)


def left_behind(folder: Path) -> None:
    """What an owner may do to us in his folder: a tree deeper than anybody recurses, and a folder for a socket."""
    (folder / "swtpm.sock").unlink()
    (folder / "swtpm.sock").mkdir()
    (folder / "swtpm.sock" / "in it").mkdir()
    (folder / "swtpm.sock" / "in it" / "too").touch()
    top = os.open(folder, os.O_RDONLY)
    for _ in range(2000):
        os.mkdir("deeper", dir_fd=top)
        inner = os.open("deeper", os.O_RDONLY, dir_fd=top)
        os.close(top)
        top = inner
    os.close(top)


def test_what_an_owner_leaves_in_his_folder_locks_nobody_out(host: Installation) -> None:
    folder = Path(attached(host, "littered")).parent
    left_behind(folder)
    before = host.show("littered")["pid"]
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: host.show("littered")["pid"] not in (None, before), "the next instance, on new sockets")
    wait_for(lambda: host.show("littered")["state"] == "running", "it to be ready")
    with qemu(str(folder / "swtpm.sock.ctrl")) as machine:
        assert tpm.rc(say(machine.data, tpm.get_random(8))) == 0
    host.command("vtpm-detach", "littered")
    assert not folder.exists()
    host.attach("littered", "guest", "--frontend", "qemu")
    host.command("vtpm-detach", "littered")


def test_a_folder_that_another_had_is_removed_without_leaving_it(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    folder = tmp_path / "folder"
    (folder / "a" / "b" / "c").mkdir(parents=True)
    (folder / "a" / "b" / "link").symlink_to(elsewhere)
    (folder / "a" / "b").chmod(0)
    (folder / "link").symlink_to(elsewhere)
    remove_tree(folder)
    remove_tree(folder)
    assert not folder.exists()
    assert (elsewhere / "file").exists()


# the words


def row(frontend: str, startup: str) -> AttachmentRow:
    return AttachmentRow(UUID(int=1), "g", frontend, "0:0", "0660", startup, 1)


@pytest.mark.parametrize(
    ("frontend", "flags", "startup"),
    [
        ("qemu", RecordFlags.RESUMABLE, "none"),
        ("qemu", RecordFlags.NONE, "none"),
        ("qemu", RecordFlags.FRESH, "none"),
        ("qemu", RecordFlags.RESUMABLE | RecordFlags.HIBERNATED, "state"),  # its QEMU is still there
        ("socket", RecordFlags.RESUMABLE, "state"),
        ("socket", RecordFlags.NONE, "failed"),
        ("socket", RecordFlags.FRESH, "clear"),
    ],
)
def test_how_the_next_instance_starts(frontend: str, flags: RecordFlags, startup: str) -> None:
    assert next_startup(row(frontend, default_startup(frontend)), flags) == startup
