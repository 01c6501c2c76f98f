import os
import subprocess
import sys
from pathlib import Path

import pytest

from manager.hwtpm_setting import TctiSetting
from manager.hwtpm_tis_errors import MemoryDenied, PageRefused, PathMissing
from manager.hwtpm_tis_page import BoundDriver, RegisterPage, bound_drivers
from manager.hwtpm_tis_place import PAGE_BYTES, Place
from manager.hwtpm_tis_transport import RegisterTransport

PLACE = Place("tis", 0x100000, 2)


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    """A file as long as the pages of five localities reach."""
    path = tmp_path / "mem"
    with path.open("wb") as file:
        file.truncate(PLACE.base + 5 * PAGE_BYTES)
    return path


def test_registers_are_read_and_written_where_they_are(memory: Path) -> None:
    page = RegisterPage(str(memory), PLACE)
    page.write8(0x18, 0xA5)
    page.write32(0x4C, 0x01020304)
    page.write_bytes(0x80, b"abcdef")
    page.write_fifo(0x24, b"xyz")
    assert (page.read8(0x18), page.read32(0x4C), page.read8(0x4C)) == (0xA5, 0x01020304, 4)
    assert page.read_bytes(0x80, 6) == b"abcdef"
    assert page.read_fifo(0x24, 3) == b"zzz"
    page.close()
    page.close()
    content = memory.read_bytes()
    assert content[PLACE.address + 0x80 :][:6] == b"abcdef"
    assert not any(content[: PLACE.address]), "another locality's page was written"
    assert not any(content[PLACE.address + PAGE_BYTES :]), "another locality's page was written"


def test_only_the_page_of_the_locality_is_mapped(memory: Path) -> None:
    page = RegisterPage(str(memory), PLACE)
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(memory))]
    page.close()
    (line,) = lines
    span, _, offset, *_ = line.split()
    begin, end = (int(half, 16) for half in span.split("-"))
    assert (int(offset, 16), end - begin) == (PLACE.address, PAGE_BYTES)


def test_two_processes_of_ours_do_not_use_one_tpm_at_once(memory: Path) -> None:
    first = RegisterPage(str(memory), PLACE)
    with pytest.raises(BlockingIOError, match="another vtpm-manager uses this TPM"):
        RegisterPage(str(memory), Place("tis", PLACE.base, 0))
    first.close()
    RegisterPage(str(memory), PLACE).close()


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(PathMissing, match=r"DeviceAllow=/dev/mem"):
        RegisterPage(str(tmp_path / "none"), PLACE)


def test_a_file_that_is_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(PAGE_BYTES))
    with pytest.raises(PageRefused, match=r"0x102000 \(locality 2\)"):
        RegisterPage(str(tmp_path / "short"), PLACE)


def test_a_device_that_cannot_be_mapped_is_refused() -> None:
    with pytest.raises(PageRefused, match="No such device"):
        RegisterPage("/dev/null", PLACE)


def test_a_directory_is_no_memory(tmp_path: Path) -> None:
    with pytest.raises(PageRefused, match="Is a directory"):
        RegisterPage(str(tmp_path), PLACE)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_somebody_else_than_root_is_told_to_be_root(memory: Path) -> None:
    memory.chmod(0o600)
    program = (
        "import os, sys\n"
        "from manager.hwtpm_tis_errors import MemoryDenied\n"
        "from manager.hwtpm_tis_place import Place\n"
        "from manager.hwtpm_tis_page import RegisterPage\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try: RegisterPage(sys.argv[1], Place('tis', 0x100000, 2))\n"
        "except MemoryDenied as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(memory)], capture_output=True, text=True, check=True)
    assert "Run as root, with CAP_SYS_RAWIO" in done.stdout


def test_root_that_is_refused_is_told_of_lockdown() -> None:
    assert "locked down" in str(MemoryDenied("/dev/mem", "Operation not permitted", root=True))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system of its own")
def test_a_page_that_ends_who_touches_it_is_refused_and_we_live(tmp_path: Path) -> None:
    """As under Xen: the page can be mapped, and touching it is a SIGBUS. Here: no room is left for a hole of a file."""
    program = (
        "import os, sys\n"
        "from manager.hwtpm_tis_errors import PageRefused\n"
        "from manager.hwtpm_tis_place import Place\n"
        "from manager.hwtpm_tis_page import RegisterPage\n"
        "path = sys.argv[1] + '/mem'\n"
        "with open(path, 'wb') as file: file.truncate(0x105000)\n"
        "fill = os.open(sys.argv[1] + '/fill', os.O_WRONLY | os.O_CREAT)\n"
        "try:\n"
        "    while True: os.write(fill, bytes(4096))\n"
        "except OSError as error: print(error.strerror)\n"
        "try: RegisterPage(path, Place('tis', 0x100000, 2))\n"
        "except PageRefused as error: print(error)\n"
    )
    script = f'mount -t tmpfs -o size=64k none {tmp_path} && exec {sys.executable} -c "$0" {tmp_path}'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, program], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "SIGBUS" in done.stdout
    assert 'iomem=["102,1"]' in done.stdout


def test_drivers_that_have_registers_are_told_from_virtual_tpms(tmp_path: Path) -> None:
    """The tree is as Linux 6.1 has it: class/tpm/tpmN/device -> the device, device/driver -> the driver."""
    for number, device, driver in ((0, "platform/MSFT0101:00", "tpm_tis"), (1, "vtpm-0", "vtpm"), (2, "bare", None)):
        place = tmp_path / "devices" / device
        place.mkdir(parents=True)
        if driver is not None:
            (tmp_path / "drivers" / driver).mkdir(parents=True)
            (place / "driver").symlink_to(tmp_path / "drivers" / driver)
        (tmp_path / "class" / f"tpm{number}").mkdir(parents=True)
        (tmp_path / "class" / f"tpm{number}" / "device").symlink_to(place)
    assert bound_drivers(tmp_path / "class") == [BoundDriver("tpm_tis", "MSFT0101:00")]
    assert bound_drivers(tmp_path / "none") == []


def test_a_transport_that_cannot_be_opened_leaves_no_descriptor(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(PathMissing):
            RegisterTransport(TctiSetting.parse(f"tis:base=0x100000,path={tmp_path}/none"), 0.0)
    assert len(os.listdir("/proc/self/fd")) == len(before)
