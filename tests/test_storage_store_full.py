"""A store that meets the end of its device: refused early, everything kept, and it goes on serving what is there."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from block_devices import loop_device
from storage_disks import FileDisk, MemoryDisk
from storage_histories import Model, content, new_store, record_of, reopen, uuid_of

from storage import store_format as fmt
from storage.disk import Disk
from storage.errors import StorageFull
from storage.store import PutVtpm, RemoveVtpm, Store

MIB = 1 << 20
GROUP = uuid_of(1)
BATCH = 300


def fill(store: Store, model: Model, most: int = 200_000) -> StorageFull:
    """Add vTPMs until the store refuses; return what it raised."""
    for start in range(len(model.rows), most, BATCH):
        changes = [PutVtpm(record_of(uuid_of(number), GROUP)) for number in range(start, start + BATCH)]
        try:
            store.commit(changes)
        except StorageFull as error:
            return error
        model.apply(changes)
    raise AssertionError("the device was never full")


def check_full(disk: Disk, room: int) -> None:
    """Fill the disk, which has `room` bytes in all, and check that what was acknowledged stays and is served."""
    store = new_store(disk, [GROUP])
    model = Model(*content(store))
    error = fill(store, model)
    assert "could not reserve" in str(error)
    assert disk.size() <= room
    assert content(store) == model.content()
    leaves = room // fmt.SECTOR - fmt.POOL_FIRST - store.statistics().log_units * fmt.UNIT // fmt.SECTOR
    assert len(store) > (leaves - 2 * fmt.MIN_SPARE) * fmt.ROWS_PER_LEAF - 2 * BATCH, "most of the device is used"
    known = sorted(model.rows)
    for changes in (
        [PutVtpm(record_of(uuid, GROUP, 1)) for uuid in known[: 3 * BATCH]],
        [RemoveVtpm(uuid) for uuid in known[:BATCH]],
        [PutVtpm(record_of(uuid_of(10**6 + number), GROUP)) for number in range(BATCH)],  # in the places of those
    ):
        store.commit(changes)
        model.apply(changes)
        store.checkpoint()
    fill(store, model)
    store.close()
    with reopen(disk) as again:
        assert not again.damage
        assert content(again) == model.content()


@contextmanager
def mounted(where: Path, *arguments: str) -> Iterator[Path]:
    where.mkdir()
    if subprocess.run(["mount", *arguments, str(where)], check=False, capture_output=True).returncode:
        pytest.skip("mounting needs privileges")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def test_a_full_tmpfs_is_met_early_and_nothing_is_lost(tmp_path: Path) -> None:
    with (
        mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=900k", "none") as small,
        FileDisk(small / "store") as disk,
    ):
        check_full(disk, 900 * 1024)


def test_a_full_ext4_is_met_early_and_nothing_is_lost(tmp_path: Path) -> None:
    with loop_device(tmp_path / "backing", 16 * MIB) as device:
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", str(device)], check=True)
        with mounted(tmp_path / "small", str(device)) as small, FileDisk(small / "store") as disk:
            other = small / "other"
            free = os.statvfs(small)
            size = free.f_bavail * free.f_frsize - MIB
            with other.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
            check_full(disk, MIB)


def test_a_block_device_is_used_to_its_end_and_not_beyond(tmp_path: Path) -> None:
    with loop_device(tmp_path / "backing", MIB) as device, FileDisk(device) as disk:
        check_full(disk, MIB)


def test_a_size_limit_of_the_process_is_met_early_and_nothing_is_lost(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (900 * 1024, 900 * 1024))\n"
        "from storage_disks import FileDisk; from test_storage_store_full import check_full\n"
        "with FileDisk(Path(sys.argv[1])) as disk: check_full(disk, 900 * 1024)\n"
        "print('kept')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "store")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "kept\n", "")


def test_growth_takes_less_where_an_eighth_is_not_there() -> None:
    class Device(MemoryDisk):
        def __init__(self, size: int) -> None:
            super().__init__(bytes(size), growable=False)

    sectors = 150
    disk = Device(sectors * fmt.SECTOR)
    store = new_store(disk, [GROUP], 140 * fmt.SECTOR)
    model = Model(*content(store))
    fill(store, model)
    assert sectors - BATCH // fmt.ROWS_PER_LEAF <= store.statistics().sectors <= sectors
    assert content(reopen(disk)) == model.content()
