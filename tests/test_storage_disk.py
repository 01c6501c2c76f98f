import errno
import os
from pathlib import Path

import pytest
from storage_disks import FaultyDisk, FileDisk, MemoryDisk, ShortDisk

from storage.disk import Bytes, Device, FdDisk
from storage.errors import DeviceError, StorageFull


class StuckDisk(MemoryDisk):
    def pwrite(self, _data: Bytes, _offset: int) -> int:
        return 0


def test_a_read_ends_at_the_end_of_the_file(tmp_path: Path) -> None:
    with ShortDisk(tmp_path / "f", 3) as disk:
        device = Device(disk)
        device.write(b"0123456789", 5)
        assert device.read(100, 0) == bytes(5) + b"0123456789"
        assert device.read(4, 100) == b""


def test_every_error_says_which_operation_met_it_and_keeps_the_cause(tmp_path: Path) -> None:
    with FaultyDisk(tmp_path / "f", 0, errno.EIO) as disk:
        device = Device(disk)
        with pytest.raises(DeviceError, match="could not write 4 bytes at 8: Input/output error") as caught:
            device.write(b"data", 8)
        assert caught.value.cause.errno == errno.EIO
        assert caught.value.__cause__ is caught.value.cause
        assert device.broken


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_has_its_own_error(tmp_path: Path, error: int) -> None:
    with FaultyDisk(tmp_path / "f", 0, error) as disk, pytest.raises(StorageFull):
        Device(disk).write(b"data", 0)


def test_a_device_that_takes_nothing_is_an_error_not_a_loop() -> None:
    with pytest.raises(DeviceError, match="takes no more"):
        Device(StuckDisk()).write(b"data", 0)


def test_reserving_allocates_and_a_refusal_keeps_the_size(tmp_path: Path) -> None:
    with FaultyDisk(tmp_path / "f", 1, errno.ENOSPC, only="fallocate") as disk:
        device = Device(disk)
        device.reserve(100_000)
        assert os.fstat(disk.fd).st_blocks * 512 >= 100_000
        with pytest.raises(StorageFull):
            device.reserve(1_000_000)
        assert device.size() == 100_000
        assert not device.broken


def test_a_device_of_fixed_size_is_only_measured() -> None:
    device = Device(MemoryDisk(bytes(1000), growable=False))
    device.reserve(1000)
    with pytest.raises(StorageFull, match="only 1000 bytes"):
        device.reserve(1001)


def test_a_closed_descriptor_is_a_device_error(tmp_path: Path) -> None:
    disk = FileDisk(tmp_path / "f")
    disk.close()
    device = Device(disk.fd)
    for use in (lambda: device.read(1, 0), lambda: device.write(b"x", 0), device.flush, device.size, device.settle):
        with pytest.raises(DeviceError):
            use()


def test_a_block_device_is_measured_by_its_end(tmp_path: Path) -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    try:
        assert not FdDisk(fd).growable()
        assert FdDisk(fd).size() == 0
    finally:
        os.close(fd)
