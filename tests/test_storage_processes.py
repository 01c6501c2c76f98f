"""Real processes on real files: killed while they commit, and a real block device."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from block_devices import loop_device
from storage_disks import FileDisk
from storage_histories import new_store, record_of, reopen, uuid_of

from storage.state_image import Family, StateImage
from storage.store import PutVtpm

HERE = Path(__file__).parent
A = uuid_of(1)

COMMIT_FOREVER = """
import sys
sys.path[:0] = [sys.argv[2], sys.argv[3]]
from pathlib import Path
from storage_disks import FileDisk
from storage_histories import record_of, reopen, uuid_of
from storage.store import PutVtpm
store = reopen(FileDisk(Path(sys.argv[1])))
generation = max([record.generation for record in store.vtpms()], default=0)
while True:
    generation += 1
    store.commit([PutVtpm(record_of(uuid_of(100 + n), uuid_of(1), generation)) for n in range(60)])
    print(generation, flush=True)
    if generation % 7 == 0:
        store.checkpoint()
"""


def test_a_killed_process_loses_no_acknowledged_commit(tmp_path: Path) -> None:
    path = tmp_path / "store.img"
    with FileDisk(path) as file:
        new_store(file, [A])
    acknowledged = 0
    for kill in range(6):
        command = [sys.executable, "-c", COMMIT_FOREVER, str(path), str(HERE), str(HERE.parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(3 + 4 * kill):
                acknowledged = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split()
        acknowledged = max([acknowledged, *map(int, rest)])
        with FileDisk(path) as file, reopen(file) as store:
            generations = {record.generation for record in store.vtpms()}
            assert len(store) == 60
            assert generations in ({acknowledged}, {acknowledged + 1})


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    with loop_device(tmp_path / "backing", 1 << 20) as made:
        yield made


def test_a_store_and_a_state_image_work_on_a_block_device(device: Path) -> None:
    with FileDisk(device) as file:
        with new_store(file, [A]) as store:
            store.commit([PutVtpm(record_of(uuid_of(100), A, 3))])
            store.commit([PutVtpm(record_of(uuid_of(200 + number), A)) for number in range(900)])
            store.commit([PutVtpm(record_of(uuid_of(2000 + number), A)) for number in range(900)])
            assert store.statistics().bytes > 64 * 4096
        with reopen(file) as store:
            assert store.get(uuid_of(100)).generation == 3
        file.pwrite(bytes(1 << 20), 0)
        image = StateImage.create(file, uuid_of(100), uuid_of(1), Family.TPM20)
        saved = image.save({"permall": bytes(200_000)}, 1)
        again = StateImage.open(file, uuid_of(100))
        assert again.load(saved.key, saved.digest, 1) == {"permall": bytes(200_000)}
        assert again.room > 400_000
